"""How a step of one load differs from the same step of another: ratios with intervals, by resampling blocks of time.

Requests that follow each other share a queue, a batch, a busy machine: they are no independent draws, and an interval
from resampling them one by one would be too short. So the measured time is cut into equal blocks, and whole blocks are
drawn with replacement, for each run on its own (block bootstrap: H. R. Kuensch, The jackknife and the bootstrap for
general stationary observations, Annals of Statistics 17, 1989, here with blocks that do not overlap; two samples and
the percentile interval: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13).

The interval holds what changes within a run from block to block. It does not hold what changes only between runs, nor a
drift that is longer than a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..bench.summary import RESAMPLES
from ..comparison.verdict import interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ..comparison.verdict import Contrast
    from .numbers import StepResult

BLOCKS = 24
"""Blocks of a step's measured time.

Long, so that neighbours have little in common but at their edges: a quarter of a second of six seconds. Many, because
a spread that is estimated from n blocks is too small by about 1 / 2n and uncertain by about 1 / sqrt(2n): 2 % and 14 %
of 24.
"""

PERCENTILES = (50, 90, 99)


def contrasts(
    a: StepResult, b: StepResult, seconds: tuple[float, float], seed: int, confidence: float
) -> dict[str, Contrast]:
    """B over A: of the percentiles, as `p50`, and of the answers per second, as `rate`.

    Args:
        a: The first run's step. It has answers in half of its blocks at least, see `sparse`.
        b: The second's; so has it.
        seconds: The measured time of each.
        seed: Of the bootstrap; the same seed gives the same interval.
        confidence: Coverage of every interval, a fraction.
    """
    # A generator for each side: equal draws on both would pair what is not paired.
    sides = [
        _resampled(step, time, np.random.default_rng([seed, side]))
        for side, (step, time) in enumerate(zip((a, b), seconds, strict=True))
    ]
    (first, resampled_first), (second, resampled_second) = sides
    names = [*(f"p{percentile}" for percentile in PERCENTILES), "rate"]
    return {
        name: interval(
            float(second[k] / first[k]), resampled_second[:, k] / resampled_first[:, k], confidence
        )
        for k, name in enumerate(names)
    }


def block_of(at_ms: Sequence[float], seconds: float) -> NDArray[np.int64]:
    """The block of each answer.

    Args:
        at_ms: When it came or was due, from the start of the measured time, in ms.
        seconds: The measured time.
    """
    block = np.asarray(at_ms, np.float64) * BLOCKS / (1000 * seconds)
    return np.clip(block.astype(np.int64), 0, BLOCKS - 1)


def sparse(step: StepResult, seconds: float) -> bool:
    """Whether most blocks are without an answer: there is too little to resample."""
    return 2 * np.unique(block_of(step.at_ms, seconds)).size < BLOCKS


def _resampled(
    step: StepResult, seconds: float, generator: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Percentiles and rate `[4]`, and those of resamples `[RESAMPLES, 4]`."""
    block = block_of(step.at_ms, seconds)
    values = np.asarray(step.samples_ms, np.float64)
    order = np.argsort(values, kind="stable")
    ranks = [np.flatnonzero(block[order] == number) for number in range(BLOCKS)]
    drawn = generator.multinomial(BLOCKS, np.full(BLOCKS, 1 / BLOCKS), RESAMPLES)
    found = np.column_stack(
        [
            *(_percentiles(values[order], ranks, drawn, p / 100) for p in PERCENTILES),
            _below(ranks, drawn, values.size) / seconds,
        ]
    )
    return np.array([*np.percentile(values, PERCENTILES), values.size / seconds]), found


def _percentiles(
    ordered: NDArray[np.float64],
    ranks: Sequence[NDArray[np.int64]],
    drawn: NDArray[np.int64],
    share: float,
) -> NDArray[np.float64]:
    """A percentile of every resample `[RESAMPLES]`, interpolated linearly as numpy does.

    Args:
        ordered: All values, ascending.
        ranks: The places in `ordered` of each block's values, ascending.
        drawn: How often each resample has each block `[RESAMPLES, BLOCKS]`.
        share: The percentile, a fraction.
    """
    total = _below(ranks, drawn, ordered.size)
    place = share * (total - 1)
    low = np.floor(place).astype(np.int64)
    left, right = (
        ordered[_place(ranks, drawn, np.minimum(k, total - 1), ordered.size)]
        for k in (low, low + 1)
    )
    return left + (place - low) * (right - left)


def _place(
    ranks: Sequence[NDArray[np.int64]],
    drawn: NDArray[np.int64],
    wanted: NDArray[np.int64],
    size: int,
) -> NDArray[np.int64]:
    """Where among all values each resample's value number `wanted`, from 0, stands: by halving."""
    low, high = np.zeros_like(wanted), np.full_like(wanted, size - 1)
    while (low < high).any():
        middle = (low + high) // 2
        enough = _below(ranks, drawn, middle + 1) > wanted
        low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
    return low


def _below(
    ranks: Sequence[NDArray[np.int64]], drawn: NDArray[np.int64], place: NDArray[np.int64] | int
) -> NDArray[np.int64]:
    """How many values each resample has before a place among all of them `[RESAMPLES]`."""
    counts = [np.searchsorted(of, place) for of in ranks]
    return sum(
        (drawn[:, number] * count for number, count in enumerate(counts)),
        start=np.zeros(len(drawn), np.int64),
    )
