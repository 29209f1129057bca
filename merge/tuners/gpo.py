"""GPO: pooling by learned weights over sorted values (arXiv 2011.04305, section 3.3).

Every channel is sorted over the valid tokens, largest first, and summed with weights that a bidirectional
GRU reads off sinusoidal positions. The weights depend on the number of tokens alone: an engine holds
them as a table, and the GRU is gone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn

from ..errors import IncompatibleArtefact
from ..tuner import Shapes, Tuner, Weights, wider

if TYPE_CHECKING:
    from collections.abc import Mapping

TEMPERATURE = 0.1
LOWEST = -10_000.0  # of padding, as published
GRU = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
BACK = "_reverse"


@dataclass(frozen=True)
class Gpo(Tuner):
    """Tokens to one vector.

    Attributes:
        tokens: Most tokens that it meets.
        positions: Channels of the sinusoidal positions; even.
        hidden: Channels of the GRU, one way.
        masked: A second tap `[B, N]` is 1 at valid tokens, which come first.
    """

    tokens: int
    positions: int = 32
    hidden: int = 32
    masked: bool = False

    kind = "gpo"
    source = "arXiv 2011.04305 (VSE-infinity)"
    join = "replace"
    padded = frozenset()
    broadcasts = True
    no_fold = "it sorts, and no weight of the backbone holds that"

    def __post_init__(self) -> None:
        sizes = (self.tokens, self.positions, self.hidden)
        if not all(type(size) is int and size > 0 for size in sizes) or self.positions % 2:
            raise ValueError(f"sizes {sizes} are not numbers from 1, the second even")
        if not isinstance(self.masked, bool):
            raise TypeError(f"masked {self.masked!r} is neither true nor false")

    @property
    def reads(self) -> int:
        """Features, and the mask."""
        return 1 + self.masked

    @property
    def shapes(self) -> Shapes:
        """The GRU's `weight_ih [3 hidden, positions]`, `weight_hh [3 hidden, hidden]`, biases `[3 hidden]`.

        Again with `_reverse`; and `score [hidden]`.
        """
        three = 3 * self.hidden
        one: Shapes = {
            "weight_ih": (three, self.positions),
            "weight_hh": (three, self.hidden),
            "bias_ih": (three,),
            "bias_hh": (three,),
        }
        back: Shapes = {f"{name}{BACK}": axes for name, axes in one.items()}
        return {**one, **back, "score": (self.hidden,)}

    @property
    def served(self) -> Shapes:
        """`table [tokens + 1, tokens]`, row n of weights over n tokens; of full length only `[1, tokens]`.

        And `present []`, 1 here and 0 for a task without it.
        """
        return {"table": (self.tokens + 1 if self.masked else 1, self.tokens), "present": ()}

    def channels(self, sizes: Mapping[str, int]) -> tuple[tuple[None, ...], None]:
        """Any."""
        return (None,) * self.reads, None

    def settle(self, w: Mapping[str, Tensor]) -> Weights:
        """The table, in float64."""
        lengths = range(self.tokens + 1) if self.masked else (self.tokens,)
        table = torch.stack([self._weights(length, w) for length in lengths])
        return {"table": table.to(wider(w["score"])), "present": torch.ones(())}

    def _weights(self, length: int, w: Mapping[str, Tensor]) -> Tensor:
        """Over `length` tokens, zero behind them: `[tokens]`, float64."""
        weights = torch.zeros(self.tokens, dtype=torch.float64, device=w["score"].device)
        if not length:
            return weights
        gru = nn.GRU(self.positions, self.hidden, batch_first=True, bidirectional=True).double()
        held = {f"{n}_l0{end}": w[f"{n}{end}"].double() for n in GRU for end in ("", BACK)}
        places = sinusoids(length, self.positions).double()[None].to(weights.device)
        both, _ = torch.func.functional_call(gru, held, places)
        scores = both[0].unflatten(-1, (2, self.hidden)).mean(-2) @ w["score"].double()
        return torch.cat([torch.softmax(scores / TEMPERATURE, 0), weights[length:]])

    def branch(self, x: Any, w: Mapping[str, Tensor]) -> Tensor:
        """The pooled vector, `[B, 1, C]`.

        Args:
            x: Features `[B, N, C]`; with a mask the two, `[B, 1, N]` behind.
            w: See `shapes`.

        Raises:
            IncompatibleArtefact: Another number of tokens.
        """
        if "table" not in w:
            w = self._settled_rows(w)
        features: Tensor = x[0] if self.masked else x
        mask: Tensor | None = x[1] if self.masked else None
        if features.shape[-2] != self.tokens:
            raise IncompatibleArtefact(
                "a gpo branch meets another number of tokens than it was made for",
                where="the tap of the branch",
                wanted=self.tokens,
                found=features.shape[-2],
            )
        if mask is None:
            weights = w["table"]  # [1, N]
        else:
            features = torch.where(mask.mT > 0, features, torch.full_like(features, LOWEST))
            counts = torch.arange(self.tokens + 1, device=mask.device)
            marked = (mask.sum(-1, keepdim=True) == counts).to(features.dtype)  # [B, 1, N + 1]
            weights = marked @ w["table"]
        ordered = features.sort(dim=-2, descending=True).values
        return weights @ ordered

    def _settled_rows(self, w: Mapping[str, Tensor]) -> Weights:
        """Settled tensors, of each row when they have a batch axis."""
        if w["score"].dim() == 1:
            return self.settle(w)
        rows = [self.settle({n: t[row] for n, t in w.items()}) for row in range(len(w["score"]))]
        return {name: torch.stack([row[name] for row in rows]) for name in self.served}

    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """Uniform as in `nn.GRU`."""
        bound = 1 / math.sqrt(self.hidden)
        return {
            name: torch.empty([int(axis) for axis in axes]).uniform_(
                -bound, bound, generator=generator
            )
            for name, axes in self.shapes.items()
        }


def sinusoids(length: int, channels: int) -> Tensor:
    """Positions 0 to `length - 1` as sines and cosines in turn, `[length, channels]` float32.

    In float32 whatever is computed from them, as published.
    """
    steps = torch.exp(
        torch.arange(0, channels, 2, dtype=torch.float32) * -(math.log(10_000.0) / channels)
    )
    angles = torch.arange(length)[:, None].float() * steps
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)
