"""Sibling GEMMs joined: `x W1, x W2` = split(`x [W1 | W2]`).

A tuner's down-projection that reads what a frozen layer reads becomes columns of that layer: one GEMM
and one read of `x` instead of two. The outputs must then be cut apart, which is a pass over memory:

* free where the frozen output is cut apart anyway (`qkv`): its split gets one more piece;
* worth it among narrow layers, whose outputs together are narrower than `x`;
* a loss where the frozen output is wide and read whole (`fc1`): left alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from .linear import Linear, constant, initializer, linear_from, replace, shaped, split_behind

if TYPE_CHECKING:
    from collections.abc import Sequence


def join_siblings(model: ir.Model) -> int:
    """Join the linear layers that read one tensor, where that moves fewer numbers.

    Returns:
        Number of GEMMs that went into another one.
    """
    graph = model.graph
    by_input: dict[ir.Value, list[Linear]] = {}
    for node in graph:
        layer = linear_from(node)
        if layer is not None:
            by_input.setdefault(layer.x, []).append(layer)
    joined = 0
    for x, layers in by_input.items():
        cut = [layer for layer in layers if split_behind(layer) is not None]
        narrow = [layer for layer in layers if layer not in cut]
        width = sum(layer.weight.shape[1] for layer in narrow)
        if width > layers[0].weight.shape[0]:
            narrow = [layer for layer in narrow if _is_narrow(layer)]
        group = cut[:1] + narrow
        if len(group) > 1:
            _join(graph, x, group)
            joined += len(group) - 1
    return joined


def _is_narrow(layer: Linear) -> bool:
    """A down-projection: its output is at most half as wide as its input."""
    return 2 * layer.weight.shape[1] <= layer.weight.shape[0]


def _join(graph: ir.Graph, x: ir.Value, layers: Sequence[Linear]) -> None:
    widths = [layer.weight.shape[1] for layer in layers]
    name = layers[0].matmul.name or "joined"
    weight = initializer(
        graph, f"{name}.columns", np.concatenate([layer.weight for layer in layers], axis=1)
    )
    matmul = ir.node("MatMul", [x, weight], name=f"{name}.joined")
    nodes = [matmul]
    if any(layer.bias is not None for layer in layers):
        zeros = [np.zeros(width, dtype=layers[0].weight.dtype) for width in widths]
        parts = [
            z if layer.bias is None else layer.bias for layer, z in zip(layers, zeros, strict=True)
        ]
        bias = initializer(graph, f"{name}.columns_bias", np.concatenate(parts))
        nodes.append(ir.node("Add", [matmul.outputs[0], bias], name=f"{name}.joined_bias"))
    old: list[ir.Value] = []  # what the pieces of the split stand for, in order
    cut = [split_behind(layer) for layer in layers]
    for layer, split in zip(layers, cut, strict=True):
        old.extend(split.outputs if split is not None else [layer.y])
    pieces: list[int] = []
    for split, width in zip(cut, widths, strict=True):
        sizes = constant(split.inputs[1]) if split is not None else None
        pieces.extend([width] if sizes is None else sizes.tolist())
    sizes = initializer(graph, f"{name}.widths", np.array(pieces, dtype=np.int64))
    new = ir.node(
        "Split",
        [nodes[-1].outputs[0], sizes],
        attributes={"axis": -1},
        num_outputs=len(pieces),
        name=f"{name}.split",
    )
    for node in nodes:
        shaped(node.outputs[0], layers[0].y, sum(widths))
    graph.insert_before(min((layer.matmul for layer in layers), key=_order(graph)), [*nodes, new])
    for value, output, width in zip(old, new.outputs, pieces, strict=True):
        shaped(output, value, width)
        replace(value, output)
    for layer, split in zip(layers, cut, strict=True):
        dead = [n for n in (split, layer.add, layer.matmul) if n is not None]
        graph.remove(dead, safe=True)


def _order(graph: ir.Graph):
    place = {node: number for number, node in enumerate(graph)}
    return place.__getitem__
