from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from utune_deploy.deploy.bench.alike import KINDS
from utune_deploy.deploy.bench.case import Case
from utune_deploy.deploy.bench.compare import compare
from utune_deploy.deploy.bench.compare_views import finding, print_comparison, to_markdown
from utune_deploy.deploy.bench.report import TIMED_ON_DEVICE
from utune_deploy.deploy.comparison.verdict import Contrast, judge
from utune_deploy.deploy.load.alike import KINDS as LOAD_KINDS
from utune_deploy.deploy.verbs import compare as verb
from utune_deploy.merge.errors import IncompatibleArtefact

BASE = "backbone only"


@pytest.fixture
def run(planted):
    """`run(seed, mixed=1.05, machine=1.0)`: two cases; what a round has in common is in both subjects."""

    def build(seed, *, mixed=1.05, machine=1.0, rounds=40, **changes):
        generator = np.random.default_rng(seed)

        def case(ms):
            common = machine * ms * generator.uniform(1, 1.15, rounds)
            noise = generator.normal(1, 0.01, (2, rounds))
            return {BASE: common * noise[0], "pets": mixed * common * noise[1]}

        return planted({(1, "one"): case(10.0), (8, "uniform"): case(60.0)}, **changes)

    return build


def rows(comparison):
    return [row for row in comparison.rows if row.verdict != "baseline"]


def test_two_runs_of_one_distribution_are_equal_and_false_alarms_as_rare_as_stated(run):
    """150 pairs of runs with two cases: about 5 % of the intervals miss 1, and none reaches past the threshold."""
    judged = []
    for seed in range(150):
        judged += rows(compare({"": run(2 * seed)}, {"": run(2 * seed + 1)}, seed=seed))
    assert len(judged) == 300
    missed = sum(row.verdict in ("slower", "faster") for row in judged) / 300
    assert 0.02 <= missed <= 0.08
    assert not [row for row in judged if row.too_slow]
    assert {row.verdict for row in judged} == {"equal", "slower", "faster"}


def test_a_machine_that_drifts_raises_false_alarms_in_latencies_and_not_in_the_verdict(planted):
    """The clock wanders through a run by some percent: rounds that follow each other are alike."""
    alarms = {"medians": 0, "ratios": 0}
    for seed in range(100):
        generator = np.random.default_rng(seed)
        pair = []
        for _ in "ab":
            drift = 10 * np.exp(np.cumsum(generator.normal(0, 0.01, 40)))
            noise = generator.normal(1, 0.01, (2, 40))
            pair.append(planted({(1, "one"): {BASE: drift * noise[0], "pets": drift * noise[1]}}))
        (row,) = rows(compare({"": pair[0]}, {"": pair[1]}, seed=seed))
        for name in alarms:
            interval = getattr(row, name)
            alarms[name] += not interval.low <= 1 <= interval.high
    assert alarms["medians"] > 40
    assert alarms["ratios"] <= 11  # 5 expected; 12 or more come once in 250


@pytest.mark.parametrize("seed", range(10))
def test_a_tenth_slower_is_found_though_the_machine_was_faster(run, seed):
    a, b = run(seed), run(seed + 100, mixed=1.05 * 1.1, machine=0.8)
    comparison = compare({"": a}, {"": b}, seed=seed)
    for row in rows(comparison):
        assert (row.verdict, row.too_slow) == ("slower", True)
        assert row.ratios.ratio == pytest.approx(1.1, rel=0.02)
        assert row.medians.ratio == pytest.approx(0.88, rel=0.05)  # the machine's change is in it
    base = [row for row in comparison.rows if row.verdict == "baseline"]
    assert [row.subject for row in base] == [BASE] * 2
    assert all(row.ratios is None and not row.too_slow for row in base)
    assert finding(comparison) == "2 of 2 cases are slower by more than 5 % (2 slower)"


def test_a_slower_machine_alone_is_equal(run):
    comparison = compare({"": run(0)}, {"": run(1, machine=1.5)})
    assert {row.verdict for row in rows(comparison)} == {"equal"}
    assert all(row.medians.low > 1.3 for row in rows(comparison))


