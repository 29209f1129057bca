"""More keys, and more tokens: what prefixes and prompts do to the attentions of a backbone."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attention import Attention, Seam
from .errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .tuner import Branch

    Weighted = tuple[Branch, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Tokens:
    """A group of tokens in a sequence.

    Attributes:
        count: How many.
        mask: Additive, `[P]` or `[B, P]`, or None.
        joint: They share one softmax with the sequence.
    """

    count: int
    mask: Tensor | None
    joint: bool


class Crowd(Seam):
    """The tokens that stand behind a sequence, in order of arrival.

    While there are any that are masked, or have a softmax of their own, every attention is told so. An
    attention's keys begin with its queries' tokens; what a prefix adds stands behind them.

    Args:
        rows: The batch size when weights carry a batch axis; see `parallel.joined`.
    """

    def __init__(self, rows: int | None) -> None:
        super().__init__()
        self.rows = rows
        self.groups: dict[int, Tokens] = {}
        self.entered = False
        self.absent = False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While the block runs, attentions do not see the sequence, only a prefix."""
        self.absent = True
        try:
            yield
        finally:
            self.absent = False

    def add(self, key: int, tokens: Tokens) -> None:
        """A group arrives behind the others."""
        self.groups[key] = tokens
        self._listen()

    def remove(self, key: int, value: Tensor) -> Tensor:
        """The sequence `[B, N, C]` without a group."""
        behind = sum(
            self.groups[k].count for k in list(self.groups)[list(self.groups).index(key) + 1 :]
        )
        stop = value.shape[1] - behind
        start = stop - self.groups.pop(key).count
        self._listen()
        left = value[:, :start]
        return torch.cat([left, value[:, stop:]], dim=1) if behind else left

    def present(self) -> tuple[tuple[int, int], ...]:
        """The groups in the sequence as it is now, each with its number of tokens."""
        return tuple((key, tokens.count) for key, tokens in self.groups.items())

    def close(self) -> None:
        """Forget all groups."""
        self.groups.clear()
        self._listen()

    def _listen(self) -> None:
        """Be entered exactly while an attention must be told."""
        wanted = any(t.mask is not None or not t.joint for t in self.groups.values())
        if wanted and not self.entered:
            self.__enter__()
        if self.entered and not wanted:
            self.__exit__(None, None, None)
        self.entered = wanted

    def attend(self, call: Attention) -> Tensor:
        """The attention with the groups' masks; a group of its own softmax in a second attention.

        Raises:
            UsageError: The attention does not run on the whole sequence.
        """
        if self.absent:
            return call.run()
        tokens, keys = call.query.shape[-2], call.key.shape[-2]
        start = tokens - sum(t.count for t in self.groups.values())
        if start < 1 or keys < tokens:
            raise UsageError(
                "an attention does not run on the sequence that prompts were added to",
                found=f"{tokens} queries, {keys} keys, {tokens - start} prompts",
            )
        pieces: list[tuple[int, int, Tensor | None, bool]] = [(0, start, None, True)]
        for group in self.groups.values():
            pieces.append((start, start + group.count, group.mask, group.joint))
            start += group.count
        pieces.append((start, keys, None, True))  # what prefixes added
        total = None
        for together in (True, False):
            parts = [p for p in pieces if p[3] == together and p[1] > p[0]]
            for chosen in [parts] if together else [[part] for part in parts]:
                given = self._over(call, chosen).run()
                if not together and chosen[0][2] is not None:
                    given = given * self._present(chosen[0][2], call)
                total = given if total is None else total + given
        assert total is not None
        return total

    def _present(self, mask: Tensor, call: Attention) -> Tensor:
        """`[B', 1, N, 1]`: 0 for a row whose prompts are all padding, which a softmax would still average."""
        return mask_of(mask, call.query, self.rows).amax(dim=-1, keepdim=True).exp()

    def _over(
        self, call: Attention, parts: Sequence[tuple[int, int, Tensor | None, bool]]
    ) -> Attention:
        """The attention over some ranges of its keys only."""
        key, value = (
            torch.cat([t[..., a:b, :] for a, b, _, _ in parts], dim=-2)
            for t in (call.key, call.value)
        )
        mask = None if call.mask is None else _ranges(call.mask, parts)
        if any(own is not None for _, _, own, _ in parts):
            zeros = call.key.new_zeros(())
            owns = [
                zeros.expand(call.query.shape[0], 1, call.query.shape[2], b - a)
                if own is None
                else mask_of(own, call.query, self.rows)
                for a, b, own, _ in parts
            ]
            own = torch.cat(owns, dim=-1)  # [B', 1, N, keys]
            mask = own if mask is None else mask + own
        return replace(call, key=key, value=value, mask=mask)


def _ranges(mask: Tensor, parts: Sequence[tuple[int, int, Any, Any]]) -> Tensor:
    """Some ranges of a mask's keys; a mask that is the same for all keys stays."""
    if mask.shape[-1] == 1:
        return mask
    return torch.cat([mask[..., a:b] for a, b, _, _ in parts], dim=-1)


def mask_of(mask: Tensor, query: Tensor, rows: int | None) -> Tensor:
    """`[L]` or `[B, L]` as `[B', 1, N, L]`, B' the rows that attention works on."""
    batch, _, tokens, _ = query.shape
    mask = mask.to(query.dtype)
    if mask.dim() == 2 and rows is not None and batch != rows:
        mask = _repeat(mask, batch // rows)
    return (mask if mask.dim() == 2 else mask[None])[:, None, None, :].expand(batch, 1, tokens, -1)


class LongerKeys(Seam):
    """Lengthens the keys and values of every attention inside.

    Args:
        branches: Prefixes with their weights.
        rows: The batch size when weights carry a batch axis; see `parallel.joined`.
        crowd: The prompts in the sequence.
    """

    def __init__(self, branches: Sequence[Weighted], rows: int | None, crowd: Crowd) -> None:
        super().__init__()
        self.branches = branches
        self.rows = rows
        self.crowd = crowd
        self.acted = False

    def attend(self, call: Attention) -> Tensor:
        """Attention over the input's keys and the prefixes.

        Raises:
            UsageError: The attention is causal: keys that stand beside a sequence have no order.
        """
        if call.options.get("is_causal"):
            raise UsageError("a prefix cannot join a causal attention")
        self.acted = True
        apart = []
        for branch, weights in self.branches:
            k, v, m = branch.tuner.branch(call.key, weights)
            k, v = (self._heads(t, call.key) for t in (k, v))
            m = None if m is None else mask_of(m, call.query, self.rows)
            if branch.tuner.joint_softmax:  # type: ignore[attr-defined]
                call = replace(
                    call,
                    mask=_longer_mask(call, m, k),
                    key=torch.cat([call.key, k], dim=-2),
                    value=torch.cat([call.value, v], dim=-2),
                )
            else:
                apart.append(replace(call, key=k, value=v, mask=m))
        total = call.run()
        with self.crowd.aside():
            return sum((other.run() for other in apart), total)

    def _heads(self, t: Tensor, key: Tensor) -> Tensor:
        """`[L, C]` or `[B, L, C]` as `[B', H, L, d]`, B' the rows that attention works on."""
        batch, heads, _, width = key.shape
        t = t.unflatten(-1, (heads, width)).transpose(-2, -3)  # [..., H, L, d]
        if t.dim() == 3:
            return t.expand(batch, *t.shape)
        return t if self.rows is None or batch == self.rows else _repeat(t, batch // self.rows)


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
