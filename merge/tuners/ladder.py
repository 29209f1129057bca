"""Ladder side-tuning: small transformer blocks beside the trunk (LST, arXiv 2206.06522, section 3).

    s_0 = down_0(h_0),   s_l = block_l(u_l down_l(h_l) + (1 - u_l) s_{l-1}),   u_l = sigmoid(gate_l / 0.1)

and `up(norm(s_L))` stands in for the trunk's own value. The blocks are pre-norm transformer blocks with few
channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ..tuner import Shapes, Tuner, Weights
from .bottleneck import ACTIVATIONS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TEMPERATURE = 0.1


@dataclass(frozen=True)
class Ladder(Tuner):
    """A ladder of blocks.

    Attributes:
        widths: Channels of each hidden state that is read, the first in front of the first block.
        width: Channels of the side network.
        heads: Of its attentions.
        hidden: Channels inside its mlps.
        out: Channels that it gives.
        activation: A key of `ACTIVATIONS`.
        eps: Of its layer norms.
        gives: `tokens`, the `first`, or their `mean`.
        masked: The last tap is a mask `[B, N]`, 1 at valid tokens.
    """

    widths: tuple[int, ...]
    width: int
    heads: int
    hidden: int
    out: int
    activation: str = "gelu"
    eps: float = 1e-6
    gives: str = "tokens"
    masked: bool = False

    kind = "ladder"
    source = "arXiv 2206.06522 (LST)"
    join = "replace"
    padded = frozenset()
    broadcasts = True
    no_fold = "a network of its own reads the hidden states, and no weight of the backbone holds it"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {sorted(ACTIVATIONS)}")
        if self.gives not in ("tokens", "first", "mean"):
            raise ValueError(f"gives {self.gives!r} is not tokens, first or mean")
        sizes = (*self.widths, self.width, self.heads, self.hidden, self.out)
        if len(self.widths) < 2 or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"sizes {sizes} are not numbers from 1, with two widths at least")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")
        if not isinstance(self.eps, float) or not self.eps > 0:
            raise ValueError(f"eps {self.eps!r} is not above zero")
        if not isinstance(self.masked, bool):
            raise TypeError(f"masked {self.masked!r} is neither true nor false")

    @property
    def reads(self) -> int:
        """The hidden states, and the mask."""
        return len(self.widths) + self.masked

    @property
    def shapes(self) -> Shapes:
        """`downN_{weight,bias}`; from N = 1 `gateN []` and block N's norms, `qkv`, `proj`, `fc1`, `fc2`; `up`."""
        d = self.width
        shapes: Shapes = {}
        for number, wide in enumerate(self.widths):
            shapes |= {f"down{number}_weight": (d, wide), f"down{number}_bias": (d,)}
            if not number:
                continue
            shapes[f"gate{number}"] = ()
            for norm in ("norm1", "norm2"):
                shapes |= {f"block{number}_{norm}_{part}": (d,) for part in ("weight", "bias")}
            for name, (out, given) in {
                "qkv": (3 * d, d),
                "proj": (d, d),
                "fc1": (self.hidden, d),
                "fc2": (d, self.hidden),
            }.items():
                shapes |= {
                    f"block{number}_{name}_weight": (out, given),
                    f"block{number}_{name}_bias": (out,),
                }
        shapes |= {"norm_weight": (d,), "norm_bias": (d,)}
        return {**shapes, "up_weight": (self.out, d), "up_bias": (self.out,)}

    @property
    def served(self) -> Shapes:
        """`present []` besides: 1 here, 0 for a task that has no ladder."""
        return {**self.shapes, "present": ()}

    def settle(self, w: Mapping[str, Tensor]) -> Weights:
        """Present."""
        return {**w, "present": w["up_bias"].new_ones(())}

    def channels(self, sizes: Mapping[str, int]) -> tuple[tuple[int | None, ...], int | None]:
        """Of every tap, and what it gives."""
        return (*self.widths, *[None] * self.masked), self.out

    def branch(self, x: Sequence[Tensor], w: Mapping[str, Tensor]) -> Tensor:
        """`[B, N, out]`, or `[B, 1, out]`.

        Args:
            x: Hidden states `[B, N, widths[l]]`, and with `masked` the mask `[B, 1, N]`.
            w: See `shapes`.
        """
        states, mask = (x[:-1], x[-1]) if self.masked else (x, None)
        side = _linear("down0", states[0], w)
        for number, state in enumerate(states[1:], start=1):
            share = torch.sigmoid(w[f"gate{number}"] / TEMPERATURE)[..., None, None]
            side = share * _linear(f"down{number}", state, w) + (1 - share) * side
            side = self._block(f"block{number}", side, mask, w)
        if self.gives == "first":
            side = side[..., :1, :]
        y = _linear("up", self._normed("norm", side, w), w)
        if self.gives != "mean":
            return y
        if mask is None:
            return y.mean(-2, keepdim=True)
        return (mask / mask.sum(-1, keepdim=True).clamp(min=1.0)) @ y

    def _block(self, name: str, x: Tensor, mask: Tensor | None, w: Mapping[str, Tensor]) -> Tensor:
        """A pre-norm transformer block."""
        qkv = _linear(f"{name}_qkv", self._normed(f"{name}_norm1", x, w), w)
        heads = qkv.unflatten(-1, (3, self.heads, -1)).movedim(-2, -4)  # [B, H, N, 3, d]
        query, key, value = heads.unbind(-2)
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        if mask is not None:
            absent = torch.finfo(scores.dtype).min
            scores = torch.where(mask[..., None, :, :] > 0, scores, torch.full_like(scores, absent))
        mixed = (torch.softmax(scores, -1) @ value).movedim(-3, -2).flatten(-2)
        x = x + _linear(f"{name}_proj", mixed, w)
        hidden = _linear(f"{name}_fc1", self._normed(f"{name}_norm2", x, w), w)
        return x + _linear(f"{name}_fc2", ACTIVATIONS[self.activation](hidden), w)

    def _normed(self, name: str, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return normed * w[f"{name}_weight"][..., None, :] + w[f"{name}_bias"][..., None, :]

    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """Linear layers as in `nn.Linear`, unit norms, zero biases and gates (half and half)."""
        w: Weights = {}
        for name, axes in self.shapes.items():
            shape = [int(axis) for axis in axes]
            w[name] = torch.zeros(shape)
            if "norm" in name and name.endswith("_weight"):
                w[name].fill_(1.0)
            elif len(shape) == 2:
                bound = 1 / math.sqrt(shape[1])
                w[name].uniform_(-bound, bound, generator=generator)
        return w


def _linear(name: str, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    return x @ w[f"{name}_weight"].mT + w[f"{name}_bias"][..., None, :]
