"""Which part of the model a node of an optimised graph belongs to, as far as names tell.

What survives the exporter, our passes and the runtime's are the names of biases, norms and bank tensors; the names of
transposed and joined weights do not. So a node is placed by what it is, by the names that it reads, or by the nodes
around it:

    by operator      Attention; LayerNormalization and its fused forms
    by names         `bank/blocks.3.mlp/adapter.0/down` is a tuner's, `trunk.blocks.3.mlp.fc1.bias` the FFN's
    by what it reads  a product whose weight was picked from the bank by `task`
    by neighbours    where all placed nodes that read it agree, or else those that it reads

A product that our passes joined from a frozen layer's and a branch's weights is one kernel; its time is the frozen
layer's part.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ...export.engine import BANK_PREFIX, TASK
from ...export.products import is_attention, is_gemm

if TYPE_CHECKING:
    import onnx_ir as ir

ATTENTION, FFN, NORM, TUNERS = "attention", "FFN", "norms", "tuner branches"
EMBEDDING, HEAD, SUMS, OTHER = "embedding", "head", "sums", "other"

NAMES = (
    (HEAD, r"^bank/head/|(^|\.)(head|fc_norm|classifier|pooler)\b"),
    (TUNERS, rf"^{BANK_PREFIX}"),
    (NORM, r"norm\w*\.(weight|bias)$"),
    (ATTENTION, r"\battn\b|attention|\bqkv\b"),
    (FFN, r"\b(mlp|ffn|fc1|fc2|intermediate)\b"),
    (EMBEDDING, r"patch_embed|pos_embed|cls_token|embeddings?\b"),
)
"""Part and what a tensor's name says of it; the first that fits."""

APART = frozenset({NORM, SUMS})
"""Parts that stand between others, so that no neighbour is placed by them."""


def parts(model: ir.Model) -> dict[str, str]:
    """The part of each node, by the node's name.

    Args:
        model: A graph as the runtime runs it.
    """
    found: dict[ir.Node, str] = {}
    picked = {value for value in model.graph.inputs if value.name == TASK}
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        given = [value for value in inputs if not _is_constant(value)]
        if given and all(value in picked for value in given):
            picked.update(node.outputs)
        part = _own_part(node, inputs, picked)
        if part is not None:
            found[node] = part
    changed = True
    while changed:
        changed = False
        for node in model.graph:
            if node not in found and (part := _part_of_neighbours(node, found)) is not None:
                found[node] = part
                changed = True
    return {node.name or node.op_type: found.get(node, OTHER) for node in model.graph}


def _is_constant(value: ir.Value) -> bool:
    return value.const_value is not None or (value.name or "").startswith(BANK_PREFIX)


def _own_part(node: ir.Node, inputs: list[ir.Value], picked: set[ir.Value]) -> str | None:
    """What the node says itself."""
    if is_attention(node.op_type):
        return ATTENTION
    if "LayerNormalization" in node.op_type:
        return NORM
    for part, pattern in NAMES:
        if any(re.search(pattern, value.name or "") for value in inputs if _is_constant(value)):
            return part
    if is_gemm(node.op_type) and any(value in picked for value in inputs):
        return TUNERS
    if node.op_type == "Add" and not any(_is_constant(value) for value in inputs):
        return SUMS
    return None


def _part_of_neighbours(node: ir.Node, found: dict[ir.Node, str]) -> str | None:
    readers = [use.node for value in node.outputs for use in value.uses()]
    read = [producer for value in node.inputs if value and (producer := value.producer())]
    for neighbours in (readers, read):
        near = {found[other] for other in neighbours if other in found} - APART
        if len(near) == 1:
            return near.pop()
    return None
