"""What shall stand beside a bundle: kinds by name, and the files that they are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...merge.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

KINDS = ("unfused", "in-turn", "torch", "torch-compiled", "peft", "peft-compiled")
"""Kinds by name; `alternatives` holds what each is and how it is made."""


@dataclass(frozen=True)
class Beside:
    """Other ways to answer the tasks of a bundle.

    Attributes:
        kinds: Of `KINDS`, each once.
        weights: The frozen backbone that the bundle was exported from; None for an architecture without any.
        deltas: Files, those of the bundle's tasks among them.

    Raises:
        UsageError: A kind is not known, or named twice, or no delta is named.
    """

    kinds: tuple[str, ...]
    weights: Path | None
    deltas: tuple[Path, ...]

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise UsageError(
                    "nothing of this kind can stand beside a bundle",
                    wanted=f"one of {', '.join(KINDS)}",
                    found=kind,
                )
        if len(set(self.kinds)) < len(self.kinds):
            raise UsageError("a kind is named twice", found=", ".join(self.kinds))
        if not self.deltas:
            raise UsageError(
                "what stands beside a bundle is made from the deltas of its tasks",
                wanted="--delta FILE for each task",
                found=", ".join(self.kinds),
            )
