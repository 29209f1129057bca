"""Orthogonal fine-tuning: what an op reads is turned, block by block of channels.

`W' = W R` is `W (R x)`: the rotation stands before the op (OFT, arXiv 2306.07280; BOFT, arXiv 2311.06243,
whose butterfly is several of these in a row). What is stored is `R^T - 1`, so that no rotation is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Generator, Tensor, nn

from ..ops import reads_patches
from ..tuner import CannotFold, Place, Shapes, Tuner, Weights

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Rotation(Tuner):
    """`blocks` matrices of `block` by `block` on consecutive channels.

    Attributes:
        blocks: Number of blocks.
        block: Channels of a block.
        level: Of the butterfly: 0 takes channels in their order, level i shuffles them inside groups of
            2^i blocks.
    """

    blocks: int
    block: int
    level: int = 0

    kind = "rotation"
    source = "arXiv 2306.07280 (OFT), 2311.06243 (BOFT)"
    join = "add"

    def __post_init__(self) -> None:
        for name, least in (("blocks", 1), ("block", 1), ("level", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} {value!r} is not a number from {least}")
        if self.blocks % 2**self.level or (self.level and self.block % 2):
            raise ValueError(f"{self.blocks} blocks of {self.block} have no level {self.level}")

    @property
    def shapes(self) -> Shapes:
        """`turn [blocks, block, block]`: a row vector's block `x` becomes `x + x turn`."""
        return {"turn": (self.blocks, self.block, self.block)}

    def channels(self, sizes: Mapping[str, int]) -> tuple[int | None, int | None]:
        """All blocks side by side, at both ends."""
        return self.blocks * self.block, self.blocks * self.block

    def branch(self, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        """`R x - x`, `[B, N, C]`."""
        if self.level:
            x = x[..., self._order().argsort().to(x.device)]
        parts = x.unflatten(-1, (self.blocks, 1, self.block))  # [B, N, blocks, 1, block]
        turn = w["turn"] if w["turn"].dim() == 3 else w["turn"][:, None]
        y = (parts @ turn).flatten(-3)
        return y[..., self._order().to(x.device)] if self.level else y

    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """Zero: training starts at the backbone."""
        return {"turn": torch.zeros(self.blocks, self.block, self.block)}

    def fold(self, w: Mapping[str, Tensor], op: nn.Module, place: Place) -> Weights:
        """`W R`."""
        pointwise = reads_patches(op) and set(op.kernel_size) == {1}
        if place != "before" or not (isinstance(op, nn.Linear) or pointwise):
            raise CannotFold("it does not turn what one linear layer reads")
        weight = cast("Tensor", op.weight)
        turn = torch.block_diag(*w["turn"])
        if self.level:
            order = self._order()
            turn = turn[order][:, order]
        flat = weight.flatten(1)
        return {"weight": (flat + flat @ turn.mT).reshape(weight.shape)}

    def _order(self) -> Tensor:
        """BOFT's shuffle: inside each group, first the even half blocks, then the odd ones."""
        half, group = self.block // 2, self.block * 2**self.level
        halves = torch.arange(group).reshape(-1, half)
        order = torch.cat([halves[0::2], halves[1::2]]).flatten()
        starts = torch.arange(0, self.blocks * self.block, group)
        return (starts[:, None] + order).flatten()
