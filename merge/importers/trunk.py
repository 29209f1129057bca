"""A file of what was trained alone: its frozen tensors are the backbone's, which it does not hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .foreign import Foreign, differing, refuse, some

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from torch import Tensor

    from ..backbone import Backbone

NOTE = "trunk"


def trunk_changes(
    path: Path, backbone: Backbone, tensors: Mapping[str, Tensor], found: Foreign, tuned: str = ""
) -> dict[str, tuple[Tensor, Tensor]]:
    """The frozen tensors that a checkpoint holds with other values, as `differing` gives them.

    A checkpoint that holds a frozen tensor which is never tuned saved the trunk, and has to have all of it. One
    without any, as a filter on `requires_grad` leaves it, holds what was trained, and the rest is the backbone's.

    Args:
        path: The checkpoint.
        backbone: The frozen backbone.
        tensors: The checkpoint's, by the backbone's names.
        found: Gets a note where the trunk is not in the file.
        tuned: How names of frozen tensors end that may be tuned; by default none may.

    Raises:
        IncompatibleArtefact: The trunk is there in part, or one of its tensors has another shape.
    """
    frozen = {n: t for n, t in backbone.model.state_dict().items() if not backbone.is_classifier(n)}
    there = set(frozen) & set(tensors)
    if any(not tuned or not name.endswith(tuned) for name in there):
        return differing(path, backbone, tensors)
    held = f"{len(there)} of the backbone's {len(frozen)}" if there else "no"
    found.notes[NOTE] = (
        f"the file holds {held} frozen tensors: that it was trained on this backbone could not be checked"
    )
    return differing(path, backbone, {**frozen, **tensors})


def require_known(
    path: Path, tensors: Collection[str], known: Collection[str], found: Foreign
) -> None:
    """Every tensor has been read.

    Raises:
        IncompatibleArtefact: One has not been.
    """
    left = sorted(set(tensors) - set(known))
    if left:
        raise refuse(
            path,
            "the checkpoint holds tensors of no known tuner",
            found=some(left),
            do="load the backbone that it was trained on, if this is another"
            if NOTE in found.notes
            else None,  # its trunk is the backbone's
        )
