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

from .attention import LongerKeys
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
        self.open: list[LongerKeys] = []
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
                self.open.append(LongerKeys(extends, self.rows))
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


def channels_first(module: nn.Module) -> bool:
    """The module works on `[B, C, H, W]`."""
    return isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.GroupNorm | LayerNorm2d)
