"""One example, every task: a trunk that runs once as far as tasks agree on it.

A task leaves the trunk alone up to the first place where one of its branches joins. There the example forks
into as many rows as there are tasks (`parallel.Fork`), and from there on it is a batch that mixes tasks. A
side network joins at the classifier, so all of the trunk is shared; a task that is tuned from block k on
shares the blocks below.

Where a fork is possible is measured: a place inside a residual branch, or inside windows, does not pass, and
the module around it is tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .bank import Bank, stack
from .errors import UtuneError
from .no_class import NO_CLASS
from .parallel import Fork, joined
from .tuner import Point

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .backbone import Backbone
    from .delta import Delta
    from .sites import Sites
    from .tuner import Branch

AGREES = 1e-3  # relative, float32: a wrong fork is wrong by far more
OTHER = 0.75  # times a task's tensors is another task


@dataclass(frozen=True)
class Group:
    """Tasks that part from the trunk at one place.

    Attributes:
        fork: Where; None for tasks that share nothing with others.
        bank: Their tensors.
        rows: Their places among all tasks.
    """

    fork: Point | None
    bank: Bank
    rows: tuple[int, ...]


def share(
    backbone: Backbone,
    deltas: Sequence[Delta],
    sites: Sites,
    dtype: torch.dtype | None = None,
) -> tuple[Group, ...]:
    """The groups of several lowered deltas, the one that shares most first.

    Args:
        backbone: The frozen backbone.
        deltas: The tasks in row order.
        sites: Of the backbone.
        dtype: Of the banks; the widest of the deltas if None.

    Raises:
        UsageError: See `bank.stack`.
        IncompatibleArtefact: See `bank.stack`.
    """
    known: dict[frozenset[Branch], Point | None] = {}
    members: dict[Point | None, list[int]] = {}
    alone: list[int] = []
    for row, delta in enumerate(deltas):
        if any(branch.tuner.no_bank for branch in delta.branches.values()):
            alone.append(row)
            continue
        kind = frozenset(delta.branches.values())
        if kind not in known:
            known[kind] = _fork(backbone, delta, _joins(delta, sites), sites)
        members.setdefault(known[kind], []).append(row)
    order = list(sites.channels)
    forks = sorted(members, key=lambda fork: -1 if fork is None else order.index(fork))[::-1]
    groups = [
        Group(fork, stack([deltas[row] for row in members[fork]], dtype), tuple(members[fork]))
        for fork in forks
    ]
    return (*groups, *(Group(None, stack([deltas[row]], dtype), (row,)) for row in alone))


def _joins(delta: Delta, sites: Sites) -> tuple[Point, ...]:
    """Where values change, as an example passes these points."""
    order = list(sites.channels)
    points = [b.tap if b.tuner.join == "tokens" else b.add for b in delta.branches.values()]
    passed = {Point(p.module, "input") if p.side in ("tokens", "keys") else p for p in points}
    return tuple(sorted(passed, key=order.index))


def _fork(backbone: Backbone, delta: Delta, joins: Sequence[Point], sites: Sites) -> Point | None:
    """Where examples can fork: at the first join, or in front of a module around it.

    A later join comes into question where the ones before it stand at seats that the trunk reads nothing from.
    """
    for first in joins:
        path = first.module
        candidates = [first]
        while path:
            candidates.append(Point(path, "input"))
            path = path.rpartition(".")[0]
        for point in candidates:
            if sites.calls.get(point, 0) == 1 and _works(backbone, delta, point):
                return point
    return None


def _works(backbone: Backbone, delta: Delta, point: Point) -> bool:
    """Two examples, each for the task and for one with other numbers, give the answers of both."""
    bank = stack([delta])
    two = {
        name: torch.cat([tensor, OTHER * tensor]).to(backbone.dtype)
        for name, tensor in bank.tensors.items()
    }
    inputs, trunk = backbone.draw(batch=2), backbone.model
    try:
        with torch.no_grad():
            with joined(trunk, bank.weighted(two), fork=Fork(point, 2)):
                forked = trunk(*inputs)
            plain = []
            for row in range(2):
                alone = {name: tensor[row] for name, tensor in two.items()}
                with joined(trunk, bank.weighted(alone)):
                    plain.append(trunk(*inputs))
    except (RuntimeError, ValueError, UtuneError):
        return False
    wanted = torch.stack(plain, dim=1).flatten(0, 1)
    if forked.shape != wanted.shape:
        return False
    return bool((forked - wanted).abs().max() <= AGREES * wanted.abs().max())


class FanOut(nn.Module):
    """A frozen backbone whose every example is answered for every task.

    Args:
        backbone: The frozen backbone, shared.
        groups: See `share`.
    """

    order: Tensor

    def __init__(self, backbone: Backbone, groups: Sequence[Group]) -> None:
        super().__init__()
        self.trunk = backbone.model
        self.groups = tuple(groups)
        for number, group in enumerate(groups):
            for index, tensor in enumerate(group.bank.tensors.values()):
                self.register_buffer(f"bank_{number}_{index}", tensor)
        rows = [row for group in groups for row in group.rows]
        self.register_buffer("order", torch.tensor(rows).argsort())

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits `[B, T, K]`, K the largest class count; tasks in the order of their rows."""
        answers = [self._group(number, inputs) for number in range(len(self.groups))]
        widest = max(answer.shape[-1] for answer in answers)
        padded = [
            nn.functional.pad(answer, (0, widest - answer.shape[-1]), value=NO_CLASS)
            for answer in answers
        ]
        together = torch.cat(padded, dim=1)
        return together if len(padded) == 1 else together.index_select(1, self.order)

    def _group(self, number: int, inputs: tuple[Tensor, ...]) -> Tensor:
        """Logits `[B, T, K]` of one group."""
        group = self.groups[number]
        names = list(group.bank.tensors)
        tensors = {n: self.get_buffer(f"bank_{number}_{i}") for i, n in enumerate(names)}
        count = len(group.rows)
        if count == 1:
            alone = {name: tensor[0] for name, tensor in tensors.items()}
            with joined(self.trunk, group.bank.weighted(alone, alone=True)):
                return self.trunk(*inputs)[:, None]
        with joined(self.trunk, group.bank.weighted(tensors), fork=Fork(group.fork, count)):
            logits = self.trunk(*inputs)
        return logits.unflatten(0, (-1, count))
