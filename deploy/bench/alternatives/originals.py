"""What a bundle was exported from: its frozen backbone and the deltas of its tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....merge.backbone import load
from ....merge.delta import load_delta, require_backbone
from ....merge.files import digest
from ....merge.sites import measure
from ...held import require_same_backbone, require_tasks

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ....export.bundle import Bundle
    from ....merge.backbone import Backbone
    from ....merge.delta import Delta
    from ....merge.sites import Sites


@dataclass(frozen=True)
class Originals:
    """The backbone and the tasks of a bundle.

    Attributes:
        backbone: With the weights that the bundle was exported from.
        deltas: In row order.
        sites: Of the backbone.
    """

    backbone: Backbone
    deltas: tuple[Delta, ...]
    sites: Sites


def read_originals(bundle: Bundle, weights: Path | None, deltas: Iterable[Path]) -> Originals:
    """Read the backbone and pick the bundle's deltas out of files that may hold others too.

    Args:
        bundle: Whose tasks are wanted.
        weights: The backbone's weights; see `merge.backbone.load`.
        deltas: Files, those of the bundle among them.

    Raises:
        IncompatibleArtefact: The backbone is another one, or a task's delta is not among the files.
    """
    wanted = {task.delta for task in bundle.tasks}
    by_digest = {digest(path): path for path in deltas}
    tasks = require_tasks(
        bundle, {key: load_delta(path) for key, path in by_digest.items() if key in wanted}
    )
    identity = bundle.backbone
    backbone = load(identity["architecture"], identity["arguments"], weights)
    require_same_backbone(bundle, backbone)
    sites = measure(backbone)
    for delta in tasks:
        require_backbone(delta, backbone, sites)
    return Originals(backbone, tuple(tasks), sites)
