"""OP(x) + U(x), kept apart: branches joined to an unmodified backbone by forward hooks.

No module of the backbone is replaced and nothing of it is copied. At one point of the backbone,
branches join in the order in which they are listed (a serial branch reads what the ones before it
left), and then the value is what other branches tap. A linear layer whose weight is read by another
module instead of being called (timm's EVA, BEiT and Swin V2) is met where it is read.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import ReadLinears
from .errors import UsageError
from .no_class import NO_CLASS
from .ops import channels_first, patches
from .tokens import Crowd, LongerKeys, Tokens
from .tuner import Branch, Point

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Weighted = tuple[Branch, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Fork:
    """Where one example becomes as many rows as there are tasks.

    Attributes:
        point: In front of it, an input, or behind it, an output, every row is repeated for each task, the
            tasks of one example in turn. In front of it values are only replaced, at seats that the trunk
            reads nothing from. None: in front of the whole model.
        tasks: How many; the leading axis of all weights.
    """

    point: Point | None
    tasks: int


@contextmanager
def joined(
    model: nn.Module,
    branches: Sequence[Weighted],
    rows: int | None = None,
    fork: Fork | None = None,
) -> Iterator[None]:
    """While the block runs, `model` computes with the branches.

    Args:
        model: The frozen backbone.
        branches: Each with its weights; weights with a leading batch axis differ from row to row.
        rows: The batch size when weights carry a batch axis. An op may see several windows or
            frames per image; they are taken to be ordered image by image.
        fork: Every example is answered for every task: the model runs on the examples up to here, and on
            examples times tasks from here on. Weights carry a task axis, and `rows` is not given.

    Raises:
        UsageError: A branch names a module that the model does not have.
    """
    run = _Run(branches, rows, fork)
    handles: list[Any] = []
    try:
        run.add_to_parameters(model)
        paths = {point.module for point in run.points}
        for path in sorted(paths):
            module = submodule(model, path)
            handles.append(module.register_forward_pre_hook(run.enter(path, module)))
            handles.append(module.register_forward_hook(run.leave(path, module)))
        for parent, read in read_inside(model, paths).items():
            seam = ReadLinears({path: model.get_submodule(path) for path in read}, run)
            handles.append(model.get_submodule(parent).register_forward_pre_hook(seam.begin))
            handles.append(
                model.get_submodule(parent).register_forward_hook(seam.end, always_call=True)
            )
        handles.append(model.register_forward_pre_hook(run.begin))
        handles.append(model.register_forward_hook(run.finish))
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


def read_inside(model: nn.Module, paths: set[str]) -> dict[str, list[str]]:
    """Of these modules the linear layers that their parent may read instead of calling, by parent."""
    found: dict[str, list[str]] = {}
    for path in sorted(paths):
        parent = path.rpartition(".")[0]
        if path and isinstance(model.get_submodule(path), nn.Linear):
            code = getattr(type(model.get_submodule(parent)).forward, "__code__", None)
            if code is not None and "linear" in code.co_names:
                found.setdefault(parent, []).append(path)
    return found


def _lowest(answer: Tensor) -> float:
    """Of a class that a task does not have."""
    return max(NO_CLASS, torch.finfo(answer.dtype).min)


class _Taken(NamedTuple):
    """A tapped value, the prompts that were in it, and whether its rows are examples times tasks already."""

    value: Tensor
    prompts: tuple[tuple[int, int], ...]
    forked: bool


class _Run:
    """One forward pass: what was tapped, and what is to be joined where."""

    def __init__(
        self, branches: Sequence[Weighted], rows: int | None, fork: Fork | None = None
    ) -> None:
        self.rows = rows
        self.fork = fork
        self.forked = False
        self.examples: int | None = None
        self.taken: dict[tuple[Point, bool], _Taken] = {}
        self.open: list[LongerKeys] = []
        self.joins: dict[Point, list[Weighted]] = {}
        self.arrivals: dict[Point, list[Weighted]] = {}
        self.parameters: list[Weighted] = []
        self.taps: set[tuple[Point, bool]] = set()
        self.frozen: list[tuple[dict[str, Any], str, Any]] = []
        self.crowd = Crowd(rows)
        self.joined: set[Point] = set()
        self.inside: set[str] = set()
        for branch, weights in branches:
            join = branch.tuner.join
            if join == "weights":
                self.parameters.append((branch, weights))
                continue
            self.joins.setdefault(branch.add, []).append((branch, weights))
            if join == "tokens":
                self.arrivals.setdefault(branch.tap, []).append((branch, weights))
            elif not branch.serial:
                self.taps |= {(point, branch.tuner.reads_map) for point in branch.taps}
        self.points = {point for point, _ in self.taps} | set(self.joins) | set(self.arrivals)
        self.points |= {fork.point} if fork and fork.point else set()

    def add_to_parameters(self, model: nn.Module) -> None:
        """Put `parameter + difference` in the place of each tuned parameter, until `close`.

        Raises:
            UsageError: There is no such parameter.
        """
        for branch, weights in self.parameters:
            module, name = submodule(model, branch.add.module), branch.tuner.parameter  # type: ignore[attr-defined]
            own = module._parameters if name in module._parameters else module._buffers
            if own.get(name) is None:
                raise UsageError(
                    "the backbone has no such parameter",
                    where=f"{branch.add.module}.{name}".lstrip("."),
                    wanted=f"a parameter or buffer of {type(module).__name__}",
                )
            self.frozen.append((own, name, own[name]))
            own[name] = own[name] + branch.tuner.branch(None, weights)

    def enter(self, path: str, module: nn.Module) -> Callable[..., Any]:
        """The hook before a module."""
        extends = self.joins.get(Point(path, "keys"), [])
        arrivals = self.arrivals.get(Point(path, "tokens"), [])
        channel_axis = 1 if channels_first(module) else -1

        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            self.inside.add(path)
            if not args:
                return args
            args = (self._split(Point(path, "input"), args[0]), *args[1:])
            staying = [arrival for arrival in arrivals if not arrival[0].serial]
            value = self._arrive(staying, args[0])
            value = self.at(Point(path, "input"), value, channel_axis)
            if (patched := (Point(path, "patches"), False)) in self.taps:
                self.taken[patched] = _Taken(patches(value, module), (), self.forked)
            value = self._arrive([arrival for arrival in arrivals if arrival[0].serial], value)
            if extends:
                self._require_forked()
                longer = [(branch, self._spread(weights)) for branch, weights in extends]
                self.open.append(LongerKeys(longer, self.rows, self.crowd))
                self.open[-1].__enter__()
            return (value, *args[1:])

        return hook

    def leave(self, path: str, module: nn.Module) -> Callable[..., Any]:
        """The hook behind a module. Of several values that it gives, the first counts."""
        extends = Point(path, "keys") in self.joins
        departures = self.joins.get(Point(path, "tokens"), [])
        channel_axis = 1 if channels_first(module) else -1

        def hook(_: nn.Module, args: tuple[Any, ...], value: Any) -> Any:
            if isinstance(value, tuple):
                return (hook(_, args, value[0]), *value[1:])
            self.inside.discard(path)
            value = self._split(Point(path, "output"), value)
            if extends:
                longer = self.open.pop()
                longer.__exit__(None, None, None)
                if longer.acted:
                    self.joined.add(Point(path, "keys"))
            for branch, weights in reversed(departures):
                value = self.crowd.remove(id(weights), value)
                self.joined.add(branch.add)
            return self.at(Point(path, "output"), value, channel_axis)

        return hook

    def begin(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The hook before the whole backbone: each pass joins anew."""
        self.joined.clear()
        self.taken.clear()
        self.forked = False
        if self.fork:
            self.examples = self.rows = self.crowd.rows = args[0].shape[0]
            args = tuple(self._split(None, value) for value in args)
        return args

    def _split(self, point: Point | None, value: Any) -> Any:
        """At the fork, every row once per task."""
        if self.fork is None or point != self.fork.point:
            return value
        self.forked = True
        value = value.repeat_interleave(self.fork.tasks, 0)
        self.rows = self.crowd.rows = value.shape[0]
        return value

    def _require_forked(self) -> None:
        if self.fork and not self.forked:
            raise ValueError("a branch joins in front of the fork")

    def _spread(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights `[T, ...]` as `[B T, ...]`."""
        if self.fork is None or self.examples is None:
            return weights
        count = self.examples
        return {
            name: tensor[None].expand(count, *tensor.shape).flatten(0, 1)
            for name, tensor in weights.items()
        }

    def _given(self, branch: Branch, weights: Mapping[str, Tensor], read: Sequence[_Taken]) -> Any:
        """What a branch gives to rows of the kind that there are now."""
        tuner, values = branch.tuner, [taken.value for taken in read]
        if self.fork is None:
            return tuner.branch(tuple(values) if branch.others else values[0], weights)
        tasks = self.fork.tasks
        if tuner.broadcasts:  # no copy of a weight per example, and none of a value per task
            values = [
                t.value.unflatten(0, (-1, tasks)) if t.forked else t.value[:, None] for t in read
            ]
            if len({t.forked for t in read}) > 1:  # some taps stand in front of the fork
                values = [v.expand(-1, tasks, *v.shape[2:]) for v in values]
            given = tuner.branch(tuple(values) if branch.others else values[0], weights)
            return given.expand(-1, tasks, *given.shape[2:]).flatten(0, 1)
        values = [t.value if t.forked else t.value.repeat_interleave(tasks, 0) for t in read]
        return tuner.branch(tuple(values) if branch.others else values[0], self._spread(weights))

    def finish(self, model: nn.Module, *_: Any) -> None:
        """The hook behind the whole backbone.

        Raises:
            UsageError: A branch never met its op, so that the answer is not the task's.
        """
        if missed := sorted(str(point) for point in set(self.joins) - self.joined):
            raise UsageError(
                "a branch never acted: the backbone passed its place by",
                where=type(model).__name__,
                found=", ".join(missed[:3]),
            )

    def close(self) -> None:
        """Leave what an interrupted pass left open, give the parameters back, and let go of what was tapped.

        The hooks refer to this object and it to them, so what it holds would stay until such circles are collected.
        """
        self.taken.clear()
        while self.open:
            self.open.pop().__exit__(None, None, None)
        self.crowd.close()
        for own, name, frozen in reversed(self.frozen):
            own[name] = frozen

    def at(self, point: Point, value: Any, channel_axis: int) -> Any:
        """The value at a point with its branches joined, kept for those that tap it."""
        axes = value.dim() if isinstance(value, Tensor) else 0
        forked = self.forked
        alone = value  # what a head reads, whatever heads of other tasks stand there
        for branch, weights in self.joins.get(point, []):
            if branch.tuner.join == "replace":
                value = self._replace(branch, weights, value, alone, channel_axis)
                alone = alone if branch.tuner.answers else value
                forked = self.fork is not None  # at a seat that the trunk reads nothing from
            else:
                alone = value = self._add(branch, weights, value, channel_axis)
            self.joined.add(point)
        if axes == 2 and value.dim() == 3:  # one vector per row again
            value = value.squeeze(1)
        present = self.crowd.present()
        if (point, True) in self.taps:
            self.taken[point, True] = _Taken(value, present, forked)
        if (point, False) in self.taps:
            rows = value.shape[0] if forked and not self.forked else None
            self.taken[point, False] = _Taken(
                self._rows(value, channel_axis, rows), present, forked
            )
        return value

    def _replace(
        self,
        branch: Branch,
        weights: Mapping[str, Tensor],
        value: Tensor,
        alone: Tensor,
        axis: int,
    ) -> Tensor:
        """What a branch gives, in the place of a value; where it is not present, the value.

        It reads the trunk's own tokens: the prompts of other tasks are in the sequence too.
        """
        own = alone if branch.tuner.answers else value
        here = _Taken(self._rows(own, axis), (), self.forked)
        read = [
            here if point == branch.add else self.taken[point, branch.tuner.reads_map]
            for point in branch.taps
        ]
        read = [
            t._replace(value=t.value[:, : t.value.shape[1] - sum(count for _, count in t.prompts)])
            if t.prompts and not branch.tuner.reads_map
            else t
            for t in read
        ]
        given = self._given(branch, weights, read)
        if self.fork and not self.forked:
            value = value.repeat_interleave(self.fork.tasks, 0)
        if value.dim() == 2 and given.shape[1] == 1:
            given = given.squeeze(1)
        elif value.dim() > 3:
            given = given.reshape(*value.shape[:-1], given.shape[-1])
        present = weights.get("present")
        if present is not None and present.dim() > 0:
            present = self._spread({"": present})[""].reshape(-1, *[1] * (given.dim() - 1))
            same = given.shape[1:] == value.shape[1:] and not branch.tuner.answers
            other = _lowest(given) if branch.tuner.answers else torch.nan
            kept = value if same else torch.full_like(given, other)  # never something else's answer
            given = torch.where(present > 0, given, kept)
        if not branch.tuner.answers or branch.add not in self.joined:
            return given
        # Tasks that answer by other kinds of heads: an absent one holds no class.
        widest = max(given.shape[-1], value.shape[-1])
        both = (
            F.pad(answer, (0, widest - answer.shape[-1]), value=_lowest(answer))
            for answer in (value, given)
        )
        return torch.maximum(*both)

    def _arrive(self, arrivals: Sequence[Weighted], value: Tensor) -> Tensor:
        """The sequence with more tokens behind it."""
        if arrivals:
            self._require_forked()
        for branch, weights in arrivals:
            tokens, mask = branch.tuner.branch(value, self._spread(weights))
            tokens = tokens.expand(value.shape[0], *tokens.shape[-2:])
            value = torch.cat([value, tokens], dim=1)
            joint = branch.tuner.joint_softmax  # type: ignore[attr-defined]
            self.crowd.add(id(weights), Tokens(tokens.shape[1], mask, joint))
        return value

    def _add(
        self, branch: Branch, weights: Mapping[str, Tensor], value: Tensor, axis: int
    ) -> Tensor:
        """The value with a branch added.

        Raises:
            ValueError: It stands in front of the fork, where rows are not those of tasks yet.

        Prompts come and go between a tap and the add point: the branch acts on the tokens of both.
        """
        self._require_forked()
        here = self.crowd.present()
        if branch.serial:
            x = value if branch.tuner.reads_map else self._rows(value, axis)
            given = self._given(branch, weights, [_Taken(x, here, self.forked)])
            return value + self._like(given, value, axis)
        taken = [
            _Taken(self._rows(value, axis), here, self.forked)
            if point == branch.add
            else self.taken[point, branch.tuner.reads_map]
            for point in branch.taps
        ]
        if all(t.prompts == here for t in taken) or branch.tuner.reads_map:
            return value + self._like(self._given(branch, weights, taken), value, axis)
        groups = zip(here, *(t.prompts for t in taken), strict=False)
        same = (len(set(group)) == 1 for group in groups)
        shared = sum(itertools.takewhile(bool, same))
        own = value.shape[1] - sum(count for _, count in here[shared:])
        taken = [
            t._replace(value=t.value[:, : t.value.shape[1] - sum(c for _, c in t.prompts[shared:])])
            for t in taken
        ]
        left = value[:, :own]
        given = self._like(self._given(branch, weights, taken), left, axis)
        return torch.cat([left + given, value[:, own:]], dim=1)

    def _rows(self, value: Tensor, channel_axis: int, rows: int | None = None) -> Tensor:
        """`[B, N, C]`, whatever layout, windows or frames the op works in."""
        rows = rows if rows is not None else self.rows
        if channel_axis != -1:
            value = value.movedim(channel_axis, -1)
        if value.dim() == 3 and rows is None:
            return value
        if value.dim() == 2 and (rows is None or value.shape[0] == rows):
            return value[:, None]
        rows = value.shape[0] if rows is None else rows
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
