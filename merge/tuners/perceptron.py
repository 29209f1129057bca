"""A head of several layers: CLIP-ViL's answers, MDETR's boxes."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ..no_class import NO_CLASS
from ..tuner import Shapes, Tuner, Weights
from .bottleneck import ACTIVATIONS

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Perceptron(Tuner):
    """Linear layers with an activation behind each but the last; `r` is what the last gives.

    Attributes:
        hidden: Channels between the layers.
        activation: A key of `ACTIVATIONS`.
        norm_eps: Of a layer norm behind each activation; 0 for no norm.
    """

    hidden: tuple[int, ...]
    activation: str = "relu"
    norm_eps: float = 0.0

    kind = "perceptron"
    source = "arXiv 2107.06383 (CLIP-ViL), 2104.12763 (MDETR)"
    join = "replace"
    broadcasts = True
    answers = True
    no_fold = "it has several layers, and the classifier is one"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {sorted(ACTIVATIONS)}")
        if not self.hidden or not all(type(size) is int and size > 0 for size in self.hidden):
            raise ValueError(f"hidden {self.hidden!r} are not numbers from 1")
        if not isinstance(self.norm_eps, float) or not self.norm_eps >= 0:
            raise ValueError(f"norm_eps {self.norm_eps!r} is below zero")

    @property
    def shapes(self) -> Shapes:
        """Per layer `layerN_weight [out, in]`, `layerN_bias [out]`, and of its norm `layerN_norm_{weight,bias}`."""
        sizes = ("in", *self.hidden, "r")
        shapes: Shapes = {}
        for number, (given, taken) in enumerate(itertools.pairwise(sizes)):
            shapes |= {f"layer{number}_weight": (taken, given), f"layer{number}_bias": (taken,)}
            if self.norm_eps and number < len(self.hidden):
                shapes |= {f"layer{number}_norm_{part}": (taken,) for part in ("weight", "bias")}
        return shapes

    @property
    def served(self) -> Shapes:
        """`present []` besides: 1 here, 0 for a task that answers otherwise."""
        return {**self.shapes, "present": ()}

    @property
    def fill(self) -> Mapping[str, float]:  # type: ignore[override]
        """A class that a task does not have."""
        return {f"layer{len(self.hidden)}_bias": NO_CLASS}

    def settle(self, w: Mapping[str, Tensor]) -> Weights:
        """Present."""
        return {**w, "present": w["layer0_bias"].new_ones(())}

    def answer_width(self, sizes: Mapping[str, int]) -> int:
        """What the last layer gives."""
        return sizes["r"]

    def branch(self, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        """`[B, N, r]` of features `[B, N, in]`."""
        for number in range(len(self.hidden) + 1):
            x = x @ w[f"layer{number}_weight"].mT + w[f"layer{number}_bias"][..., None, :]
            if number == len(self.hidden):
                break
            x = ACTIVATIONS[self.activation](x)
            if self.norm_eps:
                x = F.layer_norm(x, x.shape[-1:], eps=self.norm_eps)
                x = x * w[f"layer{number}_norm_weight"][..., None, :]
                x = x + w[f"layer{number}_norm_bias"][..., None, :]
        return x

    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """As in `nn.Linear`, with zero biases and unit norms."""
        w: Weights = {}
        for name, axes in self.shapes.items():
            shape = [axis if isinstance(axis, int) else sizes[axis] for axis in axes]
            w[name] = torch.zeros(shape)
            if name.endswith("norm_weight"):
                w[name].fill_(1.0)
            elif len(shape) == 2:
                bound = 1 / math.sqrt(shape[1])
                w[name].uniform_(-bound, bound, generator=generator)
        return w
