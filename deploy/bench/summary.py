"""From raw samples to statistics, once: never a percentile of percentiles.

The ratio to the baseline is paired. In every round each subject runs once, so dividing within the
round cancels what the round had in common (clock speed, other processes). Its confidence interval is
the percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13)
of the median, resampling rounds. It holds the noise of one run, not what reopening an engine changes
(where its memory lies; Mytkowicz et al., Producing Wrong Data Without Doing Anything Obviously Wrong,
ASPLOS 2009): a second baseline among the subjects shows that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .latency import Latency, latency_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

RESAMPLES = 2000
"""Bootstrap resamples: the ends of a 95 % interval then rest on 50 of them each."""

BLOCK = 1 << 20
"""Values resampled at once, to bound the memory."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary(Latency):
    """The statistics of one subject in one case.

    Attributes:
        images_per_second: Batch size over the median.
        cv: Coefficient of variation, `std / mean`, a fraction.
    """

    images_per_second: float
    cv: float


@dataclass(frozen=True)
class Ratio:
    """What a subject costs beside the baseline: 1.0 is the same.

    Attributes:
        median: Median of the per-round ratios.
        low: Lower end of its bootstrap interval.
        high: Upper end.
        confidence: Coverage of the interval, a fraction.
        rounds: Pairs that it rests on.
    """

    median: float
    low: float
    high: float
    confidence: float
    rounds: int


def summarise(samples_ms: Sequence[float], batch: int) -> Summary:
    """The statistics of raw latencies in ms of calls with `batch` images; two samples at least."""
    latency = latency_of(samples_ms)
    assert latency is not None  # there are samples
    return Summary(
        **vars(latency),
        images_per_second=batch * 1000 / latency.p50_ms,
        cv=latency.std_ms / latency.mean_ms,
    )


def paired_ratio(samples_ms: Sequence[float], baseline_ms: Sequence[float], seed: int) -> Ratio:
    """How much slower the samples are than the baseline's of the same rounds.

    Args:
        samples_ms: One latency per round.
        baseline_ms: The baseline's latency in the same rounds.
        seed: Of the bootstrap; the same seed gives the same interval.
    """
    ratios = np.asarray(samples_ms, np.float64) / np.asarray(baseline_ms, np.float64)
    medians = resampled_medians(ratios, np.random.default_rng(seed))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians, (tail, 1 - tail))
    return Ratio(float(np.median(ratios)), float(low), float(high), CONFIDENCE, ratios.size)


def resampled_medians(
    values: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.float64]:
    """Medians `[RESAMPLES]` of as many draws with replacement from the values `[n]`."""
    medians = np.empty(RESAMPLES)
    block = max(1, BLOCK // values.size)
    for start in range(0, RESAMPLES, block):
        count = min(block, RESAMPLES - start)
        chosen = generator.integers(values.size, size=(count, values.size))
        medians[start : start + count] = np.median(values[chosen], axis=1)
    return medians
