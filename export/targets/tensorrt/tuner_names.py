"""Which weights of a finished graph are the tasks' tensors: found by value, and proved to be all of them.

Passes fold constants, so a name alone says nothing: a tensor may have been transposed, joined with
others, or folded into a bias. Two proofs stand against that. Each tensor must be a weight of the graph
with that very value; and a second graph, made of other tensors by the same steps, must differ from the
first in these weights and in nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ....merge.errors import BuildFailed, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

PLAIN = "leave out --weights-form refit, or use --bank inputs, whose tensors need no refit"


def tuner_names(model: ir.Model, tensors: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """The graph's weight of each tensor.

    Args:
        model: The finished graph.
        tensors: The tasks' tensors by name, in the type that the graph computes in.

    Returns:
        The initializer's name by the tensor's.

    Raises:
        UsageError: A tensor is not a weight of its own in the graph, or more than one weight has its value
            and none its name.
    """
    weights = {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        equal = [n for n, array in weights.items() if _same(array, tensor)]
        if name in equal:
            equal = [name]
        if len(equal) != 1:
            raise UsageError(
                "a tensor of the tasks cannot be replaced in the graph",
                where=name,
                wanted="one weight of its value",
                found=", ".join(equal) or "none: it was folded into other weights",
                do=PLAIN,
            )
        found[name] = equal[0]
    shared = {name for name in found.values() if list(found.values()).count(name) > 1}
    if shared:
        raise UsageError(
            "tensors of the tasks share one weight of the graph",
            where=", ".join(sorted(shared)),
            found=", ".join(name for name, weight in found.items() if weight in shared),
            do=PLAIN,
        )
    return found


def require_nothing_else(first: ir.Model, second: ir.Model, names: Mapping[str, str]) -> None:
    """Hold two graphs, made of different tensors, to differ in the named weights alone.

    Args:
        first: A graph.
        second: The same, made of other tensors.
        names: What `tuner_names` found in the first.

    Raises:
        UsageError: Another weight depends on the tensors.
        BuildFailed: The graphs have different nodes.
    """
    one, other = (_parts(model) for model in (first, second))
    if one[0] != other[0]:
        raise BuildFailed("the graph's nodes depend on the values of the tasks' tensors", do=PLAIN)
    named = set(names.values())
    depend = [
        name for name, array in one[1].items() if name not in named and array != other[1].get(name)
    ]
    if depend:
        raise UsageError(
            "weights that are not the tasks' own depend on them, so a refit would be half of one",
            where=", ".join(depend[:3]),
            do=PLAIN,
        )


def _parts(model: ir.Model) -> tuple[bytes, dict[str, bytes]]:
    """The nodes of a graph, and its weights by name."""
    proto = ir.to_proto(model)
    weights = {tensor.name: tensor.SerializeToString() for tensor in proto.graph.initializer}
    del proto.graph.initializer[:]
    del proto.metadata_props[:]
    return proto.SerializeToString(deterministic=True), weights


def _same(array: NDArray[Any], tensor: NDArray[Any]) -> bool:
    """Whether two arrays are the same to the bit."""
    alike = array.dtype == tensor.dtype and array.shape == tensor.shape
    return alike and array.tobytes() == tensor.tobytes()
