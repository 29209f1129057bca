"""The bank: branches of T tasks stacked into tensors `[T, ...]`, padded where tasks differ.

Tasks share a slot when their branches have the same place and the same settings. A task without a
branch in a slot holds its neutral element there: zero weights, or keys that the softmax never sees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from .delta import branch_from_json, branch_to_json, widest
from .errors import IncompatibleArtefact, UsageError
from .tuner import Branch, Point, bind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from .delta import Delta
    from .sites import Sites
    from .tuner import Tuner


@dataclass(frozen=True)
class Slot:
    """A place in the bank.

    Attributes:
        name: Starts the names of its tensors.
        branch: Tuner and place, shared by its tasks.
        sizes: Sizes of the symbolic axes; those that may differ are the largest of its tasks.
    """

    name: str
    branch: Branch
    sizes: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """The slot as JSON values."""
        return {**branch_to_json(self.name, self.branch), "sizes": dict(self.sizes)}

    @classmethod
    def from_json(cls, path: Path, entry: Mapping[str, Any]) -> Slot:
        """The slot that `to_json` wrote into the file at `path`.

        Raises:
            IncompatibleArtefact: It cannot be read.
        """
        return cls(entry["name"], branch_from_json(path, entry), dict(entry["sizes"]))

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Shape of one task's padded tensor."""
        axes = self.branch.tuner.served[tensor]
        return tuple(axis if isinstance(axis, int) else self.sizes[axis] for axis in axes)


@dataclass(frozen=True)
class Room:
    """Sizes that a bank has at least, so that larger tasks than its own can be added later.

    Attributes:
        rank: Of branches with a bottleneck or factors.
        classes: Of heads.
        keys: Of prefixes and prompts.
    """

    rank: int = 0
    classes: int = 0
    keys: int = 0

    def least(self, tuner: Tuner) -> int:
        """What the axis `r` of a tuner's slot holds at least."""
        if tuner.answers:
            return self.classes if tuner.kind == "head" else 0
        return self.keys if tuner.kind in ("prefix", "prompt") else self.rank


NO_ROOM = Room()


@dataclass(frozen=True)
class Bank:
    """Stacked tensors.

    Attributes:
        tasks: Task names; a task's place is its row.
        slots: In the order in which they join.
        tensors: `[T, ...]` by `SLOT/TENSOR`.
    """

    tasks: tuple[str, ...]
    slots: tuple[Slot, ...]
    tensors: Mapping[str, Tensor]

    def weighted(
        self, tensors: Mapping[str, Tensor], *, alone: bool = False
    ) -> list[tuple[Branch, dict[str, Tensor]]]:
        """The slots' branches with their weights.

        Args:
            tensors: By `SLOT/TENSOR`, such as the bank's own.
            alone: Of one task, which pads nothing and lacks nothing.
        """
        left_out = {"mask", "present"} if alone else set()
        return [
            (
                slot.branch,
                {
                    n: tensors[f"{slot.name}/{n}"]
                    for n in slot.branch.tuner.served
                    if n not in left_out
                },
            )
            for slot in self.slots
        ]


def stack(
    deltas: Sequence[Delta],
    dtype: torch.dtype | None = None,
    *,
    ranks: Sequence[int] = (),
    room: Room = NO_ROOM,
) -> Bank:
    """The bank of several lowered deltas of one backbone.

    Args:
        deltas: The tasks in row order.
        dtype: Of the bank; the widest of the deltas if None.
        ranks: Ranks that kernels are made for, ascending: every bottleneck's slot is padded to the first that
            holds it, which is exact. A slot beyond the last keeps its own, and so do other tuners' slots:
            their `r` may count classes, or keys.
        room: Sizes that the slots have at least.

    Raises:
        UsageError: No delta, two tasks of one name, or a task that cannot share a batch.
        IncompatibleArtefact: Deltas of different backbones, or with unlike channels at one place.
    """
    slots = slots_of(deltas, ranks=ranks, room=room)
    dtype = dtype or widest([delta.dtype for delta in deltas])
    rows = [fill_row(slots, delta, dtype) for delta in deltas]
    tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return Bank(tuple(delta.task for delta in deltas), slots, tensors)


