"""What an adapter saves whole: norms (LN tuning), biases, `modules_to_save`, the classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from timm.layers.norm import LayerNorm, LayerNorm2d
from torch import Tensor, nn

from ...errors import IncompatibleArtefact
from ...tuner import Branch, Point
from ...tuners.bias import Bias, adds_bias_last
from ...tuners.difference import Difference
from ...tuners.gain import Gain
from ...tuners.norm import Norm
from ..foreign import refuse

if TYPE_CHECKING:
    from ...tuner import Weights
    from .adapter import Adapter

NORMS = (nn.LayerNorm, LayerNorm, LayerNorm2d)  # and nothing that does more behind them


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
    """Everything that is left: what differs from the frozen tensor, as the lightest branch that is exact.

    A layer norm becomes a norm, a batch norm a gain, a bias that its layer adds last a bias; anything else
    is a difference, which folds but cannot share a batch.

    Raises:
        IncompatibleArtefact: A tensor of no known place, or of another shape than the frozen one.
    """
    _drop_copies(adapter)
    frozen = adapter.backbone.model.state_dict()
    inside = [name for name in adapter.tensors if not adapter.backbone.is_classifier(name)]
    if strange := [name for name in inside if name not in frozen]:
        raise refuse(
            adapter.path,
            "the adapter holds tensors of no known place",
            found=", ".join(strange[:5]) + (f" and {len(strange) - 5} more" if strange[5:] else ""),
            do="load the backbone that it was trained on",
        )
    changes: dict[str, dict[str, Tensor]] = {}
    for name in inside:
        own, kept = adapter.tensors.pop(name), frozen[name]
        if own.shape != kept.shape:
            raise IncompatibleArtefact(
                "a saved tensor has another shape than the backbone's",
                where=f"{adapter.path}: {name}",
                wanted=list(kept.shape),
                found=list(own.shape),
                do="load the backbone that it was trained on",
            )
        if kept.is_floating_point() and not torch.equal(own.double(), kept.double()):
            module, _, parameter = name.rpartition(".")
            changes.setdefault(module, {})[parameter] = own.double() - kept.double()
    for module, change in changes.items():
        _plant(adapter, module, change)


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


def _plant(adapter: Adapter, module: str, change: dict[str, Tensor]) -> None:
    """The branches of one module's changed tensors, tuned minus frozen, float64."""
    op, output = adapter.module(module), Point(module, "output")
    if type(op) is nn.BatchNorm2d and op.affine and set(change) - {"bias"}:
        branch = Branch(Gain(shift=True), Point(module, "input"), output)
        adapter.found.plant(f"{module}/norm", branch, _batch_norm(op, change))
        return
    whole = type(op) in NORMS and op.weight is not None and op.bias is not None
    if whole and "weight" in change:
        gain = change.pop("weight")
        shift = change.pop("bias", torch.zeros_like(gain))
        norm = Norm(float(op.eps))  # type: ignore[arg-type]
        branch = Branch(norm, Point(module, "input"), output)
        adapter.found.plant(f"{module}/norm", branch, {"gain": gain, "shift": shift})
    for parameter, difference in change.items():
        if parameter == "bias" and adds_bias_last(op):
            branch = Branch(Bias(), output, output)
            adapter.found.plant(f"{module}/bias", branch, {"shift": difference})
            continue
        point = Point(module, "weights")
        branch = Branch(Difference(parameter, tuple(difference.shape)), point, point)
        adapter.found.plant(f"{module}/{parameter}", branch, {"shift": difference})


def _batch_norm(op: nn.BatchNorm2d, change: dict[str, Tensor]) -> Weights:
    """`x * slope + constant` in eval mode: what slope and constant change by, float64."""

    def line(change: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        names = ("weight", "bias", "running_mean", "running_var")
        kept = {name: getattr(op, name).detach().double() for name in names}
        weight, bias, mean, var = (kept[name] + change.get(name, 0.0) for name in names)
        slope = weight / (var + op.eps).sqrt()
        return slope, bias - mean * slope

    (slope, constant), (frozen_slope, frozen_constant) = line(change), line({})
    return {"gain": slope - frozen_slope, "shift": constant - frozen_constant}


def read_heads(adapter: Adapter) -> None:
    """The classifiers: saved, or else the backbone's own; branches that stand at one are folded into it.

    Raises:
        IncompatibleArtefact: There is none, or it is not one linear layer.
    """
    found = adapter.found
    for number, path in enumerate(adapter.backbone.classifiers):
        head = _classifier(adapter, path)
        at = {name: branch for name, branch in found.branches.items() if branch.add.module == path}
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
    """A classifier without what stands at it."""
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
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    head.requires_grad_(requires_grad=False)
    head.weight.copy_(weight)
    if bias is not None:
        head.bias.copy_(bias)
    return head
