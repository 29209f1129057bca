"""What a call has to do, counted from its graph: multiply-accumulates, and the bytes of its products' operands.

Times are measured, these are counted: the same on every machine. The ratio of two subjects' counts is the arithmetic
bound of the ratio of their times, as if nothing but products took time; the counts over what the machine does at
best (`ceilings.py`) are a time that no call is far below (S. Williams et al., Roofline, CACM 52(4), 2009).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...export.macs import count, sized
from ...export.operands import Operands, operands
from ...export.products import products

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .source import Source


@dataclass(frozen=True)
class Work:
    """One call of a subject.

    Attributes:
        macs: Multiply-accumulates of all products, see `export.macs`.
        weight_bytes: Weights that the products read, each once, however many products or rows read it. Of a bank,
            the rows that the batch asks for, each once.
        activation_bytes: What the products read besides weights, and what they write, product by product.
    """

    macs: int
    weight_bytes: int
    activation_bytes: int

    @property
    def flops(self) -> int:
        """Floating point operations: two for each multiply-accumulate."""
        return 2 * self.macs

    @property
    def bytes(self) -> int:
        """All operands of the products."""
        return self.weight_bytes + self.activation_bytes


@dataclass(frozen=True)
class GraphFacts:
    """An engine's graph as its file has it, before the runtime optimises it.

    Attributes:
        parameters_bytes: Constants of the graph, and its bank where that is an input.
        gemms: See `export.products.Products`.
        attentions: The same.
    """

    parameters_bytes: int
    gemms: int
    attentions: int


class Counter:
    """Counts the calls of one engine: `counter(batch, task_rows) -> Work`; a batch size is analysed once."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.counted: dict[int, tuple[int, Operands]] = {}

    def __call__(self, batch: int, task_rows: Sequence[int]) -> Work:
        """The work of one call.

        Args:
            batch: Rows B.
            task_rows: The row of the bank that each of them asks for.

        Raises:
            UsageError: An operator of the graph has no rule.
        """
        if batch not in self.counted:
            model = sized(self.source.graph, batch, tasks=self.source.tasks)
            self.counted[batch] = count(model, batch).total, operands(model)
        macs, moved = self.counted[batch]
        weights = moved.weights + len(set(task_rows)) * moved.picked
        return Work(macs, weights, moved.activations)


def graph_facts(source: Source) -> GraphFacts:
    """What the engine's file and its bank hold."""
    model = source.graph
    constants = sum(
        math.ceil(value.const_value.nbytes)
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    return GraphFacts(constants + source.bank_bytes, *products(model))
