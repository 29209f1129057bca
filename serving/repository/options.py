"""How Triton schedules a model: the same choices in every layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...merge.errors import UsageError
from ..queueing.queue import FairQueue
from ..queueing.rates import Rates
from ..registry import MAX_DELAY_MS

if TYPE_CHECKING:
    from pathlib import Path

MIN_DELAY_US = 100  # microseconds; the delay that was seen to end the stalls, 0 of 2,962 requests

_OF_SERVICE = ("max_task_queued", "rate", "rates", "weights", "rows", "keep", "task_control")


@dataclass(frozen=True)
class ModelOptions:
    """What the configuration of a model says beside its tensors.

    In the layout `hot` the queue is ours, in `native` it is Triton's. With priorities, a queue limit or a
    timeout, Triton 2.51 was seen to stall so at any delay: see `docs/triton.md`.

    Attributes:
        max_delay_ms: Longest that a request waits for company, in milliseconds; in `native` never below
            `MIN_DELAY_US`, because with zero Triton 2.51 now and then leaves a lone request in its queue
            for half a second (a stall).
        preferred_batches: Rows of a batch that does not wait any longer.
        priority_levels: Levels that clients may ask for, 1 the most urgent; a request that asks for none
            has the last. 0: all are equal; in `hot`, the three of `FairQueue`.
        max_queued: Requests that may wait, of each priority; more are refused. 0: any number. In `hot` it counts
            rows of all requests, and 0 is the batcher's own limit.
        timeout_ms: Longest that a request waits before it is refused, in milliseconds; a client may
            ask for less. 0: any time.
        instances: Engines per processor; each holds a backbone of its own.
        gpus: The GPUs that have engines, when the device is CUDA.
        keep_versions: How many of the newest versions are served.
        cache: Answer a repeated request from Triton's response cache.
        resources: Name and count of what an execution takes from Triton's rate limiter.
        warmup: Run a row of zeros before the model is ready.
        max_task_queued: Rows of one task that may wait. 0: any number. This and what follows is `hot`'s alone.
        rate: See `Batcher`.
        rates: Rows per second by task; see `Batcher`.
        weights: A task's share of a busy engine, 1 where it is not named.
        rows: See `Service.open`.
        keep: See `Service.open`.
        task_control: Whether clients may add, change and remove tasks.
        sockets: Folder of the sockets between the models; None for one in the system's temporary folder.
        in_place: Leave the bundle where it is, for a repository that is served on this machine and thrown away.
    """

    max_delay_ms: float = MAX_DELAY_MS
    preferred_batches: tuple[int, ...] = ()
    priority_levels: int = 0
    max_queued: int = 0
    timeout_ms: float = 0
    instances: int = 1
    gpus: tuple[int, ...] = (0,)
    keep_versions: int = 1
    cache: bool = False
    resources: tuple[tuple[str, int], ...] = ()
    warmup: bool = False
    max_task_queued: int = 0
    rate: float | None = None
    rates: tuple[tuple[str, float], ...] = ()
    weights: tuple[tuple[str, float], ...] = ()
    rows: int | None = None
    keep: Path | None = None
    task_control: bool = False
    sockets: Path | None = None
    in_place: bool = False

    def check(self, max_batch: int) -> None:
        """Refuse what Triton would refuse, or would take for something else.

        Raises:
            UsageError: A number is out of range.
        """
        for name, low in (
            ("max_delay_ms", 0), ("priority_levels", 0), ("max_queued", 0), ("timeout_ms", 0),
            ("instances", 1), ("keep_versions", 1), ("max_task_queued", 0),
        ):  # fmt: skip
            if (found := getattr(self, name)) < low:
                raise UsageError(
                    "a setting of the model is out of range",
                    where=name,
                    wanted=f"at least {low}",
                    found=found,
                )
        for size in self.preferred_batches:
            if not 1 <= size <= max_batch:
                raise UsageError(
                    "a preferred batch is larger than the engine takes"
                    if size > 0
                    else "a preferred batch has no rows",
                    wanted=f"1 to {max_batch} rows",
                    found=size,
                )
        wrong = [name for name, count in self.resources if not name or count < 1]
        if wrong or len({name for name, _ in self.resources}) != len(self.resources):
            raise UsageError(
                "a resource of the rate limiter cannot be read",
                wanted="names, each once, with counts of at least 1",
                found=", ".join(f"{name}={count}" for name, count in self.resources),
            )
        if not self.gpus or min(self.gpus) < 0 or len(set(self.gpus)) != len(self.gpus):
            raise UsageError(
                "the GPUs cannot be read", wanted="numbers from 0, each once", found=self.gpus
            )

    def require_no_service(self) -> None:
        """Refuse what needs our service, where Triton runs the engine itself.

        Raises:
            UsageError: Something is set.
        """
        given = [name for name in _OF_SERVICE if getattr(self, name)]
        if given:
            raise UsageError(
                "the layout `native` has no code of ours that could do this",
                wanted="the layout `hot`",
                found=", ".join(given),
            )

    def require_no_scheduler(self) -> None:
        """Refuse what Triton's scheduler would do to nothing, where our service has the queue.

        Raises:
            UsageError: Something is set.
        """
        for given, why in (
            (self.preferred_batches, "preferred batches: it makes batches of what waits"),
            (self.resources, "resources: Triton gives them back before the engine is called"),
        ):
            if given:
                raise UsageError(
                    "the layout `hot` has a queue of its own, of which Triton knows nothing",
                    wanted="the layout `native`",
                    found=why,
                    do="leave the option out",
                )
        if self.task_control and (self.instances > 1 or self.cache):
            raise UsageError(
                "tasks cannot change while they are served from several places",
                found="a response cache" if self.cache else f"{self.instances} instances",
                do="leave --task-control out, or serve with one instance and without --cache",
            )

    def queueing(self) -> dict[str, Any]:
        """The same as settings of our `Batcher`.

        Raises:
            UsageError: A weight or a rate is not a positive number.
        """
        settings: dict[str, Any] = {
            "max_delay_ms": self.max_delay_ms,
            "max_queued_rows": self.max_queued or None,
            "max_task_rows": self.max_task_queued or None,
            "default_timeout_ms": self.timeout_ms or None,
            "rate": self.rate,
            "rates": dict(self.rates),
            "weights": dict(self.weights),
        }
        if self.priority_levels:
            settings |= {
                "priority_levels": self.priority_levels,
                "default_priority": self.priority_levels,
            }
        # refuse now what the model would refuse at its start
        FairQueue(weights=settings["weights"])
        Rates(settings["rate"], settings["rates"], least_burst=1)
        return settings

    def batching(self) -> dict[str, Any]:
        """Triton's `dynamic_batching`."""
        policy: dict[str, Any] = {}
        if self.max_queued:
            policy["max_queue_size"] = self.max_queued
        if self.timeout_ms:
            policy["timeout_action"] = "REJECT"
            policy["default_timeout_microseconds"] = round(self.timeout_ms * 1e3)
            policy["allow_timeout_override"] = True
        fields: dict[str, Any] = {
            "max_queue_delay_microseconds": max(MIN_DELAY_US, round(self.max_delay_ms * 1e3))
        }
        if self.preferred_batches:
            fields["preferred_batch_size"] = sorted(set(self.preferred_batches))
        if self.priority_levels:
            fields["priority_levels"] = self.priority_levels
            fields["default_priority_level"] = self.priority_levels
        if policy:
            fields["default_queue_policy"] = policy
        return fields

    def instance_group(self, *, on_gpu: bool) -> list[dict[str, Any]]:
        """Triton's `instance_group`.

        Without the number of a GPU there would be an instance on each.
        """
        group: dict[str, Any] = {"kind": "KIND_CPU", "count": self.instances}
        if on_gpu:
            group |= {"kind": "KIND_GPU", "gpus": list(self.gpus)}
        if self.resources:
            group["rate_limiter"] = {
                "resources": [{"name": name, "count": count} for name, count in self.resources]
            }
        return [group]
