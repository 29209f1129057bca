"""Deep prompts: learned tokens that stand beside the input of a block and leave after it.

VPT-deep (arXiv 2203.12119, eq. 5): every block gets its own prompts and drops the previous ones, so
a block's prompts act on the other tokens only through its keys and values. `lower.py` uses that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from ..tuner import Tuner, Weights

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Prompt(Tuner):
    """`r` tokens appended to a block's input and cut from its output."""

    kind = "prompt"
    source = "arXiv 2203.12119 (VPT-deep)"
    join = "tokens"
    no_fold = "tokens are added, and no weight of the backbone holds them"

    @property
    def shapes(self) -> dict[str, tuple[str, ...]]:
        """`token [r, out]`."""
        return {"token": ("r", "out")}

    def branch(self, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        """The tokens, `[P, C]`."""
        return w["token"]

    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """Normal tokens of standard deviation 0.02."""
        return {
            "token": torch.empty(sizes["r"], sizes["out"]).normal_(std=0.02, generator=generator)
        }
