"""What torch answers: every task alone, in the engine's precision, and in float64 to say how far off that is.

A task is restored once, answers its rows, shows the slopes of its tensors, and is let go; the trunks are shared by
all tasks and let go behind the last. Of many tasks an even choice, with one of each layout, is looked at closely:
its answers are also computed in float64, and its tensors are moved. The others answer in float32.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..export.agreement import Least
from ..export.parity import Comparison, budget, compare, relative_error
from ..export.precision import HALF
from ..merge.attach import Tuned, answer_shapes, restore
from ..merge.backbone import dtype_of
from ..merge.errors import UsageError
from ..merge.inputs import IMAGES
from ..merge.lower import twin_of
from ..merge.memory import give_back
from .liveness import CLOSELY, LOOKS, SAMPLE, Liveness, Slopes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import nn

    from ..merge.backbone import Backbone
    from ..merge.delta import Delta
    from ..merge.sites import Sites
    from .liveness import Live

    Rows = dict[str, NDArray]  # a batch of the backbone's inputs by name

ODD = 3


@dataclass(frozen=True)
class Evidence:
    """What a check looks at besides seeded noise.

    Attributes:
        images: Preprocessed real pictures or clips, `[n, *input_size]` float32, by task; tasks without
            any use noise.
        seed: Of the noise.
        every_tensor: Really change every tensor for liveness, however long it takes.
        least: How far an engine in eight bits must agree with torch on the pictures.
    """

    images: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    seed: int = 0
    every_tensor: bool = False
    least: Least = field(default_factory=Least)


@dataclass(frozen=True)
class Table:
    """Rows that are asked, and torch's answers to them.

    Attributes:
        real: Whether tasks are shown their own pictures where there are any.
        drawn: `[R]`, the number of each row's input; see `Reference.inputs`.
        task: `[R]`, the task that answers it.
        close: `[R]`, whether `exact` was computed in float64; otherwise it was in float32.
        exact: `[R, ..., K]`, logits in float64; absent classes hold 0.
        typed: The same in the engine's precision.
        precision: That.
    """

    real: bool
    drawn: NDArray[np.int64]
    task: NDArray[np.int64]
    close: NDArray[np.bool_]
    exact: NDArray[np.float64]
    typed: NDArray[np.float64]
    precision: str

    def compare(
        self, name: str, found: NDArray, wanted: NDArray, rows: NDArray[np.int64] | None = None
    ) -> Comparison:
        """Task by task, each on the scale of its own logits; the worst decides.

        Args:
            name: Of the comparison.
            found: Logits of these rows.
            wanted: What they should be.
            rows: Of the table; all if None.
        """
        rows = np.arange(len(self.task)) if rows is None else rows
        task = self.task[rows]
        parts = [
            compare(name, found[own], wanted[own], self._allowed(rows[own]))
            for own in (np.flatnonzero(task == number) for number in np.unique(task))
        ]
        worst = max(parts, key=lambda part: part.error / part.budget)
        close = np.unique(task[self.close[rows]])
        of = f"{len(close)} of {len(parts)} tasks held to float64, the others to float32"
        return replace(
            worst,
            rows=len(task),
            flips=sum(part.flips for part in parts),
            passed=all(part.passed for part in parts),
            note=of if len(close) < len(parts) else worst.note,
        )

    def _allowed(self, rows: NDArray[np.int64]) -> float:
        """The budget of one task's rows.

        Float32 cannot say how far it is off itself: that, and the budget, are the worst of the tasks that float64
        was asked of.
        """
        if self.precision in HALF or self.close[rows].all():
            return budget(self.typed[rows], self.exact[rows], self.precision)
        return self._worst

    @cached_property
    def _worst(self) -> float:
        return max(
            budget(typed, exact, self.precision) + relative_error(typed, exact)
            for typed, exact in (
                (self.typed[self.task == number], self.exact[self.task == number])
                for number in np.unique(self.task[self.close])
            )
        )


class Change(NamedTuple):
    """A tensor that was really changed in torch.

    Attributes:
        name: Task and tensor.
        row: Of the table of all tasks, which is asked.
        logits: `[1, ..., K]`, torch's with the change.
        moved: How far they are from torch's without it.
        seen: What the engine could show at most.
    """

    name: str
    row: int
    logits: NDArray[np.float64]
    moved: float
    seen: float


class Reference:
    """Torch's answers to all rows that an engine is asked.

    Args:
        backbone: The frozen backbone, float32.
        deltas: The tasks in row order.
        sites: Of the backbone.
        evidence: Pictures and noise.
        max_batch: Largest batch.
        precision: Numbers that the engine computes in.
        fans: The engine answers every task for every row.

    Attributes:
        count: Number of tasks.
        classes: Values on the last axis of each task's answer.
        noise: Rows of seeded noise, of which task R asks row R, and on from the first.
        real: The same with real pictures; None where there are none.
        cells: Of a few rows every task's answer, `[T B]`; None unless the engine fans.
        looked: Tasks that were looked at closely.
        liveness: What it found in torch.
        changes: What was really changed, to be held to the engine.
    """

    def __init__(
        self,
        backbone: Backbone,
        deltas: Sequence[Delta],
        sites: Sites,
        evidence: Evidence,
        max_batch: int,
        precision: str,
        *,
        fans: bool,
    ) -> None:
        self.backbone, self.deltas, self.sites = backbone, deltas, sites
        self.evidence, self.max_batch, self.precision = evidence, max_batch, precision
        self.count = len(deltas)
        shapes = answer_shapes(backbone, deltas, sites)
        self.inner = shapes[0][:-1]  # axes of an answer between the row and its values
        self.classes = [shape[-1] for shape in shapes]
        self.looked = self._looked_at()
        every = np.arange(max(self.count, max_batch), dtype=np.int64)
        some = every[:max_batch] if evidence.images else every
        self.noise = self._table(some, some % self.count, real=False)
        self.real = self._table(every, every % self.count, real=True) if evidence.images else None
        few = np.arange(min(max_batch, ODD), dtype=np.int64)
        tasks = np.arange(self.count, dtype=np.int64)
        self.cells = (
            self._table(np.tile(few, self.count), np.repeat(tasks, len(few)), real=False)
            if fans
            else None
        )
        self.liveness = Liveness()
        self.changes: list[Change] = []
        self._answer_exactly()
        give_back()
        self._answer()

    @property
    def shown(self) -> Table:
        """The table of all tasks: with real pictures where there are any."""
        return self.real or self.noise

    def _table(self, drawn: NDArray[np.int64], task: NDArray[np.int64], *, real: bool) -> Table:
        shape = (len(task), *self.inner, max(self.classes))
        close = np.array([self._is_close(number) for number in task.tolist()])
        return Table(real, drawn, task, close, np.zeros(shape), np.zeros(shape), self.precision)

    def _is_close(self, number: int) -> bool:
        """Whether a task answers in float64: it is looked at, or asked in batches of every size."""
        return number in self.looked or number < self.max_batch

    # what is fed

    def inputs(self, table: Table, rows: Sequence[int] | NDArray[np.int64]) -> Rows:
        """Inputs of some rows of a table: seeded noise, or a task's own pictures in turn where there are any."""
        parts = [self._input(int(table.drawn[row]), real=table.real) for row in rows]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _input(self, number: int, *, real: bool) -> Rows:
        """The input of one number, `[1, ...]`; it is the same whatever else is asked."""
        if not self.backbone.pictures:
            drawn = self.backbone.draw(1, seed=self.evidence.seed + number + 1)
            names = [entry.name for entry in self.backbone.inputs]
            return {name: t.numpy() for name, t in zip(names, drawn, strict=True)}
        if real:
            turn, task = divmod(number, self.count)
            pictures = self.evidence.images.get(self.deltas[task].task)
            if pictures is not None and len(pictures):
                return {IMAGES: pictures[turn % len(pictures)][None]}
        noise = np.random.default_rng([self.evidence.seed, number])
        shape = (1, *self.backbone.input_size)
        return {IMAGES: noise.standard_normal(shape, dtype=np.float32)}

    def pictures_of(self, number: int) -> NDArray[np.float32]:
        """A task's own pictures, `[n, *input_size]`.

        Raises:
            UsageError: There are none.
        """
        task = self.deltas[number].task
        pictures = self.evidence.images.get(task)
        if pictures is None:
            raise UsageError(
                f"an engine in {self.precision} is judged by its answers to real pictures",
                where=f"task {task}",
                do="add --images FOLDER",
            )
        return pictures

    # what torch answers

    def answers_to(self, number: int, pictures: NDArray[np.float32]) -> NDArray[np.float64]:
        """A task's logits `[n, ..., K]` of pictures, in float32."""
        model = restore(self.backbone, self.deltas[number], self.sites).eval()
        cut = range(0, len(pictures), self.max_batch)
        parts = [{IMAGES: pictures[at : at + self.max_batch]} for at in cut]
        return np.concatenate([_run(model, part) for part in parts])

    def _answer_exactly(self) -> None:
        """Answer the tasks that are held to float64; its trunk is gone before another is needed."""
        trunk = twin_of(self.backbone.model, torch.float64)
        for number, delta in enumerate(self.deltas):
            if not self._is_close(number):
                continue
            restored = restore(self.backbone, delta, self.sites).eval()
            model = in_dtype(torch.float64, restored, trunk)
            for table, row in self._rows_of(number):
                self._set(table.exact, row, number, _run(model, self.inputs(table, [row])))
            del model, restored
            give_back()

    def _answer(self) -> None:
        """Answer in the engine's precision, the others also in float32, and look at tensors."""
        half = None
        if self.precision in HALF:
            dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
            half = twin_of(self.backbone.model, dtype)
        for number, delta in enumerate(self.deltas):
            model = restore(self.backbone, delta, self.sites).eval()
            typed = model if half is None else in_dtype(dtype_of(half), model, half)
            slopes = Slopes(model) if number in self.looked else None
            plain = slopes and slopes.add(in_torch(self.inputs(self.shown, [number]), model))
            for table, row in self._rows_of(number):
                given = self.inputs(table, [row])
                known = plain if typed is model and table is self.shown and row == number else None
                logits = _run(typed, given) if known is None else known
                self._set(table.typed, row, number, logits)
                if not table.close[row]:
                    whole = logits if typed is model else _run(model, given)
                    self._set(table.exact, row, number, whole)
            if slopes is not None and plain is not None:
                self._look(number, model, slopes, plain)
            del model, typed, slopes
            give_back()

    def _rows_of(self, number: int) -> Iterator[tuple[Table, int]]:
        """The rows of every table that a task answers."""
        for table in (self.noise, self.real, self.cells):
            if table is not None:
                for row in np.flatnonzero(table.task == number).tolist():
                    yield table, row

    def _set(self, into: NDArray[np.float64], row: int, number: int, logits: NDArray) -> None:
        """Keep a task's logits `[1, ..., K]`; those of absent classes stay 0."""
        into[row][..., : self.classes[number]] = logits[0]

    def _look(self, number: int, model: Tuned, slopes: Slopes, plain: NDArray[np.float64]) -> None:
        """The tensors of a task that move its answer; some of them are really changed.

        One row is enough where all tensors move its answer; otherwise it is `LOOKS`.

        Args:
            number: The task.
            model: It.
            slopes: Of its first row.
            plain: `[1, ..., K]`, float32 logits of that.
        """
        table, delta = self.shown, self.deltas[number]
        own = slice(self.classes[number])
        exact, typed = (t[number : number + 1, ..., own] for t in (table.exact, table.typed))
        allowed = budget(plain, exact, "fp32")
        visible = max(allowed, budget(typed, exact, self.precision))  # what the engine could show
        for look in range(1, min(LOOKS, self.max_batch)):
            if all(far > 2 * allowed for named in slopes.moved() for far, _ in named.values()):
                break
            further = self._input(number + look * self.count, real=table.real)
            slopes.add(in_torch(further, model))
        live: list[Live] = []
        for (branch, _, weights), moved in zip(model.parts(), slopes.moved(), strict=True):
            moves = [name for name, (far, _) in moved.items() if far > 2 * allowed]
            self.liveness.tensors += len(moved)
            self.liveness.inert += [f"{delta.task}: {branch}/{n}" for n in moved if n not in moves]
            if moved and not moves and delta.branches[branch].tuner.kind != "bias":
                self.liveness.dead.append(f"{delta.task}: {branch}")  # a shift of keys does nothing
            live += [
                (f"{branch}/{n}", weights[n], moved[n][1])
                for n in moves
                if moved[n][0] > 2 * visible
            ]
        first = self.inputs(table, [number])
        for name, parameter, step in self._sample(live):
            before = parameter.data
            parameter.data = before + step
            logits = _run(model, first)
            parameter.data = before
            self.liveness.changed += 1
            padded = np.zeros((1, *self.inner, max(self.classes)))
            padded[..., own] = logits
            far = relative_error(logits, plain)
            self.changes.append(Change(f"{delta.task}: {name}", number, padded, far, visible))

    def _looked_at(self) -> list[int]:
        """Of many tasks some that every batch asks, an even choice of all, and one of each layout at least."""
        if self.evidence.every_tensor or self.count <= CLOSELY:
            return list(range(self.count))
        first = {delta.layout: number for number, delta in reversed(list(enumerate(self.deltas)))}
        asked = range(min(self.max_batch, CLOSELY // 2))
        others = self.choose(self.count, CLOSELY - len(asked)).tolist()
        return sorted({*first.values(), *asked, *others})

    def _sample(self, live: Sequence[Live]) -> Sequence[Live]:
        """The tensors of one task to change: all, or an even choice."""
        share = max(2, SAMPLE // len(self.looked))
        if self.evidence.every_tensor or len(live) <= share:
            return live
        return [live[index] for index in self.choose(len(live), share)]

    def choose(self, count: int, share: int) -> NDArray[np.int64]:
        """`share` of `count` numbers, in order; the same for the same seed."""
        if share >= count:
            return np.arange(count, dtype=np.int64)
        drawn = np.random.default_rng(self.evidence.seed).choice(count, share, replace=False)
        return np.sort(drawn).astype(np.int64)


def _run(model: Tuned, inputs: Rows) -> NDArray[np.float64]:
    with torch.no_grad():
        return model(*in_torch(inputs, model)).double().numpy()


def in_torch(inputs: Rows, model: Tuned) -> list[torch.Tensor]:
    """A batch as tensors, real numbers in the model's dtype."""
    tensors = (torch.from_numpy(values) for values in inputs.values())
    dtype = dtype_of(model.trunk)
    return [t.to(dtype) if t.is_floating_point() else t for t in tensors]


def in_dtype(dtype: torch.dtype, model: Tuned, trunk: nn.Module) -> Tuned:
    """The tuned model in another dtype, over a shared trunk of that dtype."""
    shared = model.trunk
    twin = copy.deepcopy(model, {id(shared): trunk, id(model.backbone): model.backbone})
    return twin.to(dtype)
