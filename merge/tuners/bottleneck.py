"""`scale * up(act(down(x)))`: LoRA, parallel and serial adapters, PATT are this at different places.

LoRA: arXiv 2106.09685, eq. 3 (activation identity, no biases, scale alpha/r).
Adapter: arXiv 1902.00751, section 2 (GELU, serial). AdaptFormer: arXiv 2205.13535, eq. 4 (ReLU, parallel).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..tuner import CannotFold, Tuner, Weights

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


@dataclass(frozen=True)
class Bottleneck(Tuner):
    """Down to `r` channels, an activation, up again, times a scale.

    Attributes:
        activation: A key of `ACTIVATIONS`.
        bias: Whether down and up carry biases.
    """

    activation: str
    bias: bool

    kind = "bottleneck"
    source = "arXiv 2106.09685 (LoRA), 1902.00751 (adapter), 2205.13535 (AdaptFormer)"
    join = "add"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {sorted(ACTIVATIONS)}")
        if not isinstance(self.bias, bool):
            raise TypeError(f"bias {self.bias!r} is neither true nor false")

    @property
    def shapes(self) -> dict[str, tuple[str, ...]]:
        """`down [r, in]`, `up [out, r]`, `scale []`, with biases `down_bias [r]`, `up_bias [out]`."""
        return {**self.served, "scale": ()}

    @property
    def served(self) -> dict[str, tuple[str, ...]]:
        """The scale is gone: it went into `up` and `up_bias`."""
        biases = {"down_bias": ("r",), "up_bias": ("out",)} if self.bias else {}
        return {"down": ("r", "in"), "up": ("out", "r"), **biases}

    def branch(self, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        """`scale * (act(x down^T + down_bias) up^T + up_bias)`, `[B, N, out]`."""
        hidden = x @ w["down"].mT  # [B, N, r]
        if self.bias:
            hidden = hidden + w["down_bias"][..., None, :]
        y = ACTIVATIONS[self.activation](hidden) @ w["up"].mT  # [B, N, out]
        if self.bias:
            y = y + w["up_bias"][..., None, :]
        return y * w["scale"][..., None, None] if "scale" in w else y

    def settle(self, w: Mapping[str, Tensor]) -> Weights:
        """The scale folded into `up` and `up_bias`, in float64."""
        settled = {name: w[name] for name in self.served}
        for name in ("up", "up_bias") if self.bias else ("up",):
            wide = torch.promote_types(w[name].dtype, torch.float32)  # no rounding to half here
            settled[name] = (w[name].double() * w["scale"].double()).to(wide)
        return settled

    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """`down` uniform as in `nn.Linear`, `up` zero, so that training starts at the backbone."""
        bound = math.sqrt(3.0 / sizes["in"])
        down = torch.empty(sizes["r"], sizes["in"]).uniform_(-bound, bound, generator=generator)
        w = {"down": down, "up": torch.zeros(sizes["out"], sizes["r"]), "scale": torch.ones(())}
        if self.bias:
            w |= {"down_bias": torch.zeros(sizes["r"]), "up_bias": torch.zeros(sizes["out"])}
        return w

    def fold(self, w: Mapping[str, Tensor], op: nn.Module, *, serial: bool) -> Weights:
        """`W + s up down` beside a linear layer, `(I + s up down) W` behind one."""
        if self.activation != "identity":
            raise CannotFold(f"the branch has a {self.activation} between down and up")
        if not isinstance(op, nn.Linear):
            raise CannotFold(
                f"the branch is added to a {type(op).__name__}, which is not one linear layer"
            )
        product = w["scale"] * (w["up"] @ w["down"])  # [out, in]
        constant = None
        if self.bias:
            constant = w["scale"] * (w["up"] @ w["down_bias"] + w["up_bias"])
        changed: Weights = {"weight": op.weight + (product @ op.weight if serial else product)}
        if serial and op.bias is not None:
            through = product @ op.bias
            constant = through if constant is None else constant + through
        if constant is not None:
            changed["bias"] = op_bias(op) + constant
        return changed


def op_bias(op: nn.Module) -> Tensor:
    """The op's bias.

    Raises:
        CannotFold: The op was built without one, so a plain checkpoint has no room for it.
    """
    bias = getattr(op, "bias", None)
    if bias is None:
        raise CannotFold("the branch has a constant part and the frozen layer has no bias")
    return bias
