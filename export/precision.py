"""The numbers that an engine computes in: a typing pass on a finished graph.

Weights are folded in float32 or float64 by the passes and cast here, once. In half precision (float16,
bfloat16) everything is half but for the islands, which stay float32 and are named in the report:

* what a program cast to float32 itself, and sums, powers and softmaxes written out as operators
  (a sum of 200 squares leaves float16's range where none of them does);
* what is computed elementwise from such a value, until another operator reads it;
* the tail of the graph, from the last matrix product to the answer: biases of the classifier, classes
  that a task does not have, rows without a task;
* inputs: pictures arrive as float32 and are cast in the graph. The bank arrives in half.

`LayerNormalization` takes half and computes its statistics in float32 (`stash_type` 1, ONNX's default);
fused attention kernels accumulate their softmax in float32 whatever the graph says. `tf32` leaves the
graph as it is: it is a mode of the device's float32 products.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ..merge.errors import BuildFailed, UsageError
from .engine import BANK_PREFIX
from .passes.linear import constant

if TYPE_CHECKING:
    from numpy.typing import NDArray

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
ON_CUDA = frozenset({"tf32", "fp16", "bf16"})
"""Precisions whose engines are laid out for a CUDA device."""
HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
NUMPY = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}

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
FLOAT_INPUTS = {"Resize": (0,)}
"""Of operators whose other float inputs are not values of the model, those that are."""


@dataclass(frozen=True)
class Typing:
    """What the typing pass did.

    Attributes:
        precision: A key of `PRECISIONS`.
        islands: Nodes that compute in float32, by operator.
        cast: Number of constant tensors that were cast.
        clipped: Numbers beyond the largest finite half, by tensor; each became that.
        flushed: Numbers that are not zero and became zero, by tensor.
        error: Largest difference that the cast made to a tensor, over that tensor's largest absolute value.
    """

    precision: str
    islands: dict[str, int]
    cast: int
    clipped: dict[str, int]
    flushed: dict[str, int]
    error: float

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def retype(model: ir.Model, precision: str) -> Typing:
    """Give a float32 graph the types of a precision, in place.

    Args:
        model: After all passes that fold weights.
        precision: A key of `PRECISIONS`.

    Raises:
        UsageError: Unknown precision.
        BuildFailed: A LayerNormalization asks for statistics in half.
    """
    if precision not in PRECISIONS:
        raise UsageError("unknown precision", wanted=", ".join(PRECISIONS), found=precision)
    if precision not in HALF:
        return Typing(precision, {}, 0, {}, {}, 0.0)
    return _Retyping(model, precision).run()


def to_half(values: NDArray[np.float32], precision: str) -> tuple[NDArray[Any], int, int]:
    """Values in half, with how many were beyond its range and became its largest, and how many zero."""
    half = NUMPY[precision]
    largest = float(ml_dtypes.finfo(half).max)
    beyond = np.isfinite(values) & (np.abs(values) > largest)
    cast = np.where(beyond, np.copysign(largest, values), values).astype(half)
    return cast, int(beyond.sum()), int(((cast == 0) & (values != 0)).sum())


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


class _Retyping:
    def __init__(self, model: ir.Model, precision: str) -> None:
        self.model, self.graph = model, model.graph
        self.precision, self.half = precision, HALF[precision]
        self.cast: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.islands: dict[str, int] = {}
        self.clipped: dict[str, int] = {}
        self.flushed: dict[str, int] = {}
        self.error = 0.0
        self.tensors = 0

    def run(self) -> Typing:
        tail = self.tail()
        floats = {v for v in self.values() if v.dtype == ir.DataType.FLOAT}
        wide: set[ir.Value] = {v for v in self.graph.inputs if v in floats}
        for value in self.graph.inputs:
            if value in floats and (value.name or "").startswith(BANK_PREFIX):
                value.dtype = self.half
                wide.discard(value)
        for node in list(self.graph):
            reads = [v for v in node.inputs if v is not None and v in floats]
            gives = [v for v in node.outputs if v in floats]
            if (
                node.op_type == "LayerNormalization"
                and node.attributes.get_int("stash_type", 1) != 1
            ):
                raise BuildFailed(
                    "a layer norm asks for statistics in half precision",
                    where=node.name,
                    wanted="stash_type 1",
                )
            if not reads:
                wide.update(gives)  # made of integers, or asked for as float32
                continue
            if node.op_type == "Cast":  # asked for; it takes what it is given
                wide.update(gives)
                self.islands |= {"Cast": self.islands.get("Cast", 0) + 1} if gives else {}
                continue
            inner = any(v in wide and not v.is_graph_input() for v in reads)
            island = node in tail or node.op_type in SUMS or (node.op_type in ELEMENTWISE and inner)
            if island:
                self.islands[node.op_type] = self.islands.get(node.op_type, 0) + 1
                wide.update(gives)
            wanted = ir.DataType.FLOAT if island else self.half
            places = FLOAT_INPUTS.get(node.op_type)
            for place, value in enumerate(node.inputs):
                if value is not None and value in floats and (places is None or place in places):
                    node.replace_input_with(place, self.as_type(value, wanted, value in wide, node))
            for value in gives:
                value.dtype = wanted
        for place, value in enumerate(list(self.graph.outputs)):
            if value in floats and value not in wide:
                self.answer(place, value)
        unused = [n for n, v in self.graph.initializers.items() if not v.uses() and v in floats]
        for name in unused:
            del self.graph.initializers[name]
        for (value, dtype), new in self.cast.items():  # a constant keeps its name
            if value.name in unused and constant(new) is not None and dtype == self.half:
                new.name = value.name
        return Typing(
            self.precision, self.islands, self.tensors, self.clipped, self.flushed, self.error
        )

    def values(self) -> list[ir.Value]:
        """Every value of the graph, its type filled in where the exporter left it out."""
        for node in self.graph:
            for output in node.outputs:
                if output.dtype is None and (dtype := _type_of(node)) is not None:
                    output.dtype = dtype
        inside = [output for node in self.graph for output in node.outputs]
        return [*self.graph.inputs, *self.graph.initializers.values(), *inside]

    def tail(self) -> set[ir.Node]:
        """The nodes behind the last product: they move logits, mask them or add a bias."""
        found: set[ir.Node] = set()
        open_ = [v.producer() for v in self.graph.outputs]
        while open_:
            node = open_.pop()
            if node is None or node in found:
                continue
            if node.op_type == "Add":
                moved = [v for v in node.inputs if v is not None and not self.is_parameter(v)]
                if len(moved) != 1:
                    continue
            elif node.op_type not in TAIL and not self.gathers(node):
                continue
            found.add(node)
            open_.extend(v.producer() for v in node.inputs if v is not None)
        return found

    def gathers(self, node: ir.Node) -> bool:
        """Whether a node takes rows of a constant, such as the biases of a bank of classifiers."""
        return node.op_type == "Gather" and constant(node.inputs[0]) is not None

    def is_parameter(self, value: ir.Value) -> bool:
        """A constant, or rows gathered from the bank."""
        node = value.producer()
        if node is None:
            return not value.is_graph_input() or (value.name or "").startswith(BANK_PREFIX)
        first = node.inputs[0] if node.inputs else None
        return node.op_type in ("Gather", *TAIL) and first is not None and self.is_parameter(first)

    def as_type(
        self, value: ir.Value, wanted: ir.DataType, is_wide: bool, reader: ir.Node
    ) -> ir.Value:
        """The value in a type: itself, a constant of that type, or behind a Cast."""
        array = constant(value)
        if array is None and (wanted == ir.DataType.FLOAT) == is_wide:
            return value
        key = (value, wanted)
        if key not in self.cast:
            self.cast[key] = (
                self.constant(value, array, wanted)
                if array is not None
                else self.behind_cast(value, wanted)
            )
        return self.cast[key]

    def constant(self, value: ir.Value, array: np.ndarray, wanted: ir.DataType) -> ir.Value:
        if wanted == ir.DataType.FLOAT:
            return value
        name = value.name or "constant"
        half, clipped, flushed = to_half(array, self.precision)
        self.tensors += 1
        self.clipped |= {name: clipped} if clipped else {}
        self.flushed |= {name: flushed} if flushed else {}
        finite = np.isfinite(array)
        if largest := float(np.abs(array, where=finite, out=np.zeros_like(array)).max(initial=0.0)):
            difference = np.abs(
                half.astype(np.float32) - array, where=finite, out=np.zeros_like(array)
            )
            self.error = max(self.error, float(difference.max()) / largest)
        new = ir.val(f"{name}.{self.precision}", const_value=ir.tensor(half, dtype=self.half))
        new.shape, new.dtype = value.shape, self.half
        assert new.const_value is not None
        new.const_value.name = new.name
        self.graph.register_initializer(new)
        return new

    def behind_cast(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        node = ir.node(
            "Cast",
            [value],
            attributes={"to": wanted},
            name=f"{value.name}.to_{wanted.name.lower()}",
        )
        node.outputs[0].shape, node.outputs[0].dtype = value.shape, wanted
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(producer, node)
        return node.outputs[0]

    def answer(self, place: int, value: ir.Value) -> None:
        """An answer that ends in half leaves as float32, under its own name."""
        new = self.behind_cast(value, ir.DataType.FLOAT)
        value.name, new.name = f"{value.name}.half", value.name
        self.graph.outputs[place] = new
