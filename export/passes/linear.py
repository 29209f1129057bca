"""How a frozen or tuned linear layer looks in the graph: MatMul by a constant, perhaps plus a constant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Linear:
    """`y = x W (+ b)`.

    Attributes:
        matmul: The MatMul node.
        weight: `[K, N]`.
        add: The Add of the bias, or None.
        bias: `[N]`, or None.
    """

    matmul: ir.Node
    weight: np.ndarray
    add: ir.Node | None
    bias: np.ndarray | None

    @property
    def x(self) -> ir.Value:
        """What it reads."""
        value = self.matmul.inputs[0]
        assert value is not None
        return value

    @property
    def y(self) -> ir.Value:
        """What it gives."""
        return (self.add or self.matmul).outputs[0]


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer that is no graph input."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def vector_beside(x: ir.Value, value: ir.Value | None) -> np.ndarray | None:
    """The constant `[N]` that `value` adds to `x` `[..., N]` without changing its shape."""
    array, shape = constant(value), shape_of(x)
    if array is None or shape is None or array.ndim > len(shape):
        return None
    return array.ravel() if array.shape[-1:] == (array.size,) == (shape[-1],) else None


def addends(value: ir.Value | None) -> list[tuple[ir.Value, ir.Value]]:
    """The two inputs of a sum that is read once, in both orders; none of any other value."""
    node = value.producer() if value is not None else None
    if value is None or node is None or node.op_type != "Add":
        return []
    if len(value.uses()) != 1 or value.is_graph_output():
        return []
    x, b = node.inputs
    return [(x, b), (b, x)] if x is not None and b is not None else []


def shape_of(x: ir.Value) -> list[object] | None:
    """The shape of a value; the exporter leaves it off the product inside a linear layer."""
    if x.shape is not None:
        return list(x.shape)
    node = x.producer()
    if node is None or node.op_type != "MatMul" or node.inputs[0] is None:
        return None
    rows, weight = node.inputs[0].shape, constant(node.inputs[1])
    if rows is None or weight is None or weight.ndim != 2:
        return None
    return [*list(rows)[:-1], weight.shape[1]]


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value which is no output of the graph."""
    readers = list(value.uses())
    if len(readers) != 1 or value.is_graph_output():
        return None
    return readers[0].node


def linear_from(matmul: ir.Node) -> Linear | None:
    """The linear layer that starts at a MatMul node, if it is one."""
    if matmul.op_type != "MatMul":
        return None
    weight = constant(matmul.inputs[1])
    if weight is None or weight.ndim != 2:
        return None
    node = only_reader(matmul.outputs[0])
    if node is not None and node.op_type == "Add":
        for value in node.inputs:
            bias = vector_beside(matmul.outputs[0], value)
            if bias is not None:
                return Linear(matmul, weight, node, bias)
    return Linear(matmul, weight, None, None)


def linear_to(value: ir.Value | None) -> Linear | None:
    """The linear layer whose output is `value`, if nothing else reads what is inside it."""
    node = value.producer() if value is not None else None
    if node is None:
        return None
    if node.op_type == "MatMul":
        return linear_from(node)
    if node.op_type == "Add":
        for side in node.inputs:
            inner = side.producer() if side is not None else None
            found = linear_from(inner) if inner is not None else None
            if found is not None and found.add is node:
                return found
    return None


def split_behind(layer: Linear) -> ir.Node | None:
    """The Split along the last axis that is all that reads a layer."""
    split = only_reader(layer.y)
    if split is None or split.op_type != "Split":
        return None
    known = len(split.inputs) > 1 and constant(split.inputs[1]) is not None
    return split if known and split.attributes.get_int("axis", 0) == -1 else None


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Register a new constant."""
    number, unique = 0, name
    while unique in graph.initializers:
        number, unique = number + 1, f"{name}.{number + 1}"
    value = ir.val(unique, const_value=ir.tensor(np.asarray(array, order="C"), name=unique))
    value.shape = ir.Shape(array.shape)
    value.dtype = ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value


def shaped(value: ir.Value, like: ir.Value, last: int) -> ir.Value:
    """Give `value` the type of `like` with another last axis."""
    if like.dtype is not None:
        value.dtype = like.dtype
    if like.shape is not None:
        value.shape = ir.Shape([*list(like.shape)[:-1], last])
    return value


def alike(value: ir.Value, like: ir.Value) -> ir.Value:
    """Give `value` the type and shape of `like`, as far as they are known."""
    if like.dtype is not None:
        value.dtype = like.dtype
    if like.shape is not None:
        value.shape = ir.Shape(list(like.shape))
    return value


def has_shape(value: ir.Value, sizes: Iterable[object]) -> bool:
    """Whether a value has these sizes; products of the exporter carry none, and are taken to."""
    return value.shape is None or [str(d) for d in value.shape] == [str(d) for d in sizes]


def leading(value: ir.Value) -> list[int | str] | None:
    """All axes but the last, by size or name; None where one is unknown."""
    if value.shape is None:
        return None
    axes = [d if isinstance(d, int) else d.value for d in list(value.shape)[:-1]]
    return None if None in axes else axes  # type: ignore[return-value]


def replace(old: ir.Value, new: ir.Value) -> None:
    """Put `new` wherever `old` is read; a graph output keeps its name."""
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}.replaced"
        new.name = name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
