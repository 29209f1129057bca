"""Res-Tuning-Bypass: a ladder of adapters beside the frozen blocks (arXiv 2310.19859, section 3.3).

`b_0 = s_0` and `b_{l+1} = [s_{l+1} + A_l(s_{l+1})] + [b_l + V_l(b_l)]`, with s_0 what the first block reads and
s_l what block l gives: A_l is the lateral adapter, V_l the vertical one. The last b stands in for the
trunk's own output; the blocks run as if there were no tuner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from ..tuner import Shapes, Tuner, Weights
from .bottleneck import ACTIVATIONS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RUNGS = ("lateral", "vertical")


@dataclass(frozen=True)
class Bypass(Tuner):
    """Two adapters per block, all ranks alike.

    Attributes:
        depth: Number of blocks.
        activation: A key of `ACTIVATIONS`.
    """

    depth: int
    activation: str

    kind = "bypass"
    source = "arXiv 2310.19859 (Res-Tuning)"
    join = "add"
    broadcasts = True
    no_fold = "a network of its own runs beside the blocks, and no weight of the backbone holds it"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {sorted(ACTIVATIONS)}")
        if not isinstance(self.depth, int) or self.depth < 1:
            raise ValueError(f"depth {self.depth!r} is not a number from 1")

    @property
    def shapes(self) -> Shapes:
        """For `lateral` and `vertical` each `_down [depth, r, in]`, `_down_bias`, `_up [depth, out, r]`, `_up_bias`."""
        one: Shapes = {
            "down": (self.depth, "r", "in"),
            "down_bias": (self.depth, "r"),
            "up": (self.depth, "out", "r"),
            "up_bias": (self.depth, "out"),
        }
        return {f"{rung}_{name}": axes for rung in RUNGS for name, axes in one.items()}

    @property
    def reads(self) -> int:
        """What the first block reads, and what each block gives."""
        return self.depth + 1

    @property
    def served(self) -> Shapes:
        """A number `present []` besides: 1 here, 0 for a task that has no bypass."""
        return {**self.shapes, "present": ()}

    def settle(self, w: Mapping[str, Tensor]) -> Weights:
        """Present."""
        return {**w, "present": w["lateral_up"].new_ones(())}

    def branch(self, x: Sequence[Tensor], w: Mapping[str, Tensor]) -> Tensor:
        """`b_depth - s_depth`, `[B, N, C]`.

        Args:
            x: What the first block reads and what each block gives, `[B, N, C]` each.
            w: See `shapes`.
        """
        root, *stems = x
        b = root
        for level, stem in enumerate(stems):
            b = self._adapter("lateral", level, stem, w) + self._adapter("vertical", level, b, w)
        y = b - stems[-1]
        return y * w["present"][..., None, None] if "present" in w else y

    def _adapter(self, rung: str, level: int, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        """`x + up(act(down(x)))`."""
        down, up = (w[f"{rung}_{name}"][..., level, :, :] for name in ("down", "up"))
        down_bias, up_bias = (
            w[f"{rung}_{name}_bias"][..., level, None, :] for name in ("down", "up")
        )
        return x + ACTIVATIONS[self.activation](x @ down.mT + down_bias) @ up.mT + up_bias

    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """`down` uniform as in `nn.Linear`, the rest zero."""
        bound = math.sqrt(3.0 / sizes["in"])
        w: Weights = {}
        for name, axes in self.shapes.items():
            shape = [axis if isinstance(axis, int) else sizes[axis] for axis in axes]
            w[name] = torch.zeros(shape)
            if name.endswith("_down"):
                w[name].uniform_(-bound, bound, generator=generator)
        return w
