"""UniPT on a trunk whose maps shrink: ResNet, Swin (arXiv 2308.14316; VSE-infinity's image side).

The anchor is the last, smallest map. Every target map is cut into cells, one per position of the anchor, and
each cell is summed with weights: with `e_n = ReLU(cell_n(h_a))` at a position,

    s_i = e_n . h_n,i                                    each pixel i of the cell
    t_n = sum over i of (relu(s_i) / (sum relu(s) + eps) + 1 / r^2) h_n,i

Cells are a reshape of the map to `[h, r, w, r]`. What comes out has the anchor's tokens, and `UniPT` goes on
from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..errors import IncompatibleArtefact
from ..tuner import wider
from .unipt import Read, UniPT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ..tuner import Shapes


@dataclass(frozen=True)
class UniPTPyramid(UniPT):
    """A side network on maps.

    Attributes:
        cells: Side of each target's cells in pixels: its map's size over the anchor's.
        channels_last: Maps are `[B, H, W, C]`, not `[B, C, H, W]`.
    """

    cells: tuple[int, ...] = ()
    channels_last: bool = False

    kind = "unipt_pyramid"
    reads_map = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.cells) != len(self.widths) or not all(
            type(side) is int and side > 0 for side in self.cells
        ):
            raise ValueError(f"cells {self.cells!r} are not one number from 1 per target")
        if not isinstance(self.channels_last, bool):
            raise TypeError(f"channels_last {self.channels_last!r} is neither true nor false")
        if self.masked or self.crossed or self.vector or self.own not in ("query", "none"):
            raise ValueError("a network on maps has no masks, no memory and no vector")

    @property
    def shapes(self) -> Shapes:
        """Besides `UniPT`'s: per target `cellN_weight [widths[N], anchor]`, `cellN_bias [widths[N]]`."""
        shapes = dict(super().shapes)
        for number, wide in enumerate(self.widths):
            shapes |= self._linear(f"cell{number}", wide, self.anchor, "none")
        return shapes

    def read(self, x: Sequence[Tensor], w: Mapping[str, Tensor]) -> Read:
        """The anchor's tokens, and per target one token for each.

        Raises:
            IncompatibleArtefact: A map is not its `cells` times as large as the anchor's.
        """
        *maps, anchor = (t.movedim(-1, -3) for t in x) if self.channels_last else x
        tokens = anchor.flatten(-2).mT  # [B, h w, C]
        targets = []
        for number, (value, side) in enumerate(zip(maps, self.cells, strict=True)):
            sizes = [side * size for size in anchor.shape[-2:]]
            if list(value.shape[-2:]) != sizes:
                raise IncompatibleArtefact(
                    "a map has another size than the side network was made for",
                    where=f"target {number} of a unipt_pyramid",
                    wanted=sizes,
                    found=list(value.shape[-2:]),
                )
            wanted = torch.relu(
                tokens @ w[f"cell{number}_weight"].mT + w[f"cell{number}_bias"][..., None, :]
            )
            targets.append(self._pooled(value, wanted, side, tuple(anchor.shape[-2:])))
        return Read(tuple(targets), tokens, None, None, None)

    def _pooled(self, value: Tensor, wanted: Tensor, side: int, grid: tuple[int, ...]) -> Tensor:
        """Each cell of a map `[B, C, h r, w r]` summed, `[B, h w, C]`."""
        height, width = grid
        cut = value.unflatten(-1, (width, side)).unflatten(-3, (height, side))  # [B, C, h, r, w, r]
        like = wanted.mT.unflatten(-1, grid)[..., None, :, None]  # [B, C, h, 1, w, 1]
        wide = wider(value)  # as in `UniPT`
        scores = torch.relu((cut.to(wide) * like.to(wide)).sum(-5))  # [B, h, r, w, r]
        total = scores.sum((-3, -1), keepdim=True)
        shares = (scores / (total + self.eps) + 1.0 / side**2).to(value.dtype)
        return (cut * shares[..., None, :, :, :, :]).sum((-3, -1)).flatten(-2).mT
