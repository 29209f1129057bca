"""One server per folder of kept tasks: two would each remove the files that only the other's table names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from ...merge.errors import UsageError
from .store import not_kept

if TYPE_CHECKING:
    from pathlib import Path

LOCK = ".lock"


def claim(folder: Path) -> FileLock:
    """Take a folder until the lock is released, or its holder ends in whatever way.

    Args:
        folder: Is made where it is not there yet.

    Raises:
        UsageError: Another server has it, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(blocking=False)
    except Timeout as cause:
        raise UsageError(
            "another server keeps its tasks there",
            where=folder,
            do="name a folder for each server: --tasks FOLDER",
        ) from cause
    except OSError as cause:
        raise not_kept(folder, cause) from cause
    return lock
