from __future__ import annotations

import pytest

from utune_deploy.deploy.bench import summary as module
from utune_deploy.deploy.bench.summary import paired_ratio, summarise


def test_statistics_of_known_samples():
    summary = summarise(list(range(101, 0, -1)), batch=2)  # 1 ... 101 ms
    assert summary.samples == 101
    assert (summary.min_ms, summary.max_ms, summary.mean_ms) == (1, 101, 51)
    assert (summary.p50_ms, summary.p90_ms, summary.p95_ms, summary.p99_ms) == (51, 91, 96, 100)
    assert summary.std_ms == pytest.approx((101 * 102 / 12) ** 0.5)  # n (n + 1) / 12
    assert summary.cv == pytest.approx(summary.std_ms / 51)
    assert summary.images_per_second == pytest.approx(2000 / 51)


def test_percentiles_interpolate_between_samples():
    assert summarise([10.0, 20.0], batch=1).p90_ms == pytest.approx(19)


def test_the_ratio_is_paired_within_the_round():
    baseline = [10.0, 20.0, 40.0, 80.0]  # the machine slows down; the cost does not change
    ratio = paired_ratio([11.0, 22.0, 44.0, 88.0], baseline, seed=0)
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((1.1, 1.1, 1.1))
    assert (ratio.rounds, ratio.confidence) == (4, 0.95)


def test_the_median_of_ratios_is_not_the_ratio_of_medians():
    assert paired_ratio([2.0, 30.0, 9.0], [1.0, 10.0, 9.0], seed=0).median == 2.0


def test_the_bootstrap_is_seeded_and_holds_the_median():
    samples = [10 + (7 * index % 13) / 10 for index in range(60)]
    baseline = [9 + (5 * index % 11) / 10 for index in range(60)]
    ratio = paired_ratio(samples, baseline, seed=1)
    assert ratio == paired_ratio(samples, baseline, seed=1)
    assert ratio.low < ratio.median < ratio.high
    assert min(s / b for s, b in zip(samples, baseline, strict=True)) < ratio.low


def test_another_seed_gives_another_interval():
    samples = [1 + (index * 0.618034) % 1 for index in range(50)]
    intervals = {
        (ratio.low, ratio.high)
        for ratio in (paired_ratio(samples, [1.0] * 50, seed=seed) for seed in range(5))
    }
    assert len(intervals) > 1


def test_resampling_in_blocks_changes_nothing(monkeypatch):
    samples = [1 + (index * 0.618034) % 1 for index in range(50)]
    whole = paired_ratio(samples, [1.0] * 50, seed=0)
    monkeypatch.setattr(module, "BLOCK", 50 * 7)
    assert paired_ratio(samples, [1.0] * 50, seed=0) == whole
