"""Tuners on a frozen backbone, as a module that an ordinary torch loop trains.

tuned = attach(backbone, lora(4), classes=10)
optimizer = torch.optim.AdamW(tuned.trainable(), lr=1e-3)
...
save_delta(path, tuned.delta("digits", labels))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from .delta import Delta, require_backbone, validate, widest
from .errors import IncompatibleArtefact, UsageError
from .methods import Planted, head_branch
from .parallel import joined
from .sites import Sites, measure
from .tuner import Branch, Point
from .tuners.embedding import Embedding

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from .backbone import Backbone
    from .methods import Method
    from .preprocessing import Preprocessing

HALF = (torch.float16, torch.bfloat16)


class Tuned(nn.Module):
    """A frozen backbone with one task's branches: its inputs, such as images `[B, C, H, W]`, to logits `[B, K]`.

    The backbone is shared, not copied, and stays in eval mode; only the branches train.

    Args:
        backbone: The frozen backbone.
        branches: Branches by name.
        tensors: Their stored tensors by name; held in the backbone's dtype.
        learned: Branches whose scale training moves.

    Raises:
        IncompatibleArtefact: The backbone is in half precision and would round the tensors.
    """

    def __init__(
        self,
        backbone: Backbone,
        branches: Mapping[str, Branch],
        tensors: Mapping[str, Mapping[str, Tensor]],
        learned: Collection[str] = (),
    ) -> None:
        super().__init__()
        dtype = backbone.dtype
        own = widest([t.dtype for named in tensors.values() for t in named.values()] or [dtype])
        if dtype in HALF and widest([own, dtype]) != dtype:
            raise IncompatibleArtefact(
                "the backbone is in half precision and would round the tuner's tensors",
                wanted=f"a backbone in {widest([own, dtype])}",
                found=f"tensors in {own}, a backbone in {dtype}",
                do="load the backbone in float32, or merge: sums run in float64",
            )
        self.backbone = backbone
        self.trunk = backbone.model.eval()
        self.branches = dict(branches)
        self.weights = nn.ModuleList(
            nn.ParameterDict(
                {
                    k: nn.Parameter(
                        v.to(dtype, copy=True),
                        requires_grad=not branches[name].tuner.constant(k) or name in learned,
                    )
                    for k, v in tensors[name].items()
                }
            )
            for name in branches
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits `[B, K]`, or what else the heads answer.

        Args:
            inputs: As `Backbone.inputs` names them: `[B, C, H, W]` images for most.

        Raises:
            UsageError: Gradient checkpointing is on: it runs the backbone again without the branches.
        """
        if torch.is_grad_enabled() and getattr(self.trunk, "grad_checkpointing", False):
            raise UsageError(
                "gradient checkpointing would run the backbone again without the branches",
                do="call set_grad_checkpointing(False) on the backbone",
            )
        weighted = [(branch, dict(weights)) for _, branch, weights in self.parts()]
        with joined(self.trunk, weighted):
            return self.trunk(*inputs)

    def train(self, mode: bool = True) -> Tuned:
        """Set the branches' mode; the backbone stays in eval mode."""
        super().train(mode)
        self.trunk.eval()
        return self

    def trainable(self) -> Iterator[nn.Parameter]:
        """The parameters of the branches that training moves; a scale is a constant unless learned."""
        for _, _, weights in self.parts():
            yield from (parameter for parameter in weights.values() if parameter.requires_grad)

    def hold_other_rows(self, name: str, rows: Sequence[range]) -> None:
        """Let training move only these rows of a branch's `up` and `up_bias`; the others keep their values."""
        weights = next(w for n, _, w in self.parts() if n == name)
        for key in ("up", "up_bias"):
            if key in weights:
                moves = torch.zeros_like(weights[key])
                for block in rows:
                    moves[block.start : block.stop] = 1
                weights[key].register_hook(lambda slope, moves=moves: slope * moves)

    def parts(self) -> list[tuple[str, Branch, nn.ParameterDict]]:
        """Each branch's name, place and tensors."""
        weights = cast("list[nn.ParameterDict]", list(self.weights))
        return [(n, b, w) for (n, b), w in zip(self.branches.items(), weights, strict=True)]

    @property
    def head(self) -> nn.ParameterDict:
        """The first classifier's `weight [K, C]` and `bias [K]`, for a warm start."""
        return next(w for _, branch, w in self.parts() if branch.tuner.answers)

    def delta(
        self,
        task: str,
        labels: Sequence[str],
        *,
        preprocessing: Preprocessing | None = None,
        provenance: Mapping[str, str] | None = None,
    ) -> Delta:
        """The branches as they are now, ready for `save_delta`.

        Args:
            task: The task's name.
            labels: Class names in the order of the logits.
            preprocessing: How pictures become tensors; timm's for the backbone if None.
            provenance: Free text by key.

        Raises:
            IncompatibleArtefact: The labels are not the head's, or a tensor is not finite.
        """
        delta = Delta(
            task=task,
            labels=tuple(labels),
            preprocessing=preprocessing or self.backbone.preprocessing(),
            backbone=self.backbone.identity,
            branches=self.branches,
            tensors={
                name: {k: v.detach().clone() for k, v in weights.items()}
                for name, _, weights in self.parts()
            },
            provenance=provenance or {},
        )
        validate(delta, where=f"task {task}")
        return delta


