"""A report's file: JSON that names its format and version, written whole and held to both when it is read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..merge.errors import IncompatibleArtefact, UsageError
from ..merge.files import atomic_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import TypeVar

    T = TypeVar("T")


def write_record(value: Any, path: Path) -> None:
    """Write a JSON value, whole or not at all; a number that is not finite is refused."""
    with atomic_file(path) as temporary:
        text = json.dumps(value, indent=1, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """A value of mappings and sequences with lists where it has tuples, as JSON gives it back."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def read_value(path: Path) -> Any:
    """The JSON value of a file, or of a folder that holds `report.json`.

    Raises:
        UsageError: There is no such file.
        IncompatibleArtefact: It is not JSON.
    """
    file = file_of(path)
    if not file.is_file():
        raise UsageError(
            "there is no such report",
            where=file,
            do="name a report.json, or a folder that holds one",
        )
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise IncompatibleArtefact("the report is not JSON", where=file, found=error) from error


def file_of(path: Path) -> Path:
    """The file that is meant by a path."""
    return path / "report.json" if path.is_dir() else path


def format_of(value: Any) -> str:
    """The format that a JSON value names; the kind of value where it names none."""
    return str(value.get("format")) if isinstance(value, dict) else type(value).__name__


def read_record(
    path: Path,
    from_value: Callable[[dict[str, Any]], T],
    *,
    what: str,
    verb: str,
    formats: Sequence[str],
    versions: Sequence[int],
) -> T:
    """What a file, or a folder that holds `report.json`, says.

    Args:
        path: The file or folder.
        from_value: Makes the record of a JSON value that keeps to the schema.
        what: What the report is of, for messages.
        verb: That wrote it; its document is `docs/VERB.md`.
        formats: That are read.
        versions: That are read, the first to the last.

    Raises:
        UsageError: There is no such file.
        IncompatibleArtefact: It is no such report, of an unknown version, or damaged.
    """
    file, value = file_of(path), read_value(path)
    found = format_of(value)
    if found not in formats:
        raise IncompatibleArtefact(
            f"the file is no report of {what}",
            where=file,
            wanted=f"format {' or '.join(formats)}",
            found=found,
        )
    if value.get("version") not in versions:
        first, last = versions[0], versions[-1]
        raise IncompatibleArtefact(
            "the report is of a version that is not known here",
            where=file,
            wanted=last if first == last else f"{first} to {last}",
            found=value.get("version"),
            do="read it with the utune-deploy that wrote it, or a newer one",
        )
    try:
        return from_value(value)
    except (AttributeError, KeyError, TypeError, ValueError, UsageError) as error:
        raise IncompatibleArtefact(
            "the report does not keep to its schema",
            where=file,
            wanted=f"a file as `{verb}` wrote it; see docs/{verb}.md",
            found=f"{type(error).__name__}: {error}",
        ) from error
