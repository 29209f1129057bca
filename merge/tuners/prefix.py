"""Prefix tuning: constant keys and values beside those of the input.

`Attn(x W_q, [x W_k; K_p], [x W_v; V_p])` (arXiv 2101.00190; as a U-Tuner arXiv 2303.00690, eq. 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from ..tuner import Shapes, Tuner, Weights

if TYPE_CHECKING:
    from collections.abc import Mapping

MASKED = torch.finfo(torch.float32).min  # finite, so that a row of nothing but padding is no NaN


@dataclass(frozen=True)
class Prefix(Tuner):
    """`r` constant keys and values per attention, heads side by side in the channels.

    Attributes:
        joint_softmax: One softmax over the input's keys and the prefix (the published form), or the
            sum of two attentions.
    """

    joint_softmax: bool

    kind = "prefix"
    source = "arXiv 2101.00190 (prefix tuning)"
    join = "extend"
    fill = {"mask": MASKED}  # noqa: RUF012 - a ClassVar in the base
    no_fold = "keys and values are added, and no weight of the backbone holds them"

    def __post_init__(self) -> None:
        if not isinstance(self.joint_softmax, bool):
            raise TypeError(f"joint_softmax {self.joint_softmax!r} is neither true nor false")

    @property
    def shapes(self) -> Shapes:
        """`key [r, out]` and `value [r, out]`."""
        return {"key": ("r", "out"), "value": ("r", "out")}

    @property
    def served(self) -> Shapes:
        """An additive `mask [r]` besides: padded keys must not enter the softmax."""
        return {**self.shapes, "mask": ("r",)}

    def branch(self, x: Tensor, w: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys `[L, C]`, values `[L, C]` and the additive mask `[L]`, each perhaps `[B, ...]`."""
        return w["key"], w["value"], w.get("mask")

    def settle(self, w: Mapping[str, Tensor]) -> Weights:
        """All keys are real until a bank pads them."""
        return {**w, "mask": w["key"].new_zeros(w["key"].shape[0])}

    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """Normal keys of standard deviation 0.02 and zero values."""
        shape = (sizes["r"], sizes["out"])
        return {
            "key": torch.empty(shape).normal_(std=0.02, generator=generator),
            "value": torch.zeros(shape),
        }
