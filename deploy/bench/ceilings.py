"""What the machine does at best, measured in the same run: a large product and a large sum.

Both are graphs of one node that the engines' own runtime runs, on their provider and with their threads: what no engine
can be expected to pass, not what a data sheet says.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import psutil
from onnx import TensorProto, helper, numpy_helper

from ...export.engine import IMAGES, LOGITS
from ...export.graph import OPSET
from ...export.targets.onnxruntime import OnnxRuntimeSession
from .machine import last_level_cache

if TYPE_CHECKING:
    from onnx import NodeProto

    from ...export.engine import Bound, Device
    from .work import Work

DTYPES = {
    "fp32": (TensorProto.FLOAT, np.dtype(np.float32)),
    "tf32": (TensorProto.FLOAT, np.dtype(np.float32)),
    "fp16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
"""Number format of the product by an engine's precision, as ONNX and as numpy have it."""

SIDES = (1024, 2048, 4096, 8192)
"""Sides of the square products, until one takes longer than `LONG_ENOUGH_S`."""

LONG_ENOUGH_S = 0.05
LEAST_S = 0.4
REPEATS = 4
"""Calls of each at least, after one that does not count, and for so long; the fastest is the ceiling."""

ROW = 4096
LEAST_BYTES = 64 << 20
CACHES = 1
"""An array of the sum is `LEAST_BYTES`, or as many times the last cache if that is more ..."""

MEMORY_SHARE = 16
"""... and at most this part of the memory that is free."""


@dataclass(frozen=True)
class Ceilings:
    """The two limits of the roofline, through the same runtime, provider and threads as the engines.

    Attributes:
        provider: The execution provider that ran them.
        dtype: Number format of the product.
        flops_per_second: The best of several square products; two FLOP for each multiply-accumulate.
        product: `(M, K, N)` of that product.
        bytes_per_second: The best of several sums of two large float32 arrays; both read, the sum written.
        moved_bytes: Of all three arrays.
    """

    provider: str
    dtype: str
    flops_per_second: float
    product: tuple[int, int, int]
    bytes_per_second: float
    moved_bytes: int

    @property
    def ridge(self) -> float:
        """FLOP per byte above which the product's ceiling is the lower one."""
        return self.flops_per_second / self.bytes_per_second

    def bound_ms(self, work: Work) -> float:
        """The roofline's time of a call: its products or their operands at full speed, the longer one, in ms."""
        return 1e3 * max(work.flops / self.flops_per_second, work.bytes / self.bytes_per_second)

    def reached(self, work: Work, milliseconds: float) -> float:
        """Part of the product's ceiling that a call of this duration reached; 1 is all of it."""
        return work.flops / (milliseconds / 1e3) / self.flops_per_second


def measure_ceilings(device: Device, precision: str = "fp32") -> Ceilings:
    """Time products and sums; takes about three seconds, and the memory of three large arrays for that long.

    Args:
        device: Provider and threads of the engines.
        precision: Of the engines, a key of `DTYPES`.

    Raises:
        MissingDependency: The provider cannot be loaded.
    """
    provider, best, side_of_best = "", 0.0, 0
    for side in SIDES:
        session = _product(side, device, precision)
        rows = np.random.default_rng(1).standard_normal((side, side), np.float32)
        seconds = _fastest(session.bind(rows.astype(DTYPES[precision][1])))
        provider = session.provider
        if 2 * side**3 / seconds > best:
            best, side_of_best = 2 * side**3 / seconds, side
        if seconds > LONG_ENOUGH_S:
            break
    size = array_bytes()
    numbers = np.ones((size // 4 // ROW, ROW), np.float32)
    seconds = _fastest(_sum(device).bind({IMAGES: numbers, "other": numbers}))
    return Ceilings(
        provider=provider,
        dtype=str(DTYPES[precision][1]),
        flops_per_second=best,
        product=(side_of_best, side_of_best, side_of_best),
        bytes_per_second=3 * size / seconds,
        moved_bytes=3 * size,
    )


def array_bytes() -> int:
    """Of one array of the sum: larger than any cache, small beside the memory."""
    wanted = max(LEAST_BYTES, CACHES * (last_level_cache() or 0))
    most = psutil.virtual_memory().available // MEMORY_SHARE
    return max(1, min(wanted, most) // (4 * ROW)) * 4 * ROW


def _fastest(bound: Bound) -> float:
    """Seconds of the fastest call."""
    bound.run()
    found: list[float] = []
    while len(found) < REPEATS or sum(found) < LEAST_S:
        began = time.perf_counter()
        bound.run()
        found.append(time.perf_counter() - began)
    return min(found)


def _product(side: int, device: Device, precision: str) -> OnnxRuntimeSession:
    """`[side, side] x W`, of which one column is the answer."""
    onnx_type, numpy_type = DTYPES[precision]
    weight = np.random.default_rng(0).standard_normal((side, side), np.float32)
    model = _model(
        [helper.make_node("MatMul", [IMAGES, "weight"], ["all"])],
        [helper.make_tensor_value_info(IMAGES, onnx_type, ["rows", side])],
        [numpy_helper.from_array(weight.astype(numpy_type), "weight")],
    )
    return OnnxRuntimeSession(model, device, tf32=precision == "tf32")


def _sum(device: Device) -> OnnxRuntimeSession:
    """`a + b`, of which one column is the answer."""
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", ROW])
        for name in (IMAGES, "other")
    ]
    model = _model([helper.make_node("Add", [IMAGES, "other"], ["all"])], inputs, [])
    return OnnxRuntimeSession(model, device)


def _model(nodes: list[NodeProto], inputs: list, weights: list) -> bytes:
    """The nodes, and behind them one column of `all` as the answer: writing the rest would be timed too."""
    for name, value in (("zero", 0), ("one", 1)):
        weights.append(numpy_helper.from_array(np.array([value]), name))
    pick = helper.make_node("Slice", ["all", "zero", "one", "one"], ["column"])
    cast = helper.make_node("Cast", ["column"], [LOGITS], to=TensorProto.FLOAT)
    answer = helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["rows", 1])
    graph = helper.make_graph([*nodes, pick, cast], "ceiling", inputs, [answer], weights)
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
