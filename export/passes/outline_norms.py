"""A layer norm with the branch that reads it, as one node that leaves the branch in the residual stream.

    x = norm(stream);  out = stream + (OP(x) + U(x))      =      out = (stream + U(x)) + OP(x)

The sum on the right is made where the norm is: the norm reads the stream anyway and holds `x`, so
`stream + U(x)` costs no pass over memory that the norm alone would not take (`export/kernels/normed_branch.cuh`).
Where the stream is itself a sum that only the norm reads, `a + bias + skip`, that sum goes along. As in
`outline_branches`, the node is a function of standard operators, and a kernel where one is registered.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from .gathered import ACTIVATIONS, DOMAIN, Body, Gathered, declare, frozen_bias, gathered
from .linear import alike, has_shape, only_reader, replace

WIDEST = 2048  # channels that the kernel takes


@dataclass(frozen=True)
class _Found:
    """One place: the norm, its branch, and the two sums that follow.

    Attributes:
        norm: The LayerNormalization.
        stream: What it reads.
        branch: What reads it.
        base: What the branch is added to.
        inner: The sum of base and branch.
        outer: The sum of stream and `inner`.
    """

    norm: ir.Node
    stream: ir.Value
    branch: Gathered
    base: ir.Value
    inner: ir.Node
    outer: ir.Node


def outline_norms(model: ir.Model) -> int:
    """Put every norm whose branch is added to the stream that the norm reads into one node with it.

    Returns:
        Number of branches.
    """
    done = 0
    for inner in list(model.graph):
        if inner.graph is None or inner.op_type != "Add" or inner.domain:
            continue
        for base, given in (inner.inputs, inner.inputs[::-1]):
            found = _found(inner, base, given) if base is not None and given is not None else None
            if found is not None:
                _outline(model, found)
                done += 1
                break
    return done


def _found(inner: ir.Node, base: ir.Value, given: ir.Value) -> _Found | None:
    branch, outer = gathered(given), only_reader(inner.outputs[0])
    if branch is None or branch.channels is None or outer is None or outer.op_type != "Add":
        return None
    norm = branch.x.producer()
    if norm is None or norm.op_type != "LayerNormalization" or len(norm.inputs) != 3:
        return None
    stream = norm.inputs[0]
    axis = norm.attributes.get_int("axis", -1)
    wanted = (
        stream is not None
        and any(value is stream for value in outer.inputs)
        and axis in (-1, 2)
        and branch.channels[0] == branch.channels[1] <= WIDEST
    )
    return (
        _Found(norm, stream, branch, base, inner, outer) if wanted and stream is not None else None
    )


def _outline(model: ir.Model, found: _Found) -> None:
    graph, norm, branch = model.graph, found.norm, found.branch
    first, constants = _sum(found)
    skip = bool(constants)
    inputs = [first, *constants, *norm.inputs[1:3], branch.task, branch.down, branch.up]
    function = _function(model, branch, skip=skip)
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    node = ir.node(
        function.name,
        [*inputs, *branch.biases],
        attributes={"epsilon": epsilon},
        domain=DOMAIN,
        num_outputs=2,
        name=f"{norm.name}.branch",
    )
    normed, carried = node.outputs
    for output in node.outputs:
        alike(output, norm.outputs[0])
    stream_sum = found.stream.producer() if skip else None
    graph.insert_before(norm, node)
    replace(norm.outputs[0], normed)
    last = ir.node("Add", [carried, found.base], name=f"{found.outer.name}.op")
    alike(last.outputs[0], normed)
    graph.insert_before(found.outer, last)
    replace(found.outer.outputs[0], last.outputs[0])
    graph.remove([found.outer, found.inner], safe=True)
    graph.remove(norm, safe=True)
    if stream_sum is not None:
        graph.remove(stream_sum, safe=True)
    declare(model, function)


def _sum(found: _Found) -> tuple[ir.Value, list[ir.Value]]:
    """`a` and `[bias, skip]` of a stream that only the norm and the last sum read; the stream alone else."""
    readers = {use.node for use in found.stream.uses()}
    add = found.stream.producer()
    private = readers == {found.norm, found.outer} and not found.stream.is_graph_output()
    if private and add is not None and add.op_type == "Add" and not add.domain:
        for skip, base in (add.inputs, add.inputs[::-1]):
            product, bias = frozen_bias(base)
            if bias is None or product is None or skip is None:
                continue
            if has_shape(skip, found.branch.x.shape or ()):  # no positions, one row for all
                return product, [bias, skip]
    return found.stream, []


def _function(model: ir.Model, branch: Gathered, *, skip: bool) -> ir.Function:
    """The node's meaning in standard operators."""
    biased = branch.biased
    names = ["a", *["bias", "skip"] * skip, "gamma", "beta", "task", "down", "up"]
    body = Body(names + ["down_bias", "up_bias"] * biased)
    given = body.given
    stream = given["a"]
    if skip:
        stream = body.add("Add", given["skip"], body.add("Add", stream, given["bias"]))
    epsilon = ir.RefAttr("epsilon", "epsilon", ir.AttributeType.FLOAT)
    norm = ir.Node("", "LayerNormalization", [stream, given["gamma"], given["beta"]], [epsilon])
    body.nodes.append(norm)
    x = norm.outputs[0]
    y = body.branch(x, branch.activation, biased=biased)
    carried = body.add("Add", stream, y)
    if biased:
        carried = body.add("Add", carried, body.vectors("up_bias"))
    name = f"NormedBranch{ACTIVATIONS[branch.activation]}{'Biased' * biased}{'Skip' * skip}"
    attributes = [ir.Attr("epsilon", ir.AttributeType.FLOAT, None)]
    return body.function(
        name, {"normed": x, "carried": carried}, model.opset_imports[""], attributes
    )
