"""A load's numbers: percentiles, rates, windows, lag, saturation and the server's own counts, from known times."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from utune_deploy.deploy.bench.latency import latency_of
from utune_deploy.deploy.load.arrivals import due_times
from utune_deploy.deploy.load.cautions import find_cautions
from utune_deploy.deploy.load.changes import Change, effect
from utune_deploy.deploy.load.drive import Run, Sample
from utune_deploy.deploy.load.numbers import numbers
from utune_deploy.deploy.load.perf_csv import to_csv
from utune_deploy.deploy.load.saturation import Saturation, saturation
from utune_deploy.deploy.load.statistics import difference
from utune_deploy.deploy.load.step import CLOSED, CONSTANT, POISSON, Settings, Step, steps_of
from utune_deploy.deploy.load.wording import verdict
from utune_deploy.merge.errors import UsageError

MS, S = 10**6, 10**9


def percentile(values, q):
    """Linear interpolation between order statistics, written out."""
    ordered = sorted(values)
    place = q / 100 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def run_of(rows, seconds=3):
    """A run whose counted time is [0, seconds); rows of (due, sent, ended, status) in ms."""
    samples = [
        Sample(int(due * MS), int(sent * MS), int(sent * MS), int(ended * MS), int(ended * MS), status)
        for due, sent, ended, status in rows
    ]  # fmt: skip
    return Run(0, seconds * S, sorted(samples, key=lambda sample: sample.ended_ns))


# latencies


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_percentiles_are_those_of_the_raw_samples(count):
    values = np.random.default_rng(count).exponential(3.0, count)
    found = latency_of(values)
    for q in (50, 90, 95, 99):
        assert getattr(found, f"p{q}_ms") == pytest.approx(percentile(values.tolist(), q))
    assert found.mean_ms == pytest.approx(sum(values) / count)
    assert (found.min_ms, found.max_ms, found.samples) == (min(values), max(values), count)
    if count > 1:
        spread = math.sqrt(sum((v - found.mean_ms) ** 2 for v in values) / (count - 1))
        assert found.std_ms == pytest.approx(spread)


def test_nothing_has_no_latency():
    assert latency_of([]) is None


def test_a_closed_loop_counts_what_ended_and_from_when_it_was_sent():
    rows = [(-5, -4, -1, "ok"), (0, 1, 4, "ok"), (4, 5, 9, "ok"), (2998, 2999, 3001, "ok")]
    found = numbers(run_of(rows), Step(CLOSED, 1), 3)
    assert found.samples_ms == (3.0, 4.0)
    assert found.at_ms == (4.0, 9.0)
    assert found.lags_ms == (1.0, 1.0)
    assert found.offered_per_second is None
    assert (found.answered_per_second, found.rows_per_second) == (2 / 3, 2.0)


def test_an_open_loop_counts_what_was_due_and_from_when_it_was():
    rows = [(-5, -4, 2, "ok"), (0, 1, 4, "ok"), (10, 700, 900, "ok"), (2998, 2999, 3901, "ok")]
    found = numbers(run_of(rows), Step(POISSON, 1), 1)
    assert found.samples_ms == (4.0, 890.0, 903.0)  # the last came after the end, and counts
    assert found.offered_per_second == 1.0
    assert found.answered_per_second == 1.0  # three came in time, one of them due before


def test_errors_are_counted_by_status_and_in_no_latency():
    rows = [(n, n, n + 500, "503") for n in range(7)] + [
        (n, n, n + 900, "timeout") for n in range(9)
    ]
    run = run_of([*rows, (20, 20, 25, "ok")])
    run.says["503"] = "full"
    found = numbers(run, Step(POISSON, 1), 1)
    assert [(e.status, e.count, e.says) for e in found.errors] == [
        ("timeout", 9, ""), ("503", 7, "full")
    ]  # fmt: skip
    assert found.samples_ms == (5.0,)
    assert found.failed == 16
    assert found.answered_per_second == pytest.approx(1 / 3)


def test_a_step_without_an_answer_has_no_latency():
    found = numbers(run_of([(0, 0, 5, "503")]), Step(CLOSED, 1), 1)
    assert (found.latency, found.answered_per_second, found.stable) == (None, 0.0, False)
    assert numbers(run_of([]), Step(POISSON, 5), 1).lag is None


# stability


def steady(gap=10.0, took=4.0, late=0.05, count=300):
    return [(n * gap, n * gap + late, n * gap + took, "ok") for n in range(count)]


def test_windows_that_agree_are_stable():
    found = numbers(run_of(steady()), Step(POISSON, 100), 1)
    assert found.stable
    assert [w.offered_per_second for w in found.windows] == [100.0] * 3
    assert [w.p50_ms for w in found.windows] == [4.0] * 3


@pytest.mark.parametrize(("slow", "stable"), [(4.3, True), (4.5, False)])
def test_a_median_that_moves_by_more_than_a_tenth_is_unstable(slow, stable):
    rows = [(d, s, d + (slow if d >= 2000 else 4), status) for d, s, _, status in steady()]
    assert numbers(run_of(rows), Step(POISSON, 100), 1).stable is stable


def test_a_throughput_that_falls_is_unstable():
    rows = [row for n, row in enumerate(steady()) if n < 200 or n % 2]
    assert not numbers(run_of(rows), Step(CLOSED, 1), 1).stable
    assert numbers(run_of(rows), Step(POISSON, 100), 1).stable  # fewer were due: that is no fall


# the client itself


@pytest.mark.parametrize(("late", "bound"), [(0.05, False), (0.3, False), (0.6, True), (3.0, True)])
def test_a_client_that_is_late_is_told_of(late, bound):
    found = numbers(run_of(steady(late=late)), Step(POISSON, 100), 1)
    assert found.client_bound is bound
    assert found.lag.p50_ms == pytest.approx(late)


def test_a_late_tail_is_told_of():
    rows = [
        (d, d + (20 if n % 20 == 0 else 0), e, s) for n, (d, _, e, s) in enumerate(steady(took=25))
    ]
    assert numbers(run_of(rows), Step(CLOSED, 1), 1).client_bound


# saturation


@pytest.mark.parametrize(
    ("levels", "wanted"),
    [
        ([(100, 100, False), (200, 191, False), (400, 200, False)], Saturation(200, 400)),
        ([(100, 100, False), (200, 200, False)], Saturation(200, None)),
        ([(100, 90, False), (200, 200, False)], Saturation(None, 100)),
        ([(200, 180, False), (100, 100, False)], Saturation(100, 200)),
        ([(100, 100, False), (200, 120, True), (400, 200, False)], Saturation(100, 400)),
        ([(100, 100, False), (200, 200, True)], Saturation(100, None)),
        ([(100, 100, True)], Saturation(None, None)),
    ],
)
def test_saturation_lies_between_the_last_rate_that_is_held_and_the_next(
    load_report, levels, wanted
):
    (some,) = load_report(POISSON, (10,)).steps
    results = [
        replace(some, level=level, offered_per_second=float(level), answered_per_second=float(answered), client_bound=bound)
        for level, answered, bound in levels
    ]  # fmt: skip
    assert saturation(results) == wanted


# arrivals


def test_poisson_arrivals_are_seeded_exponential_and_within_their_time():
    step = Step(POISSON, 500.0)
    times = due_times(step, 40, 3)
    assert (times == due_times(step, 40, 3)).all()
    assert len(times) != len(due_times(step, 40, 4)) or (times != due_times(step, 40, 4)).any()
    gaps = np.diff(times) / S
    assert times[0] >= 0
    assert times[-1] < 40 * S
    assert (gaps >= 0).all()
    assert abs(len(times) - 20_000) < 5 * math.sqrt(20_000)  # the count is Poisson
    assert gaps.mean() == pytest.approx(1 / 500, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 500, rel=0.05)  # as large as the mean: exponential
    grid = np.sort(gaps)
    distance = np.abs(1 - np.exp(-500 * grid) - np.arange(1, len(grid) + 1) / len(grid)).max()
    assert distance < 2 / math.sqrt(len(grid))  # Kolmogorov and Smirnov, far beyond 1 %


def test_constant_arrivals_are_even():
    assert due_times(Step(CONSTANT, 4.0), 1, 0).tolist() == [0, S // 4, S // 2, 3 * S // 4]


# steps


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (((1,), (5.0,)), "callers that wait or requests at a rate"),
        (((), ()), "callers that wait or requests at a rate"),
        (((0,), ()), "out of range"),
        (((), (-1.0,)), "out of range"),
        (((), (math.inf,)), "out of range"),
    ],
)
def test_steps_that_make_no_sense_are_refused(arguments, what):
    with pytest.raises(UsageError, match=what):
        steps_of(*arguments)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(UsageError, match="seconds"):
        Settings(seconds=0)
    with pytest.raises(UsageError, match="no arrivals"):
        steps_of((1,), (), constant=True)
    assert [step.label for step in steps_of((1, 2, 1), ())] == ["1 caller", "2 callers"]
    assert [step.label for step in steps_of((), (2.5,), constant=True)] == ["2.5/s"]


# what the server counted


def test_the_difference_of_statistics_is_the_steps():
    before = {
        "inference_count": "10",
        "execution_count": "5",
        "inference_stats": {"queue": {"count": "4", "ns": "400"}},
    }
    after = {"inference_count": 40, "execution_count": 15, "inference_stats": {"queue": {"count": 10, "ns": 1600}}}  # fmt: skip
    found = difference(before, after)
    assert (found.inference_count, found.execution_count, found.mean_batch) == (30, 10, 3.0)
    assert (found.queue.count, found.queue.ns, found.queue.mean_ns) == (6, 1200, 200)
    assert found.compute_infer.mean_ns == 0
    assert difference(after, before) is None  # the server began anew
    assert difference(None, after) is None


def test_requests_open_during_an_addition_are_told_from_the_others():
    run = run_of([(0, 0, 4, "ok"), (10, 10, 14, "ok"), (20, 20, 50, "ok"), (60, 60, 65, "503")])
    changes = [
        Change("add", 12 * MS, 22 * MS), Change("remove", 0, 2 * MS),
        Change("add", 30 * MS, 31 * MS, failed=True), Change("add", -9 * S, -8 * S),
    ]  # fmt: skip
    found = effect(run, Step(CLOSED, 1), changes)
    assert (found.added, found.removed, found.failed) == (1, 1, 1)
    assert (found.during.samples, found.during.max_ms) == (2, 30.0)
    assert (found.apart.samples, found.apart.max_ms) == (1, 4.0)


# perf_analyzer's columns: the heading is the binary's own, 2.51.0, byte for byte

HEADING = (
    "Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,"
    "Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency"
)


def test_the_csv_has_the_columns_of_perf_analyzer(load_report):
    report = load_report(CLOSED, (8, 1))
    one = replace(
        report.steps[1], rows_per_second=482.5671, send_us=4.9, receive_us=2.0,
        latency=replace(
            report.steps[1].latency, mean_ms=6.0609, p50_ms=1.9589, p90_ms=2.186, p95_ms=2.657, p99_ms=5.558
        ),
    )  # fmt: skip
    eight = replace(report.steps[0], rows_per_second=1234567.0)
    text = to_csv(replace(report, steps=(eight, one)))
    heading, first, second, end = text.split("\n")
    assert (heading, end) == (HEADING, "")
    # 6060.9 - 6.9 - (1000 + 10 + 2000 + 30) = 3014
    assert first == "1,482.567,4,3014,1000,10,2000,30,2,1958,2186,2657,5558"
    assert second.startswith("8,1.23457e+06,")


def test_the_csv_of_rates_without_statistics(load_report):
    report = load_report(POISSON, (20, 40))
    steps = tuple(replace(step, server=None) for step in report.steps)
    text = to_csv(replace(report, steps=steps))
    wanted = "Request Rate,Inferences/Second,Client Send,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency\n"
    assert text.startswith(wanted)
    assert text.count("\n") == 3


# the verdict


def test_the_verdict_says_what_is_known(load_report):
    closed, rates = load_report(CLOSED, (1, 2)), load_report(POISSON, (10, 60))
    assert verdict(closed).startswith("100 requests/s at most, with ")
    assert verdict(rates).startswith("Holds 10 requests/s with p99 ")
    assert verdict(rates).endswith("; 60 is too much; 30 requests had no good answer")
    assert verdict(load_report(POISSON, (60,))).startswith("Already 60 requests/s are too much; ")
    assert verdict(load_report(POISSON, (10,))).endswith("; beyond is not known")
    fast = replace(closed.steps[1], client_bound=True, answered_per_second=500.0)
    assert verdict(replace(closed, steps=(closed.steps[0], fast))).startswith(
        "100 requests/s at least"
    )
    assert verdict(replace(closed, steps=(fast,))).startswith(
        "The client set the pace in every step"
    )
    none = replace(fast, latency=None)
    assert verdict(replace(closed, steps=(none,))) == "No request had a good answer"


def test_statistics_that_end_early_are_told_of(load_report):
    report = load_report(CLOSED)
    steps = [Step(CLOSED, result.level) for result in report.steps]
    unseen = [replace(result, server=None) for result in report.steps]
    for handed_over in (False, True):
        said = " ".join(
            find_cautions(steps, unseen, report.machine, report.load, handed_over=handed_over)
        )
        assert ("takes a request over" in said) is handed_over
        assert ("could not be read" in said) is not handed_over