def slots_of(
    deltas: Sequence[Delta], *, ranks: Sequence[int] = (), room: Room = NO_ROOM
) -> tuple[Slot, ...]:
    """The slots of a bank of these tasks; arguments and errors of `stack`."""
    if not deltas:
        raise UsageError("there is no task", wanted="at least one delta")
    names = [delta.task for delta in deltas]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UsageError("two deltas have one task name", found=", ".join(twice))
    for delta in deltas:
        if delta.backbone.fingerprint != deltas[0].backbone.fingerprint:
            raise IncompatibleArtefact(
                "the deltas belong to different backbones",
                where=f"task {delta.task}",
                wanted=deltas[0].backbone.fingerprint[:16],
                found=delta.backbone.fingerprint[:16],
            )
    if len(deltas) > 1:
        for delta in deltas:
            require_mixable(delta)
    return tuple(_to_rank(_with_room(slot, room), ranks) for slot in _slots(deltas))


def require_mixable(delta: Delta) -> None:
    """Refuse a task that cannot share a batch with other tasks.

    Raises:
        UsageError: A branch cannot differ from row to row.
    """
    for name, branch in delta.branches.items():
        if branch.tuner.no_bank:
            raise UsageError(
                f"task {delta.task} cannot share a batch with other tasks",
                where=name,
                found=f"a {branch.tuner.kind}: {branch.tuner.no_bank}",
                do="export it alone: it folds",
            )


def require_same_values(deltas: Sequence[Delta], sites: Sites) -> None:
    """Refuse tasks that would leave values of unlike channels at one place of a shared batch.

    Raises:
        IncompatibleArtefact: Two tasks replace a value by ones of unlike channels, or one replaces it by one
            that the trunk's own cannot stand beside; or heads that stand side by side are of unlike sizes.
    """
    given = [_replaced(delta) for delta in deltas]
    for point in {point for own in given for point in own}:
        widths = {
            delta.task: own.get(point, sites.channels.get(point))
            for delta, own in zip(deltas, given, strict=True)
        }
        if len(set(widths.values())) > 1:
            _refuse_unlike(f"what stands at {point} has unlike channels", widths)
    if any(not delta.labels and len(delta.heads) > 1 for delta in deltas):
        sizes = {delta.task: tuple(map(delta.answer_width, delta.heads)) for delta in deltas}
        if len(set(sizes.values())) > 1:
            _refuse_unlike("heads that answer side by side are of unlike sizes", sizes)


def _replaced(delta: Delta) -> dict[Point, int | None]:
    """What stands at the points where a task replaces a value: channels, or None for a vector of pooled tokens."""
    return {
        branch.add: branch.tuner.channels(
            bind(branch.tuner.shapes, delta.tensors[name], where=name)
        )[1]
        for name, branch in delta.branches.items()
        if branch.tuner.join == "replace" and not branch.tuner.answers
    }


def _refuse_unlike(what: str, by_task: Mapping[str, object]) -> None:
    shown = ", ".join(f"{task} {value}" for task, value in list(by_task.items())[:4])
    raise IncompatibleArtefact(
        f"{what}, so these tasks cannot share a batch",
        where="tasks of one engine",
        found=shown + (", ..." if len(by_task) > 4 else ""),
        do="export them into bundles of their own",
    )


