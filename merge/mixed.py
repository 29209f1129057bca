"""One backbone, T tasks, each row of a batch its own: (inputs, task) to logits.

The gather form of `y = OP(x) + U_task(x)`: every branch's weights are taken from the bank by row, so
the cost does not grow with the number of tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .parallel import joined

if TYPE_CHECKING:
    from .backbone import Backbone
    from .bank import Bank


class Mixed(nn.Module):
    """A frozen backbone with the tasks of a bank.

    Args:
        backbone: The frozen backbone, shared.
        bank: Stacked tensors.
    """

    def __init__(self, backbone: Backbone, bank: Bank) -> None:
        super().__init__()
        self.trunk = backbone.model
        self.reads = len(backbone.inputs)
        self.bank = bank
        self.names = list(bank.tensors)
        for number, tensor in enumerate(bank.tensors.values()):
            self.register_buffer(f"bank_{number}", tensor)

    def forward(self, *args: Tensor) -> Tensor:
        """Logits `[B, K]`, K the largest class count, or what else the heads answer.

        Args:
            args: The backbone's inputs, such as images `[B, C, H, W]`; `task [B]`, int64 rows of the bank,
                where a row outside the bank yields NaN; and perhaps tensors in the order of `names` instead
                of the module's own.
        """
        inputs, task, bank = args[: self.reads], args[self.reads], args[self.reads + 1 :]
        tensors = bank or tuple(self.get_buffer(f"bank_{i}") for i in range(len(self.names)))
        count = tensors[0].shape[0]
        known = (task >= 0) & (task < count)
        safe = torch.where(known, task, torch.zeros_like(task))
        rows = {n: t.index_select(0, safe) for n, t in zip(self.names, tensors, strict=True)}
        with joined(self.trunk, self.bank.weighted(rows), rows=inputs[0].shape[0]):
            logits = self.trunk(*inputs)
        known = known.reshape(-1, *[1] * (logits.dim() - 1))
        return torch.where(known, logits, torch.full_like(logits, torch.nan))


class Alone(Mixed):
    """The only task of a bank, for every row: what `Single` computes, its weights taken from the bank.

    A kernel that reads the bank where it lies serves one task as it serves many.
    """

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits `[B, K]` of the backbone's inputs, such as images `[B, C, H, W]`."""
        task = inputs[0].new_zeros(inputs[0].shape[0], dtype=torch.int64)
        return super().forward(*inputs, task)


class Single(nn.Module):
    """A frozen backbone with one task's served branches: its inputs to logits `[B, K]`.

    Args:
        backbone: The frozen backbone, shared.
        bank: A bank of one task.
    """

    def __init__(self, backbone: Backbone, bank: Bank) -> None:
        super().__init__()
        self.trunk = backbone.model
        self.bank = bank
        self.names = list(bank.tensors)
        for number, tensor in enumerate(bank.tensors.values()):
            self.register_buffer(f"bank_{number}", tensor[0])

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits `[B, K]` of the backbone's inputs, such as images `[B, C, H, W]`."""
        tensors = {name: self.get_buffer(f"bank_{i}") for i, name in enumerate(self.names)}
        with joined(self.trunk, self.bank.weighted(tensors, alone=True)):
            return self.trunk(*inputs)
