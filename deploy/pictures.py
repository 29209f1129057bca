"""Real pictures from a folder, preprocessed for each task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..merge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ..merge.preprocessing import Preprocessing

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ENOUGH = 64  # pictures per task


def read_picture(path: Path, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """One picture as `[3, H, W]`.

    Raises:
        UsageError: The file is not there or is no picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return preprocessing.apply(image)
    except FileNotFoundError as cause:
        raise UsageError("there is no such picture", where=path) from cause
    except (UnidentifiedImageError, OSError) as cause:
        raise UsageError(
            "the file is no picture that can be read", where=path, found=str(cause)
        ) from cause


def read_folder(
    folder: Path, tasks: Iterable[tuple[str, Preprocessing]]
) -> dict[str, NDArray[np.float32]]:
    """Pictures `[n, 3, H, W]` by task, from `folder/TASK` where there is one, else from `folder`.

    Raises:
        UsageError: No folder, or no pictures for a task.
    """
    if not folder.is_dir():
        raise UsageError("there is no such folder of pictures", where=folder)
    found = {}
    for task, preprocessing in tasks:
        place = folder / task if (folder / task).is_dir() else folder
        paths = _pictures(place)
        if not paths:
            raise UsageError(
                f"there are no pictures for task {task}",
                where=place,
                wanted=f"files ending in {', '.join(SUFFIXES)}",
            )
        found[task] = np.stack([read_picture(path, preprocessing) for path in paths])
    return found


def _pictures(folder: Path) -> Sequence[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)[:ENOUGH]
