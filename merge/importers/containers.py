"""What a training script put its state into: a file of one of two kinds, and an entry in it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .settings import Settings

ARGUMENTS = ("args", "opt")
AVERAGES = ("state_dict_ema", "model_ema", "ema")  # moving averages of the weights
CHOICE = "weights"


def arguments_of(saved: Any, names: Sequence[str] = ARGUMENTS) -> dict[str, Any]:
    """What a run was called with, where the file says it: the first of these entries, as argparse or a dictionary has it."""
    entries = saved if isinstance(saved, dict) else {}
    given = next((entries[name] for name in names if entries.get(name) is not None), {})
    given = vars(given) if isinstance(given, argparse.Namespace) else given
    return {str(name): value for name, value in given.items()} if isinstance(given, dict) else {}


def contained(path: Path, saved: Any, containers: Sequence[str], settings: Settings) -> Any:
    """The state in what a script saved: an entry that is a dictionary, or the file's object itself.

    Args:
        path: The file.
        saved: What is in it.
        containers: Entries that the state may be under, the first before the others.
        settings: `weights` chooses between them and averages of them (`AVERAGES`).

    Raises:
        UsageError: There are averages beside the state and neither is chosen, or the chosen one is not there.
    """
    entries = saved if isinstance(saved, dict) else {}
    parts = [n for n in (*containers, *AVERAGES) if isinstance(entries.get(n), dict)]
    averages = [name for name in parts if name in AVERAGES]
    chosen = settings.get(CHOICE, str) if parts else None
    if chosen is None and averages and len(parts) > 1:
        raise UsageError(
            "the file holds several states, such as a moving average beside the last step",
            where=path,
            found=", ".join(parts),
            do=f"choose one: --set {CHOICE}={f' or --set {CHOICE}='.join(parts)}",
        )
    if chosen is not None and chosen not in parts:
        raise UsageError(
            "the file holds no such weights", where=path, wanted=", ".join(parts), found=chosen
        )
    name = chosen or next(iter(parts), None)
    return saved if name is None else entries[name]
