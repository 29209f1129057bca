"""A patch embedding as one GEMM: a convolution whose kernel is its stride reads every pixel once.

    transpose(reshape(conv(images)))  =  patches(images) W^T + b,  [B, N, C k k] [C k k, D]

The convolution gives a map that is turned into tokens at once; here the pixels are laid out as rows of a
matrix instead, which are fewer numbers than the tokens' transpose was, and the product is a plain GEMM.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from .linear import alike, constant, initializer, only_reader, replace


def flat_patches(model: ir.Model) -> int:
    """Rewrite every convolution over patches whose map becomes a sequence, and nothing else.

    Returns:
        Number of convolutions rewritten.
    """
    done = 0
    for node in list(model.graph):
        found = _found(node) if node.op_type == "Conv" and not node.domain else None
        if found is not None:
            _rewrite(model.graph, found)
            done += 1
    return done


class _Found(NamedTuple):
    conv: ir.Node
    flat: ir.Node
    turn: ir.Node
    weight: np.ndarray  # [D, C, kh, kw]
    channels: int
    grid: tuple[int, int]


def _found(conv: ir.Node) -> _Found | None:
    image, weight = conv.inputs[0], constant(conv.inputs[1])
    flat = only_reader(conv.outputs[0])
    turn = only_reader(flat.outputs[0]) if flat is not None and flat.op_type == "Reshape" else None
    if (
        flat is None
        or turn is None
        or turn.op_type != "Transpose"
        or image is None
        or weight is None
    ):
        return None
    if weight.ndim != 4 or image.shape is None or len(image.shape) != 4:
        return None
    kernel, (_, channels, height, width) = weight.shape[2:], image.shape
    if not all(isinstance(size, int) for size in (channels, height, width)):
        return None
    attributes = conv.attributes
    tokens, plain = turn.outputs[0].shape, flat.outputs[0].shape
    grid = (height // kernel[0], width // kernel[1])
    wanted = (
        list(attributes.get_ints("strides", [1, 1])) == list(kernel)
        and not any(attributes.get_ints("pads", [0] * 4))
        and set(attributes.get_ints("dilations", [1, 1])) == {1}
        and attributes.get_int("group", 1) == 1
        and attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
        and height % kernel[0] == 0
        and width % kernel[1] == 0
        and list(turn.attributes.get_ints("perm", [])) == [0, 2, 1]
        and plain is not None
        and len(plain) == 3
        and list(plain)[1:] == [weight.shape[0], grid[0] * grid[1]]
        and tokens is not None
        and (len(conv.inputs) < 3 or conv.inputs[2] is None or constant(conv.inputs[2]) is not None)
    )
    return _Found(conv, flat, turn, weight, channels, grid) if wanted else None  # type: ignore[arg-type]


def _rewrite(graph: ir.Graph, found: _Found) -> None:
    conv, name = found.conv, found.conv.name or "patches"
    out, channels, high, wide = found.weight.shape
    rows, columns = found.grid
    image = conv.inputs[0]
    assert image is not None
    cut = initializer(graph, f"{name}.cut", np.array([0, channels, rows, high, columns, wide]))
    join = initializer(graph, f"{name}.join", np.array([0, rows * columns, channels * high * wide]))
    matrix = np.ascontiguousarray(found.weight.reshape(out, -1).T)
    weight = initializer(graph, f"{name}.matrix", matrix)
    nodes = [ir.node("Reshape", [image, cut], name=f"{name}.cut")]
    nodes.append(
        ir.node(
            "Transpose",
            [nodes[-1].outputs[0]],
            attributes={"perm": [0, 2, 4, 1, 3, 5]},
            name=f"{name}.turn",
        )
    )
    nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], join], name=f"{name}.patches"))
    nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], weight], name=f"{name}.product"))
    batch = image.shape[0]  # type: ignore[index]
    shapes = [
        [batch, channels, rows, high, columns, wide],
        [batch, rows, columns, channels, high, wide],
        [batch, rows * columns, channels * high * wide],
        [batch, rows * columns, out],
    ]
    for node, shape in zip(nodes, shapes, strict=True):
        alike(node.outputs[0], image).shape = ir.Shape(shape)
    if len(conv.inputs) > 2 and conv.inputs[2] is not None:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], conv.inputs[2]], name=f"{name}.bias"))
        alike(nodes[-1].outputs[0], image).shape = ir.Shape(shapes[-1])
    graph.insert_before(conv, nodes)
    replace(found.turn.outputs[0], nodes[-1].outputs[0])
    graph.remove([found.turn, found.flat, conv], safe=True)
