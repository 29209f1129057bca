"""The numbers that an engine computes in: a typing pass on a finished graph.

Weights are folded in float32 or float64 by the passes and cast here, once. In half precision (float16,
bfloat16) everything is half but for the islands, which stay float32 and are named in the report:

* what a program cast to float32 itself, and sums, powers and softmaxes written out as operators
  (a sum of 200 squares leaves float16's range where none of them does);
* what is computed elementwise from such a value, until another operator reads it;
* the tail of the graph, from the last matrix product to the answer: biases of the classifier, classes
  that a task does not have, rows without a task;
* inputs: pictures arrive as float32 and are cast in the graph. The bank arrives in half;
* nodes that whoever exports names.

`islands` decides them; `saturation` looks at the values first.

`LayerNormalization` takes half and computes its statistics in float32 (`stash_type` 1, ONNX's default);
fused attention kernels accumulate their softmax in float32 whatever the graph says. `tf32` leaves the
graph as it is: it is a mode of the device's float32 products.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ..merge.errors import BuildFailed, UsageError
from .islands import Islands, find_islands
from .passes.linear import constant

if TYPE_CHECKING:
    from numpy.typing import NDArray

QUANTISED = ("int8", "fp8")
"""Precisions of quantised products in a float32 graph; see `quantise`."""
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", *QUANTISED)
ON_CUDA = frozenset({"tf32", "fp16", "bf16"})
"""Precisions whose engines are laid out for a CUDA device."""
HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
NUMPY = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}

MASK = 1e30
"""Magnitudes from here on are masks, and no values of the model."""

FLOAT_INPUTS = {"Resize": (0,)}
"""Of operators whose other float inputs are not values of the model, those that are."""


@dataclass
class Losses:
    """What casts to a half did to tensors, by name; a tensor may be cast piece by piece.

    Attributes:
        precision: `fp16` or `bf16`.
        clipped: See `Typing`.
        flushed: See `Typing`.
        subnormal: See `Typing`.
        largest: Largest finite magnitude of each tensor.
        apart: Largest difference that the cast made to it.
    """

    precision: str
    clipped: Counter[str] = field(default_factory=Counter)
    flushed: Counter[str] = field(default_factory=Counter)
    subnormal: Counter[str] = field(default_factory=Counter)
    largest: dict[str, float] = field(default_factory=dict)
    apart: dict[str, float] = field(default_factory=dict)

    def cast(self, name: str, values: NDArray[np.float32]) -> NDArray[Any]:
        """A tensor or a piece of it in half, counted."""
        half, clipped, flushed = to_half(values, self.precision)
        small = (half != 0) & (np.abs(half) < ml_dtypes.finfo(half.dtype).smallest_normal)
        for counter, count in (
            (self.clipped, clipped), (self.flushed, flushed), (self.subnormal, int(small.sum())),
        ):  # fmt: skip
            if count:
                counter[name] += count
        finite = np.isfinite(values)
        for sizes, of in ((self.largest, values), (self.apart, half.astype(np.float32) - values)):
            size = np.abs(of, where=finite, out=np.zeros_like(values)).max(initial=0.0)
            sizes[name] = max(sizes.get(name, 0.0), float(size))
        return half

    def cast_weights(self, name: str, values: NDArray[np.float32]) -> NDArray[Any]:
        """As `cast`, masks not counted: what keys and classes are filled with that a task does not have."""
        self.cast(name, np.where(np.abs(values) < MASK, values, np.float32(0)))
        return to_half(values, self.precision)[0]

    @property
    def error(self) -> float:
        """See `Typing`."""
        return max((self.apart[n] / size for n, size in self.largest.items() if size), default=0.0)


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
        subnormal: Numbers below the smallest normal half, kept with fewer digits, by tensor.
        kept: Names of the nodes that somebody's patterns keep in float32, by pattern.
        audit: What the float32 graph's values reached; see `saturation.Audit`.
    """

    precision: str
    islands: dict[str, int]
    cast: int
    clipped: dict[str, int]
    flushed: dict[str, int]
    error: float
    subnormal: dict[str, int] = field(default_factory=dict)
    kept: dict[str, list[str]] = field(default_factory=dict)
    audit: dict[str, Any] | None = None

    def with_losses(self, losses: Losses) -> Typing:
        """The same, and what casts did to tensors whose values were not in the graph."""
        return replace(
            self,
            clipped=self.clipped | losses.clipped,
            flushed=self.flushed | losses.flushed,
            subnormal=self.subnormal | losses.subnormal,
            error=max(self.error, losses.error),
        )

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def retype(model: ir.Model, precision: str, islands: Islands | None = None) -> Typing:
    """Give a float32 graph the types of a precision, in place.

    Args:
        model: After all passes that fold weights.
        precision: A key of `PRECISIONS`; a quantised one computes in float32 between its products.
        islands: Of this model, where they are not those of the rules alone.

    Raises:
        UsageError: Unknown precision.
        BuildFailed: A LayerNormalization asks for statistics in half.
    """
    if precision not in PRECISIONS:
        raise UsageError("unknown precision", wanted=", ".join(PRECISIONS), found=precision)
    if precision not in HALF:
        return Typing(precision, {}, 0, {}, {}, 0.0)
    for node in model.graph:
        if node.op_type == "LayerNormalization" and node.attributes.get_int("stash_type", 1) != 1:
            raise BuildFailed(
                "a layer norm asks for statistics in half precision",
                where=node.name,
                wanted="stash_type 1",
            )
    return _Retyping(model, precision, islands or find_islands(model)).run()


