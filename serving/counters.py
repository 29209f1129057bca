"""What the service has done since it opened: requests, rows, engine batches and their times."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True)
class Totals:
    """One reading of the counters. Times are cumulative nanoseconds.

    Attributes:
        answered: Requests answered.
        failed: Requests refused or failed.
        rows: Rows answered.
        batches: Engine calls.
        request_ns: From arrival to answer, summed over answered requests.
        failed_ns: From arrival to refusal, summed over failed requests.
        queue_ns: From arrival to the engine call, summed over answered requests.
        engine_ns: Time of the engine call that a request was part of, summed over answered requests.
        last_ms: Unix time in milliseconds of the last answer; 0 before the first.
        rows_by_task: Rows answered by task name; where every task answers every row, a row counts for each.
    """

    answered: int = 0
    failed: int = 0
    rows: int = 0
    batches: int = 0
    request_ns: int = 0
    failed_ns: int = 0
    queue_ns: int = 0
    engine_ns: int = 0
    last_ms: int = 0
    rows_by_task: Mapping[str, int] = field(default_factory=dict)


class Counters:
    """Counters that several threads may write to."""

    def __init__(self, tasks: Iterable[str]) -> None:
        """Start at zero for every task, so that an idle task shows as 0 rather than not at all."""
        self._lock = threading.Lock()
        self._totals = Totals()
        self._rows_by_task: Counter[str] = Counter(dict.fromkeys(tasks, 0))

    def batch(self) -> None:
        """Count one engine call."""
        with self._lock:
            self._totals = replace(self._totals, batches=self._totals.batches + 1)

    def answer(
        self, rows: int, tasks: Iterable[str], *, request_ns: int, queue_ns: int, engine_ns: int
    ) -> None:
        """Count one answered request of so many rows by the task of each of its answers."""
        by_task = Counter(tasks)
        with self._lock:
            old = self._totals
            self._rows_by_task.update(by_task)
            self._totals = replace(
                old,
                answered=old.answered + 1,
                rows=old.rows + rows,
                request_ns=old.request_ns + request_ns,
                queue_ns=old.queue_ns + queue_ns,
                engine_ns=old.engine_ns + engine_ns,
                last_ms=time.time_ns() // 1_000_000,
            )

    def forget(self, task: str) -> None:
        """Show a removed task no longer."""
        with self._lock:
            self._rows_by_task.pop(task, None)

    def failure(self, failed_ns: int = 0) -> None:
        """Count one request that was refused or failed."""
        with self._lock:
            old = self._totals
            self._totals = replace(old, failed=old.failed + 1, failed_ns=old.failed_ns + failed_ns)

    def read(self) -> Totals:
        """The counters at this moment."""
        with self._lock:
            return replace(self._totals, rows_by_task=dict(self._rows_by_task))
