"""Whether more requests fail in one run than in another."""

from __future__ import annotations

import math
from statistics import NormalDist

FAIL_SHARE = 0.01
"""A rise of the failed share that matters: one request in a hundred."""


def rise(a: tuple[int, int], b: tuple[int, int], confidence: float) -> tuple[float, float]:
    """The interval of the second's share of failed requests less the first's.

    Of two proportions that are not paired, from their score intervals (R. G. Newcombe, Statistics in Medicine 17,
    1998, method 10). It takes requests as independent; failures that come in bursts vary more.

    Args:
        a: Requests of the first that failed, and all.
        b: Those of the second.
        confidence: Coverage, a fraction.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    (first, low_a, high_a), (second, low_b, high_b) = (_share(*side, z) for side in (a, b))
    change = second - first
    return (
        change - math.hypot(second - low_b, high_a - first),
        change + math.hypot(high_b - second, first - low_a),
    )


def _share(failed: int, total: int, z: float) -> tuple[float, float, float]:
    """The share and both ends of Wilson's interval."""
    share, square = failed / total, z * z / total
    middle = (share + square / 2) / (1 + square)
    half = z * math.sqrt(share * (1 - share) / total + square / total / 4) / (1 + square)
    return share, middle - half, middle + half
