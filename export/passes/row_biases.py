"""A bias of every row's own joins the constant beside it: `(x + b) + (y + u)` = `(x + y) + (b + u)`.

`x` and `y` are `[B, N, C]`, `b` a constant `[C]`, `u` `[B, 1, C]` gathered from the bank. In a mixed batch the
bias of an up-projection then costs a sum of `[B, 1, C]`, where it was a pass over every token.

A fused kernel takes the branch as the exporter writes it, so this is for engines without one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from .linear import addends, alike, constant, shape_of, vector_beside

if TYPE_CHECKING:
    from collections.abc import Sequence


def row_biases(model: ir.Model) -> int:
    """Add what is alike for all tokens of a row before it meets them.

    Returns:
        Number of passes over all tokens saved.
    """
    graph = model.graph
    saved = 0
    for node in list(graph):
        if node.graph is None or node.op_type != "Add" or node.outputs[0].is_graph_output():
            continue
        sides = [_side(value) for value in node.inputs]
        if any(side is None for side in sides) or node.inputs[0] is node.inputs[1]:
            continue
        (x, b), (y, c) = (side for side in sides if side is not None)
        if constant(b) is not None and constant(c) is not None:
            continue  # `join_biases` knows better
        if not _alike(shape_of(x), shape_of(y), (0, 1, 2)):
            continue
        inner = [value.producer() for value in node.inputs if value is not None]
        name = node.name or "sum"
        both = ir.node("Add", [x, y], name=f"{name}.both")
        once = ir.node("Add", [b, c], name=f"{name}.row_bias")
        result = ir.node("Add", [both.outputs[0], once.outputs[0]], name=f"{name}.once")
        for new in (both, result):
            alike(new.outputs[0], node.outputs[0])
        row = c if constant(c) is None else b
        alike(once.outputs[0], row)
        graph.insert_before(node, [both, once, result])
        node.outputs[0].replace_all_uses_with(result.outputs[0])
        graph.remove([node, *(n for n in inner if n is not None)], safe=True)
        saved += 1
    return saved


def _side(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """`(x, b)` of a value `x + b` that is read once, b a constant vector or one vector a row."""
    for x, b in addends(value):
        if vector_beside(x, b) is not None or _one_a_row(x, b):
            return x, b
    return None


def _one_a_row(x: ir.Value, b: ir.Value) -> bool:
    """Whether `b` is `[B, 1, C]` beside `[B, N, C]`."""
    thin = None if b.shape is None or constant(b) is not None else list(b.shape)
    if not _alike(shape_of(x), thin, (0, 2)) or thin is None:
        return False
    return thin[1] == 1 and (shape_of(x) or thin)[1] != 1


def _alike(a: Sequence[object] | None, b: Sequence[object] | None, axes: Sequence[int]) -> bool:
    """Whether two shapes of three axes are known to be equal in some."""
    if a is None or b is None or len(a) != 3 or len(b) != 3:
        return False
    return all(_size(a[i]) is not None and _size(a[i]) == _size(b[i]) for i in axes)


def _size(axis: object) -> int | str | None:
    return axis if isinstance(axis, int) else getattr(axis, "value", None)
