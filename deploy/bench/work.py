"""What a call has to do, counted from its graph: multiply-accumulates, and the bytes of its products' operands.

Times are measured, these are counted: the same on every machine. The ratio of two subjects' counts is the arithmetic
bound of the ratio of their times, as if nothing but products took time; the counts over what the machine does at
best (`ceilings.py`) are a time that no call is far below (S. Williams et al., Roofline, CACM 52(4), 2009).
"""

from __future__ import annotations

from dataclasses import dataclass


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
        gemms: Products of matrices: MatMul, Gemm, Conv, Einsum of two operands, and the fused forms that hold one.
        attentions: Attention nodes of any domain.
    """

    parameters_bytes: int
    gemms: int
    attentions: int
