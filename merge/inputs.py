"""What a backbone reads: named tensors, a row of each per example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from .errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Generator, Tensor

IMAGES = "images"
"""The name of pictures `[B, C, H, W]` and clips `[B, C, T, H, W]`."""

Values = Literal["normal", "ids", "mask"]


@dataclass(frozen=True)
class Input:
    """One tensor that a backbone's `forward` takes; several come in the order of the backbone's `inputs`.

    Attributes:
        name: Its name in an engine.
        shape: Of one row, without the batch axis.
        values: What it holds: `normal`, real numbers of about unit size; `ids`, integers from 0 to
            `high - 1`; `mask`, 1 at the first entries of the last axis and 0 at the others, at least one 1.
        high: See `values`.
    """

    name: str
    shape: tuple[int, ...]
    values: Values = "normal"
    high: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """float32 of real numbers, int64 of ids and masks."""
        return torch.float32 if self.values == "normal" else torch.int64

    def draw(self, batch: int, generator: Generator) -> Tensor:
        """Random values `[batch, *shape]` of the kind that it holds."""
        if self.values == "normal":
            return torch.randn(batch, *self.shape, generator=generator)
        if self.values == "ids":
            return torch.randint(self.high or 2, (batch, *self.shape), generator=generator)
        length = self.shape[-1]
        valid = torch.randint(1, length + 1, (batch, *self.shape[:-1], 1), generator=generator)
        return (torch.arange(length) < valid).long()


def require_rows(inputs: Sequence[Input], tensors: Sequence[Tensor]) -> None:
    """Every tensor is a batch of rows of its input.

    Raises:
        UsageError: There are more or fewer of them, or one has another shape.
    """
    if len(tensors) != len(inputs):
        raise UsageError(
            "the backbone takes another number of inputs",
            wanted=", ".join(own.name for own in inputs),
            found=f"{len(tensors)} tensors",
        )
    for own, tensor in zip(inputs, tensors, strict=True):
        if tensor.dim() != len(own.shape) + 1 or tuple(tensor.shape[1:]) != own.shape:
            raise UsageError(
                "an input does not have the shape that the backbone was created for",
                where=own.name,
                wanted=f"[{', '.join(['B', *map(str, own.shape)])}]",
                found=list(tensor.shape),
                do="pad it, or create the backbone for this shape",
            )
