"""The committed digits example answers as its results say, and its training still runs."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from utune_deploy.merge.attach import restore
from utune_deploy.merge.backbone import load
from utune_deploy.merge.delta import load_delta
from utune_deploy.merge.fan_out import share
from utune_deploy.merge.sites import measure

FOLDER = Path(__file__).parents[2] / "examples" / "digits"
RESULTS = json.loads((FOLDER / "results.json").read_text())
ROWS = {**RESULTS["tasks"], **RESULTS["side_tasks"]}
BUDGET = 4_000_000  # bytes of everything that the example commits


@pytest.fixture(scope="module")
def example():
    """The two scripts, imported as when they are run: from their own folder."""
    pytest.importorskip("sklearn.datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        for name in ("data", "train"):
            patch.delitem(sys.modules, name, raising=False)
        yield SimpleNamespace(
            data=importlib.import_module("data"), train=importlib.import_module("train")
        )
        for name in ("data", "train"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def backbone():
    return load(None, None, FOLDER / "backbone")


@pytest.fixture(scope="module")
def sites(backbone):
    return measure(backbone)


@pytest.fixture(autouse=True)
def _one_thread():
    """As in training; small matrices are slower on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_results_are_about_the_committed_files(backbone, example):
    assert backbone.identity.fingerprint == RESULTS["backbone"]["fingerprint"]
    names = sorted(path.stem for path in (FOLDER / "deltas").glob("*.safetensors"))
    assert list(RESULTS["tasks"]) == list(example.data.TASKS)
    assert list(RESULTS["side_tasks"]) == list(example.data.SIDE_TASKS)
    assert names == sorted(ROWS) == sorted(example.train.RECIPES)
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.suffix != ".pyc") < BUDGET


def test_the_split_is_stratified_and_disjoint(example):
    train, test = example.data.pictures("train"), example.data.pictures("test")
    assert len(train) + len(test) == 1797
    assert not {p.number for p in train} & {p.number for p in test}
    for digit in range(10):
        count = [sum(p.digit == digit for p in part) for part in (train, test)]
        assert count[1] == sum(count) // example.data.TEST_EVERY


def test_the_tasks_differ_in_tuner_and_in_number_of_classes():
    deltas = [load_delta(FOLDER / "deltas" / f"{name}.safetensors") for name in RESULTS["tasks"]]
    kinds = {branch.tuner.kind for delta in deltas for branch in delta.branches.values()}
    assert kinds == {"bottleneck", "prefix", "prompt", "bias", "head"}
    assert len({RESULTS["tasks"][name]["method"] for name in RESULTS["tasks"]}) == len(deltas)
    assert {len(delta.labels) for delta in deltas} == {2, 3, 4, 10}


def test_side_tasks_share_the_whole_trunk_and_another_tuner_does_not(backbone, sites):
    names = [*RESULTS["side_tasks"], "digit"]
    deltas = [load_delta(FOLDER / "deltas" / f"{name}.safetensors") for name in names]
    tuners = [next(iter(delta.branches.values())).tuner.kind for delta in deltas]
    assert tuners == ["unipt", "ladder", "bottleneck"]
    side, other = share(backbone, deltas, sites)
    assert side.rows == (0, 1)
    assert side.fork is not None
    assert side.fork.module == backbone.classifiers[0]
    assert other.rows == (2,)


@pytest.mark.parametrize("name", ROWS)
def test_a_tuner_answers_as_its_results_say(name, example, backbone, sites):
    task, row = example.data.EVERY_TASK[name], ROWS[name]
    recipe = example.train.RECIPES[name]
    assert row["method"] == recipe.method
    delta = load_delta(FOLDER / "deltas" / f"{name}.safetensors")
    assert delta.task == name
    assert delta.labels == task.labels
    assert len(delta.labels) == row["classes"]
    assert delta.preprocessing == example.data.PREPROCESSING
    assert delta.parameters == row["tuner"]["parameters"]
    held_out = example.data.tensors(example.data.examples(task, "test"), delta.preprocessing)
    assert len(held_out[1]) == row["held_out"]
    assert set(held_out[1].tolist()) == set(range(row["classes"]))
    right = example.train.correct(restore(backbone, delta, sites), *held_out)
    assert right == row["tuner"]["correct"]
    assert row["tuner"]["accuracy"] == round(right / row["held_out"], 4)
    assert f"({right} of {row['held_out']})" in delta.provenance["held-out accuracy"]
    assert right > row["probe"]["correct"]


