"""How two runs differ: the ratio of two medians with its interval, of values that are not paired.

Rounds of one run have nothing in common with rounds of another, so each side is resampled on its own: the
percentile bootstrap of a two-sample statistic (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
chapter 8 for two samples, 13 for the interval). Given latencies it compares those, and whatever made the second run's
machine faster or slower is in it. Given each round's ratio to the run's own baseline it compares those, and what a
whole run had in common (clock, neighbours, heat) has divided out before.

The interval takes the rounds of a run as draws from one distribution. It does not hold what changes only between
runs, such as where memory came to lie when the engines were opened: that takes more runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..comparison.verdict import Contrast, interval
from .summary import CONFIDENCE, resampled_medians

if TYPE_CHECKING:
    from collections.abc import Sequence


def contrast(
    first: Sequence[float], second: Sequence[float], seed: int, confidence: float = CONFIDENCE
) -> Contrast:
    """The ratio of the medians of two samples that are not paired.

    Args:
        first: Values of one run, all positive; latencies in ms, or ratios to its baseline.
        second: Values of the same kind of the other run; as many or not.
        seed: Of the bootstrap; the same seed gives the same interval.
        confidence: Coverage of the interval, a fraction.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    # A generator for each side: equal indices on both would pair what is not paired.
    left, right = (np.random.default_rng([seed, side]) for side in (0, 1))
    ratios = resampled_medians(b, right) / resampled_medians(a, left)
    return interval(float(np.median(b) / np.median(a)), ratios, confidence)