def test_the_ratio_of_ratios_is_numpys(run):
    a, b = run(0), run(1)
    (row, *_) = rows(compare({"": a}, {"": b}))
    medians = [
        np.median(np.divide(*(r.cases[0].results[k].samples_ms for k in (1, 0)))) for r in (a, b)
    ]
    assert row.ratios.ratio == pytest.approx(medians[1] / medians[0])
    p50 = [np.median(r.cases[0].results[1].samples_ms) for r in (a, b)]
    assert row.p50_ms == pytest.approx(tuple(p50))
    assert row.medians.ratio == pytest.approx(p50[1] / p50[0])


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.01, 1.30, "slower"), (0.80, 0.99, "faster"), (0.96, 1.04, "equal"), (0.99, 1.06, "undecided"),
        (0.94, 1.01, "undecided"), (0.5, 2.0, "undecided"),
    ],
)  # fmt: skip
def test_verdicts_follow_the_interval(low, high, verdict):
    assert judge(Contrast(1.0, low, high, 0.95), 0.05) == verdict


def test_few_and_loose_rounds_are_undecided_and_said(run, planted):
    noise = np.random.default_rng(0).uniform(1, 2, (4, 12))
    a, b = (
        planted({(1, "one"): {BASE: 10 * x, "pets": 10 * y}}) for x, y in (noise[:2], noise[2:])
    )
    comparison = compare({"": a}, {"": b})
    assert rows(comparison)[0].verdict == "undecided"
    assert any("A has cases of 12 rounds" in warning for warning in comparison.warnings)


def test_without_the_baseline_the_verdict_rests_on_medians_and_says_so(planted):
    generator = np.random.default_rng(0)
    a, b = (planted({(1, "one"): {"pets": 10 * generator.normal(1, 0.01, 40)}}) for _ in "ab")
    comparison = compare({"": a}, {"": b})
    (row,) = comparison.rows
    assert row.ratios is None
    assert row.judged is row.medians
    assert any("busier" in warning for warning in comparison.warnings)


def test_only_what_both_have_is_compared_and_the_rest_named(run, planted):
    a, b = run(0), run(1)
    a = replace(a, cases=a.cases[:1])
    comparison = compare({"": a, "gone": a}, {"": b})
    assert {row.case for row in comparison.rows} == {Case(1, "one")}
    assert comparison.only_a == (f"gone: {BASE}, batch 1, one", "gone: pets, batch 1, one")
    assert comparison.only_b == (f"{BASE}, batch 8, uniform", "pets, batch 8, uniform")


def test_subjects_with_another_name_are_paired_by_hand(run):
    a, b = run(0), run(1)

    def rename(report, name):
        cases = tuple(
            replace(c, results=(c.results[0], replace(c.results[1], subject=name)))
            for c in report.cases
        )
        subjects = (report.subjects[0], replace(report.subjects[1], name=name))
        return replace(report, subjects=subjects, cases=cases)

    b = rename(b, "cats")
    with pytest.raises(IncompatibleArtefact, match="no case in common"):
        compare({"": a}, {"": b})
    comparison = compare({"": a}, {"": b}, renamed={"cats": "pets"})
    assert [row.subject for row in rows(comparison)] == ["cats", "cats"]
    assert comparison.only_a == comparison.only_b == ()


def changed(report, kind):
    machine = report.machine
    fact = dict(report.about.facts)
    if kind in ("engine", "precision", "backbone"):
        old, new = {
            "engine": ("opset 23", "opset 20"), "precision": ("fp32", "bf16"), "backbone": ("vit", "swin")
        }[kind]  # fmt: skip
        facts = tuple((label, text.replace(old, new)) for label, text in fact.items())
        return replace(report, about=replace(report.about, facts=facts))
    if kind == "provider":
        return replace(report, subjects=tuple(replace(s, provider="CUDA") for s in report.subjects))
    return {
        "machine": lambda: replace(report, machine=replace(machine, usable_cores=1)),
        "runtime": lambda: replace(
            report,
            machine=replace(machine, versions={**machine.versions, "onnxruntime-gpu": "1.32"}),
        ),
        "threads": lambda: replace(report, threads=1),
    }[kind]()


@pytest.mark.parametrize("kind", KINDS)
def test_other_conditions_are_refused_and_pass_when_asked_with_a_warning(run, kind):
    a, b = run(0), changed(run(1), kind)
    with pytest.raises(IncompatibleArtefact) as refused:
        compare({"": a}, {"": b}, names=("old.json", "new.json"))
    assert f"--despite {kind}" in str(refused.value)
    assert refused.value.details["where"] == "old.json and new.json"
    comparison = compare({"": a}, {"": b}, despite=[kind])
    assert any(warning.startswith(f"Different {kind}: ") for warning in comparison.warnings)


