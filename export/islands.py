"""Which nodes of a float32 graph stay float32 when the rest becomes half; decided before anything is changed.

The rules are those of `precision`, and the patterns of whoever exports: shell globs over the names of nodes
or over operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import onnx_ir as ir

from ..merge.errors import UsageError
from .engine import BANK_PREFIX
from .passes.linear import constant

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SUMS = frozenset(
    [
        "Softmax",
        "LogSoftmax",
        "ReduceSum",
        "ReduceMean",
        "ReduceL1",
        "ReduceL2",
        "ReduceSumSquare",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceProd",
        "CumSum",
        "Pow",
        "Exp",
        "Log",
        "Sqrt",
        "Reciprocal",
        "Softplus",
        "LpNormalization",
        "InstanceNormalization",
        "GroupNormalization",
        "BatchNormalization",
        "RMSNormalization",
    ]
)
"""Operators that leave a half's range, or lose its few digits, where their operands do not."""

ELEMENTWISE = frozenset(
    [
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Neg",
        "Abs",
        "Max",
        "Min",
        "Clip",
        "Where",
        "Relu",
        "Sigmoid",
        "Tanh",
        "Squeeze",
        "Unsqueeze",
        "Reshape",
        "Transpose",
        "Expand",
        "Identity",
        "Flatten",
        "Slice",
        "Gather",
        "Split",
        "Concat",
    ]
)
"""Operators that carry an island on: they compute value by value, or only move values."""

TAIL = frozenset(["Where", "Squeeze", "Unsqueeze", "Reshape", "Expand", "Identity", "Flatten"])


@dataclass(frozen=True)
class Islands:
    """What stays float32.

    Attributes:
        floats: Every float32 value of the graph.
        wide: Those that stay float32.
        nodes: Nodes that compute in float32, in the graph's order.
        halves: Nodes that read or give half, in the graph's order.
    """

    floats: frozenset[ir.Value]
    wide: frozenset[ir.Value]
    nodes: tuple[ir.Node, ...]
    halves: tuple[ir.Node, ...]


def find_islands(model: ir.Model, keep: Iterable[ir.Node] = ()) -> Islands:
    """Decide, for every node, whether it computes in float32.

    Args:
        model: A float32 graph. Types that the exporter left out are filled in; nothing else is changed.
        keep: Nodes that stay float32 whatever the rules say.
    """
    graph, kept = model.graph, set(keep)
    tail = tail_of(graph)
    floats = frozenset(value for value in _values(graph) if value.dtype == ir.DataType.FLOAT)
    wide = {value for value in graph.inputs if value in floats and not _of_bank(value)}
    islands, halves = [], []
    for node in graph:
        reads = [value for value in node.inputs if value is not None and value in floats]
        gives = [value for value in node.outputs if value in floats]
        if not reads:
            wide.update(gives)  # made of integers, or asked for as float32
            continue
        if node.op_type == "Cast":  # asked for; it takes what it is given
            wide.update(gives)
            islands += [node] if gives else []
            continue
        inner = any(value in wide and not value.is_graph_input() for value in reads)
        carried = node.op_type in ELEMENTWISE and inner
        if node in tail or node in kept or node.op_type in SUMS or carried:
            islands.append(node)
            wide.update(gives)
        else:
            halves.append(node)
    return Islands(floats, frozenset(wide), tuple(islands), tuple(halves))


def matched(model: ir.Model, patterns: Sequence[str]) -> dict[str, list[ir.Node]]:
    """The nodes that each pattern names, by their own name or their operator.

    Raises:
        UsageError: A pattern names none.
    """
    found: dict[str, list[ir.Node]] = {}
    for pattern in patterns:
        found[pattern] = [
            node
            for node in model.graph
            if fnmatchcase(node.name or "", pattern) or fnmatchcase(node.op_type, pattern)
        ]
        if not found[pattern]:
            raise UsageError(
                "a pattern of nodes to keep in float32 names none",
                where=f"--keep-fp32 {pattern}",
                wanted=f"a node's name, or one of {', '.join(sorted({n.op_type for n in model.graph}))}",
                do="`*` and `?` stand for any letters; a refused export names the nodes it is about",
            )
    return found


def tail_of(graph: ir.Graph) -> set[ir.Node]:
    """The nodes behind the last product: they move logits, mask them or add a bias."""
    found: set[ir.Node] = set()
    open_ = [value.producer() for value in graph.outputs]
    while open_:
        node = open_.pop()
        if node is None or node in found:
            continue
        if node.op_type == "Add":
            moved = [v for v in node.inputs if v is not None and not _is_parameter(v)]
            if len(moved) != 1:
                continue
        elif node.op_type not in TAIL and not _gathers(node):
            continue
        found.add(node)
        open_.extend(value.producer() for value in node.inputs if value is not None)
    return found


def _values(graph: ir.Graph) -> list[ir.Value]:
    """Every value of the graph, its type filled in where the exporter left it out."""
    for node in graph:
        for output in node.outputs:
            if output.dtype is None and (dtype := _type_of(node)) is not None:
                output.dtype = dtype
    inside = [output for node in graph for output in node.outputs]
    return [*graph.inputs, *graph.initializers.values(), *inside]


def _type_of(node: ir.Node) -> ir.DataType | None:
    """The type that an operator gives."""
    if node.op_type in ("Shape", "Size", "ArgMax", "ArgMin", "NonZero"):
        return ir.DataType.INT64
    if node.op_type in ("Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Not", "And"):
        return ir.DataType.BOOL
    if node.op_type == "ConstantOfShape":
        value = node.attributes.get("value")
        return value.as_tensor().dtype if value is not None else ir.DataType.FLOAT
    if node.op_type == "Cast":
        return ir.DataType(node.attributes.get_int("to", 1))
    read = node.inputs[1:] if node.op_type == "Where" else node.inputs
    return next((v.dtype for v in read if v is not None and v.dtype is not None), None)


def _gathers(node: ir.Node) -> bool:
    """Whether a node takes rows of a constant, such as the biases of a bank of classifiers."""
    return node.op_type == "Gather" and constant(node.inputs[0]) is not None


def _is_parameter(value: ir.Value) -> bool:
    """A constant, or rows gathered from the bank."""
    node = value.producer()
    if node is None:
        return not value.is_graph_input() or _of_bank(value)
    first = node.inputs[0] if node.inputs else None
    return node.op_type in ("Gather", *TAIL) and first is not None and _is_parameter(first)


def _of_bank(value: ir.Value) -> bool:
    return (value.name or "").startswith(BANK_PREFIX)
