"""A head on the class token beside the mean of the patches: DINOv2's linear classifier (arXiv 2304.07193)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from ..errors import IncompatibleArtefact
from ..no_class import NO_CLASS
from ..tuner import Shapes, Tuner, Weights

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class ClassAndMean(Tuner):
    """A linear classifier of twice the channels; `r` is its number of classes.

    The first tap is what the backbone's classifier reads, the second all tokens.

    Attributes:
        prefix: Tokens in front of the patches.
    """

    prefix: int = 1

    kind = "class_and_mean"
    source = "arXiv 2304.07193 (DINOv2)"
    join = "replace"
    broadcasts = True
    answers = True
    fill = {"bias": NO_CLASS}  # noqa: RUF012 - a ClassVar in the base
    no_fold = "it reads all tokens, and the backbone's classifier one"

    def __post_init__(self) -> None:
        if type(self.prefix) is not int or self.prefix < 0:
            raise ValueError(f"prefix {self.prefix!r} is not a number from 0")

    @property
    def reads(self) -> int:
        """The class token, and all tokens."""
        return 2

    @property
    def shapes(self) -> Shapes:
        """`weight [r, in]` of the class token, `mean [r, in]` of the patches' mean, and `bias [r]`."""
        return {"weight": ("r", "in"), "mean": ("r", "in"), "bias": ("r",)}

    @property
    def served(self) -> Shapes:
        """`present []` besides: 1 here, 0 for a task that answers otherwise."""
        return {**self.shapes, "present": ()}

    def settle(self, w: Mapping[str, Tensor]) -> Weights:
        """Present."""
        return {**w, "present": w["bias"].new_ones(())}

    def channels(self, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], None]:
        """As many at both taps."""
        return (sizes["in"],) * 2, None

    def answer_width(self, sizes: Mapping[str, int]) -> int:
        """The number of classes."""
        return sizes["r"]

    def branch(self, x: Any, w: Mapping[str, Tensor]) -> Tensor:
        """Logits `[B, 1, r]` of a class token `[B, 1, in]` and tokens `[B, N, in]`.

        Raises:
            IncompatibleArtefact: There are no patches.
        """
        token, tokens = x
        if tokens.shape[-2] <= self.prefix:
            raise IncompatibleArtefact(
                "a class_and_mean branch meets no patches",
                where="the second tap of the branch",
                wanted=f"more than {self.prefix} tokens",
                found=tokens.shape[-2],
            )
        mean = tokens[..., self.prefix :, :].mean(-2, keepdim=True)
        return token @ w["weight"].mT + mean @ w["mean"].mT + w["bias"][..., None, :]

    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """Normal weights of standard deviation 1 / sqrt(2 in), zero bias."""
        std = 1 / math.sqrt(2 * sizes["in"])
        weights = {
            name: torch.empty(sizes["r"], sizes["in"]).normal_(std=std, generator=generator)
            for name in ("weight", "mean")
        }
        return {**weights, "bias": torch.zeros(sizes["r"])}
