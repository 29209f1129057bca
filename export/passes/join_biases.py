"""Constants of a sum added once: `(x + b) + (y + c)` = `(x + y) + (b + c)`.

A tuner's up-projection has a bias of its own; added to the frozen one here, it costs nothing.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .linear import addends, initializer, shaped, vector_beside


def join_biases(model: ir.Model) -> int:
    """Add up the constant vectors on both sides of a sum.

    Returns:
        Number of additions saved.
    """
    graph = model.graph
    saved = 0
    for node in list(graph):
        if node.graph is None or node.op_type != "Add" or node.outputs[0].is_graph_output():
            continue
        sides = [_vector(value) for value in node.inputs]
        if any(side is None for side in sides) or node.inputs[0] is node.inputs[1]:
            continue
        (x, b), (y, c) = (side for side in sides if side is not None)
        inner = [value.producer() for value in node.inputs if value is not None]
        total = (b.astype(np.float64) + c.astype(np.float64)).astype(b.dtype)
        name = node.name or "sum"
        bias = initializer(graph, f"{name}.bias", total)
        both = ir.node("Add", [x, y], name=f"{name}.both")
        result = ir.node("Add", [both.outputs[0], bias], name=f"{name}.once")
        for new in (both, result):
            shaped(new.outputs[0], node.outputs[0], total.size)
        graph.insert_before(node, [both, result])
        node.outputs[0].replace_all_uses_with(result.outputs[0])
        graph.remove([node, *(n for n in inner if n is not None)], safe=True)
        saved += 1
    return saved


def _vector(value: ir.Value | None) -> tuple[ir.Value, np.ndarray] | None:
    """`(x, b)` of a value `x + b`, b a constant vector, that is read once."""
    for x, b in addends(value):
        if (vector := vector_beside(x, b)) is not None:
            return x, vector
    return None
