"""A bank that nobody holds: its slots, and one task's row at a time.

What is built for many tasks needs the bank's shapes, and its values only where they are written or compared,
task by task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .bank import Bank, fill_row

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from .bank import Slot
    from .delta import Delta


@dataclass(frozen=True)
class Rows:
    """The rows of a bank, made when they are asked for, float32.

    Attributes:
        slots: Of the bank.
        deltas: The lowered tasks in row order.
    """

    slots: tuple[Slot, ...]
    deltas: Sequence[Delta]

    def __len__(self) -> int:
        return len(self.deltas)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (fill_row(self.slots, delta, torch.float32) for delta in self.deltas)

    def some(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Some rows as a bank of their own, `[n, ...]` by name."""
        rows = [fill_row(self.slots, self.deltas[number], torch.float32) for number in numbers]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def shaped(self, count: int | None = None) -> Bank:
        """The bank with zeros for values; one row of memory, however many there are.

        Args:
            count: Rows; one for each task if None.
        """
        count = len(self) if count is None else count
        zeros = {
            f"{slot.name}/{tensor}": torch.zeros(slot.shape(tensor)).expand(
                count, *slot.shape(tensor)
            )
            for slot in self.slots
            for tensor in slot.branch.tuner.served
        }
        return Bank(tuple(delta.task for delta in self.deltas), self.slots, zeros)
