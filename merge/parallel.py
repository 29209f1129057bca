"""OP(x) + U(x), kept apart: branches joined to an unmodified backbone by forward hooks.

No module of the backbone is replaced and nothing of it is copied. At one point of the backbone,
branches join in the order in which they are listed (a serial branch reads what the ones before it
left), and then the value is what other branches tap.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .errors import UsageError
from .tuner import Branch, Point

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Weighted = tuple[Branch, Mapping[str, Tensor]]


@contextmanager
def joined(
    model: nn.Module, branches: Sequence[Weighted], rows: int | None = None
) -> Iterator[None]:
    """While the block runs, `model` computes with the branches.

    Args:
        model: The frozen backbone.
        branches: Each with its weights; weights with a leading batch axis differ from row to row.
        rows: The batch size when weights carry a batch axis. An op may see several windows or
            frames per image; they are taken to be ordered image by image.

    Raises:
        UsageError: A branch names a module that the model does not have.
    """
    run = _Run(branches, rows)
    handles: list[Any] = []
    try:
        for path in sorted({point.module for point in run.points}):
            module = submodule(model, path)
            handles.append(module.register_forward_pre_hook(run.enter(path, module)))
            handles.append(module.register_forward_hook(run.leave(path, module)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        run.close()


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path.

    Raises:
        UsageError: There is none.
    """
    try:
        return model.get_submodule(path)
    except AttributeError as cause:
        raise UsageError(
            "the backbone has no such module",
            where=path,
            wanted=f"a module of {type(model).__name__}",
        ) from cause


class _Run:
    """One forward pass: what was tapped, and what is to be joined where."""

    def __init__(self, branches: Sequence[Weighted], rows: int | None) -> None:
        self.rows = rows
        self.taken: dict[Point, Tensor] = {}
        self.open: list[_LongerKeys] = []
        self.joins: dict[Point, list[Weighted]] = {}
        self.taps: set[Point] = set()
        for branch, weights in branches:
            self.joins.setdefault(branch.add, []).append((branch, weights))
            if not branch.serial:
                self.taps.add(branch.tap)
        self.points = self.taps | set(self.joins)

    def enter(self, path: str, module: nn.Module) -> Callable[..., Any]:
        """The hook before a module."""
        extends = self.joins.get(Point(path, "keys"), [])
        tokens = self.joins.get(Point(path, "tokens"), [])

        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            value = self._at(Point(path, "input"), args[0], 1 if channels_first(module) else -1)
            for branch, weights in tokens:
                prompt = branch.tuner.branch(value, weights)
                value = torch.cat([value, prompt.expand(value.shape[0], *prompt.shape[-2:])], dim=1)
            if extends:
                self.open.append(_LongerKeys(extends, self.rows))
                self.open[-1].__enter__()
            return (value, *args[1:])

        return hook

    def leave(self, path: str, module: nn.Module) -> Callable[..., Any]:
        """The hook behind a module."""
        extends = Point(path, "keys") in self.joins
        tokens = sum(w["token"].shape[-2] for _, w in self.joins.get(Point(path, "tokens"), []))

        def hook(_: nn.Module, args: tuple[Any, ...], value: Any) -> Any:
            if extends:
                self.open.pop().__exit__(None, None, None)
            if tokens:
                value = value[:, :-tokens]
            return self._at(Point(path, "output"), value, 1 if channels_first(module) else -1)

        return hook

    def close(self) -> None:
        """Leave what an interrupted pass left open."""
        while self.open:
            self.open.pop().__exit__(None, None, None)

    def _at(self, point: Point, value: Any, channel_axis: int) -> Any:
        for branch, weights in self.joins.get(point, []):
            x = self._rows(value, channel_axis) if branch.serial else self.taken[branch.tap]
            given = branch.tuner.branch(x, weights)
            if branch.tuner.join == "replace":
                value = given.reshape(*value.shape[:-1], given.shape[-1])
            else:
                value = value + self._like(given, value, channel_axis)
        if point in self.taps:
            self.taken[point] = self._rows(value, channel_axis)
        return value

    def _rows(self, value: Tensor, channel_axis: int) -> Tensor:
        """`[B, N, C]`, whatever layout, windows or frames the op works in."""
        if channel_axis != -1:
            value = value.movedim(channel_axis, -1)
        if value.dim() == 3 and self.rows is None:
            return value
        rows = value.shape[0] if self.rows is None else self.rows
        if value.dim() == 3 and value.shape[0] == rows:
            return value
        return value.reshape(rows, -1, value.shape[-1])

    def _like(self, given: Tensor, value: Tensor, channel_axis: int) -> Tensor:
        """A branch's `[B, N, C]` in the layout of the value that it joins."""
        layout = value.shape
        if channel_axis != -1:
            layout = (*layout[:channel_axis], *layout[channel_axis + 1 :], layout[channel_axis])
        if given.dim() == 2:  # one vector for all rows and tokens
            given = given.reshape(*[1] * (len(layout) - 1), layout[-1])
        elif given.shape[1] == 1 and given.shape[0] == layout[0]:  # one vector per row
            given = given.reshape(layout[0], *[1] * (len(layout) - 2), layout[-1])
        elif given.shape != layout:
            tokens = value.numel() // layout[-1] // given.shape[0]
            given = given.expand(given.shape[0], tokens, layout[-1]).reshape(layout)
        return given if channel_axis == -1 else given.movedim(-1, channel_axis)


