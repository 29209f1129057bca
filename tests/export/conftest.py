"""What the tests of this room share: graphs by hand, running them, and one traced model of three tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper, shape_inference

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnx_ir as ir

    from utune_deploy.merge.backbone import Backbone


@pytest.fixture(scope="session")
def vit(vit: Backbone) -> Backbone:
    """The small ViT on one thread: two threads wait for each other longer than these models run."""
    torch.set_num_threads(1)
    return vit


@pytest.fixture(scope="session")
def hand() -> Callable[..., ir.Model]:
    """A graph written down: `(inputs, nodes, constants, outputs) -> ir.Model` with inferred shapes.

    Inputs are shapes by name, float32 but for those whose name begins with `task`; nodes
    `(op, inputs, outputs, attributes)`, constants arrays by name.
    """
    import onnx_ir as ir

    def hand(
        inputs: Mapping[str, Sequence[int | str]],
        nodes: Sequence[tuple[Any, ...]],
        constants: Mapping[str, np.ndarray],
        outputs: Sequence[str],
    ) -> ir.Model:
        graph = helper.make_graph(
            [
                helper.make_node(op, ins, outs, name=f"{op}_{number}", **(rest[0] if rest else {}))
                for number, (op, ins, outs, *rest) in enumerate(nodes)
            ],
            "by hand",
            [
                helper.make_tensor_value_info(
                    name,
                    onnx.TensorProto.INT64 if name.startswith("task") else onnx.TensorProto.FLOAT,
                    list(shape),
                )
                for name, shape in inputs.items()
            ],
            [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
        return ir.from_proto(shape_inference.infer_shapes(model, strict_mode=True, data_prop=True))

    return hand


@pytest.fixture(scope="session")
def run_onnx() -> Callable[..., list[np.ndarray]]:
    """All outputs of a model in ONNX Runtime: `(model or bytes, feeds) -> arrays`."""
    import onnx_ir as ir

    def run_onnx(model: ir.Model | bytes, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        engine = model if isinstance(model, bytes) else ir.to_proto(model).SerializeToString()
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        session = ort.InferenceSession(engine, options, providers=["CPUExecutionProvider"])
        wanted = {entry.name for entry in session.get_inputs()}
        return session.run(None, {name: value for name, value in feeds.items() if name in wanted})

    return run_onnx


SIZE, CLASSES = 4, 3  # pixels on a side, classes of every task of the tiny engine


@pytest.fixture(scope="session")
def tiny_bank() -> Callable[[int, int], dict[str, np.ndarray]]:
    """One linear head `[T, 3, H, W, K]` as a flat matrix per task: `(tasks, seed) -> tensors`."""

    def tiny_bank(tasks: int, seed: int = 0) -> dict[str, np.ndarray]:
        noise = np.random.default_rng(seed)
        return {
            "bank/head/weight": noise.standard_normal(
                (tasks, 3 * SIZE * SIZE, CLASSES), np.float32
            ),
            "bank/head/bias": noise.standard_normal((tasks, 1, CLASSES), np.float32),
        }

    return tiny_bank


@pytest.fixture(scope="session")
def tiny_engine() -> Callable[..., bytes]:
    """A multi-task engine of one linear head: `(bank or None for inputs, metadata) -> bytes`.

    Rows outside the bank answer NaN, as the engines of `deploy` do.
    """

    def tiny_engine(
        bank: Mapping[str, np.ndarray] | None = None, metadata: Mapping[str, str] | None = None
    ) -> bytes:
        i64 = onnx.TensorProto.INT64
        f32 = onnx.TensorProto.FLOAT
        axes = {
            "bank/head/weight": ["tasks", 3 * SIZE * SIZE, CLASSES],
            "bank/head/bias": ["tasks", 1, CLASSES],
        }
        constants = {
            "zero": np.array(0), "one": np.array([1]), "nan": np.array(np.nan, np.float32), **(bank or {}),
        }  # fmt: skip
        inputs = [
            helper.make_tensor_value_info("images", f32, ["batch", 3, SIZE, SIZE]),
            helper.make_tensor_value_info("task", i64, ["batch"]),
        ]
        if bank is None:
            inputs += [
                helper.make_tensor_value_info(name, f32, shape) for name, shape in axes.items()
            ]
        graph = helper.make_graph(
            [
                helper.make_node("Shape", ["bank/head/weight"], ["count1"], start=0, end=1),
                helper.make_node("Squeeze", ["count1"], ["count"]),
                helper.make_node("GreaterOrEqual", ["task", "zero"], ["above"]),
                helper.make_node("Less", ["task", "count"], ["below"]),
                helper.make_node("And", ["above", "below"], ["known"]),
                helper.make_node("Where", ["known", "task", "zero"], ["safe"]),
                helper.make_node("Gather", ["bank/head/weight", "safe"], ["W"]),
                helper.make_node("Gather", ["bank/head/bias", "safe"], ["b"]),
                helper.make_node("Flatten", ["images"], ["flat"]),
                helper.make_node("Unsqueeze", ["flat", "one"], ["row"]),
                helper.make_node("MatMul", ["row", "W"], ["xW"]),
                helper.make_node("Add", ["xW", "b"], ["y3"]),
                helper.make_node("Squeeze", ["y3", "one"], ["y"]),
                helper.make_node("Unsqueeze", ["known", "one"], ["known1"]),
                helper.make_node("Where", ["known1", "y", "nan"], ["logits"]),
            ],
            "tiny",
            inputs,
            [helper.make_tensor_value_info("logits", f32, ["batch", CLASSES])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
        helper.set_model_props(model, dict(metadata or {}))
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()

    return tiny_engine


@pytest.fixture(scope="session")
def pictures() -> Callable[[int], np.ndarray]:
    """Seeded images of the tiny engine: `(batch) -> [B, 3, 4, 4]`."""

    def pictures(batch: int) -> np.ndarray:
        return np.random.default_rng(batch).standard_normal((batch, 3, SIZE, SIZE), np.float32)

    return pictures
