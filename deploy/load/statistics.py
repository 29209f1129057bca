"""What the server counted itself: the difference of its statistics over a step.

The statistics extension of the protocol counts for as long as the model is loaded. Times are sums over requests:
each waits in the queue, and has the time of the call that it shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

PARTS = ("queue", "compute_input", "compute_infer", "compute_output")


@dataclass(frozen=True)
class Spent:
    """Time over many requests.

    Attributes:
        count: Requests.
        ns: Their time together, in nanoseconds.
    """

    count: int
    ns: int

    @property
    def mean_ns(self) -> int:
        """Of one request, in whole nanoseconds; 0 without any."""
        return self.ns // self.count if self.count else 0


@dataclass(frozen=True)
class ServerCounts:
    """What a server did for a model in a step.

    Attributes:
        inference_count: Rows that were answered.
        execution_count: Calls of the engine.
        success: Requests that were answered, and their time in the server.
        fail: Requests that were not.
        queue: Waiting for a batch.
        compute_input: Putting inputs together.
        compute_infer: In the engine.
        compute_output: Taking outputs apart.
        mean_batch: Rows per call of the engine; None without a call.
    """

    inference_count: int
    execution_count: int
    success: Spent
    fail: Spent
    queue: Spent
    compute_input: Spent
    compute_infer: Spent
    compute_output: Spent
    mean_batch: float | None


def difference(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
) -> ServerCounts | None:
    """What was counted in between.

    Args:
        before: An entry of `model_stats`; numbers may be text, as in the JSON of protobuf.
        after: The same later.

    Returns:
        None where one is missing, or where counting began anew.
    """
    if before is None or after is None:
        return None

    def count(name: str) -> int:
        return int(after.get(name, 0)) - int(before.get(name, 0))

    def spent(name: str) -> Spent:
        old = before.get("inference_stats", {}).get(name, {})
        new = after.get("inference_stats", {}).get(name, {})
        return Spent(*(int(new.get(key, 0)) - int(old.get(key, 0)) for key in ("count", "ns")))

    rows, calls = count("inference_count"), count("execution_count")
    times = {name: spent(name) for name in ("success", "fail", *PARTS)}
    if min(rows, calls, times["success"].count) < 0:
        return None
    return ServerCounts(rows, calls, **times, mean_batch=rows / calls if calls else None)