class _LongerKeys(TorchFunctionMode):
    """Lengthens the keys and values of every scaled dot product attention inside."""

    def __init__(self, branches: Sequence[Weighted], rows: int | None) -> None:
        super().__init__()
        self.branches = branches
        self.rows = rows

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value, mask, options = attention_arguments(args, kwargs)
        apart = []
        for branch, weights in self.branches:
            k, v, m = branch.tuner.branch(key, weights)
            k, v = (self._heads(t, key) for t in (k, v))
            m = None if m is None else self._mask(m, query, k)
            if branch.tuner.joint_softmax:  # type: ignore[attr-defined]
                mask = _longer_mask(mask, m, query, key, k)
                key, value = torch.cat([key, k], dim=-2), torch.cat([value, v], dim=-2)
            else:
                apart.append((k, v, m))
        y = func(query, key, value, attn_mask=mask, **options)
        for k, v, m in apart:
            y = y + func(query, k, v, attn_mask=m, **options)
        return y

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


def attention_arguments(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, dict[str, Any]]:
    """Query, key, value, additive mask and the rest of a scaled dot product attention call.

    Raises:
        UsageError: The attention is causal: keys that stand beside the sequence have no order.
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    options = {**dict(zip(names, args, strict=False)), **kwargs}
    query, key, value = (options.pop(name) for name in names[:3])
    mask = options.pop("attn_mask", None)
    if options.get("is_causal"):
        raise UsageError("a prefix cannot join a causal attention")
    if mask is not None and mask.dtype == torch.bool:
        floor = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, floor)
    return query, key, value, mask, options


def _repeat(t: Tensor, times: Any) -> Tensor:
    """Each row `times` times in turn: the windows of an image follow one another."""
    return t[:, None].expand(t.shape[0], times, *t.shape[1:]).reshape(-1, *t.shape[1:])


def _longer_mask(
    mask: Tensor | None, extra: Tensor | None, query: Tensor, key: Tensor, k: Tensor
) -> Tensor | None:
    """The additive mask over the input's keys and the prefix."""
    if mask is None and extra is None:
        return None
    batch, heads, tokens, _ = query.shape
    shape = (batch, heads if mask is not None and mask.shape[-3] > 1 else 1, tokens)
    if mask is None:
        mask = query.new_zeros(())
    if extra is None:
        extra = query.new_zeros(())
    extra = extra.to(query.dtype)
    return torch.cat(
        [mask.expand(*shape, key.shape[-2]), extra.expand(*shape, k.shape[-2])], dim=-1
    )


def channels_first(module: nn.Module) -> bool:
    """The module works on `[B, C, H, W]`."""
    return isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.GroupNorm | LayerNorm2d)
