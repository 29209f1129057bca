"""The weighted sum in the branches' own form: low ranks stay low rank, and nothing is rounded.

`sum_t w_t s_t up_t down_t = [w_1 s_1 up_1, w_2 s_2 up_2, ...] [down_1; down_2; ...]`. Only where that is the
same as the sum of what folds: two branches of which one scales the other's weights have a cross term.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..errors import UsageError
from ..tuners.bias import Bias
from ..tuners.bottleneck import Bottleneck
from ..tuners.difference import Difference
from ..tuners.gain import Gain
from ..tuners.norm import Norm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..delta import Delta
    from ..tuner import Branch, Weights

LABELS = {"bottleneck": "lora", "bias": "bias", "norm": "norm", "gain": "gain"}


@dataclass(frozen=True)
class Part:
    """One task's branch in a sum.

    Attributes:
        task: Whose.
        number: Of the task in the list: two may have one name.
        name: Of the branch.
        weight: Of the task.
        branch: The branch.
        tensors: Its stored tensors, float64.
    """

    task: str
    number: int
    name: str
    weight: float
    branch: Branch
    tensors: Weights


def concatenate(
    tasks: Sequence[tuple[Delta, float]],
) -> tuple[dict[str, Branch], dict[str, Weights]]:
    """The branches, heads left out, whose sum is the weighted sum of the tasks' branches.

    Args:
        tasks: Deltas that fold, of one backbone, with their weights.

    Returns:
        Branches and tensors by name, float64.

    Raises:
        UsageError: A branch has no exact place in such a sum; it is named.
    """
    places: dict[tuple[object, ...], list[Part]] = {}
    ops: dict[str, list[Part]] = {}
    for number, (delta, weight) in enumerate(tasks):
        for name, branch in delta.branches.items():
            if branch.tuner.join == "replace":
                continue
            tensors = {key: tensor.double() for key, tensor in delta.tensors[name].items()}
            part = Part(delta.task, number, name, weight, branch, tensors)
            places.setdefault(_place(branch), []).append(part)
            ops.setdefault(branch.add.module, []).append(part)
    for parts in ops.values():
        _require_linear(parts)
    branches: dict[str, Branch] = {}
    summed: dict[str, Weights] = {}
    for parts in places.values():
        name = _name(parts[0].branch)
        branches[name], summed[name] = _sum(parts)
    return branches, summed


def _place(branch: Branch) -> tuple[object, ...]:
    """What the branches of one sum share; branches of unlike settings there cannot be summed."""
    tuner = branch.tuner
    if isinstance(tuner, Bottleneck | Gain):
        return tuner.kind, branch.taps, branch.add
    return tuner, branch.taps, branch.add


def _require_linear(parts: Sequence[Part]) -> None:
    """Hold the branches of all tasks at one op to a sum without cross terms.

    Raises:
        UsageError: One of them has no exact place.
    """
    kinds = {part.branch.tuner.kind for part in parts}
    for part in parts:
        tuner, place = part.branch.tuner, part.branch.place
        if isinstance(tuner, Bottleneck):
            beside = place in ("beside", "over")
            linear = beside and tuner.activation == "identity" and tuner.norm == "none"
            reason = "only a linear bottleneck beside its op has ranks that can stand side by side"
        elif isinstance(tuner, Bias):
            linear = place == "behind"
            reason = (
                "in front of an op it goes through the op's weight, which other branches change"
            )
        elif isinstance(tuner, Norm):
            linear, reason = place == "beside", "it does not stand beside its norm"
        elif isinstance(tuner, Gain):
            alone = len({p.number for p in parts}) == len(parts)
            alone = alone and len({_place(p.branch) for p in parts}) == 1
            linear = alone or (place == "beside" and "difference" not in kinds)
            reason = "it scales what other branches of this op change"
        else:
            linear, reason = isinstance(tuner, Difference), f"a {tuner.kind} is no sum of others"
        if not linear:
            raise UsageError(
                "a branch has no exact place in method cat",
                where=f"task {part.task}: {part.name}",
                found=reason,
                do="use --method linear, with --rank R to keep the task mixable",
            )


def _name(branch: Branch) -> str:
    tuner, module = branch.tuner, branch.add.module
    if isinstance(tuner, Difference):
        return f"{module}.{tuner.parameter}/difference".lstrip(".")
    return f"{module}/{LABELS[tuner.kind]}"


def _sum(parts: Sequence[Part]) -> tuple[Branch, Weights]:
    """One branch for several at one place."""
    branch = parts[0].branch
    if isinstance(branch.tuner, Bottleneck):
        return _side_by_side(parts)
    if isinstance(branch.tuner, Gain) and any(p.branch.tuner.shift for p in parts):  # type: ignore[attr-defined]
        branch = replace(branch, tuner=Gain(shift=True))
    tensors: Weights = {}
    for part in parts:
        for key, tensor in part.tensors.items():
            given = part.weight * tensor
            tensors[key] = tensors[key] + given if key in tensors else given
    if isinstance(branch.tuner, Gain) and branch.tuner.shift:
        tensors.setdefault("shift", torch.zeros_like(tensors["gain"]))
    return branch, tensors


def _side_by_side(parts: Sequence[Part]) -> tuple[Branch, Weights]:
    """The ranks of several linear bottlenecks; weights and scales go into `up`."""
    bias = any("up_bias" in part.tensors for part in parts)
    downs, ups, inner, outer = [], [], [], []
    for part in parts:
        w, factor = part.tensors, part.weight * part.tensors["scale"]
        downs.append(w["down"])
        ups.append(factor * w["up"])
        inner.append(w.get("down_bias", w["down"].new_zeros(len(w["down"]))))
        outer.append(factor * w.get("up_bias", w["up"].new_zeros(len(w["up"]))))
    branch = replace(parts[0].branch, tuner=Bottleneck("identity", bias=bias))
    tensors: Weights = {
        "down": torch.cat(downs),
        "up": torch.cat(ups, dim=1),
        "scale": torch.ones((), dtype=torch.float64),
    }
    if bias:
        tensors |= {"down_bias": torch.cat(inner), "up_bias": sum(outer[1:], outer[0])}
    return branch, tensors
