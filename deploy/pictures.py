"""Folders of real pictures and videos, preprocessed for each task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..merge.errors import UsageError
from ..serving.pictures import SUFFIXES, files, read_rows

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    from ..merge.preprocessing import Preprocessing

ANIMATED = (".gif", ".webp", ".tif", ".tiff")  # videos in one file
ENOUGH = 64  # rows per task


def read_folder(
    folder: Path,
    tasks: Iterable[tuple[str, Preprocessing | None]],
    *,
    enough: int = ENOUGH,
    spread: bool = False,
) -> dict[str, NDArray[np.float32]]:
    """Rows `[n, C, H, W]` or `[n, C, T, H, W]` by task, from `folder/TASK` where there is one, else `folder`.

    Args:
        folder: What holds the pictures.
        tasks: Names and preprocessing.
        enough: Rows per task, or the first number past it that whole files give.
        spread: Take files from all over the sorted folder, where it holds more; else the first.

    Raises:
        UsageError: No folder, or nothing in it for a task.
    """
    if not folder.is_dir():
        raise UsageError("there is no such folder of pictures", where=folder)
    found = {}
    for task, preprocessing in tasks:
        place = folder / task if (folder / task).is_dir() else folder
        if preprocessing is None or preprocessing.clip is None:
            paths, wanted = (
                sorted(files(place, SUFFIXES)),
                f"files ending in {', '.join(SUFFIXES)}",
            )
        else:
            folders = [path for path in place.iterdir() if path.is_dir()]
            paths = sorted([*files(place, ANIMATED), *folders])
            wanted = f"files ending in {', '.join(ANIMATED)}, or folders of frames"
        if not paths:
            raise UsageError(f"there are no pictures for task {task}", where=place, wanted=wanted)
        if spread and len(paths) > enough:
            paths = [paths[at] for at in np.linspace(0, len(paths) - 1, enough).round().astype(int)]
        rows: list[NDArray[np.float32]] = []
        for path in paths:
            rows.extend(read_rows(path, preprocessing))
            if len(rows) >= enough:
                break
        found[task] = np.stack(rows)
    return found
