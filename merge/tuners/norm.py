"""Norm tuning: the gain and bias of a frozen norm changed, exactly, whatever the frozen gain is.

`LN'(x) = LN(x) + gain * n(x) + shift` with n the norm without its parameters (LN tuning, arXiv
2312.11420; the norms of a full fine-tune). Scaling the norm's output instead would divide by the frozen
gain, which trained backbones bring close to zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..tuner import CannotFold, Place, Shapes, Tuner, Weights

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Norm(Tuner):
    """The difference of a layer norm's parameters.

    Attributes:
        eps: Of the norm.
    """

    eps: float

    kind = "norm"
    source = "arXiv 2312.11420 (LN tuning)"
    join = "add"
    broadcasts = True

    def __post_init__(self) -> None:
        if not isinstance(self.eps, float) or not self.eps > 0:
            raise ValueError(f"eps {self.eps!r} is not above zero")

    @property
    def shapes(self) -> Shapes:
        """`gain [out]` and `shift [out]`: tuned minus frozen."""
        return {"gain": ("out",), "shift": ("out",)}

    def channels(self, sizes: Mapping[str, int]) -> tuple[int | None, int | None]:
        """The norm's channels at both ends."""
        return sizes["out"], sizes["out"]

    def branch(self, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        """`gain * n(x) + shift`, `[B, N, C]`."""
        normed = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return normed * w["gain"][..., None, :] + w["shift"][..., None, :]

    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """Zero: training starts at the backbone."""
        return {"gain": torch.zeros(sizes["out"]), "shift": torch.zeros(sizes["out"])}

    def fold(self, w: Mapping[str, Tensor], op: nn.Module, place: Place) -> Weights:
        """`weight + gain`, `bias + shift`."""
        if place != "beside" or not isinstance(op, nn.LayerNorm) or op.bias is None:
            raise CannotFold(f"it does not stand beside a layer norm, but at a {type(op).__name__}")
        if op.eps != self.eps:
            raise CannotFold(f"the layer norm has another eps, {op.eps:g}")
        return {"weight": op.weight + w["gain"], "bias": op.bias + w["shift"]}
