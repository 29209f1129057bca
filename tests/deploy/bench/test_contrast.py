from __future__ import annotations

import numpy as np
import pytest

from utune_deploy.deploy.bench.contrast import contrast


def test_the_ratio_is_that_of_the_medians_and_the_interval_numpys():
    """Against resampling one draw at a time, with a generator of its own."""
    generator = np.random.default_rng(0)
    a, b = generator.gamma(50, 0.2, 41), generator.gamma(50, 0.25, 67)
    found = contrast(a, b, seed=3)
    assert found.ratio == pytest.approx(np.median(b) / np.median(a))
    drawn = [
        np.median(generator.choice(b, b.size)) / np.median(generator.choice(a, a.size))
        for _ in range(20_000)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.006)
    assert found.confidence == 0.95


def test_the_interval_is_seeded():
    a, b = np.linspace(1, 2, 30), np.linspace(1.1, 2.4, 25)
    assert contrast(a, b, seed=1) == contrast(a, b, seed=1)
    assert contrast(a, b, seed=1) != contrast(a, b, seed=2)


def test_the_two_sides_are_resampled_apart():
    """With the same draws on both sides, a sample beside itself would always be exactly 1."""
    values = np.random.default_rng(0).gamma(50, 0.2, 60)
    found = contrast(values, values, seed=0)
    assert found.ratio == 1
    assert found.low < 0.99 < 1.01 < found.high


def test_a_wider_confidence_is_a_wider_interval():
    a, b = np.random.default_rng(0).gamma(50, 0.2, (2, 60))
    wide, narrow = (contrast(a, b, 0, confidence) for confidence in (0.99, 0.8))
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize("rounds", [24, 50])
@pytest.mark.parametrize("true", [1.0, 1.1])
def test_the_interval_holds_the_true_ratio_as_often_as_it_says(rounds, true):
    """Skewed latencies, 400 pairs of runs: 95 % of the intervals, within the error of counting to 400."""
    generator = np.random.default_rng(rounds)
    held = 0
    for seed in range(400):
        a, b = 10 + generator.gamma(2, 0.3, (2, rounds))
        found = contrast(a, true * b, seed)
        held += found.low <= true <= found.high
    assert 0.92 <= held / 400 <= 0.985