def test_the_engine_of_a_further_subject_counts_too(run):
    a, b = (
        replace(r, subjects=(r.subjects[0], replace(r.subjects[1], engine=f"onnxruntime, {p}, opset 23")))
        for r, p in ((run(0), "fp32"), (run(1), "fp16"))
    )  # fmt: skip
    with pytest.raises(IncompatibleArtefact, match="--despite precision"):
        compare({"": a}, {"": b})


def test_other_quantities_are_never_compared(run):
    a = run(0)
    for b in (
        replace(a, timed=TIMED_ON_DEVICE),
        replace(a, about=replace(a.about, image_shape=(3, 8, 8))),
    ):
        with pytest.raises(IncompatibleArtefact, match="different"):
            compare({"": a}, {"": b}, despite=list(KINDS))


def test_what_weakens_the_comparison_is_said(run):
    a, b = run(0), run(1, rounds=50, warnings=("it was late",))
    b = replace(b, machine=replace(b.machine, python="3.12.1"))
    b = replace(b, cases=(b.cases[0], replace(b.cases[1], task_rows=(5,) * 8)))
    told = " ".join(compare({"": a}, {"": b}).warnings)
    for wanted in (
        "Python 3.11.7 and 3.12.1", "min_rounds differs: 40 in A, 50 in B", "B warned: it was late",
        "Other rows of the bank were asked for in batch 8, uniform",
    ):  # fmt: skip
        assert wanted in told


def test_the_terminal_shows_every_number_at_eighty_columns(run):
    comparison = compare({"": run(0)}, {"": run(1, mixed=1.3)}, names=("old.json", "new.json"))
    console = Console(file=StringIO(), width=80)
    print_comparison(comparison, console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for row in comparison.rows:
        for value in (row.medians, row.ratios):
            if value is not None:
                assert f"{value.ratio:.3f}" in text
                assert f"{value.low:.3f}-{value.high:.3f}" in text
    for wanted in ("batch 8, uniform", "too slow", "baseline", "not paired", "old.json"):
        assert wanted in text


def test_markdown_has_a_row_per_case_and_escapes_names(run):
    comparison = compare({"": run(0)}, {"": run(1)}, names=("a.json", "b.json"))
    hostile = tuple(replace(row, subject="x|<b>*") for row in comparison.rows)
    text = to_markdown(replace(comparison, rows=hostile))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(comparison.rows)
    plain = [line.replace("\\|", "") for line in table]
    assert {line.count("|") for line in plain} == {8}
    assert "<b>" not in text
    assert text.startswith("### Latency: No case is slower by more than 5 %")
    assert text.rstrip().endswith("</details>")


@pytest.fixture
def files(run, tmp_path):
    """Three files: a run, the same again, and one that is slower."""
    for name, report in (("a", run(0)), ("same", run(1)), ("slow", run(2, mixed=1.2))):
        (tmp_path / f"{name}.json").write_text(json.dumps(report.to_json()))
    return tmp_path


def test_the_verb_leaves_with_3_where_a_case_is_too_slow(cli, files):
    said = cli("compare", files / "a.json", files / "same.json", "--markdown", files / "new.md")
    assert (said.code, "wrote" in said.err) == (0, True)
    assert (files / "new.md").read_text().startswith("### Latency")
    said = cli("compare", files / "a.json", files / "slow.json", "--json")
    assert said.code == 3
    assert said.json["format"] == "utune-compare"
    assert [row["too_slow"] for row in said.json["rows"]] == [False, True, False, True]
    assert "wanted: at most 1.05 times" in said.err
    assert cli("compare", files / "a.json", files / "slow.json", "--threshold", "30%").code == 0


def test_the_verb_refuses_shares_and_files_that_make_no_sense(cli, files):
    for share in ("5", "0", "x%", "120%"):
        assert cli("compare", files / "a.json", files / "a.json", "--threshold", share).code == 2
    assert cli("compare", files / "a.json", files / "none.json").code == 2
    (files / "other.json").write_text("{}")
    assert cli("compare", files / "a.json", files / "other.json").code == 4
    assert cli("compare", files / "a.json", files / "same.json", "--pair", "x").code == 2


def test_the_verb_lists_the_kinds_without_loading_the_statistics():
    assert tuple(KINDS) == verb.KINDS["bench"]
    assert tuple(LOAD_KINDS) == verb.KINDS["load"]
