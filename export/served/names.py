"""The first step of every alias: the name of a task, once for each row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from .ops import Ops, named, whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..engine import Tensor


def task_names(tasks: Sequence[str], rows: Tensor) -> bytes:
    """A graph with an output per task, which says the task's name once for each row of an input.

    Args:
        tasks: Names; that of the output too.
        rows: The input, of which only the number of rows matters.
    """
    x = named(ir.Value(), rows.name, rows.dtype, rows.shape)
    graph = ir.Graph([x], [], nodes=[], name="task_names")
    ops = Ops(graph)
    size = ops("Concat", ops("Shape", x, start=0, end=1), ops.ints([1]), axis=0)
    for name in tasks:
        said = ops("Expand", ops.text([[name]]), size)
        graph.outputs.append(named(said, name, "text", [rows.shape[0], 1]))
    return whole(graph, ops)
