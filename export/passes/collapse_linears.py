"""Two linear layers in a row are one: `(x W1 + b1) W2 + b2` = `x (W1 W2) + (b1 W2 + b2)`.

With `W1` `[k, m]` and `W2` `[m, n]`, a token costs `k m + m n` multiply-accumulates before and `k n`
after. Layers are collapsed where that is fewer: an adapter's narrow `down` and `up` (small m) are not.

What only moves whole tokens may stand between the two, since it is the same for every channel: it
then moves tokens of `x`. Collapsed weights are computed in float64 and rounded once.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .linear import (
    Linear,
    constant,
    initializer,
    linear_to,
    only_reader,
    replace,
    shape_of,
    shaped,
)

BANK = "bank/"  # tensors that a check puts others in the place of


def collapse_linears(model: ir.Model) -> int:
    """Collapse linear layers that are read by one other and nothing else, where that is cheaper.

    Returns:
        Number of layers that went into another one.
    """
    graph = model.graph
    collapsed = 0
    again = True
    while again:  # a collapsed layer may be the first of another pair
        again = False
        for node in list(graph):
            second = _layer(node) if node.graph is not None else None
            found = _first(second) if second is not None else None
            if second is None or found is None:
                continue
            first, between = found
            if _cheaper(first, second) and _collapse(graph, first, between, second):
                collapsed += 1
                again = True
    return collapsed


def _layer(node: ir.Node | None) -> Linear | None:
    """The linear layer that ends at a node, if a check replaces none of its tensors."""
    if node is None:
        return None
    layer = _gemm(node) if node.op_type == "Gemm" else linear_to(node.outputs[0])
    if layer is None or layer.y is not node.outputs[0]:
        return None
    inside = [*layer.matmul.inputs, *(layer.add.inputs if layer.add is not None else ())]
    replaced = any(value is not None and (value.name or "").startswith(BANK) for value in inside)
    return None if replaced or not np.issubdtype(_dtype(layer), np.floating) else layer


def _gemm(node: ir.Node) -> Linear | None:
    """A Gemm as a linear layer, its factors `alpha` and `beta` in the weights (float64 then)."""
    weight = constant(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    bias = constant(given)
    if weight is None or node.attributes.get_int("transA", 0) or (given and bias is None):
        return None
    if node.attributes.get_int("transB", 0):
        weight = weight.T
    if (alpha := node.attributes.get_float("alpha", 1.0)) != 1:
        weight = weight.astype(np.float64) * alpha
    if bias is not None:
        if bias.size not in (1, weight.shape[1]) or bias.shape[-1:] not in ((), (bias.size,)):
            return None  # a bias per row
        bias = np.broadcast_to(bias.ravel(), weight.shape[1:])
        if (beta := node.attributes.get_float("beta", 1.0)) != 1:
            bias = bias.astype(np.float64) * beta
    return Linear(node, weight, None, bias)


def _dtype(layer: Linear) -> np.dtype:
    """Of the weights as they are stored."""
    weight = constant(layer.matmul.inputs[1])
    assert weight is not None
    return weight.dtype


def _cheaper(first: Linear, second: Linear) -> bool:
    (k, m), n = first.weight.shape, second.weight.shape[1]
    return k * n < k * m + m * n


def _first(second: Linear) -> tuple[Linear, list[ir.Node]] | None:
    """The linear layer that a second one reads, and what moves its tokens in between, in order."""
    between: list[ir.Node] = []
    value = second.x
    while only_reader(value) is not None:
        node = value.producer()
        first = _layer(node)
        if first is not None:
            return (first, between[::-1]) if _dtype(first) == _dtype(second) else None
        if node is None or not _moves_tokens(node) or node.inputs[0] is None:
            return None
        between.append(node)
        value = node.inputs[0]
    return None


def _moves_tokens(node: ir.Node) -> bool:
    """Whether a node puts whole tokens elsewhere, and makes no more of them."""
    before = shape_of(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
    after = shape_of(node.outputs[0])
    if before is None or after is None or node.domain or len(node.outputs) > 1:
        return False
    last = len(before) - 1
    given = [constant(value) for value in node.inputs[1:]]
    if node.op_type == "Identity":
        return True
    if node.op_type == "Transpose":
        return list(node.attributes.get_ints("perm", range(last, -1, -1)))[-1:] == [last]
    if node.op_type == "Reshape":  # whole tokens stay in order
        same = after[-1:] == before[-1:] and isinstance(before[-1], int)
        sizes = given[0]
        return same and sizes is not None and 0 not in sizes[last:-1]  # 0 would be the channels
    if node.op_type == "Gather":
        axis = node.attributes.get_int("axis", 0) % len(before)
        size = before[axis]
        few = given[0] is not None and isinstance(size, int) and given[0].size <= size
        return axis != last and few
    if node.op_type == "Slice":
        axes = given[2] if len(given) > 2 else None
        return axes is not None and last not in axes % len(before)
    if node.op_type in ("Squeeze", "Unsqueeze"):
        longer = before if node.op_type == "Squeeze" else after
        axes = given[0] if given else None
        return axes is not None and len(longer) - 1 not in axes % len(longer)
    return False


def _collapse(graph: ir.Graph, first: Linear, between: list[ir.Node], second: Linear) -> bool:
    dtype = _dtype(second)
    right = second.weight.astype(np.float64)
    biases = [] if first.bias is None else [first.bias.astype(np.float64) @ right]
    biases += [] if second.bias is None else [second.bias.astype(np.float64)]
    with np.errstate(over="ignore"):
        product = (first.weight.astype(np.float64) @ right).astype(dtype)
        bias = np.sum(biases, axis=0).astype(dtype) if biases else None
    if not all(np.isfinite(array).all() for array in (product, bias) if array is not None):
        return False  # past the largest number of a narrow type
    name = second.matmul.name or "collapsed"
    value = first.x
    for node in between:
        node.replace_input_with(0, value)
        if node.op_type == "Reshape":
            _reshape_to(graph, node, product.shape[0])
        value = shaped(node.outputs[0], node.outputs[0], product.shape[0])
    weight = initializer(graph, f"{name}.product", product)
    nodes = [ir.node("MatMul", [value, weight], name=f"{name}.collapsed")]
    if bias is not None:
        vector = initializer(graph, f"{name}.product_bias", bias)
        nodes.append(ir.node("Add", [nodes[0].outputs[0], vector], name=f"{name}.collapsed_bias"))
    for node in nodes:
        shaped(node.outputs[0], second.y, product.shape[1])
    graph.insert_before(second.matmul, nodes)
    replace(second.y, nodes[-1].outputs[0])
    for layer in (second, first):
        graph.remove([n for n in (layer.add, layer.matmul) if n is not None], safe=True)
    return True


def _reshape_to(graph: ir.Graph, node: ir.Node, width: int) -> None:
    """Let a Reshape keep tokens of `width` channels."""
    sizes = constant(node.inputs[1])
    assert sizes is not None
    wide = initializer(graph, f"{node.name}.sizes", np.array([*sizes[:-1], width], dtype=np.int64))
    node.replace_input_with(1, wide)
