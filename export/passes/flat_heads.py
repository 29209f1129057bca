"""Heads left side by side: attention on `[B, N, H d]` instead of `[B, H, N, d]`.

The usual code cuts one `qkv` tensor into heads by a reshape, a transpose and three slices, and puts
them together again behind the attention. ONNX Attention (opset 23) takes the flat layout with the
number of heads, so that four copies of the activations go away and `qkv` is split where it was made:

    split(reshape(qkv, [B, N, 3, H, d]))  =  reshape(split(qkv))
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .linear import constant, initializer, leading, only_reader, replace, shaped


def flat_heads(model: ir.Model) -> int:
    """Rewrite every attention whose query, key and value are the thirds of one tensor.

    Returns:
        Number of attentions rewritten.
    """
    found = 0
    for node in list(model.graph):
        alone = node.op_type == "Attention" and len(node.outputs) == 1
        if alone and _rewrite(model.graph, node):
            found += 1
    return found


def _rewrite(graph: ir.Graph, attention: ir.Node) -> bool:
    thirds = [_third(value) for value in attention.inputs[:3]]
    if [number for number, _, _ in thirds] != [0, 1, 2]:
        return False
    _, qkv, heads = thirds[0]
    joined = _joined_heads(attention.outputs[0])
    same = all(source is qkv for _, source, _ in thirds)
    if not same or qkv is None or joined is None or qkv.shape is None or heads is None:
        return False
    width = qkv.shape[-1]
    if not isinstance(width, int) or width % 3:
        return False
    tokens = leading(qkv)
    if tokens is None or leading(joined) != tokens or joined.shape[-1] != width // 3:  # type: ignore[index]
        return False
    name = attention.name or "attention"
    sizes = initializer(graph, f"{name}.thirds", np.array([width // 3] * 3, dtype=np.int64))
    split = ir.node(
        "Split", [qkv, sizes], attributes={"axis": -1}, num_outputs=3, name=f"{name}.split"
    )
    attributes = dict(attention.attributes.items())
    attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", heads)
    attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", heads)
    flat = ir.Node(
        "",
        "Attention",
        [*split.outputs, *attention.inputs[3:]],
        attributes=list(attributes.values()),
        num_outputs=1,
        name=f"{name}.flat",
    )
    for output in (*split.outputs, flat.outputs[0]):
        shaped(output, qkv, width // 3)
    graph.insert_before(attention, [split, flat])
    replace(joined, flat.outputs[0])
    return True


def _third(value: ir.Value | None) -> tuple[int | None, ir.Value | None, int | None]:
    """Which third of which flat tensor a `[B, H, N, d]` value is, and H."""
    nothing = (None, None, None)
    squeeze = value.producer() if value is not None else None
    piece = _producer(squeeze, "Squeeze")
    transpose = _producer(piece, "Slice")
    reshape = _producer(transpose, "Transpose")
    if reshape is None or reshape.op_type != "Reshape":
        return nothing
    assert squeeze is not None
    assert piece is not None
    assert transpose is not None
    start, stop, axes = (constant(v) for v in piece.inputs[1:4])
    whole = reshape.outputs[0].shape
    perm = transpose.attributes.get_ints("perm", [])
    wanted = (
        whole is not None
        and len(whole) == 5
        and whole[2] == 3
        and list(perm) == [2, 0, 3, 1, 4]
        and start is not None
        and stop is not None
        and axes is not None
        and axes.tolist() == [0]
        and len(piece.inputs) in (4, 5)
    )
    if not wanted:
        return nothing
    first, last = int(start.item()), min(int(stop.item()), 3)  # type: ignore[union-attr]
    heads = whole[3]  # type: ignore[index]
    if last - first != 1 or not isinstance(heads, int):
        return nothing
    return first, reshape.inputs[0], heads


def _producer(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """The node in front of `node`, when `node` is an `op_type`."""
    if node is None or node.op_type != op_type or node.inputs[0] is None:
        return None
    return node.inputs[0].producer()


def _joined_heads(value: ir.Value) -> ir.Value | None:
    """The `[B, N, H d]` value that an attention's `[B, H, N, d]` output becomes, and nothing else."""
    transpose = only_reader(value)
    if transpose is None or transpose.op_type != "Transpose":
        return None
    reshape = only_reader(transpose.outputs[0])
    if list(transpose.attributes.get_ints("perm", [])) != [0, 2, 1, 3] or reshape is None:
        return None
    shape = reshape.outputs[0].shape
    if reshape.op_type != "Reshape" or shape is None or len(shape) != 3:
        return None
    return reshape.outputs[0]
