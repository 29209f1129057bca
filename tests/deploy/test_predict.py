"""`predict` on bundles whose engines read named inputs, or whose tasks have no labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from utune_deploy.export.bundle import (
    IDENTITY,
    Bundle,
    Engine,
    Task,
    identity_of,
    open_bundle,
    write_manifest,
)
from utune_deploy.export.engine import Tensor
from utune_deploy.merge.preprocessing import Preprocessing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WIDTH = 6


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Bundle]:
    """ids [B, 4], feats [B, 6] -> feats + the sum of ids, as `answer` [..] without labels, or as logits."""

    def write(answer: list[int], labels: tuple[str, ...] = (), width: int = WIDTH) -> Bundle:
        folder = tmp_path / "bundle"
        folder.mkdir()
        given = (
            Tensor("ids", "int64", ("batch", 4), 9),
            Tensor("feats", "float32", ("batch", WIDTH)),
        )
        out = Tensor("logits", "float32", ("batch", *answer))
        graph = helper.make_graph(
            [
                helper.make_node("Cast", ["ids"], ["numbers"], to=TensorProto.FLOAT),
                helper.make_node("ReduceSum", ["numbers", "one"], ["sum"]),
                helper.make_node("Add", ["feats", "sum"], ["flat"]),
                helper.make_node("Reshape", ["flat", "shape"], ["logits"]),
            ],
            "sums",
            [
                helper.make_tensor_value_info("ids", TensorProto.INT64, given[0].shape),
                helper.make_tensor_value_info("feats", TensorProto.FLOAT, given[1].shape),
            ],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, out.shape)],
            [
                numpy_helper.from_array(np.array([1]), "one"),
                numpy_helper.from_array(np.array([0, *answer]), "shape"),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        size = None if labels else width
        task = Task("sums", 0, labels, Preprocessing((4, 4)), "0" * 64, size)
        identity = identity_of({}, "parallel", "none", (task,), "fp32")
        helper.set_model_props(model, {IDENTITY: identity})
        onnx.save(model, folder / "model.onnx")
        engine = Engine("onnxruntime", "model.onnx", "fp32", 18, 2, given, (out,))
        write_manifest(
            folder,
            Bundle(folder, "sums", "parallel", "none", engine, (task,), {}, {}, {}, {}, identity),
        )
        return open_bundle(folder)

    return write


@pytest.fixture
def rows() -> dict[str, np.ndarray]:
    """Three rows: one more than the engine takes at once."""
    random = np.random.default_rng(0)
    return {
        "ids": random.integers(0, 9, (3, 4)),
        "feats": random.standard_normal((3, WIDTH)).astype(np.float32),
    }


def test_an_embedding_is_printed_with_its_size_and_first_numbers(
    cli, write, rows, tmp_path
) -> None:
    bundle = write([WIDTH])
    save_file(rows, tmp_path / "rows.safetensors")
    wanted = rows["feats"] + rows["ids"].sum(axis=1, keepdims=True).astype(np.float32)
    said = cli("predict", bundle.path, "--tensor", tmp_path / "rows.safetensors")
    assert (said.code, said.err) == (0, "")
    assert said.out.count(f"embedding of {WIDTH} numbers") == 3
    for number in wanted[0, :4]:
        assert f"{number:.4f}" in said.out
    assert f"{wanted[0, 4]:.4f}" not in said.out
    said = cli("predict", bundle.path, "--tensor", tmp_path / "rows.safetensors", "--json")
    answers = said.json
    assert [answer["task"] for answer in answers] == ["sums"] * 3
    found = np.array([answer["answer"] for answer in answers], np.float32)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_prepared_engine_answers_the_same(cli, write, rows, tmp_path, monkeypatch) -> None:
    bundle = write([WIDTH])
    save_file(rows, tmp_path / "rows.safetensors")
    asked = ("predict", bundle.path, "--tensor", tmp_path / "rows.safetensors", "--json")
    wanted = cli(*asked).json
    assert cli(*asked, "--prepared", tmp_path / "kept", "--no-arena").json == wanted
    (entry,) = (tmp_path / "kept").iterdir()
    made = (entry / "model.onnx").stat().st_mtime_ns
    monkeypatch.setenv("UTUNE_PREPARED", str(tmp_path / "kept"))
    assert cli(*asked).json == wanted
    assert [e / "model.onnx" for e in (tmp_path / "kept").iterdir()] == [entry / "model.onnx"]
    assert (entry / "model.onnx").stat().st_mtime_ns == made
    said = cli(*asked, "--device-memory-mb", "100")
    assert said.code == 2
    assert "the CUDA provider's" in said.err


def test_an_array_is_cut_to_the_tasks_own_width(cli, write, rows, tmp_path) -> None:
    bundle = write([2, 3], width=2)
    save_file(rows, tmp_path / "rows.safetensors")
    said = cli("predict", bundle.path, "--tensor", tmp_path / "rows.safetensors")
    assert said.out.count("array of 2 x 2 numbers") == 3
    output = tmp_path / "raw.npy"
    cli("predict", bundle.path, "--tensor", tmp_path / "rows.safetensors", "-o", output)
    assert np.load(output).shape == (3, 2, 3)


def test_named_inputs_are_labelled_too(cli, write, rows, tmp_path) -> None:
    labels = tuple("abcdef")
    bundle = write([WIDTH], labels)
    save_file(rows, tmp_path / "rows.safetensors")
    said = cli("predict", bundle.path, "--tensor", tmp_path / "rows.safetensors", "--json")
    best = [answer["top"][0]["label"] for answer in said.json]
    assert best == [labels[row.argmax()] for row in rows["feats"]]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: {"ids": r["ids"]}, "not those that the engine reads"),
        (lambda r: {**r, "feats": r["feats"][:2]}, "ids 3, feats 2"),
        (lambda r: {**r, "feats": r["feats"][:, :5]}, "rows.safetensors, feats"),
        (lambda r: {**r, "ids": r["ids"].astype(np.int32)}, "[n, 4] int64"),
        (lambda r: {**r, "ids": r["ids"] + 9}, "out of range"),
    ],
)
def test_named_inputs_that_are_wrong_are_refused(
    cli, write, rows, tmp_path, change, sentence
) -> None:
    bundle = write([WIDTH])
    save_file(change(rows), tmp_path / "rows.safetensors")
    said = cli("predict", bundle.path, "--tensor", tmp_path / "rows.safetensors")
    assert (said.code, said.out) == (2, "")
    assert sentence in said.err


def test_what_has_no_names_or_is_a_picture_is_refused(cli, write, rows, tmp_path) -> None:
    bundle = write([WIDTH])
    np.save(tmp_path / "ids.npy", rows["ids"])
    said = cli("predict", bundle.path, "--tensor", tmp_path / "ids.npy")
    assert said.code == 2
    assert "arrays by name: ids, feats" in said.err
    said = cli("predict", bundle.path, tmp_path / "picture.png")
    assert said.code == 2
    assert "does not read pictures" in said.err
