"""Prompts: learned tokens that stand beside a sequence from one module's input to a module's output.

VPT-deep (arXiv 2203.12119, eq. 5): every block gets its own prompts and drops the previous ones, so a
block's prompts act on the other tokens only through its keys and values. `lower.py` uses that.
VPT-shallow (eq. 4): the tokens enter the first block and leave behind the last, and are tokens like any
other in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from ..tuner import Shapes, Tuner, Weights
from .prefix import MASKED

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Prompt(Tuner):
    """`r` tokens appended to a sequence and taken out again.

    Attributes:
        joint_softmax: One softmax over the sequence and the prompts (the published form), or the sum of
            two attentions.
    """

    joint_softmax: bool = True

    kind = "prompt"
    source = "arXiv 2203.12119 (VPT)"
    join = "tokens"
    fill = {"mask": MASKED}  # noqa: RUF012 - a ClassVar in the base
    no_fold = "tokens are added, and no weight of the backbone holds them"

    def __post_init__(self) -> None:
        if not isinstance(self.joint_softmax, bool):
            raise TypeError(f"joint_softmax {self.joint_softmax!r} is neither true nor false")

    @property
    def shapes(self) -> Shapes:
        """`token [r, out]`."""
        return {"token": ("r", "out")}

    @property
    def served(self) -> Shapes:
        """An additive `mask [r]` besides: padded tokens must not enter a softmax."""
        return {**self.shapes, "mask": ("r",)}

    def settle(self, w: Mapping[str, Tensor]) -> Weights:
        """All tokens are real until a bank pads them."""
        return {**w, "mask": w["token"].new_zeros(w["token"].shape[0])}

    def branch(self, x: Tensor, w: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The tokens `[P, C]` and the additive mask `[P]`, each perhaps `[B, ...]`."""
        return w["token"], w.get("mask")

    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """Normal tokens of standard deviation 0.02."""
        return {
            "token": torch.empty(sizes["r"], sizes["out"]).normal_(std=0.02, generator=generator)
        }
