"""A delta's tensors left in their file: read when they are asked for, and given back with the last of them.

A thousand tasks' tensors together are many times the backbone; one task's are a few megabytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from .errors import IncompatibleArtefact

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor


class _Last:
    """The file that was read last, mapped: a task's branches are asked for one after the other.

    Its state comes first, so that another thread's file is never taken for one's own.
    """

    opened: tuple[tuple[Path, tuple[int, int, int]], Any] | None = None


class StoredTensors(Mapping[str, Mapping[str, "Tensor"]]):
    """Each branch's tensors by name, mapped from the file when a branch is asked for.

    Args:
        path: A delta's file.
        names: Each branch's tensors.
    """

    def __init__(self, path: Path, names: Mapping[str, tuple[str, ...]]) -> None:
        self._path, self._names = path, dict(names)
        self._seen = _state(path)

    def __getitem__(self, branch: str) -> dict[str, Tensor]:
        """A branch's tensors.

        Raises:
            KeyError: There is no such branch.
            IncompatibleArtefact: The file is not the one that was there.
        """
        names = self._names[branch]
        try:
            if _state(self._path) != self._seen:
                raise OSError("another size, time or inode")
            which, last = (self._path, self._seen), _Last.opened
            if last is None or last[0] != which:
                last = _Last.opened = which, safe_open(self._path, framework="pt")
            return {name: last[1].get_tensor(f"{branch}/{name}") for name in names}
        except (SafetensorError, OSError) as cause:
            raise IncompatibleArtefact(
                "the file changed while its tensors were in use",
                where=self._path,
                found=str(cause),
                do="run the command again, and leave its inputs alone meanwhile",
            ) from cause

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _state(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
