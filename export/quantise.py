"""Products of frozen weights in eight bits: quantise and dequantise nodes around them, nothing else changed.

    x ~ s_x (q_x - z_x),  W[:, n] ~ s_n q_n:   x W  ->  DQ(Q(x)) DQ(q)

A weight has a scale per output channel and is symmetric. An activation has one scale, from calibration. The
product is an ordinary MatMul between the two, which a runtime fuses into one of integers; its sum, its bias and
all that is between products stay float32. What reads the same activation without being chosen reads it as it
was, so a tuner's branch sees no rounding but that of the trunk.

Chosen are products with a constant weight of the backbone. The weights of tasks, the heads and the products of
attention stay float32, each with its reason in the report.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ..merge.errors import UsageError
from .islands import tail_of
from .passes.linear import alike, constant, initializer, replace
from .ranges import ranges

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

PRODUCTS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True)
class Format:
    """Numbers of eight bits.

    Attributes:
        name: As in reports.
        dtype: Of the weights and, if `symmetric`, of the activations.
        largest: Largest number of a symmetric one.
        symmetric: Whether activations are as well; otherwise they are uint8 with a zero point.
    """

    name: str
    dtype: np.dtype[Any]
    largest: float
    symmetric: bool


FORMATS = {
    ("int8", "onnxruntime"): Format("uint8 x int8", np.dtype(np.int8), 127.0, symmetric=False),
    ("int8", "tensorrt"): Format("int8 x int8", np.dtype(np.int8), 127.0, symmetric=True),
    ("fp8", "tensorrt"): Format(
        "float8e4m3fn x float8e4m3fn", np.dtype(ml_dtypes.float8_e4m3fn), 448.0, symmetric=True
    ),
}
"""By precision and target: ONNX Runtime's kernels for x86 take unsigned activations, TensorRT symmetric ones."""


@dataclass(frozen=True)
class Quantised:
    """What was quantised.

    Attributes:
        format: Of activations and weights.
        method: How ranges were made of examples, a key of `ranges.METHODS`.
        scales: Number of scales: one for each activation, one for each output channel of a weight.
        products: By the name of a quantised product, the activation it reads, and that one's scale and zero point.
        kept: By the name of a product that stays float32, why.
    """

    format: str
    method: str
    scales: int
    products: dict[str, dict[str, Any]]
    kept: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


class Step(NamedTuple):
    """How an activation is quantised."""

    scale: np.float32
    zero: int


def digests(weights: Iterable[NDArray[Any]]) -> frozenset[bytes]:
    """Of frozen weights as they may stand in a graph: as matrices of rows or of columns."""
    found = set()
    for weight in weights:
        if weight.ndim > 1:
            matrix = weight.astype(np.float32).reshape(len(weight), -1)
            found |= {_digest(matrix), _digest(matrix.T)}
    return frozenset(found)


def quantise(
    model: ir.Model,
    form: Format,
    batches: Iterable[Mapping[str, NDArray[Any]]],
    *,
    frozen: frozenset[bytes] | None,
    keep: Sequence[str] = (),
    method: str = "minmax",
) -> Quantised:
    """Put products into eight bits, in place.

    Args:
        model: A float32 graph whose backbone's and tuners' products are apart (no `join_siblings`, `join_added`).
        form: One of `FORMATS`.
        batches: Calibration: all inputs of the graph by name, a batch at a time.
        frozen: `digests` of the backbone's weights; None where every constant weight but a head's is one, as in
            a merged engine.
        keep: Patterns of nodes that stay float32, by name or operator.
        method: A key of `ranges.METHODS`.

    Raises:
        UsageError: A pattern names no product, or no product is left.
    """
    _gemms_apart(model)
    chosen, kept = choose(model, frozen, keep)
    if not chosen:
        raise UsageError(
            "no product is left to quantise",
            found="; ".join(f"{name}: {why}" for name, why in list(kept.items())[:3]) or "none",
            do="use --precision fp32, or keep less with --keep-fp32",
        )
    read = {node: node.inputs[0] for node in chosen}
    names = list(dict.fromkeys(value.name or "" for value in read.values() if value is not None))
    limits = ranges(model, names, batches, method)
    steps = {name: step(*limits[name], form) for name in names}
    coded: dict[ir.Value, ir.Value] = {}
    weights: dict[ir.Value, ir.Value] = {}
    scales = len(names)
    for node in chosen:
        x, weight = node.inputs
        assert x is not None
        assert weight is not None
        if x not in coded:
            coded[x] = _coded(model.graph, x, steps[x.name or ""], form)
        if weight not in weights:
            weights[weight] = _weight(model.graph, weight, form)
            scales += (constant(weight).shape)[1]  # type: ignore[union-attr]
        node.replace_input_with(0, coded[x])
        node.replace_input_with(1, weights[weight])
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
    products = {
        node.name or "": {
            "activation": value.name or "",
            "scale": float(steps[value.name or ""].scale),
            "zero": steps[value.name or ""].zero,
        }
        for node, value in read.items()
        if value is not None
    }
    return Quantised(form.name, method, scales, products, kept)


