"""Half with an audit, and eight bits, end to end: what is written, what it says of itself, what is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from utune_deploy.deploy.calibration import Calibration, noise, read_calibration
from utune_deploy.deploy.graphs import backbone_engine
from utune_deploy.export.bundle import open_bundle
from utune_deploy.export.engine import Device
from utune_deploy.merge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

ROWS = 24
PRODUCTS = 13  # of the ViT: its patches, and four in each of three blocks
COMMON = ("--max-batch", 2, "--threads", 1)
LOOSE = ("--least-agreement", 0.5, "--least-cosine", 0.9)  # of random weights little agrees


@pytest.fixture(scope="module")
def files(
    vit: Backbone, deltas: dict[str, Delta], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with the backbone, the deltas, arrays and pictures to calibrate with."""
    from PIL import Image

    from utune_deploy.merge.backbone import save
    from utune_deploy.merge.delta import save_delta

    root = tmp_path_factory.mktemp("files")
    save(root / "backbone", vit)
    for task in ("lora", "dual"):
        save_delta(root / f"{task}.safetensors", deltas[task])
    drawn = np.random.default_rng(5)
    np.savez(root / "cal.npz", images=drawn.standard_normal((ROWS, 3, 32, 32)).astype(np.float32))
    for task in ("lora", "dual"):
        (root / "pictures" / task).mkdir(parents=True)
        for number in range(10):
            pixels = drawn.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "pictures" / task / f"{number}.png")
    return root


@pytest.fixture
def export(cli: Any, files: Path, tmp_path: Path) -> Callable[..., Any]:
    """The command: `(*tasks, *options) -> Said`, into `tmp_path/out`."""

    def export(tasks: tuple[str, ...], *options: object, out: str = "out") -> Any:
        named = [files / f"{task}.safetensors" for task in tasks]
        where = ("--weights", files / "backbone", "-o", tmp_path / out)
        return cli("export", *named, *where, *COMMON, *options)

    return export


def quantised(path: Path) -> dict[str, tuple[str, str]]:
    """What gives the two inputs of each MatMul of an engine file."""
    graph = onnx.load(path).graph
    gives = {output: node.op_type for node in graph.node for output in node.output}
    return {
        node.name: (gives.get(node.input[0], ""), gives.get(node.input[1], ""))
        for node in graph.node
        if node.op_type == "MatMul"
    }


# int8


@pytest.mark.parametrize(
    "tasks", [("lora", "dual"), ("lora",), ("dual",)], ids=["multi", "merged", "parallel"]
)
def test_an_int8_bundle_quantises_the_backbone_s_products_and_says_so(
    tasks: tuple[str, ...], export: Any, files: Path, tmp_path: Path, images: Any
) -> None:
    said = export(tasks, "--precision", "int8", "--calibration", files / "cal.npz", *LOOSE)
    assert said.code == 0, said.err
    bundle = open_bundle(tmp_path / "out")
    report = bundle.plan["quantised"]
    assert bundle.engine.precision == "int8"
    assert len(report["products"]) == PRODUCTS
    both = ("DequantizeLinear", "DequantizeLinear")
    found = quantised(tmp_path / "out" / "model.onnx")
    assert {name for name, given in found.items() if given == both} == set(report["products"])
    assert not any(
        "DequantizeLinear" in given for name, given in found.items() if name in report["kept"]
    )
    assert set(found) <= {*report["products"], *report["kept"]}
    half = ROWS // 2 * len(tasks)
    told = report["calibration"]
    assert (told["inputs"], told["rows"], told["held_out"]) == ("arrays of cal.npz", half, half)
    assert bundle.plan["numerics"]["calibration"]["sha256"] == told["sha256"]
    agreed = [c for c in bundle.check["comparisons"] if c["name"].startswith("agreement of")]
    assert [c["rows"] for c in agreed] == [ROWS // 2] * len(tasks)
    assert bundle.check["passed"]
    assert f"uint8 x int8: {PRODUCTS} products" in said.out
    logits = bundle.open_session(Device(threads=1)).run(
        images(2), *([np.array([1, 0])] if tasks[1:] else [])
    )
    assert np.isfinite(logits).all()


def test_nothing_is_written_where_int8_does_not_agree(
    export: Any, files: Path, tmp_path: Path
) -> None:
    said = export(
        ("lora",), "--precision", "int8", "--calibration", files / "cal.npz",
        "--least-agreement", 0, "--least-cosine", 1,
    )  # fmt: skip
    assert (said.code, said.out) == (3, "")
    assert "agreement of lora with float32" in said.err
    assert "--calibration-method percentile" in said.err
    assert not list(tmp_path.iterdir())


def test_what_is_kept_is_part_of_the_identity(export: Any, files: Path, tmp_path: Path) -> None:
    options = ("--precision", "int8", "--calibration", files / "cal.npz", *LOOSE)
    assert export(("lora",), *options, out="a").code == 0
    assert export(("lora",), *options, "--keep-fp32", "node_MatMul_12", out="c").code == 0
    a, c = (open_bundle(tmp_path / out) for out in "ac")
    assert a.identity != c.identity
    assert c.plan["numerics"]["keep_fp32"] == ["node_MatMul_12"]
    assert set(a.plan["quantised"]["products"]) - set(c.plan["quantised"]["products"]) == {
        "node_MatMul_12"
    }
    manifest = tmp_path / "c" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("node_MatMul_12", "node_MatMul_13"))
    from utune_deploy.merge.errors import IncompatibleArtefact

    with pytest.raises(IncompatibleArtefact, match="edited"):
        open_bundle(tmp_path / "c")


