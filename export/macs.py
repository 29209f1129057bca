"""Multiply-accumulates of a graph, counted from the shapes of its products.

One multiply-accumulate is `s += a * b`; a FLOP counter gives two per each. Counted are MatMul, Gemm,
Conv, Attention (`Q K^T` and `P V`) and Einsum of two operands. Elementwise work, norms, softmax and
moved memory are not: a graph with fewer multiply-accumulates need not be a faster one.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnxscript import optimizer

from ..merge.errors import UsageError
from .graph import BATCH

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Axes = tuple[int, ...]

SHAPES = 1024  # elements; constants up to here may say a shape, larger ones are weights
SILENT = frozenset({
    "ConvInteger", "ConvTranspose", "DeformConv", "DFT", "GRU", "LSTM", "MatMulInteger",
    "QLinearConv", "QLinearMatMul", "RNN",
})  # fmt: skip
"""Operators that multiply and accumulate without a rule here: refused rather than left out."""


@dataclass(frozen=True)
class Product:
    """One node that was counted.

    Attributes:
        name: The node's name.
        op: Its operator.
        macs: Multiply-accumulates of one run.
    """

    name: str
    op: str
    macs: int


@dataclass(frozen=True)
class Count:
    """The multiply-accumulates of one run.

    Attributes:
        batch: Examples of that run.
        nodes: What was counted, in the order of execution.
    """

    batch: int
    nodes: tuple[Product, ...]

    @property
    def total(self) -> int:
        """Of the whole run."""
        return sum(node.macs for node in self.nodes)

    @property
    def per_example(self) -> float:
        """Of the run, divided by its examples; what is done once for all is shared among them."""
        return self.total / self.batch

    @property
    def by_op(self) -> dict[str, int]:
        """By operator, the largest first."""
        sums: Counter[str] = Counter()
        for node in self.nodes:
            sums[node.op] += node.macs
        return dict(sums.most_common())


def macs(model: ir.Model, batch: int = 1, **axes: int) -> Count:
    """Count the multiply-accumulates of one run; the model is left as it is.

    A causal or masked Attention counts in full: what a mask hides is computed by the plain formula.

    Args:
        model: Any graph without control flow. Weights are not copied.
        batch: Examples per run, the size of the free axis `batch`.
        axes: Sizes of the other free axes by name (`tasks=3`). A name that the graph lacks is
            passed over, so that engines with and without a bank as input are counted alike.

    Raises:
        UsageError: A free axis has no size, a shape cannot be inferred, or an operator has no rule.
    """
    return count(sized(model, batch, **axes), batch)


def count(model: ir.Model, batch: int) -> Count:
    """Count a graph whose shapes are numbers already; see `macs`."""
    counted = []
    for node in model.graph:
        name = node.name or f"{node.op_type} of {node.outputs[0].name}"
        where = f"{name} ({node.domain or 'ai.onnx'}.{node.op_type})"
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in _own(node)):
            raise UsageError("control flow cannot be counted", where=where)
        if node.domain not in ("", "ai.onnx") or node.op_type in SILENT:
            raise UsageError(
                "no rule counts this operator", where=where, wanted=f"one of {', '.join(COUNTED)}"
            )
        if (rule := COUNTED.get(node.op_type)) is not None:
            counted.append(Product(name, node.op_type, rule(node, where)))
    return Count(batch, tuple(counted))


def sized(model: ir.Model, batch: int, **axes: int) -> ir.Model:
    """A copy that shares the weights, in which every shape that can be inferred is a number.

    Plain shape inference loses what a graph computes from `Shape(images)`. With sizes at the inputs
    these are constants, so that folding the small ones leads on.

    Raises:
        UsageError: A free axis has no size.
    """
    sizes = {**axes, BATCH: batch}
    copy = model.clone()
    for value in copy.graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape([_size(value, axis, sizes) for axis in value.shape])
    for node in copy.graph:
        for value in node.outputs:
            value.shape = None  # in the exporter's symbols
    optimizer.fold_constants(
        copy,
        onnx_shape_inference=True,
        input_size_limit=SHAPES,
        output_size_limit=SHAPES,
        should_fold=_may_fold,
    )
    return copy


def _size(value: ir.Value, axis: object, sizes: Mapping[str, int]) -> int:
    if isinstance(axis, int):
        return axis
    name = axis.value if isinstance(axis, ir.SymbolicDim) else None
    if name is None or name not in sizes:
        raise UsageError(
            "a free axis has no size",
            where=f"input {value.name}",
            found=name or "an axis without a name",
            do=f"pass it by name: macs(model, {name}=...)" if name else None,
        )
    return sizes[name]


def _may_fold(node: ir.Node) -> bool | None:
    """Not what is counted, not weights, and nothing the folder would only complain about."""
    large = any(
        value is not None and value.const_value is not None and value.const_value.size > SHAPES
        for value in node.inputs
    )
    return False if large or len(node.outputs) > 1 or node.op_type in COUNTED else None


def _own(node: ir.Node) -> list[ir.Attr]:
    return [a for a in node.attributes.values() if isinstance(a, ir.Attr)]


def shape_of(value: ir.Value | None, where: str, role: str) -> Axes:
    """The shape of a value in a graph that is sized.

    Raises:
        UsageError: It could not be inferred.
    """
    shape = None if value is None else value.shape
    if shape is None or not all(isinstance(axis, int) for axis in shape):
        raise UsageError(
            "a shape cannot be inferred, so the node cannot be counted",
            where=where,
            wanted=f"a number for every axis of {role}",
            found="no shape" if shape is None else shape,
        )
    return tuple(axis for axis in shape if isinstance(axis, int))


def _matmul(node: ir.Node, where: str) -> int:
    """`[..., M, K] x [..., K, N]`: K for each number of the broadcast product."""
    a, b = (shape_of(value, where, "its inputs") for value in node.inputs)
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else ()
    return math.prod((*np.broadcast_shapes(a[:-2], b[:-2]), *rows, *columns, a[-1]))


def _gemm(node: ir.Node, where: str) -> int:
    """`[M, K] x [K, N]`, either of them perhaps transposed."""
    a, b = (shape_of(value, where, "its inputs") for value in node.inputs[:2])
    rows, inner = a[::-1] if node.attributes.get_int("transA", 0) else a
    columns = b[0] if node.attributes.get_int("transB", 0) else b[1]
    return rows * inner * columns


def _conv(node: ir.Node, where: str) -> int:
    """`[M, C / groups, *kernel]` for each number of the output `[B, M, *places]`."""
    weight = shape_of(node.inputs[1], where, "its weight")
    return math.prod(shape_of(node.outputs[0], where, "its output")) * math.prod(weight[1:])


def _attention(node: ir.Node, where: str) -> int:
    """`Q K^T` and `P V`: H Lq Lk (dk + dv) for each example.

    Inputs are `[B, H, L, d]`, or `[B, L, H d]` with the number of heads as attributes. Keys and values
    may have fewer heads than queries (shared among them), and a past of P tokens.
    """
    q, k, v = (shape_of(value, where, "its inputs") for value in node.inputs[:3])
    past = node.inputs[4] if len(node.inputs) > 4 else None
    before = 0 if past is None else shape_of(past, where, "its past keys")[2]
    if len(q) == 4:
        batch, heads, queries, dk = q
        return batch * heads * queries * (k[2] + before) * (dk + v[3])
    batch, queries, width = q
    heads = node.attributes.get_int("q_num_heads", 0)
    shared = node.attributes.get_int("kv_num_heads", 0)
    if not heads or not shared:
        raise UsageError("an Attention of three axes does not say its heads", where=where)
    return batch * queries * (k[1] + before) * (width + heads * (v[2] // shared))


def _einsum(node: ir.Node, where: str) -> int:
    """Two operands: every combination of all indices, once. One operand only sums: nothing."""
    terms = [
        term.replace(" ", "") for term in node.attributes.get_string("equation", "").split("->")[0].split(",")
    ]  # fmt: skip
    if len(terms) == 1:
        return 0
    if len(terms) > 2:
        raise UsageError(
            "the work of an Einsum depends on its order of products",
            where=where,
            wanted="at most two operands",
            found=len(terms),
        )
    sizes: dict[str, int] = {}
    spread: list[Axes] = []
    for term, value in zip(terms, node.inputs, strict=True):
        shape = shape_of(value, where, "its inputs")
        first, dots, last = term.partition("...")
        if dots:
            spread.append(shape[len(first) : len(shape) - len(last)])
            shape = (*shape[: len(first)], *shape[len(shape) - len(last) :])
        for letter, size in zip(first + last, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return math.prod(sizes.values()) * math.prod(np.broadcast_shapes(*spread))


COUNTED: dict[str, Callable[[ir.Node, str], int]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "Attention": _attention,
    "Einsum": _einsum,
}
