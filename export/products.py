"""The products of matrices and the attentions of a graph: nearly all that an engine's time goes into."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import onnx_ir as ir


class Products(NamedTuple):
    """How many there are.

    Attributes:
        gemms: Products of matrices: MatMul, Gemm, Conv, Einsum of two operands, and the fused forms that hold one.
        attentions: Attention nodes of any domain.
    """

    gemms: int
    attentions: int


def products(model: ir.Model) -> Products:
    """Those of a graph; those of a function as often as it is called."""
    nodes = list(_nodes(model.graph, model))
    return Products(
        gemms=sum(is_gemm(node.op_type, _operands(node)) for node in nodes),
        attentions=sum(is_attention(node.op_type) for node in nodes),
    )


def is_gemm(operator: str, operands: int = 2) -> bool:
    """Whether a node is a product of matrices; a fused form (`FusedMatMul`, `FusedConv`) is one."""
    if operator == "Einsum":
        return operands > 1
    return re.search("MatMul|Gemm|Conv(?!ert)", operator) is not None


def is_attention(operator: str) -> bool:
    """Whether a node is a whole attention: `Attention` and its forms of other domains."""
    return operator.endswith("Attention")


def _operands(node: ir.Node) -> int:
    return len([value for value in node.inputs if value is not None])


def _nodes(body: Iterable[ir.Node], model: ir.Model) -> Iterator[ir.Node]:
    """Every node, those of a function in the place of the node that calls it."""
    for node in body:
        function = model.functions.get(node.op_identifier())
        if function is None:
            yield node
        else:
            yield from _nodes(function, model)
