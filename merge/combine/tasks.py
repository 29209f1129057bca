"""Several deltas of one backbone into one delta."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

import torch

from ..delta import Delta, branch_to_json, require_backbone, validate
from ..differences import Carried, Truncation, carry, say_truncation, subtract, total_error
from ..errors import CheckFailed, UsageError
from ..files import canonical_json
from ..fold import exact_weights
from ..sites import measure
from .cat import concatenate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ..backbone import Backbone
    from ..sites import Sites
    from ..tuner import Branch, Weights
    from .recipe import Recipe

    Differences = Mapping[str, Tensor]

AVERAGE = "average"
SAME = 1e-10  # of |cat - linear| over |linear|: float64 sums of up to some hundred ranks


@dataclass(frozen=True)
class Share:
    """One task's part.

    Attributes:
        task: Its name.
        weight: Its weight.
        tensors: Number of tensors of the trunk that it changes.
        norm: Frobenius norm of its difference.
    """

    task: str
    weight: float
    tensors: int
    norm: float


@dataclass(frozen=True)
class Pair:
    """How two tasks' differences stand to each other, before anything is trimmed or weighted.

    Attributes:
        one: A task.
        other: Another.
        cosine: Of the angle between them over all tensors; None where one of them is zero.
        conflict: Share of opposite signs among the values that both change; None where there is none.
    """

    one: str
    other: str
    cosine: float | None
    conflict: float | None


@dataclass(frozen=True)
class Combined:
    """The result.

    Attributes:
        delta: The combined task.
        shares: One row per task, in the order of the sum.
        pairs: One row per two tasks.
        truncations: What a low rank left, tensor by tensor, worst first.
        whole: Branches of the result that cannot share a batch with other tasks.
    """

    delta: Delta
    shares: tuple[Share, ...]
    pairs: tuple[Pair, ...]
    truncations: tuple[Truncation, ...]
    whole: tuple[str, ...]

    @property
    def error(self) -> float | None:
        """The relative error of all truncated tensors together."""
        return total_error(self.truncations)


def combine(
    deltas: Sequence[Delta],
    backbone: Backbone,
    recipe: Recipe,
    *,
    task: str,
    weights: Sequence[float] | None = None,
    head: str | None = None,
    labels: Sequence[str] | None = None,
) -> Combined:
    """Combine tasks; the same delta, byte for byte, in whatever order they are given.

    Args:
        deltas: The tasks.
        backbone: Their frozen backbone.
        recipe: The method and its numbers.
        task: The result's name.
        weights: One per delta; `recipe.weight` if None.
        head: The task whose head and labels the result has, or `AVERAGE`; needed with several deltas.
        labels: Class names in the order of the logits, in place of the head's own.

    Raises:
        UsageError: A branch does not fold, with its reason; the head is not chosen; weights that do not fit;
            tasks that prepare pictures differently; heads that cannot be averaged.
        IncompatibleArtefact: A delta of another backbone, or a result that is not a valid task.
        CheckFailed: Method cat did not give the weighted sum.
    """
    tasks = _in_order(deltas, _weights(deltas, weights, recipe))
    _require_one_preprocessing([delta for delta, _, _ in tasks])
    sites = measure(backbone)
    folded = [_folded(delta, backbone, sites) for delta, _, _ in tasks]
    differences = [difference for _, difference in folded]
    weighted = [(own, weight) for (own, _), (_, weight, _) in zip(folded, tasks, strict=True)]
    heads, names = _head(weighted, head)
    merged = _merge(tasks, differences, recipe)
    if recipe.method == "cat":
        carried = Carried(*concatenate(weighted))
    else:
        carried = carry(backbone, merged, ranks=recipe.cut, sites=sites)
    delta = Delta(
        task=task,
        labels=tuple(names if labels is None else labels),
        preprocessing=tasks[0][0].preprocessing,
        backbone=backbone.identity,
        branches=carried.branches | {name: branch for name, branch, _ in heads},
        tensors=carried.tensors | {name: tensors for name, _, tensors in heads},
        provenance={
            **recipe.settings(),
            "combined from": ", ".join(f"{delta.task} * {weight!r}" for delta, weight, _ in tasks),
            "head": head or tasks[0][0].task,
            "truncation error": say_truncation(carried.truncations),
        },
    )
    validate(delta, where=f"task {task}")
    if recipe.method == "cat":
        _require_same(_folded(delta, backbone, sites)[1], merged)
    shares = [
        Share(delta.task, weight, len(own), math.hypot(*(float(d.norm()) for d in own.values())))
        for (delta, weight, _), own in zip(tasks, differences, strict=True)
    ]
    pairs = [
        _pair(one.task, other.task, differences[i], differences[j])
        for (i, (one, _, _)), (j, (other, _, _)) in combinations(enumerate(tasks), 2)
    ]
    return Combined(delta, tuple(shares), tuple(pairs), carried.truncations, carried.whole)


def _weights(
    deltas: Sequence[Delta], weights: Sequence[float] | None, recipe: Recipe
) -> list[float]:
    """One finite number per delta."""
    if not deltas:
        raise UsageError("there is no task to combine", do="name at least one delta")
    if not weights:
        return [recipe.weight(len(deltas))] * len(deltas)
    if len(weights) != len(deltas) or not all(math.isfinite(weight) for weight in weights):
        raise UsageError(
            "the weights do not fit the tasks",
            wanted=f"{len(deltas)} finite numbers, in the order of the deltas, or none",
            found=", ".join(map(str, weights)),
        )
    return [float(weight) for weight in weights]


def _in_order(deltas: Sequence[Delta], weights: Sequence[float]) -> list[tuple[Delta, float, str]]:
    """The tasks with weights and digests, by name and content: sums and draws know no other order."""
    tasks = [(delta, weight, _digest(delta)) for delta, weight in zip(deltas, weights, strict=True)]
    return sorted(tasks, key=lambda entry: (entry[0].task, entry[2], entry[1]))


def _digest(delta: Delta) -> str:
    """SHA-256 over what a delta computes."""
    sha = hashlib.sha256(canonical_json([delta.task, list(delta.labels)]).encode())
    for name, branch in delta.branches.items():
        sha.update(canonical_json(branch_to_json(name, branch)).encode())
        for key in sorted(delta.tensors[name]):
            tensor = delta.tensors[name][key].detach().cpu().contiguous()
            sha.update(canonical_json([key, str(tensor.dtype), list(tensor.shape)]).encode())
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _require_one_preprocessing(deltas: Sequence[Delta]) -> None:
    first = deltas[0]
    for other in deltas[1:]:
        if other.preprocessing != first.preprocessing:
            raise UsageError(
                "the tasks prepare their pictures differently, so one task cannot do both",
                where=f"tasks {first.task} and {other.task}",
                wanted=first.preprocessing,
                found=other.preprocessing,
                do="train them with one preprocessing",
            )


def _head(
    tasks: Sequence[tuple[Delta, float]], chosen: str | None
) -> tuple[list[tuple[str, Branch, Weights]], tuple[str, ...]]:
    """The result's heads by name, and their labels."""
    names = sorted({delta.task for delta, _ in tasks})
    if chosen is None and len(tasks) > 1:
        raise UsageError(
            "every task has a head of its own, and the result has one",
            wanted=f"--head {' or --head '.join([*names, AVERAGE])}",
            found="no choice",
            do="name the task whose classes the result answers with",
        )
    if chosen == AVERAGE and AVERAGE not in names:
        return _average(tasks), tasks[0][0].labels
    owners = [delta for delta, _ in tasks if chosen in (None, delta.task)]
    if len(owners) != 1:
        raise UsageError(
            "no single one of the tasks has this name",
            wanted=f"one of {', '.join(names)}, or {AVERAGE}",
            found=f"{chosen}, the name of {len(owners)}",
            do=f"use --head {AVERAGE}, or give the tasks names of their own",
        )
    (owner,) = owners
    heads = [(name, owner.branches[name], dict(owner.tensors[name])) for name in owner.heads]
    return heads, owner.labels


