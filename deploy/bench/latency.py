"""Statistics of latencies, from raw samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Latency:
    """The statistics of raw latencies; percentiles interpolate linearly between samples.

    Attributes:
        samples: How many there are.
        min_ms: The fastest, in ms.
        mean_ms: Arithmetic mean, in ms.
        std_ms: Standard deviation of the sample (`n - 1`), in ms; 0 of one.
        p50_ms: Median, in ms.
        p90_ms: 90th percentile, in ms.
        p95_ms: 95th percentile, in ms.
        p99_ms: 99th percentile, in ms.
        max_ms: The slowest, in ms.
    """

    samples: int
    min_ms: float
    mean_ms: float
    std_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float


def latency_of(samples_ms: Sequence[float] | NDArray[np.float64]) -> Latency | None:
    """The statistics of raw latencies in ms; None without any."""
    samples = np.asarray(samples_ms, np.float64)
    if not samples.size:
        return None
    p50, p90, p95, p99 = (float(p) for p in np.percentile(samples, (50, 90, 95, 99)))
    return Latency(
        samples=samples.size,
        min_ms=float(samples.min()),
        mean_ms=float(samples.mean()),
        std_ms=float(samples.std(ddof=1)) if samples.size > 1 else 0.0,
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        max_ms=float(samples.max()),
    )
