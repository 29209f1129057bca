"""`scale * up(act(down(x)))`: LoRA, parallel and serial adapters, PATT are this at different places.

LoRA: arXiv 2106.09685, eq. 3 (activation identity, no biases, scale alpha/r).
Adapter: arXiv 1902.00751, section 2 (GELU, serial). AdaptFormer: arXiv 2205.13535, eq. 4 (ReLU, parallel).
PATT: arXiv 2210.00788 (tanh, beside `qkv`, zero rows of `up` for what is not tuned).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..ops import is_linear, op_bias
from ..tuner import CannotFold, Place, Shapes, Tuner, Weights, wider

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
NORMS = ("none", "in", "out")


@dataclass(frozen=True)
class Bottleneck(Tuner):
    """Down to `r` channels, an activation, up again, times a scale.

    Attributes:
        activation: A key of `ACTIVATIONS`.
        bias: Whether down and up carry biases.
        norm: Where a layer norm stands: `none`, `in` front of down, or `out`, behind the scale.
        eps: Of that norm.
    """

    activation: str
    bias: bool
    norm: str = "none"
    eps: float = 1e-5

    kind = "bottleneck"
    source = "arXiv 2106.09685 (LoRA), 1902.00751 (adapter), 2205.13535 (AdaptFormer)"
    join = "add"
    broadcasts = True

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {sorted(ACTIVATIONS)}")
        if not isinstance(self.bias, bool):
            raise TypeError(f"bias {self.bias!r} is neither true nor false")
        if self.norm not in NORMS:
            raise ValueError(f"norm {self.norm!r} is not one of {NORMS}")
        if not isinstance(self.eps, float) or not self.eps > 0:
            raise ValueError(f"eps {self.eps!r} is not above zero")

    @property
    def shapes(self) -> Shapes:
        """`down [r, in]`, `up [out, r]`, `scale []`.

        With biases `down_bias [r]`, `up_bias [out]`; with a norm `norm_weight` and `norm_bias`, `[in]` or
        `[out]`.
        """
        return {**self.served, "scale": ()}

    @property
    def served(self) -> Shapes:
        """The scale is gone: it went into `up` and `up_bias`."""
        biases: Shapes = {"down_bias": ("r",), "up_bias": ("out",)} if self.bias else {}
        norm: Shapes = (
            {"norm_weight": (self.norm,), "norm_bias": (self.norm,)} if self.norm != "none" else {}
        )
        return {"down": ("r", "in"), "up": ("out", "r"), **biases, **norm}

    def branch(self, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        """`scale * (act(x down^T + down_bias) up^T + up_bias)`, `[B, N, out]`."""
        if self.norm == "in":
            x = self._normed(x, w)
        hidden = x @ w["down"].mT  # [B, N, r]
        if self.bias:
            hidden = hidden + w["down_bias"][..., None, :]
        y = ACTIVATIONS[self.activation](hidden) @ w["up"].mT  # [B, N, out]
        if self.bias:
            y = y + w["up_bias"][..., None, :]
        if "scale" in w:
            y = y * w["scale"][..., None, None]
        return self._normed(y, w) if self.norm == "out" else y

    def _normed(self, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return normed * w["norm_weight"][..., None, :] + w["norm_bias"][..., None, :]

    def settle(self, w: Mapping[str, Tensor]) -> Weights:
        """The scale folded into `up` and `up_bias`, in float64."""
        settled = {name: w[name] for name in self.served}
        for name in ("up", "up_bias") if self.bias else ("up",):
            wide = wider(w[name], w["scale"])
            settled[name] = (w[name].double() * w["scale"].double()).to(wide)
        return settled

    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """`down` uniform as in `nn.Linear`, `up` zero, so that training starts at the backbone."""
        bound = math.sqrt(3.0 / sizes["in"])
        down = torch.empty(sizes["r"], sizes["in"]).uniform_(-bound, bound, generator=generator)
        w = {"down": down, "up": torch.zeros(sizes["out"], sizes["r"]), "scale": torch.ones(())}
        if self.bias:
            w |= {"down_bias": torch.zeros(sizes["r"]), "up_bias": torch.zeros(sizes["out"])}
        if self.norm != "none":
            ones = torch.ones(sizes[self.norm])
            w |= {"norm_weight": ones, "norm_bias": torch.zeros_like(ones)}
        return w

    def fold(self, w: Mapping[str, Tensor], op: nn.Module, place: Place) -> Weights:
        """`W + s up down` beside a linear layer, `(I + s up down) W` behind it, `W (I + s up down)` before."""
        if self.norm != "none":
            raise CannotFold("the branch has a layer norm of its own")
        if self.activation != "identity":
            raise CannotFold(f"the branch has a {self.activation} between down and up")
        if not is_linear(op, place):
            raise CannotFold(
                f"the branch is added to a {type(op).__name__}, which is not one linear layer"
            )
        weight = cast("Tensor", op.weight).flatten(1)
        product = w["scale"] * (w["up"] @ w["down"])  # [out, in]
        constant = None
        if self.bias:
            constant = w["scale"] * (w["up"] @ w["down_bias"] + w["up_bias"])
        if place == "before":
            changed = weight + weight @ product
            constant = constant if constant is None else weight @ constant
        elif place == "behind":
            changed = weight + product @ weight
            if op.bias is not None:
                through = product @ op_bias(op)
                constant = through if constant is None else constant + through
        else:
            changed = weight + product
        folded: Weights = {"weight": changed.reshape(cast("Tensor", op.weight).shape)}
        return folded if constant is None else folded | {"bias": op_bias(op) + constant}
