"""What every reader gives, and how files that may hold code are opened without running any."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..delta import Delta
from ..errors import IncompatibleArtefact, UsageError
from ..methods import head_branch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from ..backbone import Backbone
    from ..preprocessing import Preprocessing
    from ..tuner import Branch, Weights


@dataclass
class Foreign:
    """A foreign checkpoint's tuners.

    Attributes:
        source: Who wrote it.
        branches: Places by name, in the order in which they join.
        tensors: Stored tensors by name.
        labels: Class names, if the file has them.
        preprocessing: The source's own, where it differs from timm's for the backbone.
    """

    source: str
    branches: dict[str, Branch] = field(default_factory=dict)
    tensors: dict[str, Weights] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None

    def plant(self, name: str, branch: Branch, tensors: Weights) -> None:
        """Add a branch."""
        self.branches[name] = branch
        self.tensors[name] = tensors

    def plant_head(self, backbone: Backbone, weight: Tensor, bias: Tensor | None) -> None:
        """Add the classifier; without a bias it gets zeros, which is the same."""
        name, branch = head_branch(backbone.classifier)
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        self.plant(name, branch, {"weight": weight, "bias": bias})

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
        classes = next(
            len(self.tensors[n]["bias"])
            for n, b in self.branches.items()
            if b.tuner.join == "replace"
        )
        names = labels or self.labels or [f"class_{index}" for index in range(classes)]
        return Delta(
            task=task,
            labels=tuple(names),
            preprocessing=preprocessing or self.preprocessing or backbone.preprocessing(),
            backbone=backbone.identity,
            branches=self.branches,
            tensors=self.tensors,
            provenance={"imported from": self.source, **(provenance or {})},
        )


def read_pickle(path: Path) -> Any:
    """A torch checkpoint, tensors and plain containers only; no code in it is run.

    Raises:
        UsageError: There is no such file.
        IncompatibleArtefact: The file is damaged, or holds objects other than tensors.
    """
    if not path.is_file():
        raise UsageError("there is no such file", where=path, wanted="a torch checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what fails is raised
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as cause:
        raise IncompatibleArtefact(
            "the checkpoint holds objects that would run code when loaded",
            where=path,
            wanted="tensors and plain containers",
            found=str(cause).splitlines()[0],
            do="save it again as a plain state dict",
        ) from cause
    except (RuntimeError, EOFError, ValueError, KeyError) as cause:
        raise IncompatibleArtefact(
            "the checkpoint is damaged", where=path, found=str(cause).splitlines()[0]
        ) from cause


def refuse(path: Path, what: str, *, found: object, do: str | None = None) -> IncompatibleArtefact:
    """The error of a tuner that cannot be carried."""
    return IncompatibleArtefact(what, where=path, found=found, do=do)
