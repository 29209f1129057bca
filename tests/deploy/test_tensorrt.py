"""`export --target tensorrt` from files to files: prepared, built by the stand-in, and refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from utune_deploy.export.targets.tensorrt.recipe import read_recipe
from utune_deploy.export.targets.tensorrt.session import TensorRTSession

if TYPE_CHECKING:
    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

STANDINS = Path(__file__).parents[1] / "export" / "standins"
COMMON = ("--max-batch", 4, "--threads", 1, "--target", "tensorrt")
FILES = ["README.md", "build.py", "model.onnx", "recipe.json", "tasks.json", "trtexec.sh"]


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, vit: Backbone, deltas: dict[str, Delta]
) -> Path:
    from utune_deploy.merge.backbone import save
    from utune_deploy.merge.delta import save_delta

    root = tmp_path_factory.mktemp("files")
    save(root / "backbone", vit)
    for task in ("lora", "dual", "prefix"):
        save_delta(root / f"{task}.safetensors", deltas[task])
    return root


@pytest.fixture
def export(cli: Any, files: Path, tmp_path: Path) -> Any:
    """The command: `(*tasks, *options) -> Said`, into `tmp_path/out`."""

    def export(tasks: tuple[str, ...], *options: object) -> Any:
        named = [files / f"{task}.safetensors" for task in tasks]
        where = ("--weights", files / "backbone", "-o", tmp_path / "out")
        return cli("export", *named, *where, *COMMON, *options)

    return export


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_a_prepared_folder_holds_a_checked_graph_of_standard_operators(
    precision: str, export: Any, tmp_path: Path
) -> None:
    said = export(("lora", "dual"), "--prepare", "--precision", precision)
    assert said.code == 0, said.err
    out = tmp_path / "out"
    typed = ["precision.json"] if precision in ("fp16", "bf16") else []
    assert listing(out) == sorted([*FILES, *typed])
    recipe = read_recipe(out)
    assert recipe.check == ("unchecked" if precision == "bf16" else "passed")
    assert ("unchecked" in said.err) == (precision == "bf16")
    assert ("**unchecked**" in (out / "README.md").read_text()) == (precision == "bf16")
    assert recipe.precision == precision
    model = onnx.load(out / "model.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert [entry.domain for entry in model.opset_import] == [""]
    attention = [node for node in model.graph.node if node.op_type == "Attention"]
    assert attention
    assert all(len(node.output) == 1 for node in attention)  # TensorRT reads no other
    half = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}.get(precision)
    assert (half in {t.data_type for t in model.graph.initializer}) == (half is not None)
    assert [task["name"] for task in json.loads((out / "tasks.json").read_text())] == [
        "lora",
        "dual",
    ]


def test_the_folder_is_built_by_its_own_script_and_answers_as_torch_does(
    export: Any, tmp_path: Path, tensorrt: Any, deltas: Any, alone: Any, images: Any
) -> None:
    assert export(("lora", "prefix"), "--prepare", "--bank", "inputs").code == 0
    out = tmp_path / "out"
    assert listing(out) == sorted([*FILES, "bank.safetensors"])
    where = {"PATH": os.environ["PATH"], "PYTHONPATH": str(STANDINS)}
    done = subprocess.run(
        [sys.executable, "build.py"], cwd=out, env=where,
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    from safetensors.numpy import load_file

    session = TensorRTSession(
        out / "model.plan",
        bank=load_file(out / "bank.safetensors"),
        identity=read_recipe(out).identity,
    )
    found = session.run(images(2), np.array([0, 1]))
    for row, task in enumerate(("lora", "prefix")):
        wanted = alone(deltas[task], images(2))[row]
        np.testing.assert_allclose(found[row, : len(wanted)], wanted, atol=1e-4)


def test_where_tensorrt_is_the_plan_is_built_and_held_to_torch(
    export: Any, tmp_path: Path, tensorrt: Any
) -> None:
    said = export(("lora", "dual"), "--json")
    assert said.code == 0, said.err
    assert said.json["recipe"]["weights"] == "plain"
    assert {"model.plan", "plan.json", "layers.json", "timing.cache"} <= set(
        listing(tmp_path / "out")
    )
    tensorrt.faults.add("build_serialized_network")
    again = export(("lora", "dual"), "--force")
    assert again.code == 6
    assert "was told to fail" in again.err
    assert (tmp_path / "out" / "model.plan").exists()  # the old one


def test_a_plan_that_does_not_agree_with_torch_is_not_written(
    export: Any, tmp_path: Path, tensorrt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TensorRTSession.run
    monkeypatch.setattr(TensorRTSession, "run", lambda *args: run(*args) + np.float32(0.1))
    said = export(("lora", "dual"))
    assert said.code == 3
    assert "the plan does not agree with torch" in said.err
    assert listing(tmp_path) == []


def test_weights_to_refit_are_named_and_really_replace_the_tasks(
    export: Any, tmp_path: Path, tensorrt: Any, files: Path, cli: Any, images: Any
) -> None:
    said = export(("lora", "dual"), "--weights-form", "refit")
    assert said.code == 0, said.err
    recipe = read_recipe(tmp_path / "out")
    assert recipe.weights == "refit"
    weights = {t.name: t for t in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer}
    assert set(recipe.refit) == {name for name in weights if name.startswith("bank/")}
    session = TensorRTSession(tmp_path / "out" / "model.plan")
    first = session.run(images(2), np.array([0, 1]))
    swapped = {name: onnx.numpy_helper.to_array(weights[name])[::-1] for name in recipe.refit}
    session.refit(swapped)
    second = session.run(images(2)[::-1], np.array([0, 1]))[::-1]
    np.testing.assert_allclose(
        second[0, :3], session.run(images(2), np.array([1, 1]))[0, :3], atol=1e-5
    )
    third = session.run(images(2), np.array([1, 0]))
    np.testing.assert_allclose(third[:, :3], first[:, :3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tasks", "options", "says"),
    [
        (("lora",), (), "no weights of the tasks to refit"),
        (("lora", "dual"), ("--bank", "inputs"), "no weights of the tasks to refit"),
        (("lora",), ("--mode", "parallel"), "folded into other weights"),
        (("lora", "dual"), ("--mode", "fan-out"), "no weights of the tasks to refit"),
    ],
)
def test_weights_that_cannot_be_refitted_are_refused(
    tasks: Any, options: Any, says: str, export: Any, tmp_path: Path
) -> None:
    said = export(tasks, "--prepare", "--weights-form", "refit", *options)
    assert said.code == 2
    assert says in said.err
    assert listing(tmp_path) == []


def test_without_tensorrt_the_way_is_named(
    export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    said = export(("lora",))
    assert (said.code, said.out) == (5, "")
    assert "pip install 'utune-deploy[tensorrt]'" in said.err
    assert "--prepare" in said.err
    assert listing(tmp_path) == []


def test_options_of_another_target_are_refused(cli: Any, files: Path, tmp_path: Path) -> None:
    start = (
        "export",
        files / "lora.safetensors",
        "--weights",
        files / "backbone",
        "-o",
        tmp_path / "o",
    )
    for options in (("--prepare",), ("--weights-form", "plain")):
        said = cli(*start, *options)
        assert said.code == 2
        assert "of --target tensorrt" in said.err
    said = cli(*start, "--target", "tensorrt", "--prepare", "--fan-out")
    assert said.code == 2
    assert "one folder holds one" in said.err


def test_force_replaces_a_prepared_folder(export: Any, tmp_path: Path) -> None:
    assert export(("lora",), "--prepare").code == 0
    assert export(("lora",), "--prepare").code == 2
    assert export(("lora",), "--prepare", "--force", "--weights-form", "stripped").code == 0
    assert read_recipe(tmp_path / "out").weights == "stripped"


def test_doctor_tells_of_tensorrt_and_its_device(
    cli: Any, tensorrt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row() -> tuple[str, str]:
        rows = {row["what"]: (row["state"], row["do"]) for row in cli("doctor", "--json").json}
        return rows["tensorrt"]

    assert row() == ("11.4.0.106 loads, compute capability 9.0", "")
    tensorrt.faults.add("cudaGetDevice")
    assert row()[0] == "11.4.0.106 loads; there is no CUDA device for TensorRT"
    tensorrt.__version__ = "9.0"
    assert "9.0 is here" in row()[0]
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    state, do = row()
    assert state == "absent"
    assert "pip install 'utune-deploy[tensorrt]'" in do
