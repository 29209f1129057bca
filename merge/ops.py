"""What a module is to a branch: one linear layer, a reader of patches, an adder of a bias."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from .tuner import CannotFold

if TYPE_CHECKING:
    from .tuner import Place

FORWARDS = (nn.Conv2d.forward, nn.Conv3d.forward)


def is_linear(op: nn.Module, place: Place) -> bool:
    """At this place the op is one linear layer of what a branch reads, its weight flat."""
    return isinstance(op, nn.Linear) if place != "over" else reads_patches(op)


def reads_patches(op: nn.Module) -> TypeGuard[nn.Conv2d | nn.Conv3d]:
    """Each position of a convolution is one linear layer on what it reads."""
    if not isinstance(op, nn.Conv2d | nn.Conv3d) or type(op).forward not in FORWARDS:
        return False  # timm's "same" convolutions pad in their own forward
    if op.groups != 1 or isinstance(op.padding, str):
        return False
    return _side_by_side(op) or (isinstance(op, nn.Conv2d) and op.padding_mode == "zeros")


def _side_by_side(op: nn.Conv2d | nn.Conv3d) -> bool:
    """A convolution's windows neither overlap nor leave anything out between them."""
    return op.kernel_size == op.stride and not any(op.padding) and set(op.dilation) == {1}


def patches(value: Tensor, op: nn.Module) -> Tensor:
    """What each position of a convolution that `reads_patches` reads, `[B, N, C * kernel]`.

    Ordered as its weight is.
    """
    assert isinstance(op, nn.Conv2d | nn.Conv3d)
    assert not isinstance(op.padding, str)
    if not _side_by_side(op):
        return F.unfold(value, op.kernel_size, op.dilation, op.padding, op.stride).mT
    kernel = op.kernel_size
    for axis, size in enumerate(kernel):  # [B, C, n, k, n, k, ...]
        whole = value.shape[2 + 2 * axis] // size * size
        value = value.narrow(2 + 2 * axis, 0, whole).unflatten(2 + 2 * axis, (-1, size))
    counts = range(2, 2 + 2 * len(kernel), 2)
    value = value.permute(0, *counts, 1, *(c + 1 for c in counts))
    return value.flatten(1 + len(kernel)).flatten(1, len(kernel))


def channels_first(module: nn.Module) -> bool:
    """The module works on `[B, C, ...]`."""
    kinds = nn.Conv2d | nn.Conv3d | nn.BatchNorm2d | nn.GroupNorm | LayerNorm2d
    return isinstance(module, kinds)


def adds_bias_last(op: nn.Module) -> bool:
    """The op's output is something plus its bias; timm's norms with an activation are not like that."""
    plain = isinstance(
        op, nn.Linear | nn.Conv2d | nn.Conv3d | nn.LayerNorm | nn.BatchNorm2d | nn.GroupNorm
    )
    return plain and isinstance(getattr(op, "act", None), nn.Identity | type(None))


def op_bias(op: nn.Module) -> Tensor:
    """The op's bias.

    Raises:
        CannotFold: The op was built without one, so a plain checkpoint has no room for it.
    """
    bias = getattr(op, "bias", None)
    if bias is None:
        raise CannotFold("the branch has a constant part and the frozen layer has no bias")
    return bias
