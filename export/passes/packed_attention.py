"""The layer that makes queries, keys and values, and the attention that reads them, in ONNX Runtime's one operator.

    Attention(split(x W + b))  ->  com.microsoft.Attention(x, W, b)

Its kernel adds the bias while it lays the heads out for the fused attention, so that neither the bias nor
the split is a pass over memory. An operator of ONNX Runtime alone, so only for that target.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .linear import alike, constant, initializer, linear_to, only_reader, replace
from .skip_norms import DOMAIN


def packed_attention(model: ir.Model) -> int:
    """Rewrite every attention without a mask whose three inputs are the thirds of one linear layer.

    Returns:
        Number of attentions rewritten.
    """
    graph, done = model.graph, 0
    for node in list(graph):
        if node.op_type != "Attention" or node.domain or len(node.outputs) != 1:
            continue
        split = _thirds(node)
        layer = linear_to(split.inputs[0]) if split is not None else None
        if split is None or layer is None or only_reader(layer.y) is not split:
            continue
        if layer.x.shape is None or len(layer.x.shape) != 3:
            continue
        heads = node.attributes.get_int("q_num_heads", 0)
        if not heads or node.attributes.get_int("kv_num_heads", 0) != heads:
            continue
        if node.attributes.get_int("is_causal", 0) or node.attributes.get_float("softcap", 0.0):
            continue
        bias = layer.bias
        if bias is None:
            bias = np.zeros(layer.weight.shape[1], dtype=layer.weight.dtype)
        scale = node.attributes.get("scale")
        packed = ir.node(
            "Attention",
            [layer.x, layer.matmul.inputs[1], initializer(graph, f"{node.name}.bias", bias)],
            attributes={
                "num_heads": heads,
                **({"scale": scale.value} if scale is not None else {}),
            },
            domain=DOMAIN,
            name=f"{node.name}.packed",
        )
        alike(packed.outputs[0], node.outputs[0])
        graph.insert_before(node, packed)
        replace(node.outputs[0], packed.outputs[0])
        dead = [node, split, *([layer.add] if layer.add is not None else []), layer.matmul]
        graph.remove(dead, safe=True)
        model.opset_imports[DOMAIN] = 1
        done += 1
    return done


def _thirds(node: ir.Node) -> ir.Node | None:
    """The Split into three equal parts that an attention reads in order, and nothing else reads."""
    inputs = [value for value in node.inputs if value is not None]
    split = inputs[0].producer()
    if len(inputs) != 3 or split is None or split.op_type != "Split" or len(split.outputs) != 3:
        return None
    sizes = constant(split.inputs[1]) if len(split.inputs) > 1 else None
    if sizes is None or len(set(sizes.tolist())) != 1:
        return None
    if split.attributes.get_int("axis", 0) not in (-1, 2):
        return None
    private = all(only_reader(output) is node for output in split.outputs)
    return (
        split
        if private and all(a is b for a, b in zip(inputs, split.outputs, strict=True))
        else None
    )
