"""How many rows of a task are taken per second: the generic cell rate algorithm (ITU-T I.371), a clock per task.

Each row moves its task's clock on by the time that a row is worth; a request is taken while the clock is not further
ahead of now than a burst is worth. So an idle task may send a burst at once, and then as much as its rate. What is
refused for another reason costs nothing.

Times are integers of nanoseconds. Not safe to call from several threads.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from ...merge.errors import UsageError
from ..rejections import Overloaded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SECOND = 1_000_000_000
BURST_SECONDS = 1.0


class Rates:
    """Limits of rows per second."""

    def __init__(
        self, every: float | None, rates: Mapping[str, float] | None, *, least_burst: int
    ) -> None:
        """Set the limits.

        Args:
            every: Rows per second of each task that `rates` does not name; None for no limit.
            rates: Rows per second by task.
            least_burst: Rows that a task may always send at once, however low its rate.

        Raises:
            UsageError: A rate is not a positive number.
        """
        self._every, self._rates = every, dict(rates or {})
        self._least_burst = least_burst
        self._clocks: dict[str, int] = {}
        named = {f"task {task}": rate for task, rate in self._rates.items()}
        for whose, rate in {**named, **({} if every is None else {"every task": every})}.items():
            if not (math.isfinite(rate) and rate > 0):
                raise UsageError(
                    "a rate is not a positive number",
                    where=whose,
                    wanted="rows per second",
                    found=rate,
                )

    def check(self, tasks: Sequence[str], now: int) -> None:
        """Refuse a request that comes too early.

        Args:
            tasks: The task of each of its answers.
            now: The time.

        Raises:
            Overloaded: One of its tasks has used up its rate.
        """
        for task, rows in Counter(tasks).items():
            if (rate := self._rate(task)) is None:
                continue
            each = SECOND / rate
            burst = max(self._least_burst, BURST_SECONDS * rate)
            early = self._clock(task, now) + (rows - burst) * each - now
            if early > 0:
                raise Overloaded(
                    "the task has used up its rate",
                    where=f"task {task}",
                    wanted=f"at most {rate:g} rows per second",
                    found=f"{rows} rows {early / SECOND:.3f} s too early",
                    do="try again later",
                )

    def count(self, tasks: Sequence[str], now: int) -> None:
        """A request was taken."""
        for task, rows in Counter(tasks).items():
            if (rate := self._rate(task)) is not None:
                self._clocks[task] = self._clock(task, now) + round(rows * SECOND / rate)

    def _rate(self, task: str) -> float | None:
        return self._rates.get(task, self._every)

    def _clock(self, task: str, now: int) -> int:
        """Up to when its rows are paid for; never in the past."""
        return max(now, self._clocks.get(task, now))
