"""Bytes that the products of a graph read and write, counted from its shapes beside `macs`.

A weight is read once, however many products read it and through whatever moves it (Transpose, Reshape): that is what
has to come from memory at least. A bank's tensor that a batch picks rows of counts by row, since how many rows a batch
asks for is known only then. Everything else that a product reads, and what it writes, counts where it stands; what
stays in a cache between two products costs less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..merge.errors import UsageError
from .engine import BANK_PREFIX, TASK
from .macs import COUNTED, shape_of

if TYPE_CHECKING:
    import onnx_ir as ir

MOVES = frozenset({
    "Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
"""Operators behind which a weight is still the same weight."""


@dataclass(frozen=True)
class Operands:
    """Of all products in one run.

    Attributes:
        weights: Bytes of the weights, each once.
        picked: Bytes that one row of the bank adds, for each task that the batch asks for.
        activations: Bytes read besides weights, and written, product by product.
    """

    weights: int
    picked: int
    activations: int


def operands(model: ir.Model) -> Operands:
    """Count a graph whose shapes are numbers, as `macs.sized` makes them.

    Args:
        model: The graph; tensors of its bank are inputs named `bank/...` or constants, and picked by `task`.

    Raises:
        UsageError: A shape could not be inferred.
    """
    fixed = {value for value in model.graph.inputs if (value.name or "").startswith(BANK_PREFIX)}
    picked = {value for value in model.graph.inputs if value.name == TASK}
    weights: dict[ir.Value, int] = {}
    rows: dict[ir.Value, int] = {}
    activations = 0
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        moving = [value for value in inputs if value not in fixed and value.const_value is None]
        if not moving:
            fixed.update(node.outputs)
        elif all(value in picked for value in moving):
            picked.update(node.outputs)
        if node.op_type not in COUNTED:
            continue
        where = f"{node.name} ({node.op_type})"
        for value in inputs:
            size = _bytes(value, where)
            if value not in moving:
                weights[_source(value)] = size
            elif value in picked:
                rows[_source(value)] = size // shape_of(value, where, "its inputs")[0]
            else:
                activations += size
        activations += sum(
            _bytes(value, where)
            for value in node.outputs
            if value.uses() or value.is_graph_output()
        )
    return Operands(sum(weights.values()), sum(rows.values()), activations)


def _source(value: ir.Value) -> ir.Value:
    """The weight behind what only moves it."""
    node = value.producer()
    while node is not None and node.op_type in MOVES and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _bytes(value: ir.Value, where: str) -> int:
    if value.dtype is None:
        raise UsageError("a type cannot be inferred, so its bytes cannot be counted", where=where)
    numbers = math.prod(shape_of(value, where, "what it reads and writes"))
    return math.ceil(numbers * value.dtype.itemsize)  # types of half a byte exist