def test_check_judges_int8_by_pictures(export: Any, cli: Any, files: Path, tmp_path: Path) -> None:
    calibration = files / "pictures"
    assert export(
        ("lora", "dual"), "--precision", "int8", "--calibration", calibration, *LOOSE,
    ).code == 0  # fmt: skip
    named = [files / f"{task}.safetensors" for task in ("lora", "dual")]
    check = ("check", tmp_path / "out", *named, "--weights", files / "backbone", "--threads", 1)
    blind = cli(*check)
    assert blind.code == 2
    assert "--images" in blind.err
    seeing = cli(*check, "--images", files / "pictures", "--json")
    assert seeing.code == 0, seeing.err
    names = [c["name"] for c in seeing.json["comparisons"]]
    assert names == [
        "agreement of lora with torch, real images",
        "agreement of dual with torch, real images",
        "task rows outside the bank answer NaN",
        "every task's tensors in the bank, value by value",
        "isolation from other tasks' tensors, bit for bit",
        "liveness of every tensor",
    ]
    assert cli(*check, "--images", files / "pictures", "--provider", "cuda").code != 0


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_folder_for_tensorrt_has_symmetric_scales(
    precision: str, export: Any, files: Path, tmp_path: Path
) -> None:
    said = export(
        ("dual",), "--target", "tensorrt", "--prepare", "--precision", precision,
        "--calibration", files / "cal.npz", *LOOSE,
    )  # fmt: skip
    assert said.code == 0, said.err
    report = json.loads((tmp_path / "out" / "precision.json").read_text())
    assert {product["zero"] for product in report["quantised"]["products"].values()} == {0}
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    kind = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}[precision]
    zeros = {node.input[2] for node in graph.node if node.op_type == "QuantizeLinear"}
    assert {t.data_type for t in graph.initializer if t.name in zeros} == {kind}
    assert {node.domain for node in graph.node} == {""}
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["precision"] == precision


# half


def test_kept_nodes_are_float32_in_the_file(export: Any, tmp_path: Path) -> None:
    said = export(("dual",), "--precision", "fp16", "--keep-fp32", "Gelu")
    assert said.code == 0, said.err
    bundle = open_bundle(tmp_path / "out")
    assert len(bundle.plan["typing"]["kept"]["Gelu"]) == 3
    assert bundle.plan["typing"]["islands"]["Gelu"] == 3
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    casts = {n.output[0]: n.attribute[0].i for n in graph.node if n.op_type == "Cast"}
    inside = [n for n in graph.node if n.op_type == "Gelu"]
    assert [casts[n.input[0]] for n in inside] == [TensorProto.FLOAT] * 3
    assert "--keep-fp32 Gelu" in said.out
    assert "fp16: on seeded noise (16 examples) values reach" in said.out
    assert bundle.plan["typing"]["audit"]["rows"] == 16


def test_saturation_is_refused_and_auto_cures_it(export: Any, files: Path, tmp_path: Path) -> None:
    huge = np.full((8, 3, 32, 32), 1e5, np.float32)
    np.savez(tmp_path / "huge.npz", images=huge)
    options = ("--precision", "fp16", "--calibration", tmp_path / "huge.npz")
    said = export(("dual",), *options)
    assert said.code == 3
    assert "images reaches 1e+05" in said.err
    assert not (tmp_path / "out").exists()
    cured = export(("dual",), *options, "--keep-fp32", "auto")
    assert cured.code == 0, cured.err
    assert "fp16: --keep-fp32 auto: node_" in cured.out
    assert "fp16: on arrays of huge.npz (8 examples) values reach" in cured.out
    assert open_bundle(tmp_path / "out").plan["typing"]["kept"]["auto"]


