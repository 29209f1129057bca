"""What the service has done since it opened: requests, rows, engine calls and their times, by task.

Every request passes here, so counting is a lock and a few additions of plain integers; sums and
histograms are put in order when somebody reads. Only tasks that were made known are counted by name: a
name that a client made up never becomes a series.
"""

from __future__ import annotations

import asyncio
import threading
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from ..rejections import Cancelled, EngineFailed, Expired, InvalidRequest, Overloaded, Stopping

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

REJECTED, CANCELED, BACKEND, OTHER = REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
"""Why a request was not answered, in Triton's words: by the queue, by its caller, by the engine, else."""

_MS = 1_000_000
REQUEST_BOUNDS_NS = tuple(
    int(ms * _MS)
    for ms in (0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000)
)
BATCH_BOUNDS = tuple(2**power for power in range(11))


@dataclass(frozen=True)
class Histogram:
    """One reading of a distribution of integers.

    Attributes:
        bounds: Upper bounds, each within its bucket.
        counts: Values up to each bound, and last of all values; each holds those before it.
        total: The sum of the values.
    """

    bounds: Sequence[int]
    counts: Sequence[int]
    total: int = 0


@dataclass(frozen=True)
class TaskTotals:
    """What was done for one task; a request of several tasks counts for each of them.

    Attributes:
        rows: Rows answered.
        answered: Requests answered.
        refused: Requests that were not let through, or not in time.
        failed: Requests that the engine, or a mistake of the server's, left without an answer.
        request_ns: From arrival to answer, summed over answered requests.
    """

    rows: int = 0
    answered: int = 0
    refused: int = 0
    failed: int = 0
    request_ns: int = 0


@dataclass(frozen=True)
class Totals:
    """One reading of the counters. Times are cumulative nanoseconds.

    Attributes:
        answered: Requests answered.
        failed: Requests refused, failed or cancelled.
        failures: The same by reason, all of `REASONS`.
        rows: Rows answered.
        batches: Engine calls.
        request_ns: From arrival to answer, summed over answered requests.
        failed_ns: From arrival to refusal, summed over failed requests.
        queue_ns: From arrival to the engine call, summed over answered requests.
        input_ns: Time to join the inputs of the call that a request was part of, summed likewise.
        engine_ns: Time of that engine call.
        output_ns: Time to take its answers apart.
        last_ms: Unix time in milliseconds of the last answer; 0 before the first.
        tasks: What was done by task name; where every task answers every row, a row counts for each.
        request_time: Answered requests by their time in nanoseconds.
        batch_rows: Engine calls by their rows.
        batch_tasks: Engine calls by how many tasks shared them.
    """

    answered: int
    failed: int
    failures: Mapping[str, int]
    rows: int
    batches: int
    request_ns: int
    failed_ns: int
    queue_ns: int
    input_ns: int
    engine_ns: int
    output_ns: int
    last_ms: int
    request_time: Histogram
    batch_rows: Histogram
    batch_tasks: Histogram
    tasks: Mapping[str, TaskTotals] = field(default_factory=dict)

    @property
    def rows_by_task(self) -> dict[str, int]:
        """Rows answered by task name."""
        return {name: task.rows for name, task in self.tasks.items()}


