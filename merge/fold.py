"""A task's branches into the frozen weights: exactly, or not at all, with a report of what was lost.

Products and sums run in float64 from the backbone's own tensors and are cast once. A half-precision
checkpoint cannot hold every small difference, so the report says per tensor which share arrived.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .delta import Delta, require_backbone
from .errors import UsageError
from .parallel import read_inside, submodule
from .sites import Sites, measure
from .tuner import CannotFold

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .backbone import Backbone
    from .tuner import Branch, Place

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


def refusals(delta: Delta, backbone: Backbone, sites: Sites | None = None) -> list[Refusal]:
    """The branches that cannot fold; empty when the task merges exactly."""
    return _fold(delta, backbone, sites)[1]


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
    sites = sites or measure(backbone)
    require_backbone(delta, backbone, sites)
    folded, refused = _fold(delta, backbone, sites)
    if refused:
        raise UsageError(
            f"task {delta.task} cannot be merged exactly, so nothing was merged",
            found=_few([str(refusal) for refusal in refused]),
            do="export it with --mode parallel: the same numbers, the branches fused beside the backbone",
        )
    dtype = dtype or backbone.dtype
    tensors: dict[str, Tensor] = {}
    losses: list[Loss] = []
    frozen = backbone.model.state_dict()
    for name in [name for name in frozen if name not in folded] + list(folded):
        exact = folded.get(name, frozen.get(name))
        assert exact is not None
        if backbone.is_classifier(name) and name not in folded:
            continue
        tensors[name] = exact.to(dtype) if exact.is_floating_point() else exact
        if name in folded and name in frozen and not backbone.is_classifier(name):
            before = frozen[name].double()
            if not torch.equal(before, exact.double()):
                losses.append(_loss(name, before, exact, dtype))
    losses.sort(key=lambda loss: (-loss.error, loss.tensor))
    return Merged(tensors, tuple(losses), dtype)


def exact_weights(delta: Delta, backbone: Backbone) -> dict[str, Tensor]:
    """The tensors that a task changes, as timm names them, in float64; its classifier among them.

    Raises:
        UsageError: A branch cannot fold; every reason is named.
    """
    folded, refused = _fold(delta, backbone, None)
    if refused:
        raise UsageError(
            f"task {delta.task} does not fold, so it is no difference of weights",
            found=_few([str(refusal) for refusal in refused]),
        )
    return folded


def _fold(
    delta: Delta, backbone: Backbone, sites: Sites | None
) -> tuple[dict[str, Tensor], list[Refusal]]:
    """The tensors of the ops that a task changes, in float64, and what does not fold."""
    if sites is None and read_inside(
        backbone.model, {b.add.module for b in delta.branches.values()}
    ):
        sites = measure(backbone)
    read = frozenset[str]() if sites is None else sites.read
    ops: dict[str, nn.Module] = {}
    refused: list[Refusal] = []
    for name, branch in _in_order(delta):
        path = branch.add.module
        try:
            place = _place(branch)
            op = ops.get(path) or _in_double(submodule(backbone.model, path))
            if place == "behind" and path in read:
                raise CannotFold(
                    f"the module around {path} reads its weight and may add a bias of its own"
                )
            w = {key: tensor.double() for key, tensor in delta.tensors[name].items()}
            changed = branch.tuner.fold(w, op, place)
        except CannotFold as answer:
            refused.append(Refusal(name, answer.reason, answer.alternative))
            continue
        if branch.tuner.join == "replace":
            classes, features = changed["weight"].shape
            op = nn.Linear(features, classes, dtype=torch.float64)
        ops[path] = op
        for parameter, value in changed.items():
            getattr(op, parameter).data = value
    saved = backbone.model.state_dict(keep_vars=True)
    folded = {
        name: tensor.detach()
        for path, op in ops.items()
        for own, tensor in (op._parameters | op._buffers).items()
        if (name := f"{path}.{own}".lstrip(".")) in saved or backbone.is_classifier(name)
        if tensor is not None
    }
    for name, tensor in list(folded.items()):  # a module may be held under several names
        folded |= {other: tensor for other, same in saved.items() if same is saved.get(name)}
    listed = list(delta.branches)
    return folded, sorted(refused, key=lambda refusal: listed.index(refusal.branch))


def _in_double(module: nn.Module) -> nn.Module:
    """The module with its own tensors in float64; those of modules inside it stay shared."""
    twin = copy.copy(module)
    for own in ("_parameters", "_buffers"):
        tensors = {
            name: tensor.detach().double()
            if tensor is not None and tensor.is_floating_point()
            else tensor
            for name, tensor in getattr(module, own).items()
        }
        twin.__dict__[own] = tensors
    return twin


def _in_order(delta: Delta) -> list[tuple[str, Branch]]:
    """The branches in an order in which they fold.

    First the op's own weights, then what is added to its output as it is added, and last, from the
    nearest on, what changes its input.
    """
    stages: dict[int, list[tuple[str, Branch]]] = {0: [], 1: [], 2: []}
    for name, branch in delta.branches.items():
        stage = 0 if branch.tuner.join == "weights" else 2 if branch.add.side == "input" else 1
        stages[stage].append((name, branch))
    return [*stages[0], *stages[1], *reversed(stages[2])]


def _place(branch: Branch) -> Place:
    """Where the branch stands at the op that it joins.

    Raises:
        CannotFold: It does not stand at one op.
    """
    if branch.tuner.no_fold:
        raise CannotFold(branch.tuner.no_fold)
    if branch.tuner.join == "weights":
        return "beside"
    if branch.place is None:
        read = ", ".join(str(point) for point in branch.taps[:2])
        more = ", ..." if branch.taps[2:] else ""
        raise CannotFold(f"it reads {read}{more}, which is not the input of {branch.add.module}")
    return branch.place


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
