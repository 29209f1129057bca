"""Is this engine those tasks? Every claim of a bundle, tested against torch.

The reference is each task alone in torch, in float64, in the literal form it was trained in (deep
prompts as tokens). The engine must agree with it, row by row, whatever else is in the batch; and it
must *disagree* with a reference one of whose tensors was changed, or that tensor is not in it.

Torch answers first (`reference`); then the engine runs from its file, whose tensors are mapped, and is opened
anew before much of a bank was read. Every task answers a row, and with `rows` its row
of the bank is compared value by value.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..export.agreement import agreement
from ..export.engine import CPU
from ..export.engine_file import EngineFile
from ..export.mapped import map_file
from ..export.parity import Comparison, Verdict, floor, relative_error
from ..export.precision import HALF, QUANTISED, to_half
from ..export.targets.onnxruntime import OnnxRuntimeSession
from ..merge.inputs import IMAGES
from ..merge.memory import give_back
from .reference import ODD, Evidence, Reference

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from ..export.engine import Device, Session
    from ..merge.backbone import Backbone
    from ..merge.delta import Delta
    from ..merge.rows import Rows as BankRows
    from ..merge.sites import Sites
    from .reference import Rows, Table

    Bank = Mapping[str, NDArray[Any]] | Path

ISOLATED = 4  # tasks that are asked while others hold garbage
BESIDE = 2  # tasks that are not asked: their rows stand among the others' and hold garbage
SHARE = 1 / 8  # of the backbone: what a runtime reads of a bank between two openings
GARBAGE = 3.0  # standard deviation of what replaces other tasks' tensors


def check_engine(
    engine: Path,
    backbone: Backbone,
    deltas: Sequence[Delta],
    sites: Sites,
    *,
    mixes: bool,
    bank: Bank,
    max_batch: int,
    evidence: Evidence,
    device: Device = CPU,
    precision: str = "fp32",
    fans: bool = False,
    rows: BankRows | None = None,
    session: Session | None = None,
) -> Verdict:
    """Run every comparison.

    Args:
        engine: The ONNX file; its tensors are read where they lie.
        backbone: The frozen backbone, float32.
        deltas: The tasks in row order.
        sites: Of the backbone.
        mixes: The engine has a `task` input.
        bank: The bank by input name, or its file, when it is an input; empty otherwise.
        max_batch: Largest batch that the bundle promises.
        evidence: Pictures and noise.
        device: Where the engine runs.
        precision: Numbers that the engine computes in; the budget is that of torch in the same.
        fans: The engine answers every task for every row, `[B, T, ...]`, and takes no task rows.
        rows: What the bank must hold, to be compared value by value; None leaves that out.
        session: The engine as another runtime has built and opened it, which then answers; isolation from
            other tasks' tensors is not asked of it, since its tensors cannot be exchanged.
    """
    reference = Reference(backbone, deltas, sites, evidence, max_batch, precision, fans=fans)
    held = backbone.bytes
    return _Check(
        engine, reference, mixes, bank, device, precision, fans, rows, held, session
    ).run()


class _Check:
    def __init__(
        self,
        engine: Path,
        reference: Reference,
        mixes: bool,
        bank: Bank,
        device: Device,
        precision: str,
        fans: bool,
        rows: BankRows | None,
        held: int,
        session: Session | None,
    ) -> None:
        self.engine, self.reference, self.bank = engine, reference, bank
        self.mixes, self.fans, self.rows, self.held = mixes, fans, rows, held
        self.device, self.precision = device, precision
        self.elsewhere = session is not None
        self.count, self.max_batch = reference.count, reference.max_batch
        self.file: EngineFile | None = None
        self.known: dict[tuple[bool, bytes], NDArray[np.float64]] = {}
        self.tensors: Mapping[str, NDArray[Any]] = {}
        self.open_session: Session | None = session

    def open(self) -> Session:
        """The engine and its bank's tensors, opened unless they are."""
        if self.open_session is None:
            self.file = EngineFile(self.engine)
            given = map_file(self.bank)[1] if isinstance(self.bank, Path) else self.bank
            self.open_session = self.opened(self.file.model(), given)
            self.tensors = given or self.file.bank()
        return self.open_session

    def let_go(self) -> None:
        """Close the engine, and give back what was read of its file and its bank's."""
        if not self.elsewhere:
            self.open_session = self.file = None
            self.tensors = {}
            give_back()

    def opened(self, model: bytes, bank: Mapping[str, NDArray[Any]]) -> Session:
        return OnnxRuntimeSession(
            model,
            self.device,
            bank=bank,
            tf32=self.precision == "tf32",
            as_written=self.precision == "fp8",
            folder=self.engine.resolve().parent,
            in_place=True,
        )

    def run(self) -> Verdict:
        shown, eight = self.reference.shown, self.precision in QUANTISED
        found = self.agreements() if eight else self.parities()
        if self.mixes:
            found.append(self.outside_rows())
        answers, held = self.every_task(shown)
        if self.count > self.max_batch and not eight:
            everything = shown.compare("parity of every task", answers, shown.exact)
            found.insert(sum(c.name.startswith("parity, ") for c in found), everything)
        if self.rows is not None:
            found.append(held)
        if self.mixes and self.count > 1 and not self.elsewhere:
            found.append(self.task_isolation(shown, answers))
        self.let_go()
        found.append(self.liveness(answers))
        return Verdict(tuple(found))

    def parities(self) -> list[Comparison]:
        """Everything that is held to torch within rounding."""
        reference, most = self.reference, self.max_batch
        sizes = sorted({size for size in (1, 2, ODD, most) if size <= most})
        noise, shown = reference.noise, reference.shown
        tables = [noise] if shown is noise else [noise, shown]
        found = [self.parity(table, size) for table in tables for size in sizes]
        if most > 1:
            found.append(self.row_isolation(shown))
        if self.mixes or self.fans:
            found.append(self.permutation(noise))
        if reference.cells is not None:
            found.append(self.every_cell(reference.cells))
        return found

    def agreements(self) -> list[Comparison]:
        """Of an engine in eight bits: its best class and its direction beside torch's, on real pictures."""
        found = []
        for number, delta in enumerate(self.reference.deltas):
            pictures = self.reference.pictures_of(number)
            task = np.full(len(pictures), number)
            cut = range(0, len(task), self.max_batch)
            parts = [slice(at, at + self.max_batch) for at in cut]
            answers = np.concatenate(
                [self.answer({IMAGES: pictures[part]}, task[part]) for part in parts]
            )
            own = slice(self.reference.classes[number])
            found.append(
                agreement(
                    f"agreement of {delta.task} with torch, real images",
                    answers[..., own],
                    self.reference.answers_to(number, pictures),
                    self.reference.evidence.least,
                    classes=len(delta.labels) > 1,
                )
            )
        return found

    # what the engine answers

    def answer(
        self, inputs: Rows, task: NDArray[np.int64], session: Session | None = None
    ) -> NDArray:
        """The engine's logits `[B, ..., K]`; see `own_classes`."""
        session = session or self.open()
        if self.fans:
            logits = session.run(inputs)[np.arange(len(task)), task].astype(np.float64)
        else:
            logits = session.run(inputs, task if self.mixes else None).astype(np.float64)
        return self.own_classes(logits, task)

    def asked(self, table: Table, rows: Sequence[int] | NDArray[np.int64]) -> NDArray:
        """The engine's logits of some rows of a table, as one batch; the same batch is asked once."""
        rows = np.asarray(rows)
        batch = table.real, rows.tobytes()
        if batch not in self.known:
            self.known[batch] = self.answer(self.reference.inputs(table, rows), table.task[rows])
        return self.known[batch]

    def own_classes(self, logits: NDArray, task: NDArray[np.int64]) -> NDArray:
        """Logits with 0 for the classes that a row's task does not have; NaN where one of them could win."""
        classes = self.reference.classes
        found = np.full((*logits.shape[:-1], max(classes)), np.nan)
        for row, number in enumerate(task):
            own, absent = np.split(logits[row], [classes[number]], axis=-1)
            if absent.size and not (absent < own.min(axis=-1, keepdims=True)).all():
                continue  # a class that the task does not have could win
            found[row, ..., : own.shape[-1]] = own
            found[row, ..., classes[number] :] = 0.0
        return found

    # what is compared

    def parity(self, table: Table, size: int) -> Comparison:
        name = f"parity, batch {size}, {'real images' if table.real else 'seeded noise'}"
        rows = np.arange(size)
        return table.compare(name, self.asked(table, rows), table.exact[rows], rows)

    def row_isolation(self, table: Table) -> Comparison:
        rows = np.arange(self.max_batch)
        alone = np.concatenate([self.asked(table, rows[row : row + 1]) for row in rows])
        together = self.asked(table, rows)
        return table.compare("row isolation: mixed batch == one by one", together, alone, rows)

    def permutation(self, table: Table) -> Comparison:
        rows = np.arange(self.max_batch)
        order = np.random.default_rng(self.reference.evidence.seed).permutation(len(rows))
        if (order == rows).all():
            order = np.roll(order, 1)
        straight = self.asked(table, rows)
        shuffled = np.empty_like(straight)
        shuffled[order] = self.asked(table, order)
        return table.compare("permutation of rows and tasks", shuffled, straight, rows)

    def every_cell(self, cells: Table) -> Comparison:
        """Every task of every row of one call."""
        drawn = cells.drawn[: len(cells.drawn) // self.count]
        together = self.open().run(self.reference.inputs(cells, np.arange(len(drawn))))
        flat = np.moveaxis(together, 1, 0).reshape(-1, *together.shape[2:])  # [T B, ..., K]
        found = self.own_classes(flat.astype(np.float64), cells.task)
        return cells.compare("every task of every row", found, cells.exact)

    def outside_rows(self) -> Comparison:
        """A task row that the bank does not have answers NaN, and its neighbours do not notice."""
        tasks = np.array([self.count, 0, -1], dtype=np.int64)[: min(self.max_batch, ODD)]
        logits = self.open().run(
            self.reference.inputs(self.reference.noise, np.arange(len(tasks))), tasks
        )
        outside = (tasks < 0) | (tasks >= self.count)
        quiet = np.isnan(logits[outside]).all() and np.isfinite(logits[~outside]).all()
        return _yes_or_no("task rows outside the bank answer NaN", len(tasks), bool(quiet))

    def every_task(self, table: Table) -> tuple[NDArray, Comparison]:
        """The engine's logits of all rows of a table, and whether every task's tensors are in the bank.

        The latter holds each task's row to what its delta says must be there: every value, not within a
        tolerance.
        """
        answers, wrong, read = [], [], 0
        self.let_go()
        wanted = iter(self.rows if self.rows is not None else ())
        for at in range(0, len(table.task), self.max_batch):
            self.open()
            rows = np.arange(at, min(at + self.max_batch, len(table.task)))
            answers.append(self.asked(table, rows))
            for number, row in zip(rows[rows < self.count], wanted, strict=False):
                wrong += [f"task row {number}: {n}" for n in self.differing(number, row)]
            if self.file is not None:
                self.file.let_go()
            read += sum(tensor[:1].nbytes for tensor in self.tensors.values()) * len(rows)
            if read > SHARE * self.held:
                self.let_go()
                read = 0
        note = f"not as in the delta: {', '.join(wrong[:3])}" if wrong else ""
        name = "every task's tensors in the bank, value by value"
        return np.concatenate(answers), _yes_or_no(name, self.count, not wrong, note)

    def differing(self, number: int, row: Mapping[str, Any]) -> list[str]:
        """Tensors of a task's row that are not in the bank as they must be."""
        found = []
        for key, tensor in row.items():
            name, wanted = f"bank/{key}", tensor.numpy()
            stored = self.tensors.get(name)
            if stored is not None and stored.dtype != wanted.dtype and self.precision in HALF:
                wanted = to_half(wanted, self.precision)[0]
            if stored is None or not np.array_equal(stored[number], wanted):
                found.append(name)
        return found

    def task_isolation(self, table: Table, answers: NDArray) -> Comparison:
        """Other tasks' tensors replaced by garbage: bit for bit the same answers.

        The bank is a short one, of tasks that are asked and of tasks that never are. Those that are asked are
        halved by each bit of their place, so that every pair of them is separated once; all that are not
        asked hold garbage each time.
        """
        asked = self.reference.choose(self.count, ISOLATED)
        others = np.setdiff1d(np.arange(self.count), asked)
        beside = others[self.reference.choose(len(others), BESIDE)]
        there = np.sort(np.concatenate([asked, beside]))
        places = np.searchsorted(there, asked)
        self.let_go()
        file = EngineFile(self.engine)
        given = map_file(self.bank)[1] if isinstance(self.bank, Path) else self.bank
        bank = {name: tensor[there] for name, tensor in (given or file.bank()).items()}
        model = file.with_bank_as_input()
        del file, given
        session = self.opened(model, bank)
        inputs = self.reference.inputs(table, asked)
        before = session.run(inputs, places)
        probe = self.own_classes(before.astype(np.float64), asked)
        same = relative_error(probe, answers[asked]) <= floor(self.precision)
        noise = np.random.default_rng(self.reference.evidence.seed)
        for bit in range(max(1, (len(asked) - 1).bit_length())):
            for kept in (0, 1):
                keep = np.array([(place >> bit) & 1 == kept for place in range(len(asked))])
                if keep.all() or not keep.any():
                    continue
                spoil = np.setdiff1d(np.arange(len(there)), places[keep])
                spoiled = {name: values.copy() for name, values in bank.items()}
                for values in spoiled.values():
                    garbage = GARBAGE * noise.standard_normal(values.shape[1:])
                    values[spoil] = garbage.astype(values.dtype)
                session.replace_bank(spoiled)
                after = session.run(inputs, places)
                same &= np.array_equal(before[keep], after[keep])
                same &= all(  # the garbage did arrive
                    not np.array_equal(b, a)
                    for b, a in zip(before[~keep], after[~keep], strict=True)
                )
        note = f"in a bank of {len(there)} of {self.count} tasks" if len(there) < self.count else ""
        return _yes_or_no(
            "isolation from other tasks' tensors, bit for bit", len(asked), bool(same), note
        )

    def liveness(self, answers: NDArray) -> Comparison:
        """Every tensor moves the answer, and the engine does not agree with a changed one.

        The slope of torch's logits along each tensor says how far a change of the tensor's own size
        would move them; a sample of tensors (all with `every_tensor`) was then really changed, and the
        engine must not agree with torch there. A tensor without slope is inert in the task itself
        (a bias of the keys, say) and is named; a branch of such tensors only fails the check.
        """
        found, looked = self.reference.liveness, self.reference.looked
        for change in self.reference.changes:
            apart = relative_error(answers[change.row : change.row + 1], change.logits)
            if change.moved > 2 * change.seen >= apart:
                found.absent.append(change.name)
        note = f"{found}" if len(looked) == self.count else f"of {len(looked)} tasks: {found}"
        return _yes_or_no(
            "liveness of every tensor", found.tensors, not found.dead and not found.absent, note
        )


def _yes_or_no(name: str, rows: int, passed: bool, note: str = "") -> Comparison:
    return Comparison(name, rows, 0.0 if passed else math.inf, 0.0, 0, passed, note)