def to_half(values: NDArray[np.float32], precision: str) -> tuple[NDArray[Any], int, int]:
    """Values in half, with how many were beyond its range and became its largest, and how many zero."""
    half = NUMPY[precision]
    largest = float(ml_dtypes.finfo(half).max)
    beyond = np.isfinite(values) & (np.abs(values) > largest)
    cast = np.where(beyond, np.copysign(largest, values), values).astype(half)
    return cast, int(beyond.sum()), int(((cast == 0) & (values != 0)).sum())


class _Retyping:
    def __init__(self, model: ir.Model, precision: str, islands: Islands) -> None:
        self.graph, self.islands = model.graph, islands
        self.precision, self.half = precision, HALF[precision]
        self.cast: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.losses = Losses(precision)
        self.tensors = 0

    def run(self) -> Typing:
        floats, wide = self.islands.floats, self.islands.wide
        for value in self.graph.inputs:
            if value in floats and value not in wide:
                value.dtype = self.half  # of the bank
        types = dict.fromkeys(self.islands.nodes, ir.DataType.FLOAT)
        types |= dict.fromkeys(self.islands.halves, self.half)
        for node in list(self.graph):
            if node in types and node.op_type != "Cast":
                self.give(node, types[node])
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
            self.precision,
            dict(Counter(node.op_type for node in self.islands.nodes)),
            self.tensors,
            dict(self.losses.clipped),
            dict(self.losses.flushed),
            self.losses.error,
            dict(self.losses.subnormal),
        )

    def give(self, node: ir.Node, dtype: ir.DataType) -> None:
        """Let a node read and give a type."""
        floats, wide = self.islands.floats, self.islands.wide
        places = FLOAT_INPUTS.get(node.op_type)
        for place, value in enumerate(node.inputs):
            if value is not None and value in floats and (places is None or place in places):
                node.replace_input_with(place, self.as_type(value, dtype, value in wide))
        for value in node.outputs:
            if value in floats:
                value.dtype = dtype

    def as_type(self, value: ir.Value, wanted: ir.DataType, is_wide: bool) -> ir.Value:
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
        self.tensors += 1
        one = array[:1] if array.ndim and not array.strides[0] else array  # one row stands for all
        half = np.broadcast_to(self.losses.cast(name, one), array.shape)
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