# what is refused


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--precision", "int8"), 2, "takes its ranges from examples"),
        (("--precision", "fp8", "--calibration", "cal.npz"), 5, "--target tensorrt"),
        (("--precision", "int8", "--calibration", "cal.npz", "--provider", "cuda"), 5, "CUDA"),
        (("--precision", "int8", "--calibration", "none"), 2, "no examples to calibrate with"),
        (("--precision", "int8", "--calibration", "few.npz"), 2, "too few examples"),
        (("--precision", "int8", "--calibration", "wrong.npz"), 2, "not what the backbone reads"),
        (("--precision", "int8", "--calibration", "other.npz"), 2, "lacks an array"),
        (("--precision", "int8", "--calibration", "cal.npz", "--keep-fp32", "auto"), 2, "auto is of"),
        (("--precision", "int8", "--calibration", "cal.npz", "--keep-fp32", "Sofa"), 2, "names none"),
        (("--precision", "fp16", "--keep-fp32", "Sofa"), 2, "names none"),
        (("--precision", "fp16", "--least-agreement", 0.9), 2, "are of int8 and fp8"),
        (("--keep-fp32", "Gelu"), 2, "are of fp16, bf16, int8 and fp8"),
        (("--calibration", "cal.npz"), 2, "are of fp16, bf16, int8 and fp8"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_words(
    options: tuple[Any, ...], code: int, said: str, export: Any, files: Path, tmp_path: Path
) -> None:
    images = np.zeros((9, 3, 32, 32), np.float32)
    np.savez(files / "few.npz", images=images[:7])
    np.savez(files / "wrong.npz", images=images[:, :, :16])
    np.savez(files / "other.npz", pictures=images)
    given = [files / o if str(o).endswith((".npz", "none")) else o for o in options]
    found = export(("lora",), *given)
    assert found.code == code, found.err
    assert said in found.err
    assert not list(tmp_path.iterdir())


def test_there_is_no_bare_backbone_in_int8(vit: Backbone) -> None:
    with pytest.raises(UsageError, match="ranges come from examples"):
        backbone_engine(vit, "int8")


# examples


def test_every_second_example_of_a_task_is_held_out() -> None:
    rows = np.arange(7, dtype=np.float32)[:, None]
    used, held = Calibration("x", {"images": rows}, np.array([0, 0, 1, 0, 1, 1, 0])).halves()
    assert (used.rows["images"].ravel().tolist(), held.rows["images"].ravel().tolist()) == (
        [0, 2, 3, 5],
        [1, 4, 6],
    )
    assert (used.task.tolist(), held.task.tolist()) == ([0, 1, 0, 1], [0, 1, 0])
    assert used.digest != held.digest


def test_a_file_may_hold_examples_of_each_task(vit: Backbone, tmp_path: Path) -> None:
    zeros, ones = (np.full((8, 3, 32, 32), value, np.float32) for value in (0, 1))
    np.savez(tmp_path / "cal.npz", **{"images": zeros, "dual/images": ones})
    found = read_calibration(tmp_path / "cal.npz", vit, [("lora", None), ("dual", None)])
    assert [found.rows["images"][found.task == number].mean() for number in (0, 1)] == [0, 1]
    batch = next(iter(found.examples(["images", "task"]).batches))
    assert batch["task"].tolist() == [0, 1] * 4


def test_noise_is_of_every_task_and_the_same_each_time(vit: Backbone) -> None:
    first, again = noise(vit, 3), noise(vit, 3)
    assert set(first.task.tolist()) == {0, 1, 2}
    assert first.digest == again.digest
    assert not first.real
    assert len(noise(vit, 1000).task) == 64


def test_a_task_is_not_packed_for_an_int8_engine(
    vit: Backbone, deltas: dict[str, Delta], as_task: Any
) -> None:
    from utune_deploy.deploy.pack import Layout, pack

    layout = Layout("0" * 64, vit.identity.fingerprint, "int8", (), "a bundle")
    with pytest.raises(UsageError, match="cannot judge"):
        pack(as_task(deltas["lora"]), layout)
