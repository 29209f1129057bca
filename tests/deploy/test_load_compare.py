"""Two loads side by side: intervals from blocks of time, what fails, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from utune_deploy.deploy.bench.latency import latency_of
from utune_deploy.deploy.load.alike import KINDS
from utune_deploy.deploy.load.compare import SHOWN, compare
from utune_deploy.deploy.load.compare_views import finding, print_comparison, to_markdown
from utune_deploy.deploy.load.contrast import BLOCKS, PERCENTILES, contrasts, sparse
from utune_deploy.deploy.load.failures import rise
from utune_deploy.deploy.load.numbers import Errors
from utune_deploy.deploy.load.report import Changing
from utune_deploy.deploy.load.saturation import saturation
from utune_deploy.deploy.load.step import CLOSED, POISSON, Settings
from utune_deploy.merge.errors import IncompatibleArtefact

SECONDS = 6.0


def correlated(runs, phi, seed=0, count=800):
    """Latencies in ms about 10 `[runs, count]`, the logarithm an autoregression of the first order."""
    noise = np.random.default_rng(seed).normal(size=(count, runs))
    x = noise[0]
    found = [x]
    for e in noise[1:]:
        x = phi * x + np.sqrt(1 - phi**2) * e
        found.append(x)
    return 10 * np.exp(0.15 * np.array(found).T)


@pytest.fixture(scope="module")
def step(load_report):
    """`step(latencies, **changes)`: one caller who asks again at once, for six seconds."""

    def build(latencies, **changes):
        at = np.cumsum(latencies)
        kept = at < 1000 * SECONDS
        samples = tuple(latencies[kept].tolist())
        plain = load_report().steps[0]
        rate = len(samples) / SECONDS
        facts = {
            "latency": latency_of(samples), "samples_ms": samples, "at_ms": tuple(at[kept].tolist()),
            "lags_ms": (0.01,) * len(samples), "answered_per_second": rate, "rows_per_second": 2 * rate,
            "errors": (), "stable": True, "client_bound": False,
        }  # fmt: skip
        return replace(plain, **{**facts, **changes})

    return build


@pytest.fixture(scope="module")
def run(load_report, step):
    """`run(seed, slower=1.0, **changes of the step)`: a load of one step."""

    def build(seed, slower=1.0, **changes):
        latencies = slower * correlated(1, 0.5, seed)[0]
        return load_report(
            CLOSED, (1,), steps=(step(latencies, **changes),), settings=Settings(0.0, SECONDS), warnings=()
        )  # fmt: skip

    return build


def rates(load_report, *held, **changes):
    """A load at 10, 20, ... requests per second, each held or not."""
    levels = tuple(10.0 * (k + 1) for k in range(len(held)))
    report = load_report(POISSON, levels, settings=Settings(0.0, 3.0), warnings=())
    steps = tuple(
        replace(step, answered_per_second=(0.99 if holds else 0.5) * step.offered_per_second, stable=True)
        for step, holds in zip(report.steps, held, strict=True)
    )  # fmt: skip
    return replace(report, steps=steps, saturation=saturation(steps), **changes)


def named(pair):
    return {measure.name: measure for measure in pair.measures}


# the intervals


def test_the_intervals_are_those_of_blocks_drawn_one_by_one(step):
    """Against putting the blocks of each resample together and asking numpy, with a generator of its own."""
    a, b = (step(latencies) for latencies in correlated(2, 0.8))
    found = contrasts(a, b, (SECONDS, SECONDS), 0, 0.9)
    generator = np.random.default_rng(99)

    def resampled(of):
        at, values = np.array(of.at_ms), np.array(of.samples_ms)
        width = 1000 * SECONDS / BLOCKS
        blocks = [values[(at >= k * width) & (at < (k + 1) * width)] for k in range(BLOCKS)]
        chosen = generator.integers(BLOCKS, size=BLOCKS)
        values = np.concatenate([blocks[k] for k in chosen])
        return [*np.percentile(values, PERCENTILES), values.size / SECONDS]

    drawn = np.array([np.divide(resampled(b), resampled(a)) for _ in range(4000)])
    for k, name in enumerate(["p50", "p90", "p99", "rate"]):
        low, high = np.percentile(drawn[:, k], [5, 95])
        assert (found[name].low, found[name].high) == pytest.approx((low, high), abs=0.012)
    for percentile in PERCENTILES:
        whole = [np.percentile(of.samples_ms, percentile) for of in (a, b)]
        assert found[f"p{percentile}"].ratio == pytest.approx(whole[1] / whole[0])
    assert found["rate"].ratio == pytest.approx(len(b.samples_ms) / len(a.samples_ms))


def test_every_resampled_percentile_is_numpys(step):
    """The same draws, put together by hand: equal to rounding, ties and all."""
    from utune_deploy.deploy.bench.summary import RESAMPLES
    from utune_deploy.deploy.load.contrast import _resampled, block_of

    of = step(np.round(correlated(1, 0.5)[0], 1))
    whole, found = _resampled(of, SECONDS, np.random.default_rng(5))
    drawn = np.random.default_rng(5).multinomial(BLOCKS, np.full(BLOCKS, 1 / BLOCKS), RESAMPLES)
    values, block = np.array(of.samples_ms), block_of(of.at_ms, SECONDS)
    for row in range(50):
        together = np.repeat(values, drawn[row][block])
        expected = [*np.percentile(together, PERCENTILES), together.size / SECONDS]
        assert found[row] == pytest.approx(expected)
    assert whole == pytest.approx([*np.percentile(values, PERCENTILES), values.size / SECONDS])


def test_two_runs_of_one_process_differ_about_as_often_as_stated(step):
    """Answers that resemble the one before: 80 pairs; one in twenty intervals misses 1, and none the threshold."""
    runs = [step(latencies) for latencies in correlated(160, 0.5, seed=7)]
    found = [
        contrasts(a, b, (SECONDS,) * 2, 0, 0.95) for a, b in zip(runs[::2], runs[1::2], strict=True)
    ]
    for name in ("p50", "p90", "p99", "rate"):
        missed = sum(not change[name].low <= 1 <= change[name].high for change in found)
        assert missed <= 11  # 4 are expected; more come once in a thousand
        assert not [change for change in found if change[name].low > 1.05]
    assert sum(not c["p50"].low <= 1 <= c["p50"].high for c in found) >= 1


def test_resampling_requests_one_by_one_would_be_too_sure(step):
    """A queue that fills and empties: an interval of independent draws is far too short."""
    from utune_deploy.deploy.bench.contrast import contrast

    a, b = (step(latencies) for latencies in correlated(2, 0.9, seed=3))
    blocks = contrasts(a, b, (SECONDS,) * 2, 0, 0.95)["p50"]
    single = contrast(a.samples_ms, b.samples_ms, 0)
    assert blocks.high - blocks.low > 1.8 * (single.high - single.low)


def test_the_interval_is_seeded_and_its_sides_apart(step):
    of = step(correlated(1, 0.5)[0])
    found = contrasts(of, of, (SECONDS,) * 2, 1, 0.95)
    assert found == contrasts(of, of, (SECONDS,) * 2, 1, 0.95)
    assert found["p50"].ratio == 1
    assert found["p50"].low < 0.99 < 1.01 < found["p50"].high


def test_a_step_with_answers_in_few_blocks_is_sparse(step):
    latencies = correlated(1, 0.5)[0]
    assert not sparse(step(latencies), SECONDS)
    assert sparse(step(60 * latencies), SECONDS)
    assert sparse(step(latencies[:3]), SECONDS)


def test_the_rise_of_a_share_is_newcombes():
    """The examples of his paper, table II: 56/70 less 48/80, and 9/10 less 3/10."""
    low, high = rise((48, 80), (56, 70), 0.95)
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    low, high = rise((3, 10), (9, 10), 0.95)
    assert (low, high) == pytest.approx((0.1705, 0.8090), abs=5e-5)
    assert rise((0, 100), (0, 100), 0.95)[0] < 0 < rise((0, 100), (0, 100), 0.95)[1]


# the verdicts


def test_two_equal_runs_fail_nothing(run):
    comparison = compare(run(0), run(1))
    assert comparison.failures == ()
    assert {m.verdict for m in comparison.steps[0].measures} <= {
        "equal",
        "undecided",
        "slower",
        "faster",
    }
    assert finding(comparison).startswith("No number of 1 step fails at 5 %")


@pytest.mark.parametrize("seed", range(5))
def test_a_tenth_slower_is_found(run, seed):
    found = named(compare(run(seed), run(seed + 100, slower=1.1)).steps[0])
    for name in ("p50", "rows/s"):
        assert (found[name].verdict, found[name].fails) == ("slower", True)
    assert found["p50"].change.ratio == pytest.approx(1.1, rel=0.03)
    assert found["rows/s"].change.ratio == pytest.approx(1 / 1.1, rel=0.03)
    assert not found["p90"].fails


def test_a_tenth_faster_is_found_and_fails_nothing(run):
    comparison = compare(run(0), run(1, slower=0.85))
    found = named(comparison.steps[0])
    assert found["p50"].verdict == found["rows/s"].verdict == "faster"
    assert comparison.failures == ()


def test_a_tail_alone_fails(run, step, load_report):
    latencies = correlated(1, 0.5)[0]
    heavy = latencies.copy()
    heavy[::40] *= 3
    a, b = (replace(run(0), steps=(step(values),)) for values in (latencies, heavy))
    found = named(compare(a, b).steps[0])
    assert found["p99"].fails
    assert not found["p50"].fails


def test_p99_of_few_answers_is_shown(run, step):
    few = [replace(run(0), steps=(step(3.2 * values),)) for values in correlated(2, 0.5)]
    found = named(compare(*few).steps[0])
    assert found["p99"].verdict == SHOWN
    assert found["p50"].verdict != SHOWN


def test_what_the_client_set_the_pace_of_is_shown_and_not_judged(run):
    errors = (Errors("503", 500, "full"),)
    comparison = compare(run(0), run(1, slower=2, client_bound=True, errors=errors))
    (pair,) = comparison.steps
    assert pair.unjudged == "client-bound in B"
    assert {measure.verdict for measure in pair.measures} == {SHOWN}
    assert comparison.failures == ()
    assert "none is judged" in finding(comparison)


def test_a_rate_that_a_held_and_b_does_not_fails(load_report):
    a, b = rates(load_report, True, True, False), rates(load_report, True, False, False)
    comparison = compare(a, b)
    held = [named(pair)["held"] for pair in comparison.steps]
    assert [m.verdict for m in held] == ["equal", "slower", SHOWN]
    assert [m.fails for m in held] == [False, True, False]
    assert [pair.unjudged for pair in comparison.steps] == [
        "",
        "not held in B",
        "not held in A and B",
    ]
    assert named(comparison.steps[1])["p50"].verdict == SHOWN
    assert "saturation A above 20/s, at most 30/s, B above 10/s, at most 20/s" in finding(
        comparison
    )
    assert len(comparison.failures) == 1
    back = compare(b, a)
    assert named(back.steps[1])["held"].verdict == "faster"
    assert back.failures == ()


def test_a_server_that_ceases_to_answer_fails_without_an_error(run, step):
    latencies = correlated(1, 0.5)[0]
    for kept in (0, 30):
        b = replace(run(0), steps=(step(latencies[:kept], stable=False),))
        comparison = compare(run(0), b)
        assert named(comparison.steps[0])["rows/s"].fails
        assert comparison.to_json()["steps"][0]["measures"]


@pytest.mark.parametrize(
    ("before", "after", "verdict", "fails"),
    [(0, 60, "more", True), (0, 6, "more", False), (5, 6, "equal", False), (60, 0, "fewer", False)],
)
def test_more_failed_requests_are_warned_of_and_fail_beyond_one_in_a_hundred(
    run, before, after, verdict, fails
):
    a, b = (
        run(seed, errors=(Errors("503", count, "full"),) if count else ())
        for seed, count in enumerate((before, after))
    )
    comparison = compare(a, b)
    failed = named(comparison.steps[0])["failed"]
    assert (failed.verdict, failed.fails) == (verdict, fails)
    assert any("More requests failed" in w for w in comparison.warnings) == (verdict == "more")


@pytest.mark.parametrize(("slower", "fails"), [(1.1, False), (1.3, True)])
def test_an_unstable_step_fails_beyond_what_it_wanders_itself(run, slower, fails):
    stable, wanders = run(1, slower=slower), run(1, slower=slower, stable=False)
    assert compare(run(0), stable).failures
    found = compare(run(0), wanders)
    assert bool(found.failures) == fails
    (pair,) = found.steps
    assert next(m.verdict for m in pair.measures if m.name == "p50") == "slower"


def test_an_unstable_step_is_judged_and_warned_of(run):
    comparison = compare(run(0), run(1, slower=1.2, stable=False))
    assert comparison.failures
    assert any(w.startswith("Not stable in one of the runs: 1 caller") for w in comparison.warnings)


def test_only_the_levels_of_both_are_compared_and_the_rest_named(load_report):
    comparison = compare(load_report(CLOSED, (1, 2)), load_report(CLOSED, (2, 4)))
    assert [pair.label for pair in comparison.steps] == ["2 callers"]
    assert (comparison.only_a, comparison.only_b) == (("1 caller",), ("4 callers",))
    with pytest.raises(IncompatibleArtefact, match="no step in common"):
        compare(load_report(CLOSED, (1,)), load_report(CLOSED, (2,)))


# the conditions


def changed(report, kind):
    return {
        "machine": lambda: replace(report, machine=replace(report.machine, usable_cores=1)),
        "server": lambda: replace(report, server={"name": "triton", "version": "2.51"}),
        "protocol": lambda: replace(report, url="grpc://127.0.0.1:8001"),
        "encoding": lambda: replace(report, asked=replace(report.asked, encoding="json")),
        "mix": lambda: replace(report, asked=replace(report.asked, mix="zipf")),
        "changing": lambda: replace(report, changing=Changing("pets", 2.0)),
    }[kind]()


@pytest.mark.parametrize("kind", KINDS)
def test_other_conditions_are_refused_and_pass_when_asked_with_a_warning(run, kind):
    a, b = run(0), changed(run(1), kind)
    with pytest.raises(IncompatibleArtefact, match=f"--despite {kind}"):
        compare(a, b)
    comparison = compare(a, b, despite=[kind])
    assert any(warning.startswith(f"Different {kind}: ") for warning in comparison.warnings)


def test_other_loops_inputs_and_sizes_are_never_compared(run, load_report):
    a = run(0)
    for b in (
        load_report(POISSON, (1,)),
        replace(a, asked=replace(a.asked, rows=3)),
        replace(a, asked=replace(a.asked, inputs=a.asked.inputs[:1])),
    ):
        with pytest.raises(IncompatibleArtefact, match="different"):
            compare(a, b, despite=list(KINDS))


def test_our_own_version_is_what_is_compared_and_another_server_s_is_not(run):
    a = run(0)
    newer = replace(a, server={"name": "utune-deploy", "version": "0.2.0"})
    assert "utune-deploy: 0.1.0 in A, 0.2.0 in B." in compare(a, newer).warnings
    first, second = (replace(a, server={"name": "triton", "version": v}) for v in ("1", "2"))
    with pytest.raises(IncompatibleArtefact, match="--despite server"):
        compare(first, second)


def test_what_weakens_the_comparison_is_said(run):
    b = replace(
        run(1), url="http://10.0.0.1:8000", model="other", warnings=("it was late",),
        settings=Settings(1.0, SECONDS),
    )  # fmt: skip
    told = " ".join(compare(run(0), b).warnings)
    for wanted in (
        "Servers: http://127.0.0.1:8000 in A, http://10.0.0.1:8000 in B", "Models: digits in A, other in B",
        "warmup_s differs", "B warned: it was late",
    ):  # fmt: skip
        assert wanted in told


# the views


def test_the_terminal_shows_every_number_at_eighty_columns(run, load_report):
    for comparison in (
        compare(run(0), run(1, slower=1.3), names=("old.json", "new.json")),
        compare(rates(load_report, True, True), rates(load_report, True, False)),
    ):
        console = Console(file=StringIO(), width=80)
        print_comparison(comparison, console)
        text = console.file.getvalue()
        assert max(map(len, text.splitlines())) <= 80
        for pair in comparison.steps:
            assert pair.label in text
            for change in (m.change for m in pair.measures if m.change):
                assert f"{change.low:.3f}-{change.high:.3f}" in text
        assert "have no baseline" in " ".join(text.split())
    assert "not held" in text


def test_markdown_has_a_row_per_number_and_escapes_names(run):
    comparison = compare(run(0), run(1, slower=1.3), names=("a.json", "b.json"))
    (pair,) = comparison.steps
    text = to_markdown(replace(comparison, steps=(replace(pair, label="x|<b>*"),)))
    table = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(pair.measures)
    assert {line.count("|") for line in table} == {7}
    assert "<b>" not in text
    assert text.startswith("### Load: ")
    assert "**too slow**" in text
    assert "**too few**" in text


# the verb


@pytest.fixture
def files(run, tmp_path):
    """A load, the same again, one that is slower, and a report of bench."""
    for name, report in (("a", run(0)), ("same", run(1)), ("slow", run(2, slower=1.2))):
        (tmp_path / f"{name}.json").write_text(json.dumps(report.to_json()))
    (tmp_path / "bench.json").write_text('{"format": "utune-bench", "version": 3}')
    return tmp_path


def test_the_verb_leaves_with_3_where_a_load_is_too_slow(cli, files):
    said = cli("compare", files / "a.json", files / "same.json", "--markdown", files / "new.md")
    assert (said.code, "wrote" in said.err) == (0, True)
    assert (files / "new.md").read_text().startswith("### Load: No number")
    said = cli("compare", files / "a.json", files / "slow.json", "--json")
    assert said.code == 3
    assert said.json["format"] == "utune-load-compare"
    assert said.json["steps"][0]["measures"][0]["fails"]
    assert "wanted: at most 1.05 times" in said.err
    assert "1 caller, p50: 1." in said.err
    assert cli("compare", files / "a.json", files / "slow.json", "--threshold", "40%").code == 0


def test_the_verb_refuses_reports_of_two_kinds_and_options_of_the_other(cli, files):
    said = cli("compare", files / "a.json", files / "bench.json")
    assert (said.code, "load in A, bench in B" in said.err) == (4, True)
    (files / "other.json").write_text('{"format": "x"}')
    said = cli("compare", files / "a.json", files / "other.json")
    assert (said.code, "utune-load" in said.err) == (4, True)
    both = files / "a.json", files / "same.json"
    for options in (("--baseline", "x"), ("--pair", "a=b"), ("--despite", "threads")):
        said = cli("compare", *both, *options)
        assert (said.code, options[0] in said.err) == (2, True)
    said = cli("compare", files / "bench.json", files / "bench.json", "--despite", "mix")
    assert said.code == 2