@pytest.mark.parametrize("name", ROWS)
def test_training_still_learns(name, example, backbone):
    images, classes = example.data.tensors(
        example.data.examples(example.data.EVERY_TASK[name], "train")[:192]
    )
    start = example.train.probe(backbone, images, classes, ROWS[name]["classes"])
    with torch.no_grad():
        for value in start.weights[-1].values():
            value.zero_()  # from no knowledge at all, so that one epoch has something to learn
    recipe = replace(example.train.RECIPES[name], epochs=2, wobble=0.0)
    trained, losses = example.train.tune(backbone, recipe, start, images, classes)
    assert losses[-1] < losses[0]
    assert example.train.correct(trained, images, classes) > len(classes) // len(
        trained.weights[-1]["bias"]
    )


def test_one_task_trained_again_leaves_the_others_alone(tmp_path, example, monkeypatch):
    out = tmp_path / "digits"
    shutil.copytree(FOLDER, out, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    every = example.data.examples
    monkeypatch.setattr(example.train, "examples", lambda task, split: every(task, split)[:64])
    quick = replace(example.train.RECIPES["three"], epochs=1)
    monkeypatch.setitem(example.train.RECIPES, "three", quick)
    monkeypatch.setattr(sys, "argv", ["train.py", "--only", "three", "--out", str(out)])
    try:
        example.train.main()
    finally:
        torch.use_deterministic_algorithms(mode=False)
    changed = [
        path.name
        for path in sorted(FOLDER.rglob("*"))
        if path.suffix in (".safetensors", ".json")
        and path.read_bytes() != (out / path.relative_to(FOLDER)).read_bytes()
    ]
    assert changed == ["three.safetensors", "results.json"]
    results = json.loads((out / "results.json").read_text())
    assert results["side_tasks"].pop("three")["held_out"] == 64
    assert results == {
        **RESULTS,
        "side_tasks": {n: row for n, row in RESULTS["side_tasks"].items() if n != "three"},
    }


def test_results_about_another_backbone_are_not_added_to(tmp_path, example):
    shutil.copytree(FOLDER / "backbone", tmp_path / "backbone")
    other = {**RESULTS, "backbone": {**RESULTS["backbone"], "fingerprint": "0" * 64}}
    (tmp_path / "results.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="not about the backbone beside it"):
        example.train.take_up(tmp_path)


def test_a_backbone_can_be_trained_again(tmp_path, example, monkeypatch):
    every = example.train.backbone_pictures
    monkeypatch.setattr(
        example.train, "backbone_pictures", lambda split: tuple(t[:256] for t in every(split))
    )
    images, classes = example.train.backbone_pictures("train")
    trained = example.train.train_backbone(tmp_path / "backbone", epochs=6)
    assert trained.identity.arguments == RESULTS["backbone"]["arguments"]
    assert trained.identity.fingerprint != RESULTS["backbone"]["fingerprint"]
    chance = len(classes) / (example.train.SEEN * example.train.TURNS)
    assert example.train.correct(trained.model, images, classes) > 1.5 * chance


def test_the_pictures_are_written_as_the_tasks_show_them(tmp_path, example):
    task = example.data.TASKS["rotated"]
    shown = example.data.examples(task, "test")
    assert example.data.write_png(tmp_path, [task]) == len(shown)
    paths = sorted((tmp_path / "rotated").iterdir())
    assert [path.stem for path in paths] == [example.name for example in shown]
    for path, wanted in zip(paths[:20], shown, strict=False):
        with Image.open(path) as read:
            assert read.size == (8, 8)
            assert read.tobytes() == wanted.image.tobytes()
