"""What stands behind a trunk: the mean over valid tokens, and a classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ..errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean `[B, C]` of the tokens `[B, N, C]` where the mask `[B, N]` is 1, and not 0."""
    return (x * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def classifier(width: int, classes: int) -> nn.Module:
    """A linear layer, or for 0 classes the identity.

    Raises:
        UsageError: The number is below 0.
    """
    if type(classes) is not int or classes < 0:
        raise UsageError("num_classes is not a number from 0", found=classes)
    return nn.Linear(width, classes) if classes else nn.Identity()
