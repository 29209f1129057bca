"""The formulas, tensor by tensor, float64, on the differences `d_t` of tasks t with weights `w_t`.

Sums run in the order of the list, so that a caller who sorts the tasks has the same bytes for any order.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def weighted_sum(differences: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum_t w_t d_t` (arXiv 2212.04089, section 2)."""
    total = torch.zeros_like(differences[0])
    for difference, weight in zip(differences, weights, strict=True):
        total += weight * difference
    return total


def kept(density: float, count: int) -> int:
    """How many of `count` values a density keeps: the nearest number, halves up, at least one."""
    return max(1, int(density * count + 0.5))


def trim(difference: Tensor, density: float) -> Tensor:
    """The largest magnitudes of a tensor, the others zero.

    Of equal magnitudes at the edge the first in row-major order stay, so that exactly `kept` values do.
    (arXiv 2306.01708, section 4.2, step 1; there over the whole model, here tensor by tensor, so that a
    tensor of small values keeps its share.)
    """
    flat = difference.flatten()
    size = flat.abs()
    count = kept(density, flat.numel())
    edge = size.kthvalue(flat.numel() - count + 1).values
    stays = size > edge
    at_edge = size == edge
    stays |= at_edge & (at_edge.cumsum(0) <= count - stays.sum())
    return torch.where(stays, flat, 0.0).reshape(difference.shape)


def drop(difference: Tensor, density: float, *seed: object) -> Tensor:
    """Each value kept with probability `density` and divided by it, or zero (arXiv 2311.03099, eq. 2).

    Args:
        difference: float64.
        density: `1 - p` of the paper.
        seed: Names the draw: the same seed gives the same values, whatever was drawn before.
    """
    digest = hashlib.sha256(repr(seed).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    drawn = torch.rand(difference.shape, generator=generator, dtype=torch.float64)
    return torch.where(drawn < density, difference / density, 0.0)


def disjoint_mean(differences: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Per value the mean of `w_t d_t` over the tasks that agree with the elected sign.

    (arXiv 2306.01708, section 4.2, steps 2 and 3.) The elected sign is that of `sum_t w_t d_t`, of the larger
    total mass; where both are equal nobody is elected and the value is zero. Zeros do not count in the
    mean. With all weights equal to lambda this is the paper's `lambda * tau_m`.
    """
    elected = weighted_sum(differences, weights).sign()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for difference, weight in zip(differences, weights, strict=True):
        given = weight * difference
        agrees = given.sign() == elected  # where nobody is elected, zeros only
        total += torch.where(agrees, given, 0.0)
        count += agrees
    return total / count.clamp(min=1)
