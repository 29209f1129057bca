"""A residual sum and the layer norm that reads it, in ONNX Runtime's one operator.

    norm(skip + (x W + b))  ->  SkipLayerNormalization(x W, skip, b), which gives the sum as well

ONNX Runtime has this fusion, but only where it can infer the shapes of both summands; with a free batch
axis it finds one norm of a ViT's twenty-four. An operator of ONNX Runtime alone, so only for that target.
"""

from __future__ import annotations

import onnx_ir as ir

from .gathered import frozen_bias
from .linear import alike, has_shape, replace

DOMAIN = "com.microsoft"


def skip_norms(model: ir.Model) -> int:
    """Join every layer norm over the last of three axes with the sum in front of it.

    Returns:
        Number of sums that went into a norm.
    """
    graph, done = model.graph, 0
    for norm in list(graph):
        if norm.op_type != "LayerNormalization" or len(norm.inputs) != 3 or norm.domain:
            continue
        stream, output = norm.inputs[0], norm.outputs[0]
        add = stream.producer() if stream is not None else None
        if stream is None or add is None or add.op_type != "Add" or add.domain:
            continue
        last = norm.attributes.get_int("axis", -1) in (-1, 2) and _like(output, *add.inputs)
        if not last or output.shape is None or len(output.shape) != 3 or stream.is_graph_output():
            continue
        first, skip, bias = _summands(add)
        node = ir.node(
            "SkipLayerNormalization",
            [first, skip, *norm.inputs[1:3], bias],
            attributes={"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
            domain=DOMAIN,
            num_outputs=4,
            name=f"{norm.name}.skip",
        )
        normed, _, _, total = node.outputs
        for value, old in ((normed, output), (total, stream)):
            alike(value, old)
        graph.insert_before(norm, node)
        replace(output, normed)
        stream.replace_all_uses_with(total)
        graph.remove([norm, add], safe=True)
        for unused in node.outputs[1:3]:
            unused.name = ""
        model.opset_imports[DOMAIN] = 1
        done += 1
    return done


def _like(output: ir.Value, *summands: ir.Value | None) -> bool:
    """Whether all have the output's shape."""
    return all(v is not None and has_shape(v, output.shape or ()) for v in summands)


def _summands(add: ir.Node) -> tuple[ir.Value | None, ir.Value | None, ir.Value | None]:
    """`(x W, skip, b)`, or `(x, skip, None)`."""
    for skip, base in (add.inputs, add.inputs[::-1]):
        product, bias = frozen_bias(base)
        if bias is not None:
            return product, skip, bias
    return add.inputs[1], add.inputs[0], None
