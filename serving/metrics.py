"""The counters as Prometheus reads them; the text is written by Prometheus' own client library.

Nothing is counted here and nothing is kept: a collector reads the counters when it is asked. Families that
Triton has bear Triton's names, so that its dashboards and autoscaling rules find them; what is by task, and
distributions, are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from .protocol import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from .batcher import Batcher
    from .counters import Counters, Histogram
    from .service import Service

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


def exposition(models: Sequence[Model], accept: str = "") -> tuple[bytes, str]:
    """The metrics of all models as text.

    Args:
        models: What is served, under different names.
        accept: The request's `Accept` header: OpenMetrics where it is asked for, else Prometheus' own text.

    Returns:
        The body and its content type.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(models))
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is none: the library stumbles over it
        encode, content_type = choose_encoder("")
    body = encode(registry)
    if content_type.startswith("text/plain"):
        body = body.replace(b" untyped\n", b" counter\n")  # see `_begin`; labels hold no line's end
    return body, content_type


class _Collector(Collector):
    """Reads the models once per scrape."""

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """Every family that has a series."""
        families = {name: _begin(name, family) for name, family in METRICS.items()}
        for model in self._models:
            _add_model(families, model)
            if model.bank is not None:
                _add_bank(families, model.name, model.bank())
        return (metric for metric in families.values() if metric.samples)


def _begin(name: str, family: Family) -> Metric:
    """The family without series.

    A counter of OpenMetrics must end in `_total`, and the library appends that to its name. Triton's
    counters do not, and keep their name only as `unknown`, which is what they are in OpenMetrics.
    """
    if family.kind == COUNTER and not name.endswith("_total"):
        return Metric(name, family.text, "unknown")
    return Metric(name.removesuffix("_total"), family.text, family.kind)


def _add_model(families: Mapping[str, Metric], model: Model) -> None:
    totals = model.counters.read()
    of_model = {"model": model.name}
    as_triton = {"model": model.name, "version": VERSION}
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
        families[name].add_sample(name, as_triton, value)
    name = "nv_inference_request_failure"
    for reason, count in totals.failures.items():
        families[name].add_sample(name, {**as_triton, "reason": reason}, count)
    name = "utune_queue_rows"
    families[name].add_sample(name, of_model, model.queued_rows())
    _add_histogram(families, "utune_request_seconds", of_model, totals.request_time, 1e9)
    _add_histogram(families, "utune_batch_rows", of_model, totals.batch_rows)
    _add_histogram(families, "utune_batch_tasks", of_model, totals.batch_tasks)
    for task, done in totals.tasks.items():
        of_task = {"model": model.name, "task": task}
        name = "utune_task_rows_total"
        families[name].add_sample(name, of_task, done.rows)
        name = "utune_task_requests_total"
        for outcome in ("answered", "refused", "failed"):
            labels = {**of_task, "outcome": outcome}
            families[name].add_sample(name, labels, getattr(done, outcome))
        name = "utune_task_request_seconds"
        families[name].add_sample(f"{name}_count", of_task, done.answered)
        families[name].add_sample(f"{name}_sum", of_task, done.request_ns / 1e9)


def _add_bank(families: Mapping[str, Metric], model: str, bank: BankFacts) -> None:
    of_model = {"model": model}
    for name, value in {
        "utune_bank_bytes": bank.bytes,
        "utune_tasks": bank.tasks,
        "utune_task_loads_total": bank.loads,
        "utune_task_evictions_total": bank.evictions,
    }.items():
        families[name].add_sample(name, of_model, value)
    name = "utune_bank_rows"
    for state, rows in (("used", bank.used_rows), ("free", bank.free_rows)):
        families[name].add_sample(name, {**of_model, "state": state}, rows)
    name = "utune_task_changes_total"
    for action, count in bank.changes.items():
        families[name].add_sample(name, {**of_model, "action": action}, count)


def _add_histogram(
    families: Mapping[str, Metric],
    name: str,
    labels: dict[str, str],
    histogram: Histogram,
    unit: float = 1,
) -> None:
    """Add a distribution's series; `unit` is how many of its integers make one of the metric's."""
    metric = families[name]
    bounds = [*(floatToGoString(bound / unit) for bound in histogram.bounds), "+Inf"]
    for bound, count in zip(bounds, histogram.counts, strict=True):
        metric.add_sample(f"{name}_bucket", {**labels, "le": bound}, count)
    metric.add_sample(f"{name}_count", labels, histogram.counts[-1])
    metric.add_sample(f"{name}_sum", labels, histogram.total / unit)
