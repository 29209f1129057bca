"""Does every tensor of a task act? How far a step of a tensor's own size moves the answer, and what was found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from ..merge.attach import Tuned

    Live = tuple[str, nn.Parameter, Tensor]  # name, tensor, a step that moves the answer

LOOKS = 4  # rows that are looked at: a ReLU may be silent on one of them
CLOSELY = 12  # tasks whose tensors are moved and whose answers are computed in float64
SAMPLE = 24  # tensors that are really changed, besides measuring the slope of all
STEP = 0.5  # of a tensor's size: a variance that it is taken from stays above zero


@dataclass
class Liveness:
    """What was found.

    Attributes:
        tensors: How many were looked at.
        changed: How many were really changed.
        inert: Those without visible effect in torch either.
        dead: Branches of such tensors only.
        absent: Tensors that the engine does not hold.
    """

    tensors: int = 0
    changed: int = 0
    inert: list[str] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"slope of {self.tensors} tensors, {self.changed} changed one by one"]
        for what, names in (
            ("without visible effect in torch either", self.inert),
            ("branches without any effect in torch either: train or drop them", self.dead),
            ("not in the engine", self.absent),
        ):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                parts.append(f"{what}: {', '.join(names[:3])}{more}")
        return "; ".join(parts)


class Slopes:
    """How far a step of each tensor's own size moves the logits of some rows, and the step.

    A lower bound to first order, over the largest logit: the slope of a sum of logits with random weights,
    divided by the sum of their sizes (signs alone could cancel exactly between rows). Rows are added one at a
    time: the slope of their sum is the sum of their slopes.

    Args:
        model: One task.
    """

    def __init__(self, model: Tuned) -> None:
        self._model = model
        self._named = [dict(weights) for _, _, weights in model.parts()]
        self._flat = [p.requires_grad_() for weights in self._named for p in weights.values()]
        self._slopes: list[Tensor | None] = [None] * len(self._flat)
        self._random = torch.Generator().manual_seed(0)
        self._total, self._scale = 0.0, 0.0

    def add(self, inputs: Sequence[Tensor]) -> NDArray[np.float64]:
        """Look at one more row of the backbone's inputs, `[1, ...]` each; its logits."""
        logits = self._model(*inputs)
        weights = torch.randn(logits.shape, generator=self._random)
        given = torch.autograd.grad((weights * logits).sum(), self._flat, allow_unused=True)
        self._slopes = [
            new if old is None else old if new is None else old + new
            for old, new in zip(self._slopes, given, strict=True)
        ]
        self._total += float(weights.abs().sum())
        self._scale = max(self._scale, float(logits.detach().abs().max()))
        return logits.detach().double().numpy()

    def moved(self) -> list[dict[str, tuple[float, Tensor]]]:
        """Per branch and tensor, how far it moves the logits, and the step."""
        found, at = [], iter(zip(self._flat, self._slopes, strict=True))
        for names in self._named:
            moves = {}
            for name in names:
                parameter, slope = next(at)
                size = float(parameter.detach().double().pow(2).mean().sqrt()) or 0.1
                size *= STEP if name.endswith("_var") else 1.0
                if slope is None:
                    moves[name] = (0.0, torch.zeros_like(parameter))
                    continue
                far = size * float(slope.double().abs().sum()) / self._total / (self._scale or 1.0)
                moves[name] = (far, size * slope.sign())
            found.append(moves)
        return found