def _average(tasks: Sequence[tuple[Delta, float]]) -> list[tuple[str, Branch, Weights]]:
    """The mean of the heads, weighted as the tasks are, the weights scaled to sum to 1.

    A head is no difference: the sum of two copies of one head has twice its logits.
    """
    first, total = tasks[0][0], sum(weight for _, weight in tasks)
    for other, _ in tasks[1:]:
        if other.labels != first.labels:
            raise UsageError(
                "heads of different classes have no average",
                where=f"tasks {first.task} and {other.task}",
                wanted=", ".join(first.labels[:8]),
                found=", ".join(other.labels[:8]),
                do=f"choose one: --head {first.task} or --head {other.task}",
            )
    if not total > 0:
        raise UsageError(
            "the weights of the heads have no positive sum, so there is no average",
            found=f"{total:g}",
            do="choose a head: --head TASK",
        )
    places = {first.branches[name].add: name for name in first.heads}
    found = []
    for place, name in places.items():
        mean: Weights = {}
        for delta, weight in tasks:
            own = next(n for n in delta.heads if delta.branches[n].add == place)
            for key, tensor in delta.tensors[own].items():
                given = weight / total * tensor.double()
                mean[key] = mean[key] + given if key in mean else given
        found.append((name, first.branches[name], mean))
    return found


