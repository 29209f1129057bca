"""BitFit: a shift of an op's output by one vector (arXiv 2106.10199, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from ..ops import adds_bias_last, op_bias
from ..tuner import CannotFold, Place, Shapes, Tuner, Weights

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Bias(Tuner):
    """The difference between a tuned bias and the frozen one."""

    kind = "bias"
    source = "arXiv 2106.10199 (BitFit)"
    join = "add"

    @property
    def shapes(self) -> Shapes:
        """`shift [out]`."""
        return {"shift": ("out",)}

    def branch(self, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        """The shift, `[1, out]` or `[B, 1, out]`."""
        return w["shift"][..., None, :]

    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """Zero: training starts at the backbone."""
        return {"shift": torch.zeros(sizes["out"])}

    def fold(self, w: Mapping[str, Tensor], op: nn.Module, place: Place) -> Weights:
        """`b + shift`; before a linear layer, `b + W shift`."""
        if place == "before" and isinstance(op, nn.Linear):
            return {"bias": op_bias(op) + op.weight @ w["shift"]}
        if place == "before" or not adds_bias_last(op):
            raise CannotFold(f"a {type(op).__name__} does more to its bias than add it last")
        return {"bias": op_bias(op) + w["shift"]}