def choose(
    model: ir.Model, frozen: frozenset[bytes] | None, keep: Sequence[str] = ()
) -> tuple[list[ir.Node], dict[str, str]]:
    """The products to quantise, and by name why each of the others stays float32.

    Raises:
        UsageError: A pattern of `keep` names no product.
    """
    heads = _heads(model.graph)
    unused = set(keep)
    chosen, kept = [], {}
    for node in model.graph:
        if node.op_type not in PRODUCTS or node.domain:
            continue
        asked = [p for p in keep if any(fnmatchcase(s or "", p) for s in (node.name, node.op_type))]
        unused -= set(asked)
        why = f"kept by --keep-fp32 {asked[0]}" if asked else _reason(node, heads, frozen)
        if why:
            kept[node.name or ""] = why
        else:
            chosen.append(node)
    if unused:
        raise UsageError(
            "a pattern of products to keep in float32 names none",
            where=f"--keep-fp32 {sorted(unused)[0]}",
            wanted=", ".join([*[node.name or "" for node in chosen][:8], *PRODUCTS]),
            do="`*` and `?` stand for any letters",
        )
    return chosen, kept


def step(low: float, high: float, form: Format) -> Step:
    """Scale and zero point of numbers between two ends; zero is always one of them.

    Symmetric: `max(|low|, |high|) / largest` and no zero point; else 255 steps from `low` to `high`.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if form.symmetric:
        return Step(np.float32(max(-low, high) / form.largest or 1.0), 0)
    scale = np.float32((high - low) / 255.0 or 1.0)
    return Step(scale, int(np.rint(-low / float(scale))))


def weight_steps(weight: NDArray[np.float32], form: Format) -> NDArray[np.float32]:
    """The scale of each column of a weight `[K, N]`: its largest magnitude over the format's."""
    scale = np.abs(weight).max(axis=0) / form.largest
    return np.where(scale > 0, scale, 1.0).astype(np.float32)


def _reason(node: ir.Node, heads: set[ir.Node], frozen: frozenset[bytes] | None) -> str:
    """Why a product stays float32; empty if it does not."""
    weight = constant(node.inputs[1])
    if node.op_type == "Conv":
        return "a convolution that is no product of patches"
    if weight is None or constant(node.inputs[0]) is not None:
        return "its weight is no constant: a task's, or another activation"
    if node in heads:
        return "a head"
    if weight.ndim != 2 or node.op_type != "MatMul":
        return "no plain product with a matrix"
    if frozen is not None and _digest(weight) not in frozen:
        return "not a weight of the backbone alone: a tuner's, or folded with one"
    return ""


def _heads(graph: ir.Graph) -> set[ir.Node]:
    """The last products in front of the answer."""
    tail = tail_of(graph)
    ends = [*graph.outputs, *(v for node in tail for v in node.inputs if v is not None)]
    found = {value.producer() for value in ends}
    return {node for node in found if node is not None and node.op_type in PRODUCTS}


def _digest(matrix: NDArray[Any]) -> bytes:
    values = np.ascontiguousarray(matrix, dtype=np.float32)
    return hashlib.sha256(repr(values.shape).encode() + values.tobytes()).digest()


def _gemms_apart(model: ir.Model) -> None:
    """`Gemm(x, W, b)` as a product and a sum, whose bias then stays float32; heads are left alone."""
    graph = model.graph
    heads = _heads(graph)
    for node in list(graph):
        attributes, weight = node.attributes, constant(node.inputs[1]) if node.inputs[1:] else None
        plain = attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1.0
        if node.op_type != "Gemm" or node in heads or weight is None or not plain:
            continue
        if attributes.get_int("transA", 0):
            continue
        matrix = weight.T if attributes.get_int("transB", 0) else weight
        name = node.name or "gemm"
        product = ir.node(
            "MatMul", [node.inputs[0], initializer(graph, f"{name}.weight", matrix)], name=name
        )
        nodes = [product]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            nodes.append(ir.node("Add", [product.outputs[0], node.inputs[2]], name=f"{name}.bias"))
        for new in nodes:
            alike(new.outputs[0], node.outputs[0])
        graph.insert_before(node, nodes)
        replace(node.outputs[0], nodes[-1].outputs[0])
        graph.remove(node, safe=True)


def _coded(graph: ir.Graph, x: ir.Value, by: Step, form: Format) -> ir.Value:
    """An activation quantised and dequantised."""
    dtype = form.dtype if form.symmetric else np.dtype(np.uint8)
    scale = initializer(graph, f"{x.name}.scale", np.array(by.scale, np.float32))
    zero = initializer(graph, f"{x.name}.zero", np.array(by.zero).astype(dtype))
    code = ir.node("QuantizeLinear", [x, scale, zero], name=f"{x.name}.quantise")
    back = ir.node("DequantizeLinear", [code.outputs[0], scale, zero], name=f"{x.name}.dequantise")
    alike(code.outputs[0], x).dtype = ir.DataType.from_numpy(dtype)
    alike(back.outputs[0], x)
    if (producer := x.producer()) is None:
        graph.insert_before(graph[0], [code, back])
    else:
        graph.insert_after(producer, [code, back])
    return back.outputs[0]


def _weight(graph: ir.Graph, weight: ir.Value, form: Format) -> ir.Value:
    """A weight stored in eight bits, dequantised."""
    matrix = constant(weight)
    assert matrix is not None
    scales = weight_steps(matrix, form)
    code = matrix / scales
    if form.dtype == np.int8:
        code = np.rint(code)
    codes = np.clip(code, -form.largest, form.largest).astype(form.dtype)
    stored = initializer(graph, f"{weight.name}.{form.dtype.name}", codes)
    scale = initializer(graph, f"{weight.name}.scales", scales)
    zero = initializer(graph, f"{weight.name}.zeros", np.zeros(len(scales)).astype(form.dtype))
    back = ir.node(
        "DequantizeLinear",
        [stored, scale, zero],
        attributes={"axis": 1},
        name=f"{weight.name}.dequantise",
    )
    alike(back.outputs[0], weight)
    graph.insert_before(graph[0], back)
    return back.outputs[0]
