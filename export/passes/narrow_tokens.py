"""Tokens picked behind what works on each token alone are picked in front of it: `f(x)[i]` = `f(x[i])`.

A classifier that reads `x[:, 0]` throws away what the last block made of all other tokens. Elementwise
operators, norms over the channels and matrix products treat every token for itself, so that the pick
moves in front of them, through sums into both sides, until it stands behind the last operator that mixes
tokens: a product then costs `n` tokens instead of `N`.

A moved pick copies `n` tokens of each operand, where the operator read and wrote `N`: picks of at most
half of the tokens are moved (`x[:, 1:]` is not), and only where nothing else reads the other tokens.
Attention stays whole: its queries are alone, too, but kernels are made for as many queries as keys. So does a
tuner's narrow layer that `join_siblings` makes columns of `qkv`, which reads all tokens: that is one product less.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ..engine import BANK_PREFIX
from .linear import constant, initializer, linear_from, replace, shape_of, split_behind

if TYPE_CHECKING:
    from collections.abc import Sequence

ELEMENTWISE = frozenset({
    "Abs", "Add", "Cast", "Ceil", "Celu", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu",
    "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg",
    "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign",
    "Sqrt", "Sub", "Swish", "Tanh", "ThresholdedRelu", "Where",
})  # fmt: skip
OVER_CHANNELS = frozenset({"LayerNormalization", "RMSNormalization", "LogSoftmax", "Softmax"})
COLUMNS = 8  # times as wide at least as what is to be columns of it


@dataclass(frozen=True)
class Pick:
    """Some places of one axis.

    Attributes:
        back: The axis, counted from the last, which is 1: tokens of `[B, N, C]` are 2.
        places: Where the tokens are, each from 0 to N - 1.
        whole: N.
        drops: Whether the axis goes away, as in `x[:, 0]`; never a difference between two picks.
    """

    back: int
    places: tuple[int, ...]
    whole: int
    drops: bool = field(default=False, compare=False)


def narrow_tokens(model: ir.Model) -> int:
    """Move every pick of tokens as far to the front as it goes.

    Returns:
        Number of operators that compute fewer tokens.
    """
    graph = model.graph
    picked: dict[tuple[ir.Value, Pick], ir.Value] = {}
    narrowed = 0
    for node in reversed(list(graph)):  # readers first: each has become a pick if it can
        pick = _asked(node) if node.graph is not None else None
        sides = _sides(node, pick) if pick is not None else None
        if pick is None or sides is None:
            continue
        for number in sides:
            value = node.inputs[number]
            assert value is not None
            if (value, pick) not in picked:
                picked[value, pick] = _pick(graph, value, pick)
            node.replace_input_with(number, picked[value, pick])
        _answer(graph, node, pick)
        narrowed += 1
    return narrowed


def _asked(node: ir.Node) -> Pick | None:
    """The pick that is all that reads a node."""
    value = node.outputs[0]
    uses = list(value.uses())
    if value.is_graph_output() or not uses:
        return None
    if any(other.is_graph_output() or other.uses() for other in node.outputs[1:]):
        return None
    picks = [_pick_from(reader) if place == 0 else None for reader, place in uses]
    first = picks[0]
    if first is None or any(pick != first for pick in picks):
        return None
    named = any(reader.outputs[0].is_graph_output() for reader, _ in uses)
    if named and len(uses) > 1:
        return None  # one value cannot have the names of two outputs
    return first if 2 * len(first.places) <= first.whole else None


def _pick_from(node: ir.Node) -> Pick | None:
    """What a Gather or Slice picks, when that is constant and of one axis other than the last."""
    data = node.inputs[0] if node.inputs else None
    shape = shape_of(data) if data is not None else None
    if shape is None or node.op_type not in ("Gather", "Slice"):
        return None
    given = [None if value is None else constant(value) for value in node.inputs[1:]]
    if any(array is None and value for array, value in zip(given, node.inputs[1:], strict=True)):
        return None
    if node.op_type == "Gather":
        axis, (places,) = node.attributes.get_int("axis", 0), given
        if places is None or places.ndim > 1:
            return None
        cut: Sequence[int] | slice = [int(place) for place in places.ravel()]
        drops = places.ndim == 0
    else:
        starts, ends, axes, steps = (*given, None, None)[:4]
        if starts is None or ends is None or starts.size != 1:
            return None
        axis = 0 if axes is None else int(axes.item())
        step = 1 if steps is None else int(steps.item())
        cut, drops = slice(int(starts.item()), int(ends.item()), step), False
    axis %= len(shape)
    whole = shape[axis]
    if not isinstance(whole, int) or axis == len(shape) - 1:
        return None
    chosen = range(whole)[cut] if isinstance(cut, slice) else [place % whole for place in cut]
    return Pick(len(shape) - axis, tuple(chosen), whole, drops) if chosen else None


def _sides(node: ir.Node, pick: Pick) -> list[int] | None:
    """The inputs of a node that a pick moves into, the others being the same for every token."""
    values = list(node.inputs)
    if node.domain:
        return None
    if node.op_type == "MatMul":  # the rows of the left side are the rows of the product
        shapes = [shape_of(value) if value is not None else None for value in values]
        plain = all(shape is not None and len(shape) > 1 for shape in shapes)
        if not plain or pick.back != 2:
            return None
        if _is_part(node):
            return None
        values = values[:1]
    elif node.op_type in OVER_CHANNELS:
        rank = len(shape_of(node.outputs[0]) or ())
        if rank - node.attributes.get_int("axis", -1) % max(rank, 1) >= pick.back:
            return None
    elif node.op_type not in ELEMENTWISE:
        return None
    sides = []
    for number, value in enumerate(values):
        if value is None:
            continue
        shape = shape_of(value)
        if shape is None:
            return None
        if len(shape) < pick.back or shape[-pick.back] == 1:
            continue
        if shape[-pick.back] != pick.whole or (value.name or "").startswith(BANK_PREFIX):
            return None
        sides.append(number)
    return sides or None


def _is_part(matmul: ir.Node) -> bool:
    """A layer is to be columns of a wide one, which reads the same and is cut apart behind."""
    layer, x = linear_from(matmul), matmul.inputs[0]
    if layer is None or x is None:
        return False
    least = COLUMNS * layer.weight.shape[1]
    others = (linear_from(reader) for reader, _ in x.uses() if reader is not matmul)
    return any(
        other is not None and other.weight.shape[1] >= least and split_behind(other) is not None
        for other in others
    )


def _pick(graph: ir.Graph, value: ir.Value, pick: Pick) -> ir.Value:
    """`value` at the picked places, the axis kept; right behind where it is made."""
    name, axis = value.name or "value", len(shape_of(value) or ()) - pick.back
    if (array := constant(value)) is not None:
        return initializer(graph, f"{name}.picked", np.take(array, pick.places, axis=axis))
    places = initializer(graph, f"{name}.places", np.array(pick.places, dtype=np.int64))
    gather = ir.node("Gather", [value, places], attributes={"axis": axis}, name=f"{name}.pick")
    gather.outputs[0].name = f"{name}.picked"
    _type(gather.outputs[0], value, len(pick.places), pick)
    if (producer := value.producer()) is not None:
        graph.insert_after(producer, gather)
    else:
        graph.insert_before(graph[0], gather)
    return gather.outputs[0]


def _answer(graph: ir.Graph, node: ir.Node, pick: Pick) -> None:
    """Let the narrowed node stand for every pick that reads it."""
    value = node.outputs[0]
    axis = len(shape_of(value) or ()) - pick.back
    readers = [(reader, _pick_from(reader)) for reader, _ in value.uses()]
    _type(value, value, len(pick.places), pick)
    for reader, asked in readers:
        answer = value
        if asked is not None and asked.drops:
            name = reader.name or "pick"
            axes = initializer(graph, f"{name}.axis", np.array([axis], dtype=np.int64))
            squeeze = ir.node("Squeeze", [value, axes], name=f"{name}.squeeze")
            answer = squeeze.outputs[0]
            answer.type, answer.shape = value.type, reader.outputs[0].shape
            graph.insert_before(reader, squeeze)
        replace(reader.outputs[0], answer)
        graph.remove(reader, safe=True)


def _type(value: ir.Value, like: ir.Value, tokens: int, pick: Pick) -> None:
    """Give `value` the type of `like`, if that has one, with `tokens` along the picked axis."""
    shape = shape_of(like)
    value.shape = None
    if like.dtype is not None and shape is not None:
        shape[-pick.back] = tokens
        value.dtype, value.shape = like.dtype, ir.Shape(shape)  # type: ignore[arg-type]
