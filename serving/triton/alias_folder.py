"""The folder of an alias, NAME.TASK, in a Triton repository of the layout `hot`.

    NAME.TASK/config.pbtxt   an ensemble of NAME.task_names and NAME
    NAME.TASK/labels.txt     the task's class names, where it has any
    NAME.TASK/alias.json     {"of": NAME, "task": TASK, "slot": number}
    NAME.TASK/N/             empty; N is the task's version

NAME.task_names has a fixed number of outputs, the slots: the alias maps the one of its own to NAME's input `task`.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from ...merge.files import atomic_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

CONFIG, LABELS, ABOUT = "config.pbtxt", "labels.txt", "alias.json"
TEMPLATE = "alias.pbtxt"
"""Beside `model.py`: the configuration of an alias, with `TASK_HERE` and `SLOT_HERE` in it."""

LAST = "alias.last"
"""Beside `model.py`: the slot that was given out last when the repository was written."""

TASK_HERE, SLOT_HERE = "@task@", "@slot@"
SLOTS = 1024
MARK = "\0"
"""Before the number of a slot, where a task's name is expected: no task is called so."""

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""What can be a model's folder."""

FIRST_STEP = ".task_names"
"""Behind a bundle's name: the first step of its aliases."""


def read_slots(repository: Path, name: str) -> dict[int, str]:
    """Which slot each alias in a repository has.

    Args:
        repository: The folder of all models.
        name: The bundle's model.
    """
    slots = {}
    for folder in repository.glob(f"{name}.*"):
        if (about := read_about(folder)) is not None and about["of"] == name:
            slots[about["slot"]] = about["task"]
    return slots


def free_slot(slots: Mapping[int, str], count: int, last: int) -> int | None:
    """The next slot after the one given out last that nobody has; None where all are taken."""
    turn = ((last + step) % count for step in range(1, count + 1))
    return next((slot for slot in turn if slot not in slots), None)


def read_last(version: Path) -> int:
    """The slot that was given out last when a version of NAME was written; -1 where it does not say."""
    try:
        return int((version / LAST).read_text())
    except (OSError, ValueError):
        return -1


def about_json(name: str, task: str, slot: int) -> str:
    """The content of `alias.json`."""
    return json.dumps({"of": name, "task": task, "slot": slot}) + "\n"


def labels_text(labels: Iterable[str]) -> str:
    """The content of `labels.txt`."""
    return "".join(f"{label}\n" for label in labels)


def is_alias(folder: Path) -> bool:
    """Whether a model is an alias that we wrote."""
    return read_about(folder) is not None


def renew(folder: Path, files: Mapping[str, str], number: int) -> bool:
    """Bring an alias that is there to what these files say, and to one version; whether anything changed."""
    changed = False
    for name, text in files.items():
        target = folder / name
        if not target.is_file() or target.read_text() != text:
            changed = True
            with atomic_file(target) as temporary:
                temporary.write_text(text)
    there = [path for path in folder.iterdir() if path.name.isdecimal()]
    others = [path for path in there if path.name != str(number)]
    if len(others) == len(there):
        if others:
            others.pop().rename(folder / str(number))
        else:
            (folder / str(number)).mkdir()
        changed = True
    for path in others:
        path.rmdir()
        changed = True
    return changed


def read_about(folder: Path) -> dict[str, Any] | None:
    """The content of an alias's `alias.json`; None where it is none of ours."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        if isinstance(about["slot"], int) and isinstance(about["task"], str) and about["of"]:
            return about
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