def fill_row(
    slots: Iterable[Slot], delta: Delta, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """One lowered delta as a row of a bank with these slots, in the bank's dtype (the delta's if None).

    Raises:
        IncompatibleArtefact: A branch has no slot, or is larger than its slot.
    """
    slots = tuple(slots)
    dtype = dtype or delta.dtype
    taken: dict[str, str] = {}
    last: dict[Point, int] = {}
    for name, branch in delta.branches.items():
        at = _next(slots, branch, last)
        if at is None:
            raise IncompatibleArtefact(
                "the bank has no slot for a branch",
                where=f"task {delta.task}: {name}",
                wanted=", ".join(sorted({str(s.branch.add) for s in slots})[:6]) + ", ...",
                found=_unlike(slots, branch),
                do="export the bundle again with this task",
            )
        taken[slots[at].name] = name
        last[branch.add] = at
    row: dict[str, Tensor] = {}
    for slot in slots:
        tuner = slot.branch.tuner
        stored = delta.tensors[taken[slot.name]] if slot.name in taken else None
        settled = tuner.settle(stored) if stored is not None else {}
        for tensor in tuner.served:
            fill = max(tuner.fill.get(tensor, 0.0), torch.finfo(dtype).min)
            padded = torch.full(slot.shape(tensor), fill, dtype=dtype)
            if stored is not None:
                value = settled[tensor]
                if any(have > room for have, room in zip(value.shape, padded.shape, strict=True)):
                    raise IncompatibleArtefact(
                        "a branch is larger than its slot in the bank",
                        where=f"task {delta.task}: {taken[slot.name]}/{tensor}",
                        wanted=f"at most {list(padded.shape)}",
                        found=list(value.shape),
                        do="export the bundle again with this task",
                    )
                padded[tuple(slice(0, size) for size in value.shape)] = value.to(dtype)
            row[f"{slot.name}/{tensor}"] = padded
    return row


def _unlike(slots: Sequence[Slot], branch: Branch) -> str:
    """What keeps a branch out of the slot that is most like it."""
    kind = branch.tuner.kind
    for slot in slots:
        if slot.branch.tuner.kind == kind and slot.branch.add == branch.add:
            own, other = (vars(b.tuner) for b in (branch, slot.branch))
            if differing := [
                f"{n} {own[n]}, the slot has {other[n]}" for n in own if own[n] != other[n]
            ]:
                return f"a {kind} at {branch.add} with {'; '.join(differing)}"
    return f"a {kind} from {branch.tap} to {branch.add}"


def _slots(deltas: Sequence[Delta]) -> tuple[Slot, ...]:
    """The slots that hold every branch of every task.

    At each point they stand in an order that respects each task's own: a serial branch reads what
    the ones before it left.
    """
    slots: list[Slot] = []
    for delta in deltas:
        last: dict[Point, int] = {}
        for name, branch in delta.branches.items():
            sizes = bind(
                branch.tuner.shapes, delta.tensors[name], where=f"task {delta.task}: {name}"
            )
            at = _next(slots, branch, last)
            if at is None:
                used = {slot.name for slot in slots}
                number = next(i for i in range(len(slots) + 1) if f"{name}.{i}" not in used)
                at = _room(slots, branch, last)
                slots.insert(at, Slot(f"{name}.{number}", branch, sizes))
                last = {point: i + (i >= at) for point, i in last.items()} | {branch.add: at}
                continue
            slot = slots[at]
            for axis, size in sizes.items():
                if axis in branch.tuner.padded:
                    sizes[axis] = max(size, slot.sizes[axis])
                elif slot.sizes[axis] != size:
                    raise IncompatibleArtefact(
                        "two tasks disagree about the channels of one place",
                        where=f"task {delta.task}: {name}",
                        wanted=f"{axis}={slot.sizes[axis]}",
                        found=f"{axis}={size}",
                    )
            slots[at] = Slot(slot.name, branch, sizes)
            last[branch.add] = at
    return tuple(slots)


def _with_room(slot: Slot, room: Room) -> Slot:
    """The slot, its `r` no smaller than the room that is wanted; zeros and masks there are exact."""
    tuner, own = slot.branch.tuner, slot.sizes.get("r")
    if own is None or "r" not in tuner.padded or own >= room.least(tuner):
        return slot
    return replace(slot, sizes={**slot.sizes, "r": room.least(tuner)})


def _to_rank(slot: Slot, ranks: Sequence[int]) -> Slot:
    """The slot, a bottleneck's rank padded to one of `ranks`."""
    own = slot.sizes["r"] if slot.branch.tuner.kind == "bottleneck" else None
    wider = next((rank for rank in ranks if own is not None and own <= rank), own)
    return slot if wider == own else replace(slot, sizes={**slot.sizes, "r": wider})


def _next(slots: Sequence[Slot], branch: Branch, last: Mapping[Point, int]) -> int | None:
    """The first slot for a branch behind the one that its task took last at the same point."""
    behind = range(last.get(branch.add, -1) + 1, len(slots))
    return next((i for i in behind if slots[i].branch == branch), None)


def _room(slots: Sequence[Slot], branch: Branch, last: Mapping[Point, int]) -> int:
    """Where a new slot goes: behind the one taken last at its point, in front of the others there.

    No slot behind it holds an equal branch, so the tasks before keep theirs.
    """
    if branch.add in last:
        return last[branch.add] + 1
    return next((i for i, s in enumerate(slots) if s.branch.add == branch.add), len(slots))