class Counters:
    """Counters that several threads may write to."""

    def __init__(self, tasks: Iterable[str]) -> None:
        """Start at zero for every task, so that an idle task shows as 0 rather than not at all."""
        self._lock = threading.Lock()
        self._tasks = {task: _Task() for task in tasks}
        self._failures: dict[str, int] = dict.fromkeys(REASONS, 0)
        self._rows = 0
        self._failed_ns = 0
        self._queue_ns = 0
        self._input_ns = 0
        self._engine_ns = 0
        self._output_ns = 0
        self._last_ms = 0
        self._request_time = _Distribution(REQUEST_BOUNDS_NS)
        self._batch_rows = _Distribution(BATCH_BOUNDS)
        self._batch_tasks = _Distribution(BATCH_BOUNDS)

    def know(self, task: str) -> None:
        """Count a task by its name from now on."""
        with self._lock:
            self._tasks.setdefault(task, _Task())

    def forget(self, task: str) -> None:
        """Drop what was counted for a task; what of it is still under way counts for the model only."""
        with self._lock:
            self._tasks.pop(task, None)

    def batch(self, rows: int, tasks: int) -> None:
        """Count one engine call of so many rows, shared by so many tasks."""
        with self._lock:
            self._batch_rows.add(rows)
            self._batch_tasks.add(tasks)

    def answer(
        self,
        rows: int,
        tasks: Iterable[str],
        *,
        request_ns: int,
        queue_ns: int,
        engine_ns: int,
        input_ns: int = 0,
        output_ns: int = 0,
    ) -> None:
        """Count one answered request of so many rows by the task of each of its answers."""
        by_task: dict[str, int] = {}
        for name in tasks:
            by_task[name] = by_task.get(name, 0) + 1
        now = time.time_ns() // _MS
        with self._lock:
            self._rows += rows
            self._queue_ns += queue_ns
            self._input_ns += input_ns
            self._engine_ns += engine_ns
            self._output_ns += output_ns
            self._last_ms = now
            self._request_time.add(request_ns)
            for name, more in by_task.items():
                task = self._tasks.get(name)
                if task is not None:
                    task.rows += more
                    task.answered += 1
                    task.request_ns += request_ns

    def failure(self, error: BaseException, failed_ns: int = 0, tasks: Iterable[str] = ()) -> None:
        """Count one request that was refused, failed or cancelled.

        Args:
            error: Why; its type decides where it counts.
            failed_ns: From arrival to now.
            tasks: What it asked for, as far as that is known. A cancelled request counts for none: its
                caller left, which says nothing about the task.
        """
        reason = reason_of(error)
        refused = reason == REJECTED or isinstance(error, InvalidRequest)
        with self._lock:
            self._failures[reason] += 1
            self._failed_ns += failed_ns
            if reason == CANCELED:
                return
            for name in set(tasks):
                task = self._tasks.get(name)
                if task is None:
                    continue
                if refused:
                    task.refused += 1
                else:
                    task.failed += 1

    def read(self) -> Totals:
        """The counters at this moment."""
        with self._lock:
            request_time = self._request_time.read()
            batch_rows = self._batch_rows.read()
            return Totals(
                answered=request_time.counts[-1],
                failed=sum(self._failures.values()),
                failures=dict(self._failures),
                rows=self._rows,
                batches=batch_rows.counts[-1],
                request_ns=request_time.total,
                failed_ns=self._failed_ns,
                queue_ns=self._queue_ns,
                input_ns=self._input_ns,
                engine_ns=self._engine_ns,
                output_ns=self._output_ns,
                last_ms=self._last_ms,
                request_time=request_time,
                batch_rows=batch_rows,
                batch_tasks=self._batch_tasks.read(),
                tasks={name: task.read() for name, task in self._tasks.items()},
            )


def reason_of(error: BaseException) -> str:
    """Which of `REASONS` an error is."""
    if isinstance(error, (asyncio.CancelledError, Cancelled)):
        return CANCELED
    if isinstance(error, (Overloaded, Expired, Stopping)):
        return REJECTED
    return BACKEND if isinstance(error, EngineFailed) else OTHER


class _Task:
    """A task's numbers while they grow."""

    __slots__ = ("answered", "failed", "refused", "request_ns", "rows")

    def __init__(self) -> None:
        self.rows = self.answered = self.refused = self.failed = self.request_ns = 0

    def read(self) -> TaskTotals:
        return TaskTotals(self.rows, self.answered, self.refused, self.failed, self.request_ns)


class _Distribution:
    """A histogram while it grows: each value in one bucket."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[int]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0

    def add(self, value: int) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def read(self) -> Histogram:
        return Histogram(self.bounds, tuple(accumulate(self.counts)), self.total)
