"""Does every tensor of a task act? How far a step of a tensor's own size moves the answer, and what was found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from ..merge.attach import Tuned

    Live = tuple[str, nn.Parameter, Tensor]  # name, tensor, a step that moves the answer

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


def steps(
    model: Tuned, inputs: Sequence[Tensor], plain: NDArray
) -> list[dict[str, tuple[float, Tensor]]]:
    """Per branch and tensor: how far a step of the tensor's own size moves the logits, and the step.

    The first number is a lower bound to first order, over the largest logit: the slope of a sum of
    logits with random weights, divided by the sum of their sizes (signs alone could cancel exactly
    between rows).

    Args:
        model: One task.
        inputs: Of its backbone.
        plain: Its logits.
    """
    named = [dict(weights) for _, _, weights in model.parts()]
    flat = [p.requires_grad_() for weights in named for p in weights.values()]
    logits = model(*inputs)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    slopes = torch.autograd.grad((weights * logits).sum(), flat, allow_unused=True)
    total = float(weights.abs().sum())
    scale = float(np.abs(plain).max()) or 1.0
    found, at = [], iter(zip(flat, slopes, strict=True))
    for names in named:
        moves = {}
        for name in names:
            parameter, slope = next(at)
            size = float(parameter.detach().double().pow(2).mean().sqrt()) or 0.1
            size *= STEP if name.endswith("_var") else 1.0
            if slope is None:
                moves[name] = (0.0, torch.zeros_like(parameter))
                continue
            moved = size * float(slope.double().abs().sum()) / total / scale
            moves[name] = (moved, size * slope.sign())
        found.append(moves)
    return found
