"""The counters as series: families by name, and what each series is at this moment.

Nothing is counted here and nothing is kept. Families that Triton has bear Triton's names, so that its dashboards
and autoscaling rules find them; what is by task, and distributions, are ours. `metrics.py` writes
them down for Prometheus; `triton/metrics.py` hands them to Triton, which does so itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from ..protocol import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ..queueing.batcher import Batcher
    from ..service import Service
    from .counters import Counters, Histogram, Totals

COUNTER, GAUGE, HISTOGRAM, SUMMARY = "counter", "gauge", "histogram", "summary"


@dataclass(frozen=True)
class Family:
    """What a metric says.

    Attributes:
        kind: Prometheus' type of it.
        labels: What its series differ by.
        text: One line of help.
    """

    kind: str
    labels: tuple[str, ...]
    text: str


_TRITON = ("model", "version")
_MODEL = ("model",)
_TASK = ("model", "task")

METRICS: Mapping[str, Family] = {
    "nv_inference_request_success": Family(COUNTER, _TRITON, "Requests answered"),
    "nv_inference_request_failure": Family(
        COUNTER, (*_TRITON, "reason"), "Requests not answered, by reason"
    ),
    "nv_inference_count": Family(COUNTER, _TRITON, "Rows answered"),
    "nv_inference_exec_count": Family(COUNTER, _TRITON, "Engine calls"),
    "nv_inference_request_duration_us": Family(
        COUNTER, _TRITON, "Time from arrival to answer, summed over answered requests"
    ),
    "nv_inference_queue_duration_us": Family(
        COUNTER, _TRITON, "Time from arrival to the engine call, summed over answered requests"
    ),
    "nv_inference_compute_input_duration_us": Family(
        COUNTER, _TRITON, "Time to join the inputs of a request's engine call, summed likewise"
    ),
    "nv_inference_compute_infer_duration_us": Family(
        COUNTER, _TRITON, "Time of a request's engine call, summed likewise"
    ),
    "nv_inference_compute_output_duration_us": Family(
        COUNTER, _TRITON, "Time to take the answers of the call apart, summed likewise"
    ),
    "nv_inference_pending_request_count": Family(
        GAUGE, _TRITON, "Requests that wait for an engine call"
    ),
    "utune_task_rows_total": Family(COUNTER, _TASK, "Rows answered by task"),
    "utune_task_requests_total": Family(
        COUNTER, (*_TASK, "outcome"), "Requests by task, each counted for every task that it names"
    ),
    "utune_task_request_seconds": Family(
        SUMMARY, _TASK, "Time from arrival to answer of answered requests by task"
    ),
    "utune_request_seconds": Family(
        HISTOGRAM, _MODEL, "Time from arrival to answer of answered requests"
    ),
    "utune_batch_rows": Family(HISTOGRAM, _MODEL, "Rows of an engine call"),
    "utune_batch_tasks": Family(HISTOGRAM, _MODEL, "Tasks that shared an engine call"),
    "utune_queue_rows": Family(GAUGE, _MODEL, "Rows that wait for an engine call"),
    "utune_bank_rows": Family(GAUGE, (*_MODEL, "state"), "Rows of the bank, used and free"),
    "utune_bank_bytes": Family(GAUGE, _MODEL, "Memory of the bank"),
    "utune_tasks": Family(GAUGE, _MODEL, "Tasks that can be asked for"),
    "utune_task_loads_total": Family(COUNTER, _MODEL, "Tasks brought into the bank"),
    "utune_task_evictions_total": Family(
        COUNTER, _MODEL, "Tasks that left the bank to make room for others"
    ),
    "utune_task_changes_total": Family(
        COUNTER, (*_MODEL, "action"), "Changes to the set of tasks, by what was done"
    ),
}
"""Every family by the name that a query uses; histograms and summaries by the name before the suffix."""

LATE: Mapping[str, Family] = {
    "utune_queue_seconds_total": Family(
        COUNTER, _MODEL, "Time from arrival to the engine call, summed over answered requests"
    ),
    "utune_engine_seconds_total": Family(
        COUNTER, _MODEL, "Time of a request's engine call, summed likewise"
    ),
}
"""What Triton's own durations say elsewhere: there they end before the engine is called."""

SUFFIXES: Mapping[str, tuple[str, ...]] = {
    COUNTER: ("",),
    GAUGE: ("",),
    HISTOGRAM: ("_bucket", "_sum", "_count"),
    SUMMARY: ("_sum", "_count"),
}
"""What stands behind a family's name in its series, by kind."""


