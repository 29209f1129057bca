from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from utune_deploy.deploy.bench.beside import Beside
from utune_deploy.deploy.bench.case import MIXES, Case
from utune_deploy.deploy.bench.recipe import Together, read_recipe
from utune_deploy.deploy.bench.report import Settings
from utune_deploy.export.engine import Device
from utune_deploy.merge.errors import UsageError

DOCS = Path(__file__).resolve().parents[3] / "docs" / "bench.md"
LEAST = {
    "format": "utune-bench-recipe", "version": 1, "bundles": {"a": "runs/a", "b": "runs/b"}, "batches": [1, 8]
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Writes a recipe beside two folders that look like bundles."""
    for name in ("a", "b"):
        (tmp_path / "sub" / "runs" / name).mkdir(parents=True)
        (tmp_path / "sub" / "runs" / name / "manifest.json").write_text("{}")

    def write(value):
        path = tmp_path / "sub" / "recipe.yaml"
        path.write_text(value if isinstance(value, str) else yaml.safe_dump(value, sort_keys=False))
        return path

    return write


def test_the_least_recipe_compares_all_with_the_first(write, tmp_path):
    recipe = read_recipe(write(LEAST))
    assert recipe.bundles == {name: tmp_path / "sub" / "runs" / name for name in "ab"}
    assert recipe.settings == Settings()
    assert (recipe.device, recipe.resident) == (Device(), False)
    assert recipe.comparisons == (Together("a", ("a", "b"), (Case(1), Case(8))),)


def test_everything_can_be_said(write, tmp_path):
    recipe = read_recipe(write({
        **LEAST,
        "mixes": list(MIXES),
        "settings": {"rounds": 7, "warmup": 2, "seconds": 0.5, "settle": 0, "seed": 4},
        "device": {"provider": "cuda", "threads": 3, "kernels": "k.so", "resident": True},
        "comparisons": [
            {"name": "first, small", "bundle": "b", "against": ["a"], "batches": [2], "mixes": ["hot"]},
            {"bundle": "a"}, {"bundle": "a", "against": ["b"]},
        ],
    }))  # fmt: skip
    assert recipe.settings == Settings(2, 7, 0.5, 0, 4)
    assert recipe.device == Device("cuda", 3, tmp_path / "sub" / "k.so")
    assert recipe.resident
    assert recipe.comparisons[0] == Together("first, small", ("b", "a"), (Case(2, "hot"),))
    assert [together.name for together in recipe.comparisons[1:]] == ["a", "a vs b"]
    assert len(recipe.comparisons[1].cases) == 8


@pytest.mark.parametrize(
    ("change", "where", "told"),
    [
        ({"format": "x"}, ": format", "wanted: utune-bench-recipe"),
        ({"version": 2}, ": version", "found:  2"),
        ({"bundle": "a"}, ": bundle", "not known"),
        ({"bundles": None}, ": bundles", "no mapping"),
        ({"bundles": {}}, ": bundles", "names no bundle"),
        ({"bundles": {"a": "runs/none"}}, ": bundles.a", "runs/none"),
        ({"bundles": {"a": 3}}, ": bundles.a", "found:  3"),
        ({"bundles": {3: "runs/a"}}, ": bundles.3", "a name"),
        ({"batches": []}, ": batches", "not empty"),
        ({"batches": [1, 0]}, ": batches[1]", "found:  0"),
        ({"batches": [True]}, ": batches[0]", "found:  True"),
        ({"batches": [1, 1]}, ": batches", "twice"),
        ({"mixes": ["salad"]}, ": mixes[0]", "one, uniform, zipf, hot"),
        ({"settings": {"rounds": 1}}, ": settings.rounds", "at least 2"),
        ({"settings": {"rounds": 2.5}}, ": settings.rounds", "a whole number"),
        ({"settings": {"seconds": float("inf")}}, ": settings.seconds", "found:  inf"),
        ({"settings": {"speed": 1}}, ": settings.speed", "rounds, warmup"),
        ({"device": {"provider": "tpu"}}, ": device.provider", "cpu, cuda"),
        ({"device": {"threads": 0}}, ": device.threads", "at least 1"),
        ({"device": {"resident": "yes"}}, ": device.resident", "true or false"),
        ({"comparisons": []}, ": comparisons", "not empty"),
        ({"comparisons": [{"against": ["a"]}]}, ": comparisons[0].bundle", "missing"),
        ({"comparisons": [{"bundle": "c"}]}, ": comparisons[0].bundle", "one of a, b"),
        ({"comparisons": [{"bundle": "a", "against": ["a"]}]}, ": comparisons[0].against", "itself"),
        ({"comparisons": [{"bundle": "a", "against": ["z"]}]}, ": comparisons[0].against[0]", "z"),
        ({"comparisons": [{"bundle": "a"}, {"bundle": "a"}]}, ": comparisons", "same name"),
        ({"comparisons": [{"bundle": "a", "name": "x"}, {"bundle": "b", "name": "X"}]}, ": comparisons", "same name"),
        ({"comparisons": [{"bundle": "a", "name": "Parts"}]}, ": comparisons[0].name", "not parts"),
        ({"comparisons": [{"bundle": "a", "name": "../x"}]}, ": comparisons[0].name", "../x"),
        ({"comparisons": [{"bundle": "a", "batches": [-1]}]}, ": comparisons[0].batches[0]", "-1"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_its_place(write, change, where, told):
    path = write({**LEAST, **change})
    with pytest.raises(UsageError) as refused:
        read_recipe(path)
    assert refused.value.details["where"] == f"{path}{where}"
    assert told in str(refused.value)


@pytest.mark.parametrize("key", ["format", "version", "bundles", "batches"])
def test_what_is_missing_is_named(write, key):
    with pytest.raises(UsageError, match="missing") as refused:
        read_recipe(write({name: value for name, value in LEAST.items() if name != key}))
    assert refused.value.details["wanted"] == key


@pytest.mark.parametrize(
    "text", ["[", "a: 1\na: 2\n", "!!python/object/apply:os.getcwd []", "? [1]\n: 2\n"]
)
def test_what_is_no_plain_yaml_is_refused(write, text):
    with pytest.raises(UsageError):
        read_recipe(write(text))
    with pytest.raises(UsageError, match="no such recipe"):
        read_recipe(write("").with_name("none.yaml"))


def test_the_recipe_of_the_documentation_is_one(write, tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    folders = ("tasks8", "tasks64", "fused", "backbone")
    for name in folders:
        (tmp_path / "sub" / "runs" / name).mkdir()
        (tmp_path / "sub" / "runs" / name / "manifest.json").write_text("{}")
    (tmp_path / "sub" / "runs" / "task0.safetensors").write_text("")
    assert len(read_recipe(write(text)).comparisons) == 3


def test_what_stands_beside_is_made_from_files_that_the_recipe_names(write, tmp_path):
    folder = tmp_path / "sub" / "runs"
    for name in ("t0", "t1"):
        (folder / f"{name}.safetensors").write_text("")
    bundle = {
        "folder": "runs/a",
        "weights": "runs/b",
        "deltas": ["runs/t1.*", "runs/*.safetensors"],
    }
    comparison = {"bundle": "a", "beside": ["torch", "in-turn"]}
    recipe = read_recipe(write({**LEAST, "bundles": {"a": bundle}, "comparisons": [comparison]}))
    deltas = (folder / "t1.safetensors", folder / "t0.safetensors")
    assert recipe.comparisons[0].beside == Beside(("torch", "in-turn"), folder / "b", deltas)
    assert recipe.bundles == {"a": folder / "a"}

    for change, told in [
        ({"deltas": ["runs/none*"]}, r"bundles\.a\.deltas\[0\](.|\n)*runs/none"),
        ({"weights": "runs/none"}, r"bundles\.a\.weights"),
        ({"folder": "runs/none"}, r"bundles\.a\.folder"),
    ]:
        with pytest.raises(UsageError, match=told):
            read_recipe(write({**LEAST, "bundles": {"a": {**bundle, **change}}}))
    wrong = [{"bundle": "a", "beside": ["torch", "salad"]}]
    with pytest.raises(UsageError, match=r"comparisons\[0\]\.beside\[1\](.|\n)*unfused"):
        read_recipe(write({**LEAST, "bundles": {"a": bundle}, "comparisons": wrong}))
    with pytest.raises(UsageError, match=r"beside(.|\n)*folder: "):
        read_recipe(write({**LEAST, "comparisons": [comparison]}))
