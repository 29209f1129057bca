"""A branch beside an MLP as more of its hidden units: `act(x W1) W2 + f(x D) U` = `act(x [W1 | sD]) [W2; U/s]`.

An adapter that reads what a frozen MLP reads and is added where it is added is an MLP itself. Two products, an
activation and a sum over the MLP's output go; the frozen products become a little wider, and nothing is copied.

With one activation, `f = act`, `s` is 1 and it is an identity. A ReLU is a GELU far from zero: `relu(v) = gelu(s v) / s`
up to `0.17 / s`, and with `s` a power of two nothing is rounded. `SCALE` makes that 2e-13 for every `v`; in float32, for
`|v| > 6e-12`, both sides are the same number. Half precision has no room for such numbers, so this is left out there.

New hidden units come in multiples of `WIDTH`, those without weights being zeros: rows of a matrix stay aligned.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from .linear import Linear, initializer, linear_to, only_reader, shaped

SCALE = 2.0**40
WIDTH = 16  # float32 numbers of a vector register or a cache line
GELU, RELU = "Gelu", "Relu"
ACTIVATIONS = {GELU, RELU, "Tanh", "Sigmoid", "HardSwish", "HardSigmoid", "Elu", "LeakyRelu", "Mish", "Swish"}  # fmt: skip


class Mlp(NamedTuple):
    """`act(x inner) outer`, of which nothing inside is read by others."""

    inner: Linear
    act: ir.Node
    outer: Linear


def widen_hidden(model: ir.Model) -> int:
    """Put branches into the MLPs that they stand beside.

    Returns:
        Number of branches that went into one.
    """
    graph = model.graph
    done = 0
    for node in list(graph):
        if node.graph is None or node.op_type != "Add" or node.outputs[0].is_graph_output():
            continue
        frozen, branch = _pair(node)
        scale = _scale(frozen, branch) if frozen and branch else None
        if frozen and branch and scale is not None:
            _widen(graph, node, frozen, branch, scale)
            done += 1
    return done


def _pair(add: ir.Node) -> tuple[Mlp, Mlp] | tuple[None, None]:
    """The two MLPs that a sum adds, the wider one first; nothing where it adds something else."""
    first, second = (_mlp(value) for value in add.inputs)
    if first is None or second is None or first.outer.matmul is second.outer.matmul:
        return None, None
    widths = first.inner.weight.shape[1], second.inner.weight.shape[1]
    return (first, second) if widths[0] >= widths[1] else (second, first)


def _mlp(value: ir.Value | None) -> Mlp | None:
    """The MLP whose output a value is."""
    outer = linear_to(value)
    if outer is None or len(outer.y.uses()) != 1:
        return None
    act = outer.x.producer()
    if act is None or act.op_type not in ACTIVATIONS or only_reader(outer.x) is not outer.matmul:
        return None
    inner = linear_to(act.inputs[0])
    if inner is None or only_reader(inner.y) is not act:
        return None
    return Mlp(inner, act, outer)


def _scale(frozen: Mlp, branch: Mlp) -> float | None:
    """What the branch's hidden units are multiplied by inside the frozen MLP; None where it does not fit."""
    fits = (
        frozen.inner.x is branch.inner.x
        and frozen.outer.weight.shape[1] == branch.outer.weight.shape[1]
        and frozen.inner.weight.dtype == branch.inner.weight.dtype == np.float32
    )
    if not fits:
        return None
    if _what(frozen.act) == _what(branch.act):
        return 1.0
    return SCALE if (frozen.act.op_type, branch.act.op_type) == (GELU, RELU) else None


def _what(act: ir.Node) -> tuple[str, list[tuple[str, object]]]:
    return act.op_type, sorted((name, a.value) for name, a in act.attributes.items())


def _widen(graph: ir.Graph, add: ir.Node, frozen: Mlp, branch: Mlp, scale: float) -> None:
    name = frozen.inner.matmul.name or "mlp"
    hidden = branch.inner.weight.shape[1]
    spare = -hidden % WIDTH
    down = np.pad(branch.inner.weight * np.float32(scale), ((0, 0), (0, spare)))
    up = np.pad(branch.outer.weight / np.float32(scale), ((0, spare), (0, 0)))
    wide = frozen.inner.weight.shape[1] + hidden + spare
    columns = initializer(graph, f"{name}.hidden", np.hstack([frozen.inner.weight, down]))
    rows = initializer(graph, f"{name}.hidden_rows", np.vstack([frozen.outer.weight, up]))

    nodes = [ir.node("MatMul", [frozen.inner.x, columns], name=f"{name}.widened")]
    shaped(nodes[-1].outputs[0], frozen.inner.y, wide)
    shift = _beside(frozen.inner, branch.inner, np.float32(scale), spare)
    if shift is not None:
        bias = initializer(graph, f"{name}.hidden_bias", shift)
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], bias], name=f"{name}.widened_bias"))
        shaped(nodes[-1].outputs[0], frozen.inner.y, wide)
    act = ir.node(
        frozen.act.op_type,
        [nodes[-1].outputs[0]],
        attributes=dict(frozen.act.attributes),
        name=f"{name}.widened_act",
    )
    shaped(act.outputs[0], frozen.inner.y, wide)
    nodes += [act, ir.node("MatMul", [act.outputs[0], rows], name=f"{name}.narrowed")]
    shaped(nodes[-1].outputs[0], add.outputs[0], rows.const_value.shape[1])  # type: ignore[union-attr]
    biases = [part.outer.bias for part in (frozen, branch) if part.outer.bias is not None]
    if biases:
        total = np.sum(np.stack(biases).astype(np.float64), axis=0).astype(np.float32)
        bias = initializer(graph, f"{name}.narrowed_bias", total)
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], bias], name=f"{name}.narrowed_sum"))
        shaped(nodes[-1].outputs[0], add.outputs[0], total.size)
    graph.insert_before(add, nodes)
    add.outputs[0].replace_all_uses_with(nodes[-1].outputs[0])
    graph.remove(add, safe=True)
    for part in (frozen, branch):
        dead = (part.outer.add, part.outer.matmul, part.act, part.inner.add, part.inner.matmul)
        graph.remove([node for node in dead if node is not None], safe=True)


def _beside(frozen: Linear, branch: Linear, scale: np.float32, spare: int) -> np.ndarray | None:
    """The biases of both, one behind the other; None where neither has one."""
    if frozen.bias is None and branch.bias is None:
        return None
    own, added = (
        np.zeros(layer.weight.shape[1], np.float32) if layer.bias is None else layer.bias
        for layer in (frozen, branch)
    )
    return np.concatenate([own, np.pad(added * scale, (0, spare))])
