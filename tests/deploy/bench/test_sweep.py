from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
import referencing

from utune_deploy.deploy.bench import sweep as module
from utune_deploy.deploy.bench.reading import read_reports
from utune_deploy.deploy.bench.recipe import read_recipe
from utune_deploy.deploy.bench.subject import Subject
from utune_deploy.deploy.bench.sweep import sweep
from utune_deploy.merge.errors import UsageError

RECIPE = """
format: utune-bench-recipe
version: 1
bundles: {a: a, b: b}
batches: [1, 2]
mixes: [one, hot]
settings: {rounds: 2, warmup: 1, seconds: 0, settle: 0}
comparisons:
  - {name: both, bundle: a, against: [b]}
  - {name: alone, bundle: b, batches: [2], mixes: [uniform]}
"""


class Stop(Exception):
    pass


@pytest.fixture
def ran(monkeypatch, about):
    """What was opened and timed, in order; engines are stand-ins."""
    log = []

    def opened(path):
        return SimpleNamespace(
            path=path, name=path.name, engine=SimpleNamespace(max_batch=2, precision="fp32")
        )

    def open_subjects(first, others, names, device, *, resident, beside):
        log.append(("open", *names))

        def run(images, task):
            return np.zeros((len(images), 2), np.float32)

        return [Subject(name, "", run, "CPU") for name in ("backbone only", *names)]

    def measure(subjects, cases, **facts):
        if cases[0] in ran.stops:
            raise Stop
        log.append((subjects[1].name, *cases))
        return real(subjects, cases, **facts)

    real = module.measure
    monkeypatch.setattr(module, "open_bundle", opened)
    monkeypatch.setattr(module, "open_subjects", open_subjects)
    monkeypatch.setattr(module, "about_bundle", lambda bundle: replace(about, max_batch=2))
    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "furnish", lambda subjects, *_, **__: subjects)
    monkeypatch.setattr(module, "measure_ceilings", lambda *_: None)
    ran = SimpleNamespace(log=log, stops=[])
    return ran