def attach(
    backbone: Backbone,
    *methods: Method,
    classes: int | None,
    seed: int = 0,
    sites: Sites | None = None,
) -> Tuned:
    """Plant methods in a backbone, with a head of its own.

    Args:
        backbone: The frozen backbone.
        methods: See `methods`; several combine, none is a linear probe.
        classes: The head's number of classes; None for a task that answers with what the backbone's own
            classifier gives.
        seed: Of the starting values.
        sites: From `measure`, when at hand.

    Raises:
        UsageError: Two branches would have one name, or a block is not there.
        IncompatibleArtefact: A place cannot carry its branch.
    """
    if classes is not None and classes < 1:
        raise UsageError("a task needs at least one class", found=classes)
    sites = sites or measure(backbone)
    several = [p for p in backbone.classifiers if sites.dims.get(Point(p, "output")) != 2]
    if classes is not None and several:
        raise UsageError(
            "the backbone answers with several vectors per row, which classes cannot name",
            where=f"{backbone.identity.architecture}: {', '.join(several)}",
            found=f"classes={classes}",
            do="attach(..., classes=None): the task answers with what the backbone's classifier gives",
        )
    generator = torch.Generator().manual_seed(seed)
    branches: dict[str, Branch] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    dtype = backbone.dtype
    replaced: dict[Point, int] = {}

    heads = [head_branch(path)[0] for path in backbone.classifiers]

    def plant(planted: Planted) -> None:
        name, branch = planted.name, planted.branch
        if name in branches:
            raise UsageError("two branches have one name", found=name)
        ranked = any(branch.tuner.padded & set(axes) for axes in branch.tuner.shapes.values())
        if ranked and planted.rank < 1:
            raise UsageError(
                "a tuner needs a rank or length of at least 1", where=name, found=planted.rank
            )
        sizes = dict.fromkeys(branch.tuner.padded, planted.rank)
        if branch.tuner.join != "weights":
            named = {axis for axes in branch.tuner.shapes.values() for axis in axes}
            for axis, point in (("in", branch.tap), ("out", branch.add)):
                if axis in named or point not in sites.unclear:
                    sizes[axis] = replaced.get(point) or sites.require(point)
        if (
            branch.add in [Point(path, "output") for path in backbone.classifiers]
            and name not in heads
        ):
            raise UsageError("a tuner here would be replaced by the task's head", where=name)
        branches[name] = branch
        try:
            tensors[name] = branch.tuner.init(sizes, generator)
        except ValueError as cause:
            raise UsageError(
                "a tuner does not fit its place", where=name, found=str(cause)
            ) from cause
        if "scale" in branch.tuner.shapes:
            tensors[name]["scale"] = torch.tensor(float(planted.scale))
        tensors[name] = {k: v.to(dtype) for k, v in tensors[name].items()}
        sites.check(branch, tensors[name], where=name, replaced=replaced)

    planting = [planted for method in methods for planted in method(backbone, sites)]
    for planted in planting:
        plant(planted)
    for classifier in backbone.classifiers:
        name, head = head_branch(classifier)
        if classes is None:
            head = Branch(Embedding(sites.require(head.add)), head.add, head.add)
        plant(Planted(name, head, classes or 0))
    tuned = Tuned(backbone, branches, tensors, {p.name for p in planting if p.learn_scale})
    for planted in planting:
        if planted.rows is not None:
            tuned.hold_other_rows(planted.name, planted.rows)
    _require_runs(tuned)
    return tuned


def restore(backbone: Backbone, delta: Delta, sites: Sites | None = None) -> Tuned:
    """The tuned model of a delta, to run it, or to train all of its tensors but scales.

    A delta does not say what its method held still (the rows that PATT does not tune) or let learn (a
    scale): to go on with a training, `attach` the method and copy the tensors.

    Raises:
        IncompatibleArtefact: The delta belongs to another backbone, or does not fit it.
    """
    require_backbone(delta, backbone, sites or measure(backbone))
    tuned = Tuned(backbone, delta.branches, delta.tensors)
    if any(branch.tuner.join == "tokens" for branch in delta.branches.values()):
        _require_runs(tuned)
    return tuned


def answer_shapes(
    backbone: Backbone, deltas: Sequence[Delta], sites: Sites
) -> list[tuple[int, ...]]:
    """The shape of one row's answer of each task, `(K,)` or `(Q, K)`; tasks of one layout are run once."""
    found: dict[object, tuple[int, ...]] = {}
    for delta in deltas:
        if delta.layout not in found:
            with torch.no_grad():
                answer = restore(backbone, delta, sites).eval()(*backbone.draw())
            found[delta.layout] = tuple(answer.shape[1:])
    return [found[delta.layout] for delta in deltas]


def _require_runs(tuned: Tuned) -> None:
    """Try an image.

    Raises:
        IncompatibleArtefact: The backbone does not run with the branches.
    """
    try:
        with torch.no_grad():
            tuned(*tuned.backbone.draw())
    except (RuntimeError, ValueError) as cause:
        raise IncompatibleArtefact(
            "the backbone does not run with these branches",
            where=tuned.backbone.identity.architecture,
            found=str(cause).splitlines()[0],
            do="choose another method: some attentions fix the number of their tokens",
        ) from cause
