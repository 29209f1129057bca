"""What a frozen trunk computes in: its products and whole attentions, counted in one run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .backbone import Backbone

PRODUCTS = {
    "linear", "conv1d", "conv2d", "conv3d", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm",
    "baddbmm", "einsum",
}  # fmt: skip
ATTENTION = "scaled_dot_product_attention"


class Calls(NamedTuple):
    """Calls of torch in one run of a trunk.

    Attributes:
        gemms: Products of matrices, those inside an attention left out.
        attentions: Whole attentions. Of `torch.nn.MultiheadAttention`, which torch runs as one call of its own, neither
            is seen.
    """

    gemms: int
    attentions: int


class _Counting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.gemms = self.attentions = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        self.gemms += name in PRODUCTS
        self.attentions += name == ATTENTION
        return func(*args, **(kwargs or {}))


def calls_of(backbone: Backbone) -> Calls:
    """Run the frozen trunk once, on random inputs, and count."""
    counting = _Counting()
    with torch.no_grad(), counting:
        backbone.model(*backbone.draw())
    return Calls(counting.gemms, counting.attentions)
