"""What is asked of TensorRT: round trips, the command of trtexec, and every recipe that is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from utune_deploy.export.engine import Tensor
from utune_deploy.export.targets.tensorrt import builder
from utune_deploy.export.targets.tensorrt.folder import readme, write_folder
from utune_deploy.export.targets.tensorrt.recipe import (
    Profile,
    Recipe,
    default_profiles,
    read_recipe,
    trtexec,
)
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError

if TYPE_CHECKING:
    from pathlib import Path

IMAGES = Tensor("images", "float32", ("batch", 3, 4, 4))
TASK = Tensor("task", "int64", ("batch",))
BANK = Tensor("bank/up", "float16", ("tasks", 8, 3))
PLAIN = Recipe(
    onnx="model.onnx",
    sha256=builder.digest(b"graph"),
    precision="fp16",
    inputs=(IMAGES, TASK),
    profiles=default_profiles(16),
    identity="me",
    check="passed",
)
BANKED = replace(PLAIN, inputs=(IMAGES, TASK, BANK), tasks=Profile(1, 3, 16))
FORMS = [
    PLAIN,
    BANKED,
    replace(PLAIN, weights="stripped", timing_cache=None, optimization_level=5),
    replace(PLAIN, weights="refit", refit=("bank/up", "bank/down")),
    replace(PLAIN, hardware_compatibility="ampere-plus", version_compatible=True),
    replace(PLAIN, precision="bf16", check="unchecked"),
]


@pytest.mark.parametrize("recipe", FORMS)
def test_a_recipe_comes_back_as_it_was_written(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"graph")
    recipe.write(tmp_path)
    assert read_recipe(tmp_path) == recipe
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("largest", "ranges"),
    [
        (1, [(1, 1)]),
        (2, [(1, 1), (2, 2)]),
        (8, [(1, 1), (2, 8)]),
        (16, [(1, 1), (2, 8), (9, 16)]),
        (64, [(1, 1), (2, 8), (9, 32), (33, 64)]),
    ],
)
def test_profiles_hold_every_batch_once(largest: int, ranges: list[tuple[int, int]]) -> None:
    profiles = default_profiles(largest)
    assert [(p.min, p.max) for p in profiles] == ranges
    assert all(p.opt == p.max for p in profiles)
    held = [batch for p in profiles for batch in range(p.min, p.max + 1)]
    assert held == list(range(1, largest + 1))


def changed(field: str, value: Any) -> dict[str, Any]:
    entry = copy.deepcopy(BANKED.to_json())
    entry[field] = value
    return entry


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("format", "cake", "format is 'cake'"),
        ("version", 2, "version is 2"),
        ("version", True, "wrong type"),
        ("surprise", 1, "surprise is not a field"),
        ("precision", "int4", "precision is 'int4'"),
        ("workspace", 0, "workspace is 0"),
        ("workspace", "4G", "wrong type"),
        ("optimization_level", 6, "optimization_level is 6"),
        ("hardware_compatibility", "all", "hardware_compatibility is 'all'"),
        ("weights", "thin", "weights is 'thin'"),
        ("weights", "refit", "refit names weights exactly"),
        ("refit", ["bank/up"], "refit names weights exactly"),
        ("check", "probably", "check is 'probably'"),
        ("onnx", {"file": "model.onnx"}, "onnx does not hold"),
        ("onnx", {"file": "../model.onnx", "sha256": "0"}, "not a plain file name"),
        ("timing_cache", "/tmp/cache", "not a plain file name"),
        ("profiles", [], "profiles is empty"),
        ("profiles", [[1, 8, 4]], "profile 0 is [1, 8, 4]"),
        ("profiles", [[0, 1, 1]], "profile 0 is [0, 1, 1]"),
        ("profiles", [[1, 1]], "profile 0 is [1, 1]"),
        ("tasks", [3, 2, 1], "tasks is [3, 2, 1]"),
        ("tasks", None, "tasks sets the size"),
        ("inputs", [{"name": "images"}], "is not right"),
        ("inputs", [{"name": "images", "dtype": "float32", "shape": ["rows"]}], "is not right"),
        ("inputs", [{"name": "b", "dtype": "float32", "shape": ["tasks"]}], "no batch"),
    ],
)
def test_a_recipe_that_is_not_right_is_refused_in_words(
    field: str, value: Any, says: str, tmp_path: Path
) -> None:
    entry = changed(field, value)
    found = "; ".join(builder.problems(entry))
    assert says.replace("no batch", "no input has a batch axis") in found
    (tmp_path / "model.onnx").write_bytes(b"graph")
    (tmp_path / "recipe.json").write_text(json.dumps(entry))
    with pytest.raises(IncompatibleArtefact) as caught:
        read_recipe(tmp_path)
    assert caught.value.exit_code == 4


def test_a_field_that_is_missing_is_named() -> None:
    entry = PLAIN.to_json()
    del entry["identity"]
    assert builder.problems(entry) == ["identity is missing"]


def test_a_recipe_that_cannot_be_built_is_never_made() -> None:
    for wrong in (
        {"version_compatible": True, "weights": "stripped"},
        {"weights": "refit", "refit": ("a", "a")},
    ):
        with pytest.raises(UsageError, match="cannot build such a recipe"):
            replace(PLAIN, **wrong)


def test_another_graph_or_none_is_refused(tmp_path: Path) -> None:
    PLAIN.write(tmp_path)
    with pytest.raises(IncompatibleArtefact, match="missing"):
        read_recipe(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"another graph")
    with pytest.raises(IncompatibleArtefact, match="not the file"):
        read_recipe(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "recipe.json").write_text(text)
        with pytest.raises(IncompatibleArtefact):
            read_recipe(tmp_path)


def test_trtexec_builds_the_same() -> None:
    assert trtexec(BANKED).split() == [
        "trtexec",
        "--onnx=model.onnx",
        "--saveEngine=model.plan",
        "--noTF32",
        "--memPoolSize=workspace:4096M",
        "--builderOptimizationLevel=3",
        "--timingCacheFile=timing.cache",
        "--profile=0",
        "--minShapes=images:1x3x4x4,task:1,bank/up:1x8x3",
        "--optShapes=images:1x3x4x4,task:1,bank/up:3x8x3",
        "--maxShapes=images:1x3x4x4,task:1,bank/up:16x8x3",
        "--profile=1",
        "--minShapes=images:2x3x4x4,task:2,bank/up:1x8x3",
        "--optShapes=images:8x3x4x4,task:8,bank/up:3x8x3",
        "--maxShapes=images:8x3x4x4,task:8,bank/up:16x8x3",
        "--profile=2",
        "--minShapes=images:9x3x4x4,task:9,bank/up:1x8x3",
        "--optShapes=images:16x3x4x4,task:16,bank/up:3x8x3",
        "--maxShapes=images:16x3x4x4,task:16,bank/up:16x8x3",
        "--profilingVerbosity=detailed",
        "--exportLayerInfo=layers.json",
        "--skipInference",
    ]


def test_trtexec_says_what_differs() -> None:
    assert "--noTF32" not in trtexec(replace(PLAIN, precision="tf32"))
    assert "--stronglyTyped" in trtexec(PLAIN, 10)
    assert "--stripWeights" in trtexec(FORMS[2])
    assert "--timingCacheFile" not in trtexec(FORMS[2])
    assert "--hardwareCompatibilityLevel=ampere+ --versionCompatible" in trtexec(FORMS[4])
    with pytest.raises(UsageError, match="single weights"):
        trtexec(FORMS[3])


def test_the_page_says_what_is_unchecked_and_what_cannot_be_done() -> None:
    assert "**unchecked**" in readme(FORMS[5], reads_bank=False)
    assert "**unchecked**" not in readme(PLAIN, reads_bank=False)
    assert "bank.safetensors" in readme(BANKED, reads_bank=True)
    assert "Not possible" in readme(FORMS[3], reads_bank=False)
    assert "sh trtexec.sh" in readme(PLAIN, reads_bank=False)
    assert "trtexec.sh" not in readme(FORMS[3], reads_bank=False)


def test_a_folder_holds_the_command_of_trtexec_unless_it_cannot_build_it(tmp_path: Path) -> None:
    for name, recipe in (("plain", PLAIN), ("refit", FORMS[3])):
        (tmp_path / name).mkdir()
        write_folder(tmp_path / name, recipe, b"", [], {})
    script = tmp_path / "plain" / "trtexec.sh"
    assert script.read_text().splitlines()[1] == f'exec {trtexec(PLAIN)} "$@"'
    assert not (tmp_path / "refit" / "trtexec.sh").exists()