@pytest.fixture
def path(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(f'"{name}"')
    (tmp_path / "nightly.yaml").write_text(RECIPE)
    return tmp_path / "nightly.yaml"


def labels(log):
    return [f"{name}: {case[0].label}" for name, *case in log if name != "open"]


EVERY = [
    "a: batch 1, one", "a: batch 1, hot", "a: batch 2, one", "a: batch 2, hot", "b: batch 2, uniform"
]  # fmt: skip


def test_a_recipe_runs_every_part_and_writes_every_report(ran, path, tmp_path):
    told, numbers = [], []
    out = tmp_path / "out"
    reports = sweep(
        read_recipe(path), out,
        started=lambda todo, had: told.append((len(todo), had)),
        progress=lambda now: numbers.append((now.number, now.cases)),
    )  # fmt: skip
    assert labels(ran.log) == EVERY
    assert [entry for entry in ran.log if entry[0] == "open"] == [("open", "a", "b"), ("open", "b")]
    assert told == [(5, 0)]
    assert set(numbers) == {(number, 5) for number in range(1, 6)}
    assert read_reports(out) == reports
    assert list(reports) == ["both", "alone"]
    assert [case.case.label for case in reports["both"].cases] == [e[3:] for e in EVERY[:4]]
    assert read_reports(out / "both") == {"": reports["both"]}
    page = (out / "report.html").read_text()
    assert page.count("<main") == 3
    assert "<summary><h2>both</h2>" in page
    assert "2 comparisons" in page
    assert {len(r.samples_ms) for case in reports["both"].cases for r in case.results} == {2}


def test_the_combined_file_keeps_to_its_schema(ran, path, tmp_path):
    sweep(read_recipe(path), tmp_path / "out")
    folder = resources.files("utune_deploy.deploy.bench")
    inner, outer = (
        json.loads((folder / name).read_text()) for name in ("schema.json", "sweep_schema.json")
    )
    registry = referencing.Registry().with_resource(
        "schema.json", referencing.Resource.from_contents(inner)
    )
    value = json.loads((tmp_path / "out" / "report.json").read_text())
    validator = jsonschema.Draft202012Validator(outer, registry=registry)
    validator.validate(value)
    value["reports"]["both"]["cases"][0]["surprise"] = 1
    with pytest.raises(jsonschema.ValidationError, match="surprise"):
        validator.validate(value)


def test_a_sweep_that_was_stopped_goes_on(ran, path, tmp_path):
    from utune_deploy.deploy.bench.case import Case

    ran.stops.append(Case(2, "one"))
    with pytest.raises(Stop):
        sweep(read_recipe(path), tmp_path / "out")
    assert labels(ran.log) == EVERY[:2]
    before = json.loads((tmp_path / "out" / "parts" / "both" / "1-one.json").read_text())
    ran.stops.clear()
    ran.log.clear()
    reports = sweep(read_recipe(path), tmp_path / "out")
    assert labels(ran.log) == EVERY[2:]
    assert reports["both"].cases[0].results[0].samples_ms == tuple(
        before["report"]["cases"][0]["results"][0]["samples_ms"]
    )
    ran.log.clear()
    sweep(read_recipe(path), tmp_path / "out")
    assert ran.log == []  # nothing to do: no engine is opened


def test_two_sittings_are_said(ran, path, tmp_path):
    sweep(read_recipe(path), tmp_path / "out")
    file = tmp_path / "out" / "parts" / "both" / "1-one.json"
    value = json.loads(file.read_text())
    file.write_text(json.dumps({**value, "sitting": "2026-01-01T00:00:00+00:00"}))
    reports = sweep(read_recipe(path), tmp_path / "out")
    assert "2 sittings, begun 2026-01-01" in reports["both"].warnings[-1]
    assert not any("sittings" in warning for warning in reports["alone"].warnings)


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ("nothing", []),
        ("a comment", []),
        ("another batch", ["b: batch 1, uniform"]),
        ("nodes", EVERY[4:]),
        ("beside", EVERY[4:]),
        ("settings", EVERY),
        ("device", EVERY),
        ("bundle b", EVERY),
        ("machine", EVERY),
        ("damage", EVERY[:1]),
        ("fresh", EVERY),
    ],
)
def test_only_what_depends_on_the_change_runs_again(
    ran, path, tmp_path, monkeypatch, change, again
):
    sweep(read_recipe(path), tmp_path / "out")
    ran.log.clear()
    text = path.read_text()
    if change == "a comment":
        path.write_text(f"# why\n{text}")
    elif change == "another batch":
        path.write_text(text.replace("batches: [2], ", "batches: [1, 2], "))
    elif change == "nodes":
        path.write_text(text.replace("{name: alone,", "{nodes: true, name: alone,"))
    elif change == "beside":
        (tmp_path / "d.safetensors").write_text("")
        text = text.replace("b: b}", "b: {folder: b, deltas: [d.safetensors]}}")
        path.write_text(text.replace("{name: alone,", "{beside: [torch], name: alone,"))
    elif change == "settings":
        path.write_text(text.replace("rounds: 2", "rounds: 3"))
    elif change == "device":
        path.write_text(f"{text}device: {{threads: 1}}\n")
    elif change == "bundle b":
        (tmp_path / "b" / "manifest.json").write_text('"another"')
    elif change == "machine":
        machine = replace(module.read_machine(), cpu="Another")
        monkeypatch.setattr(module, "read_machine", lambda: machine)
    elif change == "damage":
        (tmp_path / "out" / "parts" / "both" / "1-one.json").write_text("{")
    sweep(read_recipe(path), tmp_path / "out", fresh=change == "fresh")
    assert labels(ran.log) == again


def test_a_batch_that_does_not_fit_is_refused_before_anything_runs(ran, path, tmp_path):
    path.write_text(RECIPE.replace("batches: [2]", "batches: [3]"))
    with pytest.raises(UsageError, match=r"comparisons\[1\], alone"):
        sweep(read_recipe(path), tmp_path / "out")
    assert ran.log == []


def test_a_folder_with_another_report_is_left_alone(ran, path, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("{}")
    with pytest.raises(UsageError, match="no recipe made"):
        sweep(read_recipe(path), tmp_path / "out")
