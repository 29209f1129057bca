"""Files and folders that are there whole or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def require_file(path: Path, wanted: str = "a file") -> None:
    """Stop where there is no file to read.

    Raises:
        UsageError: Nothing is there, or a folder.
    """
    if path.is_dir():
        raise UsageError("this is a folder", where=path, wanted=wanted)
    if not path.is_file():
        raise UsageError("there is no such file", where=path, wanted=wanted)


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex.

    Raises:
        UsageError: There is no such file.
    """
    require_file(path)
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


OURS = (  # marks of the folders that we write
    "manifest.json",
    "backbone.json",
    "recipe.json",
    "config.pbtxt",
    "*/config.pbtxt",
    "adapter_config.json",
)


def refuse_existing(path: Path, *, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Stop before work begins when the output is already there; an empty folder is no output.

    Args:
        path: The output.
        force: Replace it, unless it is an input or a folder that is not ours.
        inputs: What the command reads.

    Raises:
        UsageError: `path` exists and may not be replaced.
    """
    own = path.resolve()
    if any(own == given.resolve() or own in given.resolve().parents for given in inputs):
        raise UsageError("the output is one of the inputs", where=path, do="name another one")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not force:
        raise UsageError(
            "the output already exists", where=path, do="name another one, or pass --force"
        )
    if path.is_dir() and not any(any(path.glob(marker)) for marker in OURS):
        raise UsageError(
            "the folder holds other things than a bundle, a backbone, a recipe or a model repository",
            where=path,
            do="name another output: --force replaces only what utune-deploy wrote",
        )


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` when the block ends well, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` when the block ends well, and vanishes otherwise.

    What stood at `path` is moved aside first and removed last, so that no moment has half of each.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        for inside in temporary.rglob("*"):
            inside.chmod((0o777 if inside.is_dir() else 0o666 | inside.stat().st_mode) & ~_umask())
        if path.exists():
            aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            path.replace(aside / path.name)
            temporary.replace(path)
            shutil.rmtree(aside)
        else:
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
