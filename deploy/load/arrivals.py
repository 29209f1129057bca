"""When requests of an open loop are due.

Independent users make a Poisson process: the times between arrivals are exponential with mean 1 / rate (W. Feller, An
Introduction to Probability Theory and Its Applications, volume 2, chapter I.4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .step import CONSTANT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .step import Step

NS_PER_S = 1_000_000_000


def due_times(step: Step, seconds: float, seed: int) -> NDArray[np.int64]:
    """Nanoseconds `[n]` from the start, rising, all below `seconds`; the same for the same seed.

    Args:
        step: Of an open loop; its level is the rate per second.
        seconds: How long requests come.
        seed: Of the exponential times.
    """
    rate = step.level
    if step.loop == CONSTANT:
        times = np.arange(max(int(np.ceil(rate * seconds)), 1)) / rate
    else:
        generator = np.random.default_rng([seed, round(rate * 1000)])
        expected = rate * seconds
        gaps: list[NDArray[np.float64]] = []
        while sum(float(gap.sum()) for gap in gaps) < seconds:
            gaps.append(generator.exponential(1 / rate, size=int(expected) + 16))
        times = np.cumsum(np.concatenate(gaps))
    return (times[times < seconds] * NS_PER_S).astype(np.int64)
