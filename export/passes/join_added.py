"""Added GEMMs joined: `a W1 + t W2` = `[a | t] [W1; W2]`.

A tuner's up-projection that is added where a frozen layer's output is added becomes rows of that layer:
one GEMM, and no pass over its output for the sum. Writing `a` and `t` side by side is a pass over
memory too, so wide inputs (`fc2`) are left alone.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .linear import Linear, initializer, leading, linear_to, shaped


def join_added(model: ir.Model) -> int:
    """Join linear layers whose outputs are summed and read by nothing else, where that pays.

    Returns:
        Number of GEMMs that went into another one.
    """
    graph = model.graph
    joined = 0
    for node in list(graph):
        if node.graph is None or node.op_type != "Add" or node.outputs[0].is_graph_output():
            continue
        layers = [linear_to(value) for value in node.inputs]
        if any(layer is None for layer in layers):
            continue
        first, second = (layer for layer in layers if layer is not None)
        if _joinable(first, second):
            _join(graph, node, first, second)
            joined += 1
    return joined


def _joinable(first: Linear, second: Linear) -> bool:
    private = all(
        len(layer.y.uses()) == 1 and not layer.y.is_graph_output() for layer in (first, second)
    )
    axes = leading(first.x)
    if not private or first.matmul is second.matmul or axes is None:
        return False
    if axes != leading(second.x) or first.weight.shape[1] != second.weight.shape[1]:
        return False
    concat = 2 * (first.weight.shape[0] + second.weight.shape[0])  # read and write, per token
    return concat <= 3 * first.weight.shape[1]  # the sum reads two and writes one


def _join(graph: ir.Graph, add: ir.Node, first: Linear, second: Linear) -> None:
    name = first.matmul.name or "joined"
    rows = np.concatenate([first.weight, second.weight], axis=0)
    concat = ir.node("Concat", [first.x, second.x], attributes={"axis": -1}, name=f"{name}.concat")
    shaped(concat.outputs[0], first.x, rows.shape[0])
    weight = initializer(graph, f"{name}.rows", rows)
    matmul = ir.node("MatMul", [concat.outputs[0], weight], name=f"{name}.joined")
    nodes = [concat, matmul]
    biases = [layer.bias for layer in (first, second) if layer.bias is not None]
    if biases:
        total = np.sum(np.stack(biases).astype(np.float64), axis=0).astype(rows.dtype)
        bias = initializer(graph, f"{name}.rows_bias", total)
        nodes.append(ir.node("Add", [matmul.outputs[0], bias], name=f"{name}.joined_bias"))
    for node in nodes[1:]:
        shaped(node.outputs[0], add.outputs[0], rows.shape[1])
    graph.insert_before(add, nodes)
    add.outputs[0].replace_all_uses_with(nodes[-1].outputs[0])
    for node in (add, first.add, first.matmul, second.add, second.matmul):
        if node is not None:
            graph.remove(node, safe=True)
