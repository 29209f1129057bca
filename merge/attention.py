"""The seam inside an attention: where queries meet keys and values.

Every fused attention of torch is one call of `scaled_dot_product_attention`. A torch function mode sees
that call, so that a prefix can lengthen its keys and a measurement can read them, without touching the
module that makes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .tuner import Branch

    Weighted = tuple[Branch, Mapping[str, Tensor]]


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
    """While it is entered, every attention goes through `attend`."""

    def attend(self, call: Attention) -> Tensor:
        """What the attention gives instead."""
        return call.run()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.attend(Attention.of(args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class LongerKeys(Seam):
    """Lengthens the keys and values of every attention inside.

    Args:
        branches: Prefixes with their weights.
        rows: The batch size when weights carry a batch axis; see `parallel.joined`.
    """

    def __init__(self, branches: Sequence[Weighted], rows: int | None) -> None:
        super().__init__()
        self.branches = branches
        self.rows = rows

    def attend(self, call: Attention) -> Tensor:
        """Attention over the input's keys and the prefixes.

        Raises:
            UsageError: The attention is causal: keys that stand beside a sequence have no order.
        """
        if call.options.get("is_causal"):
            raise UsageError("a prefix cannot join a causal attention")
        apart = []
        for branch, weights in self.branches:
            k, v, m = branch.tuner.branch(call.key, weights)
            k, v = (self._heads(t, call.key) for t in (k, v))
            m = None if m is None else self._mask(m, call.query, k)
            if branch.tuner.joint_softmax:  # type: ignore[attr-defined]
                call = replace(
                    call,
                    mask=_longer_mask(call, m, k),
                    key=torch.cat([call.key, k], dim=-2),
                    value=torch.cat([call.value, v], dim=-2),
                )
            else:
                apart.append(replace(call, key=k, value=v, mask=m))
        return sum((other.run() for other in apart), call.run())

    def _heads(self, t: Tensor, key: Tensor) -> Tensor:
        """`[L, C]` or `[B, L, C]` as `[B', H, L, d]`, B' the rows that attention works on."""
        batch, heads, _, width = key.shape
        t = t.unflatten(-1, (heads, width)).transpose(-2, -3)  # [..., H, L, d]
        if t.dim() == 3:
            return t.expand(batch, *t.shape)
        return t if self.rows is None or batch == self.rows else _repeat(t, batch // self.rows)

    def _mask(self, m: Tensor, query: Tensor, k: Tensor) -> Tensor:
        """`[L]` or `[B, L]` as `[B', 1, N, L]`."""
        batch, _, tokens, _ = query.shape
        if m.dim() == 2 and self.rows is not None and batch != self.rows:
            m = _repeat(m, batch // self.rows)
        m = m[..., None, None, :] if m.dim() == 2 else m
        return m.expand(batch, 1, tokens, k.shape[-2])


def _repeat(t: Tensor, times: Any) -> Tensor:
    """Each row `times` times in turn: the windows of an image follow one another."""
    return t[:, None].expand(t.shape[0], times, *t.shape[1:]).reshape(-1, *t.shape[1:])


def _longer_mask(call: Attention, extra: Tensor | None, k: Tensor) -> Tensor | None:
    """The additive mask over the call's keys and `k`."""
    if call.mask is None and extra is None:
        return None
    batch, heads, tokens, _ = call.query.shape
    per_head = call.mask is not None and call.mask.shape[-3] > 1
    shape = (batch, heads if per_head else 1, tokens)
    none = call.query.new_zeros(())
    mask = none if call.mask is None else call.mask
    extra = none if extra is None else extra.to(call.query.dtype)
    return torch.cat(
        [mask.expand(*shape, call.key.shape[-2]), extra.expand(*shape, k.shape[-2])], dim=-1
    )
