"""A full fine-tune as what it changed: tuned minus frozen, parameter by parameter.

It folds exactly, always. It cannot share a batch with other tasks: a row would have to bring the
whole op's weights along, which is one full model per task.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from ..tuner import Place, Shapes, Tuner, Weights

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Difference(Tuner):
    """Added to one parameter or buffer of a module.

    Attributes:
        parameter: Its name in the module.
        shape: Its shape.
    """

    parameter: str
    shape: tuple[int, ...]

    kind = "difference"
    source = "full fine-tuning"
    join = "weights"
    no_bank = "every row would carry the whole weights of its op"

    def __post_init__(self) -> None:
        if not self.parameter.isidentifier():
            raise ValueError(f"parameter {self.parameter!r} is not a name")
        sizes = isinstance(self.shape, tuple) and all(
            isinstance(size, int) and size > 0 for size in self.shape
        )
        if not sizes or math.prod(self.shape) < 1:
            raise ValueError(f"shape {self.shape!r} is not a list of sizes")

    @property
    def shapes(self) -> Shapes:
        """`shift`, of the parameter's shape."""
        return {"shift": self.shape}

    def branch(self, x: None, w: Mapping[str, Tensor]) -> Tensor:
        """What is added to the parameter."""
        return w["shift"]

    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """Zero: training starts at the backbone."""
        return {"shift": torch.zeros(self.shape)}

    def fold(self, w: Mapping[str, Tensor], op: nn.Module, place: Place | None) -> Weights:
        """The tuned parameter itself."""
        return {self.parameter: getattr(op, self.parameter) + w["shift"]}
