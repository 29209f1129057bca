"""What every reader gives, and how it holds a file to the backbone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ..delta import Delta
from ..errors import IncompatibleArtefact
from ..methods import head_branch
from ..tuner import Point, bind
from ..tuners.class_and_mean import ClassAndMean

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from ..backbone import Backbone
    from ..differences import Carried
    from ..preprocessing import Preprocessing
    from ..tuner import Branch, Weights


@dataclass
class Foreign:
    """A foreign checkpoint's tuners.

    Attributes:
        source: Who wrote it.
        branches: Places by name, in the order in which they join.
        tensors: Stored tensors by name.
        labels: Class names, if the file has them; an empty tuple for a task without classes.
        preprocessing: The source's own, where it differs from timm's for the backbone.
        notes: What a person should know of the reading: settings that were used, truncation errors.
    """

    source: str
    branches: dict[str, Branch] = field(default_factory=dict)
    tensors: dict[str, Weights] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """How many numbers the task answers, a number per class where it has classes."""
        first = next(n for n, b in self.branches.items() if b.tuner.answers)
        tuner = self.branches[first].tuner
        return tuner.answer_width(bind(tuner.shapes, self.tensors[first], where=first))

    def plant(self, name: str, branch: Branch, tensors: Weights) -> None:
        """Add a branch."""
        self.branches[name] = branch
        self.tensors[name] = tensors

    def plant_changes(self, carried: Carried) -> None:
        """Add the branches of tuned parameters, and a note of those that are alone in a batch."""
        for name, branch in carried.branches.items():
            self.plant(name, branch, carried.tensors[name])
        if carried.whole:
            self.notes["alone"] = (
                f"{len(carried.whole)} branches cannot share a batch with other tasks: "
                f"{', '.join(carried.whole[:3])}{', ...' if carried.whole[3:] else ''}"
            )

    def plant_head(
        self, backbone: Backbone, weight: Tensor, bias: Tensor | None, classifier: int = 0
    ) -> None:
        """Add a classifier, by default the first; without a bias it gets zeros, which is the same."""
        name, branch = head_branch(backbone.classifiers[classifier])
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        self.plant(name, branch, {"weight": weight, "bias": bias})

    def plant_wide_head(self, backbone: Backbone, weight: Tensor, bias: Tensor) -> None:
        """Add DINOv2's classifier: `weight [K, 2 C]` of the class token and of the mean of the patches."""
        name, branch = head_branch(backbone.classifiers[0])
        tuner = ClassAndMean(int(getattr(backbone.model, "num_prefix_tokens", 1)))
        token, mean = weight.chunk(2, dim=1)
        tensors = {"weight": token.contiguous(), "mean": mean.contiguous(), "bias": bias}
        self.plant(name, replace(branch, tuner=tuner, others=(Point("norm", "output"),)), tensors)

    def delta(
        self,
        task: str,
        backbone: Backbone,
        *,
        labels: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
        provenance: Mapping[str, str] | None = None,
    ) -> Delta:
        """The task's delta; classes without names are numbered."""
        numbered = [f"class_{index}" for index in range(self.width)]
        names = labels or (numbered if self.labels is None else self.labels)
        return Delta(
            task=task,
            labels=tuple(names),
            preprocessing=preprocessing or self.preprocessing or backbone.preprocessing(),
            backbone=backbone.identity,
            branches=self.branches,
            tensors=self.tensors,
            provenance={"imported from": self.source, **self.notes, **(provenance or {})},
        )


def named_module(file: Path, backbone: Backbone, path: str) -> nn.Module:
    """A module of the backbone that a file names.

    Raises:
        IncompatibleArtefact: There is none.
    """
    try:
        return backbone.model.get_submodule(path)
    except AttributeError as cause:
        raise IncompatibleArtefact(
            "the backbone has no such module",
            where=file,
            wanted=f"a module of {backbone.identity.architecture}",
            found=path,
            do="load the backbone that it was trained on",
        ) from cause


def differing(
    path: Path, backbone: Backbone, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The frozen tensors that a checkpoint holds with other values: its own and the backbone's.

    The classifier is left out. A checkpoint that saves the trunk has all of it. One that was saved in half precision
    holds the same values where the backbone's round to them.

    Raises:
        IncompatibleArtefact: One is missing, or has another shape.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    missing, strange = [], []
    for name, frozen in backbone.model.state_dict().items():
        if backbone.is_classifier(name):
            continue
        own = tensors.get(name)
        if own is None:
            missing.append(name)
        elif own.shape != frozen.shape:
            strange.append(name)
        elif not torch.equal(own.double(), _as_stored(frozen, own.dtype).double()):
            found[name] = own, frozen
    if missing:
        raise IncompatibleArtefact(
            "the checkpoint lacks frozen tensors of the backbone",
            where=path,
            wanted=f"all of {backbone.identity.architecture}, which such a checkpoint saves",
            found=f"no {some(missing)}",
            do="save the whole model's state dict or what was trained alone, or load the backbone that it was "
            "trained on",
        )
    if strange:
        raise other_backbone(path, backbone, strange)
    return found


def _as_stored(frozen: Tensor, dtype: torch.dtype) -> Tensor:
    """A frozen tensor as a file in half precision stores it."""
    return frozen.to(dtype) if dtype in (torch.float16, torch.bfloat16) else frozen


def some(names: Iterable[str]) -> str:
    """The first of them, and how many more."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")


def bare_name(key: str, wrappers: tuple[str, ...]) -> str:
    """A name without what wrappers put before it, each a part that ends in a dot, however many there are."""
    while key.startswith(wrappers):
        key = key.partition(".")[2]
    return key


def other_backbone(path: Path, backbone: Backbone, names: Sequence[str]) -> IncompatibleArtefact:
    """The error of frozen tensors that are not the backbone's."""
    return IncompatibleArtefact(
        "frozen tensors are not the backbone's",
        where=path,
        wanted=f"{backbone.identity.architecture} {backbone.identity.fingerprint[:16]}",
        found=some(names),
        do="load the backbone that it was trained on",
    )


def is_linear_layer(weight: Tensor | None, bias: Tensor | None) -> bool:
    """They are a linear layer's `[out, in]` and, where there is one, `[out]`."""
    if weight is None or weight.dim() != 2:
        return False
    return bias is None or bias.shape == weight.shape[:1]


def refuse(
    path: Path, what: str, *, found: object, wanted: str | None = None, do: str | None = None
) -> IncompatibleArtefact:
    """The error of a tuner that cannot be carried."""
    return IncompatibleArtefact(what, where=path, wanted=wanted, found=found, do=do)
