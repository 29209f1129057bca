"""How much longer a benchmark takes, from how far it is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .case import Case
    from .measure import Progress


def weight(case: Case, subjects: int) -> float:
    """About how long a case takes beside another: in proportion to its rows and to what runs in a round."""
    return case.batch * subjects


class Pace:
    """Time left, taking what is still to do to run as fast as what is done.

    Args:
        weights: See `weight`, one for each case in the order in which they run.
        clock: Seconds that only go up.
    """

    def __init__(
        self, weights: Sequence[float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.weights, self.clock = weights, clock
        self.began = clock()

    def seconds_left(self, number: int, fraction: float) -> float | None:
        """Seconds from now; None before anything is done.

        Args:
            number: The case that runs, from 1.
            fraction: How much of it is done.
        """
        done = sum(self.weights[: number - 1]) + self.weights[number - 1] * fraction
        if done <= 0:
            return None
        return (self.clock() - self.began) * (sum(self.weights) - done) / done

    def line(self, now: Progress) -> str:
        """The progress and the time left."""
        left = self.seconds_left(now.number, now.fraction)
        return str(now) if left is None else f"{now}, about {duration(left)} left"


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `1 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
