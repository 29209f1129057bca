"""From the interval of a ratio to a verdict.

    slower      the whole interval lies above 1
    faster      the whole interval lies below 1
    equal       it holds 1, and reaches the threshold on neither side
    undecided   it holds 1, and reaches past the threshold: a change that large is not ruled out

Too slow, the exit code, is stricter than slower: the whole interval lies above 1 + threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERDICTS = ("slower", "faster", "undecided", "equal")
THRESHOLD = 0.05


@dataclass(frozen=True)
class Contrast:
    """A second run beside a first: 1.0 is the same.

    Attributes:
        ratio: A statistic of the second over that of the first.
        low: Lower end of its bootstrap interval.
        high: Upper end.
        confidence: Coverage of the interval, a fraction.
    """

    ratio: float
    low: float
    high: float
    confidence: float

    @property
    def inverse(self) -> Contrast:
        """The first beside the second."""
        return Contrast(1 / self.ratio, 1 / self.high, 1 / self.low, self.confidence)

    def __str__(self) -> str:
        """The ratio and its interval, in a clause."""
        return f"{self.ratio:.3f} ({self.low:.3f} to {self.high:.3f})"


def interval(ratio: float, resampled: NDArray[np.float64], confidence: float) -> Contrast:
    """The percentile interval of a ratio.

    Args:
        ratio: Of the samples themselves.
        resampled: Of resamples of them `[n]`.
        confidence: Coverage, a fraction.
    """
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, (tail, 1 - tail))
    return Contrast(ratio, float(low), float(high), confidence)


def judge(interval: Contrast, threshold: float) -> str:
    """The verdict of an interval, of a quantity that is better the less it is; see the head of the file."""
    if interval.low > 1:
        return "slower"
    if interval.high < 1:
        return "faster"
    within = interval.high < 1 + threshold and interval.low > 1 - threshold
    return "equal" if within else "undecided"


def beyond(interval: Contrast, threshold: float) -> bool:
    """Whether the whole interval lies above the threshold."""
    return interval.low > 1 + threshold
