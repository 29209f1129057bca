"""From pixels to the tensor that an engine reads, as a graph: what `merge/preprocessing.py` does to a picture.

ONNX Runtime's antialiased Resize of 8-bit values works as Pillow's does, in fixed point and one axis after
the other, if weights outside the picture are left out (`exclude_outside`); in float32 it would be off by
up to 21 levels of 255. What is left are single levels in few pixels, see `tests/export/test_served.py`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ...merge.errors import UsageError
from ..engine import IMAGES, TASK, row_inputs
from .ops import Ops, named, whole

if TYPE_CHECKING:
    from ...merge.preprocessing import Preprocessing
    from ..bundle import Bundle

PICTURE = "picture"
BATCH = "batch"
MODES = {"bilinear": "linear", "bicubic": "cubic"}


def picture_graph(bundle: Bundle) -> bytes:
    """The graph from `picture [B, H, W, 3]` uint8 RGB and `task [B, 1]` text to `images [B, 3, h, w]` float32.

    All pictures of a batch have one size, whichever. A row with an unknown task is prepared as for the first.

    Raises:
        UsageError: The engine reads no single pictures, or its tasks want them resized differently or in a
            way that the graph does not have.
    """
    common = _common(bundle)
    graph = ir.Graph([], [], nodes=[], name="pictures")
    ops = Ops(graph)
    picture = named(ir.Value(), PICTURE, "uint8", [BATCH, "height", "width", 3])
    task = named(ir.Value(), TASK, "text", [BATCH, 1])
    graph.inputs.extend([picture, task])
    place, _ = ops.place(task, [task.name for task in bundle.tasks])
    size = _resized(ops, picture, common)
    pixels = ops("Transpose", picture, perm=[0, 3, 1, 2])
    cubic = {"cubic_coeff_a": -0.5} if common.interpolation == "bicubic" else {}
    width = ops("Slice", size, ops.ints([1]), ops.ints([2]))
    for kept, edges in ((3, width), (2, size)):  # one edge after the other, in Pillow's order
        sizes = ops("Concat", ops("Shape", pixels, start=0, end=kept), edges, axis=0)
        pixels = ops(
            "Resize", pixels, None, None, sizes,
            mode=MODES[common.interpolation], antialias=1, exclude_outside=1, **cubic,
        )  # fmt: skip
    wanted = ops.ints(list(common.size))
    spare = ops("Cast", ops("Sub", size, wanted), to=ir.DataType.DOUBLE.value)
    half = ops("Round", ops("Mul", spare, ops.constant(np.array(0.5))))  # halves to even, as Python
    corner = ops("Cast", half, to=ir.DataType.INT64.value)
    pixels = ops("Slice", pixels, corner, ops("Add", corner, wanted), ops.ints([2, 3]))
    values = ops("Cast", pixels, to=ir.DataType.FLOAT.value)
    values = ops("Div", values, ops.constant(np.array(255, dtype=np.float32)))
    for kind, field in (("Sub", "mean"), ("Div", "std")):
        table = [getattr(task.preprocessing, field) for task in bundle.tasks]
        array = np.array(table, dtype=np.float32)[:, :, None, None]
        values = ops(kind, values, ops("Gather", ops.constant(array), place))
    graph.outputs.append(named(values, IMAGES, "float32", [BATCH, 3, *common.size]))
    return whole(graph, ops)


def _common(bundle: Bundle) -> Preprocessing:
    """The preprocessing of all tasks, up to mean and std.

    Raises:
        UsageError: There is no such one, or the graph does not have it.
    """
    reads = [tensor.name for tensor in row_inputs(bundle.engine.inputs)]
    found = [task.preprocessing for task in bundle.tasks]
    first = found[0]
    if reads != [IMAGES] or first is None or any(p is None or p.clip for p in found):
        raise UsageError(
            "the engine does not read single pictures",
            where=bundle.path,
            wanted=f"the one input {IMAGES}, and preprocessing in every task",
            found=", ".join(reads),
        )
    resizing = {(p.size, p.interpolation, p.crop, p.squash) for p in found if p is not None}
    if len(resizing) > 1:
        raise UsageError(
            "the tasks want their pictures resized differently",
            where=bundle.path,
            wanted="one size, interpolation, crop and squash",
            found="; ".join(sorted(map(str, resizing))),
            do="export the tasks into a bundle for each, or prepare pictures at the client",
        )
    if first.interpolation not in MODES or any(len(p.mean) != 3 for p in found if p is not None):
        raise UsageError(
            "the graph does not have this preprocessing",
            where=bundle.path,
            wanted=f"three channels, and {' or '.join(MODES)}",
            found=f"{len(first.mean)} channels, {first.interpolation}",
            do="prepare pictures at the client",
        )
    return first


def _resized(ops: Ops, picture: ir.Value, wanted: Preprocessing) -> ir.Value:
    """Height and width after resizing, `[2]` int64: see `_resized` of `merge/preprocessing.py`."""
    height, width = (math.floor(size / wanted.crop) for size in wanted.size)
    if wanted.squash:
        return ops.ints([height, width])
    given = ops("Shape", picture, start=1, end=3)
    if height == width:
        edge = ops.ints([height])
        shorter = ops("ReduceMin", given, keepdims=1)
        return ops("Div", ops("Mul", given, edge), shorter)
    exact = ops("Cast", given, to=ir.DataType.DOUBLE.value)
    ratio = ops("Div", exact, ops.constant(np.array([height, width], dtype=np.float64)))
    near = ops("Round", ops("Div", exact, ops("ReduceMin", ratio, keepdims=1)))
    return ops("Cast", near, to=ir.DataType.INT64.value)
