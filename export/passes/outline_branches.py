"""A gathered branch as one node: `base + U_task(x)`, its standard operators the body of a function.

What the exporter writes of a bottleneck in a batch of many tasks becomes a node of the domain `utune`,
and what it is added to goes with it: the frozen layer's bias and the residual stream. The node is a
model-local function whose body is those standard operators, so every runtime runs it; a session that
registers the library of `export/kernels` runs one fused kernel in its place, which reads the bank where
it lies. Two forms of one thing, told apart only by what the session has registered.

Without the kernel nothing is gained or lost: the runtime inlines the function. So this runs last, on
engines whose precision the kernel knows, and takes the branches that `outline_norms` left.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .gathered import ACTIVATIONS, DOMAIN, Body, Gathered, declare, frozen_bias, gathered
from .linear import alike, has_shape, initializer, only_reader, replace


def outline_branches(model: ir.Model) -> int:
    """Put every gathered bottleneck that is added to something into one node.

    Returns:
        Number of branches.
    """
    done = 0
    for add in list(model.graph):
        if add.graph is None or add.op_type != "Add" or add.domain:
            continue
        for base, given in (add.inputs, add.inputs[::-1]):
            branch = gathered(given) if base is not None and given is not None else None
            if branch is not None and base is not None and _fits(branch, base):
                _outline(model, add, base, branch)
                done += 1
                break
    return done


def _fits(branch: Gathered, base: ir.Value) -> bool:
    """Whether the kernel takes both: the base is as large as the sum, and not one row for all."""
    if branch.channels is None or branch.x.shape is None:
        return False
    return has_shape(base, [*list(branch.x.shape)[:-1], branch.channels[1]])


def _outline(model: ir.Model, add: ir.Node, base: ir.Value, branch: Gathered) -> None:
    graph = model.graph
    residual, last = _residual(add)
    product, bias = frozen_bias(base)
    if bias is None:
        assert branch.channels is not None
        dtype = (branch.up.dtype or ir.DataType.FLOAT).numpy()
        bias = initializer(graph, f"{add.name}.no_bias", np.zeros(branch.channels[1], dtype=dtype))
    inputs = [branch.x, product, branch.task, branch.down, branch.up, bias, *branch.biases]
    inputs += [residual] if residual is not None else []
    function = _function(model, branch, residual=residual is not None)
    node = ir.node(function.name, inputs, domain=DOMAIN, name=f"{add.name}.branch")
    result = last.outputs[0]
    alike(alike(node.outputs[0], branch.x), result)
    graph.insert_before(last, node)
    replace(result, node.outputs[0])
    graph.remove([last] if last is add else [last, add], safe=True)
    declare(model, function)


def _residual(add: ir.Node) -> tuple[ir.Value | None, ir.Node]:
    """What else is added to the sum of base and branch, and the node that adds it last."""
    after = only_reader(add.outputs[0])
    if after is None or after.op_type != "Add" or add.outputs[0].is_graph_output():
        return None, add
    other = after.inputs[1] if after.inputs[0] is add.outputs[0] else after.inputs[0]
    if other is None or other.shape is None or add.outputs[0].shape is None:
        return None, add
    same = [str(d) for d in other.shape] == [str(d) for d in add.outputs[0].shape]
    return (other, after) if same and other is not add.outputs[0] else (None, add)


def _function(model: ir.Model, branch: Gathered, *, residual: bool) -> ir.Function:
    """The node's meaning in standard operators."""
    biased = branch.biased
    names = ["x", "base", "task", "down", "up", "bias", *["down_bias", "up_bias"] * biased]
    body = Body(names + ["residual"] * residual)
    given = body.given
    y = body.branch(given["x"], branch.activation, biased=biased)
    constants = body.add("Add", body.vectors("up_bias"), given["bias"]) if biased else given["bias"]
    y = body.add("Add", body.add("Add", given["base"], y), constants)
    if residual:
        y = body.add("Add", given["residual"], y)
    ends = "Biased" * biased + "Residual" * residual
    name = f"GroupedBottleneck{ACTIVATIONS[branch.activation]}{ends}"
    return body.function(name, {"y": y}, model.opset_imports[""])
