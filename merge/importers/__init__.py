"""SHELF: readers of checkpoints that other projects write. Each finds its tuners by their keys.

A reader turns a file into branches on a given backbone. What it cannot carry it refuses by name;
frozen tensors that differ from the backbone's abort with their names; what the file does not say is asked
for by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..backbone.transformers.config import EPS
from ..delta import require_finite
from ..errors import UsageError
from ..tuner import bind
from .modelscope import read_modelscope
from .peft import read_peft
from .settings import Settings
from .swift import read_swift
from .timm import read_timm
from .unipt import read_unipt
from .vpetl import read_vpetl

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from ..backbone import Backbone
    from .foreign import Foreign

IMPORTERS: dict[str, Callable[[Path, Backbone, Settings], Foreign]] = {
    "modelscope": read_modelscope,
    "vpetl": read_vpetl,
    "peft": read_peft,
    "swift": read_swift,
    "timm": read_timm,
    "unipt": read_unipt,
}

OF_PICTURES = ("modelscope", "vpetl", "swift")  # their preprocessing is part of what is read


def read(
    source: str, path: Path, backbone: Backbone, settings: Mapping[str, str] | None = None
) -> Foreign:
    """The branches of a foreign checkpoint.

    Args:
        source: A key of `IMPORTERS`.
        path: The checkpoint.
        backbone: The frozen backbone that it was trained on.
        settings: What the file does not say, by name.

    Raises:
        UsageError: No such source or file; a setting that is missing, unreadable or unknown.
        IncompatibleArtefact: The file is unsafe, malformed, of another backbone, or holds a tuner
            that cannot be carried, or NaN or Inf in one.
    """
    if source not in IMPORTERS:
        raise UsageError("unknown source", wanted=f"one of {sorted(IMPORTERS)}", found=source)
    if source in OF_PICTURES and not backbone.pictures:
        raise UsageError(
            f"a checkpoint of {source} belongs to a backbone that reads pictures",
            where=path,
            found=f"{backbone.identity.architecture}, which reads "
            + ", ".join(entry.name for entry in backbone.inputs),
            do="load the backbone that it was trained on",
        )
    given = Settings(settings)
    foreign = IMPORTERS[source](path, backbone, given)
    given.require_used()
    if (eps := backbone.identity.arguments.get(EPS)) is not None:
        foreign.notes[EPS] = f"{eps}, as the backbone has it"
    for name, branch in foreign.branches.items():
        bind(branch.tuner.shapes, foreign.tensors[name], where=f"{path}: {name}")
        for key, tensor in foreign.tensors[name].items():
            require_finite(tensor, where=f"{path}: {name}/{key}")
    return foreign
