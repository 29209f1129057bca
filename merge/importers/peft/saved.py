"""What an adapter saves whole: norms (LN tuning), biases, `modules_to_save`, the classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ...differences import carry, subtract
from ...errors import IncompatibleArtefact
from ..foreign import refuse

if TYPE_CHECKING:
    from .adapter import Adapter


def read_ln_tuning(adapter: Adapter) -> None:
    """Copies of whole layers, norms as a rule (arXiv 2312.11420): as if they were saved modules.

    Raises:
        IncompatibleArtefact: A setting that cannot be carried.
    """
    adapter.allow()
    adapter.tensors = {
        name.replace(".ln_tuning_layers.", "."): tensor for name, tensor in adapter.tensors.items()
    }


def read_saved(adapter: Adapter) -> None:
    """Everything that is left: what differs from the frozen tensor; see `differences.carry`.

    Raises:
        IncompatibleArtefact: A tensor of no known place, or of another shape than the frozen one, or a
            change that no branch can carry.
    """
    _drop_copies(adapter)
    adapter.settle()
    frozen = adapter.backbone.model.state_dict()
    inside = [name for name in adapter.tensors if not adapter.backbone.is_classifier(name)]
    if strange := [name for name in inside if name not in frozen]:
        raise refuse(
            adapter.path,
            "the adapter holds tensors of no known place",
            found=", ".join(strange[:5]) + (f" and {len(strange) - 5} more" if strange[5:] else ""),
            do="load the backbone that it was trained on",
        )
    saved = {name: adapter.tensors.pop(name) for name in inside}
    for name, own in saved.items():
        kept = frozen[name]
        if own.shape != kept.shape:
            raise IncompatibleArtefact(
                "a saved tensor has another shape than the backbone's",
                where=f"{adapter.path}: {name}",
                wanted=list(kept.shape),
                found=list(own.shape),
                do="load the backbone that it was trained on",
            )
    if changes := subtract(frozen, saved):
        adapter.found.plant_changes(carry(adapter.backbone, changes))


def _drop_copies(adapter: Adapter) -> None:
    """Of a saved module's bias PEFT writes up to three with `bias="all"`, and a wrapped layer's inside it.

    Raises:
        IncompatibleArtefact: Two of them differ.
    """
    plain = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in adapter.tensors.items()
        if ".original_module." not in name  # the frozen module, which does not run
    }
    for name in [name for name in plain if ".modules_to_save." in name]:
        module, _, rest = name.partition(".modules_to_save.")
        for original in (f"{module}.{rest}", f"{module}.{rest.partition('.')[2]}"):
            if original in plain:  # without and with the adapter's name
                if not torch.equal(plain[original], plain.pop(name)):
                    raise refuse(
                        adapter.path, "the adapter holds a tensor twice, unlike", found=name
                    )
                break
    adapter.tensors = plain


def read_heads(adapter: Adapter) -> None:
    """The classifiers: saved, or else the backbone's own; branches that stand at one are folded into it.

    Raises:
        IncompatibleArtefact: There is none, or it is not one linear layer.
    """
    found = adapter.found
    for number, path in enumerate(adapter.backbone.classifiers):
        head = _classifier(adapter, path)
        if adapter.counterparts is not None and adapter.counterparts.reads_class_and_mean(
            head.weight
        ):
            found.plant_wide_head(adapter.backbone, head.weight, head.bias)
            continue
        at = {name: branch for name, branch in found.branches.items() if branch.add.module == path}
        layer = adapter.module(path)
        if at and isinstance(layer, nn.Linear) and head.weight.shape != layer.weight.shape:
            raise refuse(
                adapter.path, "the saved classifier has another shape than what stands at it",
                found=f"{path} {list(head.weight.shape)} with {', '.join(at)} {list(layer.weight.shape)}",
            )  # fmt: skip
        if at:
            head = head.double()
        before = [name for name, branch in at.items() if branch.add.side == "input"]
        behind = [name for name in at if name not in before]
        for name in (*behind, *reversed(before)):
            branch, weights = found.branches.pop(name), found.tensors.pop(name)
            exact = {key: tensor.double() for key, tensor in weights.items()}
            for parameter, value in branch.tuner.fold(exact, head, branch.place).items():  # type: ignore[arg-type]
                getattr(head, parameter).data = value
        found.plant_head(adapter.backbone, head.weight, head.bias, number)
    if left := ", ".join(adapter.tensors):
        raise refuse(adapter.path, "the adapter holds tensors of no known place", found=left)


def _classifier(adapter: Adapter, path: str) -> nn.Linear:
    """A classifier without what stands at it; it has a bias, of zeros where there was none."""
    own = {key: adapter.tensors.pop(f"{path}.{key}", None) for key in ("weight", "bias")}
    layer = adapter.module(path)
    weight, bias = own["weight"], own["bias"]
    if weight is None:
        if not isinstance(layer, nn.Linear):
            raise refuse(
                adapter.path, "the task has no head", found=f"{path} is neither saved nor in the backbone",
                do="load a backbone with its classifier, or train with modules_to_save",
            )  # fmt: skip
        weight = layer.weight
        bias = layer.bias if bias is None else bias
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise IncompatibleArtefact(
            "the saved head is not one linear layer",
            where=f"{adapter.path}: {path}",
            wanted="weight [classes, features] and bias [classes]",
            found={key: list(tensor.shape) for key, tensor in own.items() if tensor is not None},
        )
    head = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    head.requires_grad_(requires_grad=False)
    head.weight.copy_(weight)
    head.bias.copy_(weight.new_zeros(weight.shape[0]) if bias is None else bias)
    return head
