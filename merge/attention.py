"""The seams inside a module: where queries meet keys and values, and where a weight is read.

Every fused attention of torch is one call of `scaled_dot_product_attention`, and a linear layer that is
not called is read by `linear`. A torch function mode sees those calls, so that a prefix can lengthen
keys, a branch can join a layer and a measurement can read both, without touching the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .tuner import Point

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Protocol

    from torch import nn

    class Joins(Protocol):
        """What a pass does at a point."""

        inside: set[str]
        """The modules that are running."""

        def at(self, point: Point, value: Any, channel_axis: int) -> Any:
            """The value with its branches joined."""
            ...


@dataclass(frozen=True)
class Attention:
    """One call of scaled dot product attention.

    Attributes:
        query: `[B, H, N, d]`.
        key: `[B, H, M, d]`.
        value: `[B, H, M, d]`.
        mask: Additive, broadcast to `[B, H, N, M]`, or None.
        options: The other arguments.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: Mapping[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Attention:
        """The call with these arguments; a boolean mask becomes an additive one."""
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key, value = (given.pop(name) for name in names[:3])
        mask = given.pop("attn_mask", None)
        if mask is not None and mask.dtype == torch.bool:
            floor = torch.finfo(query.dtype).min
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, floor)
        return cls(query, key, value, mask, given)

    def run(self) -> Tensor:
        """`[B, H, N, d]`."""
        return F.scaled_dot_product_attention(
            self.query, self.key, self.value, attn_mask=self.mask, **self.options
        )


class Seam(TorchFunctionMode):
    """While it is entered, attentions go through `attend` and linear layers through `linear`."""

    def begin(self, *_: Any) -> None:
        """A hook before a module: from here on."""
        self.__enter__()

    def end(self, *_: Any) -> None:
        """A hook behind a module: up to here."""
        self.__exit__(None, None, None)

    def attend(self, call: Attention) -> Tensor:
        """What the attention gives instead."""
        return call.run()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the linear layer gives instead."""
        return F.linear(x, weight, bias)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.attend(Attention.of(args, kwargs or {}))
        if func is F.linear:
            return self.linear(*_linear(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


class ReadLinears(Seam):
    """Joins branches to linear layers whose weights are read instead of being called.

    Args:
        layers: By path.
        joins: What happens at their points.
    """

    def __init__(self, layers: Mapping[str, nn.Module], joins: Joins) -> None:
        super().__init__()
        self.layers = layers
        self.joins = joins

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with its branches, unless it was called and its hooks have joined them already."""
        for path, layer in self.layers.items():
            if weight is layer.weight and path not in self.joins.inside:
                x = self.joins.at(Point(path, "input"), x, -1)
                return self.joins.at(Point(path, "output"), F.linear(x, weight, bias), -1)
        return F.linear(x, weight, bias)
