from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from utune_deploy.deploy.bench.cost import FORMULAS, price
from utune_deploy.deploy.bench.footprint import Footprint
from utune_deploy.merge.errors import UsageError

MIB = 1 << 20
CPU = "CPUExecutionProvider"


@pytest.fixture
def report(planted):
    """A backbone, engines of 8 and 64 tasks, a folded task; 100 images/s mixed at 8, 20 alone at 1."""
    cases = {
        (batch, mix): {
            "backbone only": [ms, ms], "eight": [ms * 1.1] * 2, "many": [mixed] * 2, "folded": [ms, ms]
        }
        for mix in ("uniform", "zipf", "one")
        for batch, ms, mixed in ((1, 50.0, 52.0), (4, 60.0, 64.0), (8, 78.0, 80.0))
    }  # fmt: skip
    made = planted(cases)
    facts = {"backbone only": (0, 500), "eight": (8, 400), "many": (64, 960), "folded": (1, 300)}
    return replace(
        made,
        subjects=tuple(
            replace(
                s, provider=CPU, task_count=facts[s.name][0], opened_bytes=facts[s.name][1] * MIB
            )
            for s in made.subjects
        ),
        machine=replace(made.machine, memory_bytes=4096 * MIB),
    )


ASK = {"tasks": 64, "rate": 200.0, "per_hour": 1.2, "utilisation": 0.5, "mix": "uniform"}


def test_the_numbers_are_those_of_the_formulas_by_hand(report):
    cost = price(report, **ASK)
    assert (cost.mixed, cost.single, cost.load.batch) == ("many", "folded", 8)
    mixed, shared, apart = cost.ways
    assert mixed.busy == pytest.approx(200 / 100)
    assert (mixed.machines, mixed.bound) == (4, "rate")
    assert mixed.per_million == pytest.approx(1.2 * 4 / 3600 / 200 * 1e6)
    assert mixed.limit_per_million == pytest.approx(1.2 * 2 / 0.5 / 3600 / 200 * 1e6)
    assert mixed.memory_bytes == 4 * 960 * MIB
    assert mixed.idle == pytest.approx(0.5)
    # 8 rows over 64 tasks: a task alone never has more than one
    assert shared.batch == apart.batch == (1, 1)
    assert shared.busy == pytest.approx(200 / 20)
    assert shared.machines == 20
    assert apart.machines == 64
    assert apart.bound == "tasks"
    assert apart.idle == pytest.approx(1 - 10 / 64)
    assert apart.memory_bytes == 64 * 300 * MIB
    assert cost.notes == ()


def test_memory_can_decide_how_many_machines_share_the_models(report):
    cost = price(report, **{**ASK, "rate": 1.0})
    _, shared, _ = cost.ways
    assert (shared.machines, shared.bound) == (math.ceil(64 * 300 / 4096), "memory")
    larger = price(report, **{**ASK, "rate": 1.0}, machine_bytes=64 * 300 * MIB)
    assert (larger.ways[1].machines, larger.ways[1].bound) == (1, "rate")


def test_a_popular_task_fills_batches_of_its_own(report):
    cost = price(report, **{**ASK, "tasks": 4, "mix": "zipf"})
    shares = [x / sum(1 / k for k in range(1, 5)) for x in (1, 1 / 2, 1 / 3, 1 / 4)]
    assert [8 * s >= 4 for s in shares] == [False] * 4
    assert cost.ways[1].batch == (1, 1)
    one = price(report, **{**ASK, "tasks": 4, "mix": "one"})
    assert one.ways[1].batch == (1, 8)
    assert one.ways[1].busy == pytest.approx(200 / (8 / 0.078))
    assert one.ways[2].machines == math.ceil(200 / (8 / 0.078) / 0.5) + 3  # three tasks nobody asks


def test_the_engine_of_enough_tasks_is_taken_and_more_are_extrapolated(report):
    assert price(report, **{**ASK, "tasks": 8}).mixed == "eight"
    assert price(report, **{**ASK, "tasks": 9}).mixed == "many"
    cost = price(report, **{**ASK, "tasks": 120})
    assert cost.mixed_bytes == pytest.approx((960 + 56 * (960 - 400) / 56) * MIB)
    assert "one of 120 is as fast is assumed" in cost.notes[0]