@dataclass(frozen=True)
class BankFacts:
    """A bank at this moment.

    Attributes:
        used_rows: Rows that hold a task.
        free_rows: Rows that hold none.
        bytes: Its memory.
        tasks: Tasks that can be asked for, in the bank or not.
        loads: Tasks brought into it so far.
        evictions: Tasks that left it so far to make room.
        changes: How often tasks were changed so far, by what was done.
    """

    used_rows: int
    free_rows: int
    bytes: int
    tasks: int
    loads: int
    evictions: int
    changes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A served model as the collector sees it.

    Attributes:
        name: Its name.
        counters: What it did.
        queued_requests: How many requests wait.
        queued_rows: How many rows they have.
        bank: The state of its bank; None where there is nothing to say.
    """

    name: str
    counters: Counters
    queued_requests: Callable[[], int]
    queued_rows: Callable[[], int]
    bank: Callable[[], BankFacts] | None = None

    @classmethod
    def of(cls, batcher: Batcher, bank: Callable[[], BankFacts] | None = None) -> Model:
        """The model that a batcher serves; the state of its bank is read from the service unless it is given."""
        service = batcher.service
        if bank is None and service.resident is not None:
            bank = partial(bank_facts, service)
        return cls(
            name=batcher.service.registry.name,
            counters=batcher.service.counters,
            queued_requests=lambda: batcher.queued_requests,
            queued_rows=lambda: batcher.queued_rows,
            bank=bank,
        )


def bank_facts(service: Service) -> BankFacts:
    """The state of the bank of a service that has rows of its own."""
    resident, tasks = service.resident, service.tasks
    assert resident is not None
    used = resident.used
    return BankFacts(
        used_rows=used,
        free_rows=resident.rows - used,
        bytes=used * resident.row_bytes,
        tasks=len(service.registry.versions),
        loads=resident.loads,
        evictions=resident.evictions,
        changes=dict(tasks.changes) if tasks is not None else {},
    )


class Sample(NamedTuple):
    """One series at this moment.

    Attributes:
        family: A key of `METRICS` or `LATE`.
        name: The family's name, with a suffix where its kind has some.
        labels: What tells it from the family's others.
        value: A number; of histograms and summaries seconds, rows or tasks.
    """

    family: str
    name: str
    labels: dict[str, str]
    value: float


def samples(model: Model) -> Iterator[Sample]:
    """All of a model's series in the families of `METRICS`."""
    totals = model.counters.read()
    yield from _as_triton(model, totals)
    of_model = {"model": model.name}
    yield Sample("utune_queue_rows", "utune_queue_rows", of_model, model.queued_rows())
    yield from _histogram("utune_request_seconds", of_model, totals.request_time, 1e9)
    yield from _histogram("utune_batch_rows", of_model, totals.batch_rows)
    yield from _histogram("utune_batch_tasks", of_model, totals.batch_tasks)
    for task, done in totals.tasks.items():
        of_task = {"model": model.name, "task": task}
        yield Sample("utune_task_rows_total", "utune_task_rows_total", of_task, done.rows)
        name = "utune_task_requests_total"
        for outcome in ("answered", "refused", "failed"):
            yield Sample(name, name, {**of_task, "outcome": outcome}, getattr(done, outcome))
        name = "utune_task_request_seconds"
        yield Sample(name, f"{name}_count", of_task, done.answered)
        yield Sample(name, f"{name}_sum", of_task, done.request_ns / 1e9)
    if model.bank is not None:
        yield from _bank(model.name, model.bank())


def late_samples(model: Model) -> Iterator[Sample]:
    """A model's series in the families of `LATE`."""
    totals = model.counters.read()
    for name, nanoseconds in {
        "utune_queue_seconds_total": totals.queue_ns,
        "utune_engine_seconds_total": totals.engine_ns,
    }.items():
        yield Sample(name, name, {"model": model.name}, nanoseconds / 1e9)


def _as_triton(model: Model, totals: Totals) -> Iterator[Sample]:
    """The families that Triton has."""
    labels = {"model": model.name, "version": VERSION}
    for name, value in {
        "nv_inference_request_success": totals.answered,
        "nv_inference_count": totals.rows,
        "nv_inference_exec_count": totals.batches,
        "nv_inference_request_duration_us": totals.request_ns // 1000,
        "nv_inference_queue_duration_us": totals.queue_ns // 1000,
        "nv_inference_compute_input_duration_us": totals.input_ns // 1000,
        "nv_inference_compute_infer_duration_us": totals.engine_ns // 1000,
        "nv_inference_compute_output_duration_us": totals.output_ns // 1000,
        "nv_inference_pending_request_count": model.queued_requests(),
    }.items():
        yield Sample(name, name, labels, value)
    name = "nv_inference_request_failure"
    for reason, count in totals.failures.items():
        yield Sample(name, name, {**labels, "reason": reason}, count)


def _bank(model: str, bank: BankFacts) -> Iterator[Sample]:
    of_model = {"model": model}
    for name, value in {
        "utune_bank_bytes": bank.bytes,
        "utune_tasks": bank.tasks,
        "utune_task_loads_total": bank.loads,
        "utune_task_evictions_total": bank.evictions,
    }.items():
        yield Sample(name, name, of_model, value)
    name = "utune_bank_rows"
    for state, rows in (("used", bank.used_rows), ("free", bank.free_rows)):
        yield Sample(name, name, {**of_model, "state": state}, rows)
    name = "utune_task_changes_total"
    for action, count in bank.changes.items():
        yield Sample(name, name, {**of_model, "action": action}, count)


def _histogram(
    name: str, labels: dict[str, str], histogram: Histogram, unit: float = 1
) -> Iterator[Sample]:
    """A distribution's series; `unit` is how many of its integers make one of the metric's."""
    bounds = [
        *(repr(bound / unit) for bound in histogram.bounds),
        "+Inf",
    ]  # as Prometheus' Go writes
    for bound, count in zip(bounds, histogram.counts, strict=True):
        yield Sample(name, f"{name}_bucket", {**labels, "le": bound}, count)
    yield Sample(name, f"{name}_count", labels, histogram.counts[-1])
    yield Sample(name, f"{name}_sum", labels, histogram.total / unit)
