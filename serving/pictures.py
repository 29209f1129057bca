"""Pictures and videos from files, folders, bytes or Pillow, as the rows that a task reads."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..merge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from ..merge.preprocessing import Frames, Preprocessing

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # pictures, and frames of a video

Picture: TypeAlias = "str | os.PathLike[str] | bytes | Image | Frames"
"""A file or a folder of frames; the bytes of a file; a Pillow picture; the frames of a video."""


def read_rows(source: Picture, preprocessing: Preprocessing | None) -> NDArray[np.float32]:
    """What a task wants of a picture or video, as rows of an engine's input.

    Args:
        source: A picture; for a task of videos an animated one, or frames: a folder in which they follow
            one another by name, numbers in the names by value, or a list of pictures.
        preprocessing: The task's.

    Returns:
        `[1, C, H, W]` of a picture, `[views, C, T, H, W]` of a video.

    Raises:
        UsageError: There is no such file, it cannot be read, it is of the other kind, or it is too short;
            or the task reads no pictures.
    """
    where = _place(source)
    if preprocessing is None:
        raise UsageError(
            "the task reads no pictures", where=where, do="give its inputs by name: --tensor FILE"
        )
    from PIL import UnidentifiedImageError

    try:
        with _opened(source) as opened:
            rows = preprocessing.apply(opened)
    except FileNotFoundError as cause:
        raise UsageError("there is no such picture", where=where) from cause
    except (UnidentifiedImageError, OSError) as cause:
        raise UsageError(
            "the file is no picture that can be read", where=where, found=str(cause)
        ) from cause
    except UsageError as cause:
        raise UsageError(cause.what, **{"where": where, **cause.details}) from cause  # type: ignore[arg-type]
    return rows[None] if preprocessing.clip is None else rows


class FolderOfFrames:
    """The frames of a video, one file each, opened when asked for.

    Args:
        folder: What holds them.

    Raises:
        UsageError: It holds none.
    """

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(files(folder, SUFFIXES), key=_by_number)
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


def files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of a folder whose names end so, in no order."""
    return [p for p in folder.iterdir() if p.suffix.lower() in suffixes and p.is_file()]


@contextmanager
def _opened(source: Picture) -> Iterator[Image | Frames]:
    from PIL.Image import open as open_picture

    if isinstance(source, bytes):
        with open_picture(BytesIO(source)) as image:
            yield image
    elif not isinstance(source, (str, os.PathLike)):
        yield source
    elif Path(source).is_dir():
        yield FolderOfFrames(Path(source))
    else:
        with open_picture(source) as image:
            yield image


def _place(source: Picture) -> object:
    if isinstance(source, (str, os.PathLike)):
        return Path(source)
    if isinstance(source, bytes):
        return f"a picture of {len(source)} bytes"
    return getattr(source, "filename", None) or None


def _by_number(path: Path) -> list[tuple[bool, int, str]]:
    """The name with its numbers by value: `frame_2` before `frame_10`."""
    parts = re.split(r"(\d+)", path.name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]
