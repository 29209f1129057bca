"""A task's own classifier in the place of the backbone's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from ..no_class import NO_CLASS
from ..tuner import CannotFold, Place, Shapes, Tuner, Weights

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Head(Tuner):
    """A linear classifier; `r` is its number of classes."""

    kind = "head"
    source = "linear probe"
    join = "replace"
    broadcasts = True
    answers = True
    fill = {"bias": NO_CLASS}  # noqa: RUF012 - a ClassVar in the base

    @property
    def shapes(self) -> Shapes:
        """`weight [r, in]` and `bias [r]`."""
        return {"weight": ("r", "in"), "bias": ("r",)}

    def answer_width(self, sizes: Mapping[str, int]) -> int:
        """The number of classes."""
        return sizes["r"]

    def branch(self, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        """Logits `[B, 1, r]` of features `[B, 1, in]`."""
        return x @ w["weight"].mT + w["bias"][..., None, :]

    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """Normal weights of standard deviation 1 / sqrt(in), zero bias."""
        weight = torch.empty(sizes["r"], sizes["in"])
        std = 1 / math.sqrt(sizes["in"])
        return {
            "weight": weight.normal_(std=std, generator=generator),
            "bias": torch.zeros(sizes["r"]),
        }

    def fold(self, w: Mapping[str, Tensor], op: nn.Module, place: Place) -> Weights:
        """The classifier is replaced, whatever its number of classes was."""
        if not isinstance(op, nn.Linear | nn.Identity):
            raise CannotFold(f"the classifier is a {type(op).__name__}, not one linear layer")
        return {"weight": w["weight"], "bias": w["bias"]}