def test_without_a_task_of_its_own_the_backbone_stands_for_it_and_says_so(report):
    subjects = tuple(replace(s, task_count=None) for s in report.subjects)
    old = replace(report, subjects=subjects, about=replace(report.about, name="eight"))
    with pytest.raises(UsageError, match="tell what a task adds"):
        price(old, **ASK)
    cost = price(old, **ASK, mixed_bytes=960 * MIB, mixed="many")
    assert cost.single == "backbone only"
    assert any("opened first" in note for note in cost.notes)
    assert any("tasks that fold" in note for note in cost.notes)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mix": None}, "several mixes"),
        ({"mix": "hot"}, "no such case"),
        ({"batch": 3}, "batch 3"),
        ({"mixed": "none"}, "one of backbone only, eight, many, folded"),
        ({"machine_bytes": 100 * MIB}, "does not fit"),
    ],
)
def test_what_the_report_lacks_is_refused(report, change, told):
    with pytest.raises(UsageError) as refused:
        price(report, **{**ASK, **change})
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("name", "mib"), [("many", 2), ("many", 0), ("folded", -1), ("folded", None)]
)
def test_memory_that_cannot_be_is_not_priced(report, name, mib):
    size = None if mib is None else mib * MIB
    report = replace(
        report,
        subjects=tuple(
            replace(s, opened_bytes=size) if s.name == name else s for s in report.subjects
        ),
    )
    with pytest.raises(UsageError, match="memory"):
        price(report, **ASK)
    assert price(report, **ASK, mixed_bytes=960 * MIB, single_bytes=300 * MIB).ways[0].machines == 4


def test_a_footprint_is_the_memory_where_there_is_one(report):
    sizes = {"backbone only": 500, "eight": 400, "many": 960, "folded": 300}
    subjects = tuple(
        replace(
            s,
            opened_bytes=None,
            footprint=Footprint(1, 2, 2 * sizes[s.name] * MIB, None, 1.0, 1.0, 8),
        )
        for s in report.subjects
    )
    cost = price(replace(report, subjects=subjects), **ASK)
    assert (cost.mixed_bytes, cost.single_bytes) == (1920 * MIB, 600 * MIB)


def test_memory_of_a_device_must_be_said(report):
    subjects = tuple(replace(s, provider="CUDAExecutionProvider") for s in report.subjects)
    report = replace(report, subjects=subjects)
    with pytest.raises(UsageError, match="host's memory only"):
        price(report, **ASK)
    said = {"mixed_bytes": 960 * MIB, "single_bytes": 300 * MIB, "machine_bytes": 80_000 * MIB}
    assert price(report, **ASK, **said).ways[1].bound == "rate"


def test_the_documentation_has_every_formula():
    text = (Path(__file__).resolve().parents[3] / "docs" / "bench.md").read_text()
    for symbol, formula in FORMULAS:
        assert f"| {symbol} | {formula} |" in text


def test_the_verb_prints_numbers_and_every_formula(cli, report, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(report.to_json()))
    asked = [
        "cost",
        tmp_path,
        "--price-per-hour",
        1.2,
        "--tasks",
        64,
        "--rate",
        200,
        "--mix",
        "uniform",
    ]
    said = cli(*asked, "--utilisation", 0.5)
    assert said.code == 0, said.err
    for symbol, formula in FORMULAS:
        assert f"{symbol} " in said.out
        assert formula in said.out
    for wanted in ("one mixed engine", "utilisation 0.5", "6.67", "106.67", "64"):
        assert wanted in said.out
    found = cli(*asked, "--utilisation", 0.5, "--json").json
    assert [way["machines"] for way in found["ways"]] == [4, 20, 64]
    assert found["formulas"] == dict(FORMULAS)
    assert cli(*asked, "--comparison", "x").code == 2
    assert cli(*asked, "--utilisation", 1.5).code == 2
