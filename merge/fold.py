"""A task's branches into the frozen weights: exactly, or not at all, with a report of what was lost.

Products and sums run in float64 from the backbone's own tensors and are cast once. A half-precision
checkpoint cannot hold every small difference, so the report says per tensor which share arrived.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .delta import Delta, require_backbone
from .errors import UsageError
from .parallel import submodule
from .sites import Sites, measure
from .tuner import CannotFold, Point

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from .backbone import Backbone

LOSS = 0.05  # relative error of the realised difference above which keeping it parallel is advised


@dataclass(frozen=True)
class Refusal:
    """A branch that cannot fold.

    Attributes:
        branch: Its name.
        reason: Why.
        alternative: What carries it instead.
    """

    branch: str
    reason: str
    alternative: str

    def __str__(self) -> str:
        return f"{self.branch}: {self.reason}: {self.alternative}"


@dataclass(frozen=True)
class Loss:
    """What casting left of one tensor's difference.

    Attributes:
        tensor: Its name in the checkpoint.
        error: `|realised - wanted| / |wanted|`, both against the backbone in the output dtype.
        unmoved: Share of the values that differ in float64 but not in the output dtype.
        largest: Largest absolute value of the merged tensor.
    """

    tensor: str
    error: float
    unmoved: float
    largest: float


@dataclass(frozen=True)
class Merged:
    """A plain checkpoint.

    Attributes:
        tensors: timm's state dict with the task inside, in the output dtype.
        losses: One row per tensor that the task changed, worst first.
        dtype: Output dtype.
    """

    tensors: Mapping[str, Tensor]
    losses: tuple[Loss, ...]
    dtype: torch.dtype

    @property
    def worst(self) -> Loss | None:
        """The tensor that lost most."""
        return self.losses[0] if self.losses else None

    @property
    def warning(self) -> str | None:
        """Advice when a tensor lost more than `LOSS`."""
        worst = self.worst
        if worst is None or worst.error <= LOSS:
            return None
        return (
            f"{_name(self.dtype)} keeps only part of the task: {worst.tensor} realises its difference "
            f"with a relative error of {worst.error:.0%}, {worst.unmoved:.0%} of its values did not "
            "move; keep the task parallel, or merge to float32"
        )


def refusals(delta: Delta, backbone: Backbone) -> list[Refusal]:
    """The branches that cannot fold; empty when the task merges exactly."""
    return _fold(delta, backbone)[1]


def fold(
    delta: Delta,
    backbone: Backbone,
    *,
    dtype: torch.dtype | None = None,
    sites: Sites | None = None,
) -> Merged:
    """Merge a task, all of it or nothing.

    Args:
        delta: The task.
        backbone: The frozen backbone; not changed.
        dtype: Of the checkpoint; the backbone's own if None.
        sites: From `measure`, when at hand.

    Raises:
        IncompatibleArtefact: The delta does not belong to the backbone.
        UsageError: A branch cannot fold; every reason is named.
    """
    require_backbone(delta, backbone, sites or measure(backbone))
    model, refused = _fold(delta, backbone)
    if refused:
        raise UsageError(
            f"task {delta.task} cannot be merged exactly, so nothing was merged",
            found=_few([str(refusal) for refusal in refused]),
            do="export it with --mode parallel: the same numbers, the branches fused beside the backbone",
        )
    dtype = dtype or next(backbone.model.parameters()).dtype
    before = backbone.model.state_dict()
    tensors: dict[str, Tensor] = {}
    losses: list[Loss] = []
    for name, exact in model.state_dict().items():
        if not exact.is_floating_point():
            tensors[name] = exact
            continue
        tensors[name] = exact.to(dtype)
        frozen = before.get(name)
        if name.startswith(f"{backbone.classifier}.") or frozen is None:
            continue
        if not torch.equal(frozen.double(), exact):
            losses.append(_loss(name, frozen.double(), exact, dtype))
    losses.sort(key=lambda loss: (-loss.error, loss.tensor))
    return Merged(tensors, tuple(losses), dtype)


def _fold(delta: Delta, backbone: Backbone) -> tuple[nn.Module, list[Refusal]]:
    """The backbone in float64 with everything folded that folds, and what does not."""
    model = copy.deepcopy(backbone.model).double()
    refused: list[Refusal] = []
    for name, branch in delta.branches.items():
        try:
            if branch.add.side != "output":
                if branch.tuner.no_fold:
                    raise CannotFold(branch.tuner.no_fold)
                raise CannotFold(f"it joins at {branch.add}, in front of an op")
            op = submodule(model, branch.add.module)
            if not branch.serial and branch.tap != Point(branch.add.module, "input"):
                raise CannotFold(
                    f"it reads {branch.tap}, which is not the input of {branch.add.module}"
                )
            w = {key: tensor.double() for key, tensor in delta.tensors[name].items()}
            changed = branch.tuner.fold(w, op, serial=branch.serial)
        except CannotFold as answer:
            refused.append(Refusal(name, answer.reason, answer.alternative))
            continue
        if branch.tuner.join == "replace":
            _replace_classifier(model, branch.add.module, changed)
        else:
            for parameter, value in changed.items():
                getattr(op, parameter).data = value
    return model, refused


def _replace_classifier(model: nn.Module, path: str, changed: Mapping[str, Tensor]) -> None:
    classes, features = changed["weight"].shape
    layer = torch.nn.Linear(features, classes, dtype=torch.float64)
    layer.load_state_dict(dict(changed))
    parent, _, name = path.rpartition(".")
    setattr(
        submodule(model, parent) if parent else model,
        name,
        layer.requires_grad_(requires_grad=False),
    )


def _loss(name: str, frozen: Tensor, exact: Tensor, dtype: torch.dtype) -> Loss:
    wanted = exact - frozen
    realised = exact.to(dtype).double() - frozen.to(dtype).double()
    moves = wanted != 0
    return Loss(
        tensor=name,
        error=float((realised - wanted).norm() / wanted.norm()),
        unmoved=float((realised[moves] == 0).double().mean()),
        largest=float(exact.abs().max()),
    )


def report(merged: Merged) -> dict[str, Any]:
    """The merge-loss report as JSON values."""
    return {
        "dtype": _name(merged.dtype),
        "changed_tensors": len(merged.losses),
        "warning": merged.warning,
        "tensors": [vars(loss) for loss in merged.losses],
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _few(lines: list[str]) -> str:
    shown = "\n          ".join(lines[:4])
    return shown + (f"\n          and {len(lines) - 4} more" if len(lines) > 4 else "")
