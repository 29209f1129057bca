"""Class names in files: one per line, or in the `config.json` that Hugging Face keeps beside weights."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .files import require_file

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = "config.json"
UNNAMED = re.compile(r"LABEL_\d+")  # what transformers calls classes that nobody named


def read_class_names(path: Path) -> tuple[str, ...]:
    """The class names of a file, in the order of the logits.

    Args:
        path: A text with one name per line, or JSON that has them under `id2label` (transformers) or `label_names`
            (timm).

    Raises:
        UsageError: There is no such file, or JSON without names.
    """
    require_file(path, "names of classes, one per line, or config.json")
    if path.suffix != ".json":
        return tuple(line for line in path.read_text().splitlines() if line.strip())
    names = _of_config(path)
    if names is None:
        raise UsageError(
            "the file names no classes",
            where=path,
            wanted="id2label with a name for every number from 0, or a list label_names",
            do="give a text with one name per line",
        )
    return names


def class_names_beside(path: Path, classes: int) -> Path | None:
    """The configuration in a folder, or beside a file, that names as many classes, all differently."""
    config = (path if path.is_dir() else path.parent) / CONFIG
    names = _of_config(config) or ()
    return config if len(names) == len(set(names)) == classes else None


def _of_config(path: Path) -> tuple[str, ...] | None:
    """The names in a configuration; None where there are none, or it cannot be read."""
    try:
        config: dict[str, Any] = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    found: object = config.get("label_names")
    if isinstance(by_number := config.get("id2label"), dict):
        found = [by_number.get(str(number)) for number in range(len(by_number))]
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        return None
    names = tuple(map(str, found))
    return None if all(UNNAMED.fullmatch(name) for name in names) else names
