"""Real pictures and videos from files and folders, preprocessed for each task."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from ..merge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL.Image import Image

    from ..merge.preprocessing import Preprocessing

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # pictures, and frames of a video
ANIMATED = (".gif", ".webp", ".tif", ".tiff")  # videos in one file
ENOUGH = 64  # rows per task


def read_rows(path: Path, preprocessing: Preprocessing | None) -> NDArray[np.float32]:
    """What a task wants of a file or folder, as rows of an engine's input.

    Args:
        path: A picture; for a task of videos an animated file, or a folder of frames that follow one
            another by name, numbers in the names by value.
        preprocessing: The task's.

    Returns:
        `[1, C, H, W]` of a picture, `[views, C, T, H, W]` of a video.

    Raises:
        UsageError: There is no such file, it cannot be read, it is of the other kind, or it is too short;
            or the task reads no pictures.
    """
    if preprocessing is None:
        raise UsageError(
            "the task reads no pictures", where=path, do="give its inputs by name: --tensor FILE"
        )
    from PIL import Image, UnidentifiedImageError

    try:
        if path.is_dir():
            rows = preprocessing.apply(FolderOfFrames(path))
        else:
            with Image.open(path) as image:
                rows = preprocessing.apply(image)
    except FileNotFoundError as cause:
        raise UsageError("there is no such picture", where=path) from cause
    except (UnidentifiedImageError, OSError) as cause:
        raise UsageError(
            "the file is no picture that can be read", where=path, found=str(cause)
        ) from cause
    except UsageError as cause:
        raise UsageError(cause.what, **{"where": path, **cause.details}) from cause  # type: ignore[arg-type]
    return rows[None] if preprocessing.clip is None else rows


class FolderOfFrames:
    """The frames of a video, one file each, opened when asked for.

    Args:
        folder: What holds them.

    Raises:
        UsageError: It holds none.
    """

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(_files(folder, SUFFIXES), key=_by_number)
        if not self.paths:
            raise UsageError(
                "the folder holds no frames of a video",
                wanted=f"files ending in {', '.join(SUFFIXES)}",
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Image:
        from PIL.Image import open as open_picture

        with open_picture(self.paths[number]) as frame:
            return frame.copy()


def read_folder(
    folder: Path, tasks: Iterable[tuple[str, Preprocessing | None]]
) -> dict[str, NDArray[np.float32]]:
    """Rows `[n, C, H, W]` or `[n, C, T, H, W]` by task, from `folder/TASK` where there is one, else `folder`.

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
                sorted(_files(place, SUFFIXES)),
                f"files ending in {', '.join(SUFFIXES)}",
            )
        else:
            folders = [path for path in place.iterdir() if path.is_dir()]
            paths = sorted([*_files(place, ANIMATED), *folders])
            wanted = f"files ending in {', '.join(ANIMATED)}, or folders of frames"
        if not paths:
            raise UsageError(f"there are no pictures for task {task}", where=place, wanted=wanted)
        rows: list[NDArray[np.float32]] = []
        for path in paths:
            rows.extend(read_rows(path, preprocessing))
            if len(rows) >= ENOUGH:
                break
        found[task] = np.stack(rows)
    return found


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return [p for p in folder.iterdir() if p.suffix.lower() in suffixes and p.is_file()]


def _by_number(path: Path) -> list[tuple[bool, int, str]]:
    """The name with its numbers by value: `frame_2` before `frame_10`."""
    parts = re.split(r"(\d+)", path.name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]
