"""A task that answers with a vector: what stands at the classifier, at unit length if it says so.

VSE-infinity divides by `|x| + eps`, CLIP4Clip gives the vector as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from ..tuner import Shapes, Tuner, Weights

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Embedding(Tuner):
    """A head without classes.

    Attributes:
        size: How many numbers it answers with.
        unit: Whether the answer is divided by its length.
        eps: Added to the length.
    """

    size: int
    unit: bool = False
    eps: float = 1e-8

    kind = "embedding"
    source = "arXiv 2011.04305 (VSE-infinity)"
    join = "replace"
    broadcasts = True
    answers = True
    no_fold = "it answers with what the classifier would read, and no weight of a classifier does"

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 1:
            raise ValueError(f"size {self.size!r} is not a number from 1")
        if not isinstance(self.unit, bool):
            raise TypeError(f"unit {self.unit!r} is neither true nor false")
        if not isinstance(self.eps, float) or not self.eps >= 0:
            raise ValueError(f"eps {self.eps!r} is below zero")

    @property
    def shapes(self) -> Shapes:
        """None."""
        return {}

    @property
    def served(self) -> Shapes:
        """`present []`: 1 here, 0 for a task that answers otherwise."""
        return {"present": ()}

    def settle(self, w: Mapping[str, Tensor]) -> Weights:
        """Present."""
        return {"present": torch.ones(())}

    def channels(self, sizes: Mapping[str, int]) -> tuple[int, None]:
        """As many as it answers with."""
        return self.size, None

    def answer_width(self, sizes: Mapping[str, int]) -> int:
        """See `size`."""
        return self.size

    def branch(self, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        """`x`, or `x / (|x| + eps)`; its length in float32 at least."""
        if not self.unit:
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide / (wide.square().sum(-1, keepdim=True).sqrt() + self.eps)).to(x.dtype)

    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """Nothing to train."""
        return {}
