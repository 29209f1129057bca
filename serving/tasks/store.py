"""Where a server keeps the tasks that it was given while running: packed files beside one table.

    <folder>/tasks.json          format, version, the bundle's identity, and for every task that differs from the
                                 bundle's own: its versions with their files, the one in use, whether it is pinned
    <folder>/<digest>.task       a packed task, named by the SHA-256 of its bytes

A task that the bundle shipped and that was removed stands in the table without versions. Both kinds of file are
written whole or not at all, files before the table that names them: a server that is killed
at any moment finds a table whose files are there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...export.mapped import map_file
from ...merge.errors import IncompatibleArtefact, UsageError, UtuneError
from ...merge.files import atomic_file

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray

FORMAT = "utune-tasks"
VERSION = 1
TABLE = "tasks.json"


@dataclass(frozen=True)
class Kept:
    """What the table says of one task.

    Attributes:
        files: The packed file of each version by its number; of the one that the bundle shipped there is none.
        current: The version in use; 0 where the task was removed.
        pinned: Whether it stays in the engine's memory.
        counted: The highest number that a version ever had.
        shipped: Whether the version that the bundle shipped, its first, is kept too.
    """

    files: Mapping[int, str]
    current: int
    pinned: bool = False
    counted: int = 1
    shipped: bool = False


def not_kept(folder: Path, cause: OSError) -> UsageError:
    """What somebody is told whose folder cannot be written to."""
    return UsageError(
        "tasks cannot be kept there",
        where=folder,
        found=cause.strerror or str(cause),
        do="name a folder that the server may write to: --tasks FOLDER",
    )


class Store:
    """One folder of kept tasks.

    Attributes:
        lasting: Whether it outlives the server; a temporary one does not.
    """

    def __init__(self, folder: Path | None, identity: str) -> None:
        """Open or make it.

        Args:
            folder: None makes a temporary one.
            identity: Of the bundle whose tasks it keeps.

        Raises:
            UsageError: The folder cannot be written to.
            IncompatibleArtefact: It keeps tasks of another bundle, or its table is malformed.
        """
        self.lasting = folder is not None
        self._folder = folder
        self._identity = identity
        self._remove = None
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
                for pattern in (f".{TABLE}.*", ".*.task.*"):  # of a server that was killed
                    for path in folder.glob(pattern):
                        path.unlink()
            except OSError as cause:
                raise not_kept(folder, cause) from cause

    @property
    def folder(self) -> Path:
        """Where tasks are kept; a temporary one is made when it is first needed."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="utune-tasks-"))
            self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    def read(self) -> dict[str, Kept]:
        """The table; empty where there is none yet.

        Raises:
            IncompatibleArtefact: It belongs to another bundle, is of another version, or malformed.
        """
        if self._folder is None or not (self._folder / TABLE).is_file():
            return {}
        path = self._folder / TABLE
        try:
            table = json.loads(path.read_text())
            kind, version, identity = table["format"], table["version"], table["identity"]
            kept = {
                name: Kept(
                    files={int(n): str(file) for n, file in entry["files"].items()},
                    current=int(entry["current"]),
                    pinned=bool(entry["pinned"]),
                    counted=int(entry["counted"]),
                    shipped=bool(entry["shipped"]),
                )
                for name, entry in table["tasks"].items()
            }
        except (
            OSError,
            ArithmeticError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as cause:
            raise IncompatibleArtefact("the table of tasks is malformed", where=path) from cause
        if (kind, version) != (FORMAT, VERSION) or identity != self._identity:
            raise IncompatibleArtefact(
                "the folder keeps tasks of another bundle, or of another version of this format",
                where=path,
                wanted=f"{FORMAT} version {VERSION} of bundle {self._identity[:16]}",
                found=f"{kind} version {version} of bundle {str(identity)[:16]}",
                do="name another folder, or remove this one if its tasks are no longer wanted",
            )
        return kept

    def write(self, kept: Mapping[str, Kept], in_use: Collection[str] = ()) -> None:
        """Replace the table, then remove the files that it does not name.

        Args:
            kept: What the table says from now on.
            in_use: Files that stay without being named: requests under way may ask for them.

        Raises:
            UtuneError: It cannot be written; the one before it stays.
        """
        table = {
            "format": FORMAT,
            "version": VERSION,
            "identity": self._identity,
            "tasks": {
                name: {
                    "files": {str(number): file for number, file in entry.files.items()},
                    "current": entry.current,
                    "pinned": entry.pinned,
                    "counted": entry.counted,
                    "shipped": entry.shipped,
                }
                for name, entry in kept.items()
            },
        }
        self._put(self.folder / TABLE, (json.dumps(table, indent=2) + "\n").encode())
        named = {file for entry in kept.values() for file in entry.files.values()}.union(in_use)
        for path in self.folder.glob("*.task"):
            if path.name not in named:
                with contextlib.suppress(OSError):  # on Windows a mapped file cannot be removed yet
                    path.unlink(missing_ok=True)

    def put(self, data: bytes) -> str:
        """Keep a packed task; the name of its file. One that is there stays as it is: it may be mapped.

        Raises:
            UtuneError: It cannot be written.
        """
        name = f"{hashlib.sha256(data).hexdigest()}.task"
        path = self.folder / name
        if not path.is_file():
            self._put(path, data)
        return name

    @staticmethod
    def _put(path: Path, data: bytes) -> None:
        try:
            with atomic_file(path) as temporary:
                temporary.write_bytes(data)
        except OSError as cause:
            raise UtuneError(
                "a task cannot be kept", where=path, found=cause.strerror or str(cause)
            ) from cause

    def map(self, file: str) -> dict[str, NDArray]:
        """The tensors of a kept file.

        Raises:
            IncompatibleArtefact: It is missing or damaged.
        """
        return map_file(self.folder / file)[1]

    def remove(self, file: str) -> None:
        """Forget a kept file that no table names."""
        with contextlib.suppress(OSError):  # as in `write`
            (self.folder / file).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder if it is temporary."""
        if self._remove is not None:
            self._remove()