def _folded(delta: Delta, backbone: Backbone, sites: Sites) -> tuple[Delta, Differences]:
    """The task with a head that says all of its classifier, and what it changes in the trunk's weights.

    Both exactly, in float64; a head where nothing else stands is left as it is stored.

    Raises:
        UsageError: A branch does not fold; its reason is given.
    """
    require_backbone(delta, backbone, sites)
    try:
        tuned = exact_weights(delta, backbone)
    except UsageError as cause:
        raise UsageError(
            f"task {delta.task} is not a difference of weights, so it cannot be combined",
            found=cause.details.get("found", cause.what),
            do="leave it out: export serves it beside the combined task, in one engine",
        ) from cause
    frozen = backbone.model.state_dict()
    trunk = {name: frozen[name] for name in frozen if not backbone.is_classifier(name)}
    return _settle(delta, tuned), subtract(trunk, tuned)


def _settle(delta: Delta, tuned: Mapping[str, Tensor]) -> Delta:
    """The task without the branches that stand at its classifiers: the folded heads hold them."""
    heads = {delta.branches[name].add.module: name for name in delta.heads}
    inside = {
        name: heads[branch.add.module]
        for name, branch in delta.branches.items()
        if branch.add.module in heads and name not in delta.heads
    }
    tensors = {name: own for name, own in delta.tensors.items() if name not in inside}
    for name in set(inside.values()):
        path = delta.branches[name].add.module
        tensors[name] = {key: tuned[f"{path}.{key}"] for key in tensors[name]}
    branches = {name: branch for name, branch in delta.branches.items() if name not in inside}
    return replace(delta, branches=branches, tensors=tensors)


def _merge(
    tasks: Sequence[tuple[Delta, float, str]], differences: Sequence[Differences], recipe: Recipe
) -> dict[str, Tensor]:
    """The combined difference; a task that leaves a tensor alone has zeros there."""
    weights = [weight for _, weight, _ in tasks]
    merged: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for own in differences for name in own):
        like = next(own[name] for own in differences if name in own)
        parts = [own[name] if name in own else torch.zeros_like(like) for own in differences]
        merged[name] = recipe.merge(parts, weights, [f"{digest} {name}" for _, _, digest in tasks])
    return merged


def _pair(one: str, other: str, a: Differences, b: Differences) -> Pair:
    both = [(a[name], b[name]) for name in a if name in b]
    dot = math.fsum(float((x * y).sum()) for x, y in both)
    norms = [math.hypot(*(float(d.norm()) for d in own.values())) for own in (a, b)]
    signs = [x.sign() * y.sign() for x, y in both]
    opposite = sum(int((sign < 0).sum()) for sign in signs)
    shared = sum(int((sign != 0).sum()) for sign in signs)
    return Pair(
        one,
        other,
        dot / math.prod(norms) if all(norms) else None,
        opposite / shared if shared else None,
    )


def _require_same(found: Differences, wanted: Differences) -> None:
    """Hold the sum in factors to the sum of weights.

    Raises:
        CheckFailed: A tensor differs by more than rounding.
    """
    for name in {**wanted, **found}:
        one, other = found.get(name), wanted.get(name)
        gap = (one if one is not None else 0) - (other if other is not None else torch.zeros(()))
        size = float(other.norm()) if other is not None else 0.0
        if float(gap.norm()) > SAME * max(size, 1.0):
            raise CheckFailed(
                "the concatenated branches do not add up to the sum of the weights",
                where=name,
                wanted=f"a relative difference below {SAME:g}",
                found=f"{float(gap.norm()) / max(size, 1e-300):.3g}",
            )
