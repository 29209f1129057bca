"""SHELF: readers of checkpoints that other projects write. Each finds its tuners by their keys.

A reader turns a file into branches on a given backbone. What it cannot carry it refuses by name;
frozen tensors that differ from the backbone's abort with their names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError
from .modelscope import read_modelscope
from .peft import read_peft

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ..backbone import Backbone
    from .foreign import Foreign

IMPORTERS: dict[str, Callable[[Path, Backbone], Foreign]] = {
    "modelscope": read_modelscope,
    "peft": read_peft,
}


def read(source: str, path: Path, backbone: Backbone) -> Foreign:
    """The branches of a foreign checkpoint.

    Args:
        source: A key of `IMPORTERS`.
        path: The checkpoint.
        backbone: The frozen backbone that it was trained on.

    Raises:
        UsageError: No such source, or no such file.
        IncompatibleArtefact: The file is unsafe, malformed, of another backbone, or holds a tuner
            that cannot be carried.
    """
    if source not in IMPORTERS:
        raise UsageError("unknown source", wanted=f"one of {sorted(IMPORTERS)}", found=source)
    return IMPORTERS[source](path, backbone)
