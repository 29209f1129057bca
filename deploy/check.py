"""Is this engine those tasks? Every claim of a bundle, tested against torch.

The reference is each task alone in torch, in float64, in the literal form it was trained in (deep
prompts as tokens). The engine must agree with it, row by row, whatever else is in the batch; and it
must *disagree* with a reference one of whose tensors was changed, or that tensor is not in it.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx
import torch

from ..export.agreement import Least, agreement
from ..export.engine import CPU
from ..export.parity import Comparison, Verdict, budget, compare, floor, relative_error
from ..export.precision import HALF, QUANTISED
from ..export.targets.onnxruntime import OnnxRuntimeSession
from ..merge.attach import answer_shapes, restore
from ..merge.backbone import dtype_of
from ..merge.errors import IncompatibleArtefact, MissingDependency, UsageError
from ..merge.inputs import IMAGES
from .liveness import SAMPLE, Liveness, steps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch import nn

    from ..export.bundle import Bundle
    from ..export.engine import Device, Session
    from ..merge.attach import Tuned
    from ..merge.backbone import Backbone
    from ..merge.delta import Delta
    from ..merge.sites import Sites
    from .liveness import Live

    Rows = dict[str, NDArray]  # a batch of the backbone's inputs by name

ODD = 3
LOOKS = 4  # images that liveness looks at: a ReLU may be silent on one of them
ISOLATED = 8  # tasks that are asked while others hold garbage
KEPT = 8  # tasks whose torch models are kept at hand: one of many takes as much as its delta, three times
GARBAGE = 3.0  # standard deviation of what replaces other tasks' tensors


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


def check_engine(
    engine: bytes,
    backbone: Backbone,
    deltas: Sequence[Delta],
    sites: Sites,
    *,
    mixes: bool,
    bank: Mapping[str, NDArray[Any]],
    max_batch: int,
    evidence: Evidence,
    device: Device = CPU,
    precision: str = "fp32",
    fans: bool = False,
    session: Session | None = None,
) -> Verdict:
    """Run every comparison.

    Args:
        engine: The ONNX file.
        backbone: The frozen backbone, float32.
        deltas: The tasks in row order.
        sites: Of the backbone.
        mixes: The engine has a `task` input.
        bank: The bank by input name, when it is an input.
        max_batch: Largest batch that the bundle promises.
        evidence: Pictures and noise.
        device: Where the engine runs.
        precision: Numbers that the engine computes in; the budget is that of torch in the same.
        fans: The engine answers every task for every row, `[B, T, ...]`, and takes no task rows.
        session: The engine as another runtime has built and opened it, which then answers; isolation from
            other tasks' tensors is not asked of it, since its tensors cannot be exchanged.
    """
    return _Check(
        engine,
        backbone,
        deltas,
        sites,
        mixes,
        bank,
        max_batch,
        evidence,
        device,
        precision,
        fans,
        session,
    ).run()


def require_runnable(precision: str, device: Device) -> None:
    """Refuse a precision that the device cannot run, before anything is built.

    Raises:
        UsageError: The CPU has no TF32.
        MissingDependency: ONNX Runtime's CPU provider has no bfloat16 products, its CUDA provider none in eight bits.
    """
    if precision in QUANTISED and device.provider == "cuda":
        raise MissingDependency(
            f"ONNX Runtime's CUDA provider has no products in {precision}, and would compute them in float32",
            wanted="--provider cpu, or --target tensorrt",
            found="--provider cuda",
        )
    if precision == "tf32" and device.provider == "cpu":
        raise UsageError(
            "TF32 is a mode of a CUDA device's products",
            wanted="--provider cuda",
            found="--provider cpu",
            do="export on a machine with a CUDA device, or use --precision fp32",
        )
    if precision == "bf16" and device.provider == "cpu":
        raise MissingDependency(
            "a bf16 engine can be checked on a CUDA device only, and nothing ships unchecked",
            wanted="--provider cuda",
            found="--provider cpu, whose products are not made for bfloat16",
            do="export on a machine with a CUDA device, or use --precision fp16",
        )


def require_same_backbone(bundle: Bundle, backbone: Backbone) -> None:
    """Hold a bundle to a backbone.

    Raises:
        IncompatibleArtefact: The bundle was exported from another one.
    """
    if bundle.backbone["fingerprint"] != backbone.identity.fingerprint:
        raise IncompatibleArtefact(
            "the bundle was exported from another backbone",
            where=bundle.path,
            wanted=f"{bundle.backbone['architecture']} {bundle.backbone['fingerprint'][:16]}",
            found=f"{backbone.identity.architecture} {backbone.identity.fingerprint[:16]}",
            do="load the weights that it was exported from",
        )


def require_tasks(bundle: Bundle, deltas: Mapping[str, Delta]) -> list[Delta]:
    """The deltas of a bundle's tasks, in row order.

    Args:
        bundle: The bundle.
        deltas: By the SHA-256 of their files.

    Raises:
        IncompatibleArtefact: A task's delta is not among them, or one is of no task.
    """
    wanted = {task.delta: task.name for task in bundle.tasks}
    for digest, delta in deltas.items():
        if digest not in wanted:
            raise IncompatibleArtefact(
                "a delta is not one that the bundle was exported from",
                where=f"task {delta.task}",
                wanted=", ".join(f"{name} {key[:16]}" for key, name in wanted.items()),
                found=digest[:16],
            )
    if missing := [name for key, name in wanted.items() if key not in deltas]:
        raise IncompatibleArtefact(
            "the deltas of some tasks are not given",
            where=bundle.path,
            wanted=", ".join(missing),
            do="name the delta of every task of the bundle",
        )
    return [deltas[task.delta] for task in bundle.tasks]


class _Check:
    def __init__(
        self,
        engine: bytes,
        backbone: Backbone,
        deltas: Sequence[Delta],
        sites: Sites,
        mixes: bool,
        bank: Mapping[str, NDArray[Any]],
        max_batch: int,
        evidence: Evidence,
        device: Device,
        precision: str,
        fans: bool,
        session: Session | None,
    ) -> None:
        self.fans = fans
        self.elsewhere = session is not None
        self.engine, self.backbone, self.deltas, self.sites = engine, backbone, deltas, sites
        self.mixes, self.bank, self.max_batch = mixes, bank, max_batch
        self.evidence, self.device, self.precision = evidence, device, precision
        self.session = session or self.open(engine, bank)
        self.double = copy.deepcopy(backbone.model).double()
        self.half: nn.Module | None = None
        if precision in HALF:
            half = torch.float16 if precision == "fp16" else torch.bfloat16
            self.half = copy.deepcopy(backbone.model).to(half)
        self.torch = lru_cache(KEPT)(self.task_in_torch)
        self.cases: dict[tuple[int, bool], _Case] = {}
        shapes = answer_shapes(backbone, deltas, sites)
        self.inner = shapes[0][:-1]  # axes of an answer between the row and its values
        self.classes = [shape[-1] for shape in shapes]

    def task_in_torch(self, number: int) -> _Torch:
        """One task over the shared trunks."""
        model = restore(self.backbone, self.deltas[number], self.sites).eval()
        typed = model if self.half is None else in_dtype(dtype_of(self.half), model, self.half)
        return _Torch(model, in_dtype(torch.float64, model, self.double), typed)

    def open(self, engine: bytes, bank: Mapping[str, NDArray[Any]]) -> Session:
        return OnnxRuntimeSession(
            engine,
            self.device,
            bank=bank,
            tf32=self.precision == "tf32",
            as_written=self.precision == "fp8",
        )

    def run(self) -> Verdict:
        if self.precision in QUANTISED:
            return Verdict(tuple(self.quantised()))
        sizes = sorted({size for size in (1, 2, ODD, self.max_batch) if size <= self.max_batch})
        found = [self.parity(size, real=False) for size in sizes]
        if self.evidence.images:
            found.extend(self.parity(size, real=True) for size in sizes)
        if len(self.deltas) > self.max_batch:
            found.append(self.every_task())
        if self.max_batch > 1:
            found.append(self.row_isolation())
        if self.mixes or self.fans:
            found.append(self.permutation())
        if self.fans:
            found.append(self.every_cell())
        if self.mixes:
            found.append(self.outside_rows())
            if len(self.deltas) > 1 and not self.elsewhere:
                found.append(self.task_isolation())
        found.append(self.liveness())
        return Verdict(tuple(found))

    def quantised(self) -> list[Comparison]:
        """Of an engine in eight bits: agreement with torch on pictures in place of parity, and what is exact."""
        found = []
        for number, delta in enumerate(self.deltas):
            pictures = self.evidence.images.get(delta.task)
            if pictures is None:
                raise UsageError(
                    f"an engine in {self.precision} is judged by its answers to real pictures",
                    where=f"task {delta.task}",
                    do="add --images FOLDER",
                )
            inputs, task = {IMAGES: pictures}, np.full(len(pictures), number)
            cut = range(0, len(task), self.max_batch)
            parts = [np.arange(at, min(at + self.max_batch, len(task))) for at in cut]
            answers = np.concatenate([self.answer(chosen(inputs, p), task[p]) for p in parts])
            (reference,) = self.reference(inputs, task, "model")
            own = slice(self.classes[number])
            found.append(
                agreement(
                    f"agreement of {delta.task} with torch, real images",
                    answers[..., own],
                    reference[..., own],
                    self.evidence.least,
                    classes=len(delta.labels) > 1,
                )
            )
        if self.mixes:
            found.append(self.outside_rows())
            if len(self.deltas) > 1 and not self.elsewhere:
                found.append(self.task_isolation())
        return [*found, self.liveness()]

    # what is fed

    def batch(self, size: int, *, real: bool = False) -> tuple[Rows, NDArray[np.int64]]:
        """Inputs and task rows; tasks take turns."""
        task = np.arange(size, dtype=np.int64) % len(self.deltas)
        return self.inputs(task, real=real), task

    def inputs(self, task: NDArray[np.int64], *, real: bool) -> Rows:
        """Seeded noise, or each task's own pictures in turn where there are any."""
        if not self.backbone.pictures:
            drawn = self.backbone.draw(len(task), seed=self.evidence.seed + len(task))
            names = [entry.name for entry in self.backbone.inputs]
            return {name: t.numpy() for name, t in zip(names, drawn, strict=True)}
        noise = np.random.default_rng(self.evidence.seed + len(task))
        images = noise.standard_normal((len(task), *self.backbone.input_size)).astype(np.float32)
        used = [0] * len(self.deltas)
        for row, number in enumerate(task):
            pictures = self.evidence.images.get(self.deltas[number].task)
            if real and pictures is not None and len(pictures):
                images[row] = pictures[used[number] % len(pictures)]
                used[number] += 1
        return {IMAGES: images}

    def reference(self, inputs: Rows, task: NDArray[np.int64], *names: str) -> list[NDArray]:
        """Torch's logits `[B, ..., K]`, task by task, of some fields of `_Torch`; absent classes hold 0."""
        shape = (len(task), *self.inner, max(self.classes))
        logits = {name: np.zeros(shape, dtype=np.float64) for name in names}
        with torch.no_grad():
            for number in np.unique(task).tolist():
                rows = np.flatnonzero(task == number)
                for name in logits:
                    model = getattr(self.torch(number), name)
                    given = model(*in_torch(chosen(inputs, rows), model))
                    logits[name][rows, ..., : self.classes[number]] = given.double().numpy()
        return [logits[name] for name in names]

    def answer(
        self, inputs: Rows, task: NDArray[np.int64], session: Session | None = None
    ) -> NDArray:
        """The engine's logits `[B, ..., K]`; see `own_classes`."""
        session = session or self.session
        if self.fans:
            logits = session.run(inputs)[np.arange(len(task)), task].astype(np.float64)
        else:
            logits = session.run(inputs, task if self.mixes else None).astype(np.float64)
        return self.own_classes(logits, task)

    def own_classes(self, logits: NDArray, task: NDArray[np.int64]) -> NDArray:
        """Logits with 0 for the classes that a row's task does not have; NaN where one of them could win."""
        found = np.full((*logits.shape[:-1], max(self.classes)), np.nan)
        for row, number in enumerate(task):
            own, absent = np.split(logits[row], [self.classes[number]], axis=-1)
            if absent.size and not (absent < own.min(axis=-1, keepdims=True)).all():
                continue  # a class that the task does not have could win
            found[row, ..., : own.shape[-1]] = own
            found[row, ..., self.classes[number] :] = 0.0
        return found

    # what is compared

    def case(self, size: int, *, real: bool) -> _Case:
        """A batch with its reference and budget; made once."""
        if (size, real) not in self.cases:
            inputs, task = self.batch(size, real=real)
            self.cases[size, real] = self.made(inputs, task)
        return self.cases[size, real]

    def made(self, inputs: Rows, task: NDArray[np.int64]) -> _Case:
        exact, plain = self.reference(inputs, task, "exact", "typed")
        return _Case(inputs, task, exact, plain, self.precision)

    def parity(self, size: int, *, real: bool) -> Comparison:
        case = self.case(size, real=real)
        name = f"parity, batch {size}, {'real images' if real else 'seeded noise'}"
        return case.compare(name, self.answer(case.inputs, case.task), case.exact)

    def every_task(self) -> Comparison:
        """Parity of the tasks that no batch above has room for."""
        task = np.arange(len(self.deltas), dtype=np.int64)
        inputs = self.inputs(task, real=bool(self.evidence.images))
        case = self.made(inputs, task)
        parts = [
            np.arange(at, min(at + self.max_batch, len(task)))
            for at in range(0, len(task), self.max_batch)
        ]
        found = np.concatenate([self.answer(chosen(inputs, p), task[p]) for p in parts])
        return case.compare("parity of every task", found, case.exact)

    def every_cell(self) -> Comparison:
        """Every task of every row of one call."""
        inputs, task = self.batch(min(self.max_batch, ODD))
        rows = len(task)
        cells = np.repeat(np.arange(len(self.deltas)), rows)
        repeated = chosen(inputs, np.tile(np.arange(rows), len(self.deltas)))
        case = self.made(repeated, cells)
        together = np.moveaxis(self.session.run(inputs), 1, 0)  # [T, B, ..., K]
        found = self.own_classes(
            together.reshape(-1, *together.shape[2:]).astype(np.float64), cells
        )
        return case.compare("every task of every row", found, case.exact)

    def row_isolation(self) -> Comparison:
        case = self.case(self.max_batch, real=bool(self.evidence.images))
        alone = np.concatenate(
            [
                self.answer(chosen(case.inputs, [row]), case.task[row : row + 1])
                for row in range(len(case.task))
            ]
        )
        together = self.answer(case.inputs, case.task)
        return case.compare("row isolation: mixed batch == one by one", together, alone)

    def permutation(self) -> Comparison:
        case = self.case(self.max_batch, real=False)
        order = np.random.default_rng(self.evidence.seed).permutation(len(case.task))
        if (order == np.arange(len(order))).all():
            order = np.roll(order, 1)
        shuffled = np.empty_like(case.exact)
        shuffled[order] = self.answer(chosen(case.inputs, order), case.task[order])
        straight = self.answer(case.inputs, case.task)
        return case.compare("permutation of rows and tasks", shuffled, straight)

    def outside_rows(self) -> Comparison:
        """A task row that the bank does not have answers NaN, and its neighbours do not notice."""
        inputs, task = self.batch(min(self.max_batch, 3))
        tasks = np.array([len(self.deltas), 0, -1], dtype=np.int64)[: len(task)]
        logits = self.session.run(inputs, tasks)
        outside = (tasks < 0) | (tasks >= len(self.deltas))
        quiet = np.isnan(logits[outside]).all() and np.isfinite(logits[~outside]).all()
        return _yes_or_no("task rows outside the bank answer NaN", len(tasks), bool(quiet))

    def task_isolation(self) -> Comparison:
        """Other tasks' tensors replaced by garbage: bit for bit the same answers.

        Of many tasks an even choice is asked. They are halved by each bit of their place, so that every pair
        of them is separated once; all tasks that are not asked hold garbage each time.
        """
        count = len(self.deltas)
        asked = self.choose(count, min(count, ISOLATED))
        inputs = self.inputs(asked, real=False)
        session, bank = self.with_bank_as_input()
        before = session.run(inputs, asked)
        probe, engine = self.answer(inputs, asked, session), self.answer(inputs, asked)
        same = relative_error(probe, engine) <= floor(self.precision)
        noise = np.random.default_rng(self.evidence.seed)
        for bit in range(max(1, (len(asked) - 1).bit_length())):
            for kept in (0, 1):
                keep = np.array([(place >> bit) & 1 == kept for place in range(len(asked))])
                if keep.all() or not keep.any():
                    continue
                spoil = np.setdiff1d(np.arange(count), asked[keep])
                spoiled = {name: values.copy() for name, values in bank.items()}
                for values in spoiled.values():
                    garbage = GARBAGE * noise.standard_normal(values.shape[1:])
                    values[spoil] = garbage.astype(values.dtype)
                session.replace_bank(spoiled)
                after = session.run(inputs, asked)
                same &= np.array_equal(before[keep], after[keep])
                same &= all(  # the garbage did arrive
                    not np.array_equal(b, a)
                    for b, a in zip(before[~keep], after[~keep], strict=True)
                )
        return _yes_or_no(
            "isolation from other tasks' tensors, bit for bit", len(asked), bool(same)
        )

    def choose(self, count: int, share: int) -> NDArray[np.int64]:
        """`share` of `count` numbers, in order; the same for the same seed."""
        if share >= count:
            return np.arange(count, dtype=np.int64)
        drawn = np.random.default_rng(self.evidence.seed).choice(count, share, replace=False)
        return np.sort(drawn).astype(np.int64)

    def with_bank_as_input(self) -> tuple[Session, Mapping[str, NDArray[Any]]]:
        """The engine with its bank as an input, whatever it is in the bundle, and that bank."""
        if self.bank:
            return self.open(self.engine, self.bank), self.bank
        model = onnx.load_from_string(self.engine)
        inside = [tensor for tensor in model.graph.initializer if tensor.name.startswith("bank/")]
        bank = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in inside}
        for tensor in inside:
            model.graph.initializer.remove(tensor)
            model.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
        return self.open(model.SerializeToString(), bank), bank

    def liveness(self) -> Comparison:
        """Every tensor moves the answer, and the engine does not agree with a changed one.

        The slope of torch's logits along each tensor says how far a change of the tensor's own size
        would move them; a sample of tensors (all with `every_tensor`) is then really changed, and the
        engine must no longer agree with torch. A tensor without slope is inert in the task itself
        (a bias of the keys, say) and is named; a branch of such tensors only fails the check.

        One picture is enough where all tensors move its answer; otherwise it is `LOOKS`. Of many tasks an
        even choice is looked at, one of each layout at least.
        """
        found = Liveness()
        looked = self.looked_at()
        for number in looked:
            live = self.slopes(number, 1, found) or self.slopes(number, LOOKS, found)
            assert live is not None
            for tensor in self.sample(live.tensors, len(looked)):
                self.change(number, tensor, live, found)
        note = f"{found}" if len(looked) == len(self.deltas) else f"of {len(looked)} tasks: {found}"
        return _yes_or_no(
            "liveness of every tensor", found.tensors, not found.dead and not found.absent, note
        )

    def looked_at(self) -> list[int]:
        """Tasks whose tensors liveness looks at."""
        count = len(self.deltas)
        if self.evidence.every_tensor or count <= SAMPLE:
            return list(range(count))
        first = {delta.layout: number for number, delta in reversed(list(enumerate(self.deltas)))}
        return sorted({*first.values(), *self.choose(count, SAMPLE).tolist()})

    def slopes(self, number: int, looks: int, found: Liveness) -> _Live | None:
        """The tensors of a task that move its answer; None if some do not and `LOOKS` may show more."""
        delta, torch_task = self.deltas[number], self.torch(number)
        task = np.full(min(looks, self.max_batch), number)
        inputs = self.inputs(task, real=bool(self.evidence.images))
        plain, exact, typed = self.reference(inputs, task, "model", "exact", "typed")
        allowed = budget(plain, exact, "fp32")
        seen = max(allowed, budget(typed, exact, self.precision))  # what the engine could show
        model = torch_task.model
        moved = steps(model, in_torch(inputs, model), plain)
        inert, dead, live, tensors = [], [], [], 0
        for (branch, _, weights), slopes in zip(model.parts(), moved, strict=True):
            moves = [name for name, (far, _) in slopes.items() if far > 2 * allowed]
            tensors += len(slopes)
            inert += [f"{delta.task}: {branch}/{n}" for n in slopes if n not in moves]
            if slopes and not moves and delta.branches[branch].tuner.kind != "bias":
                dead.append(f"{delta.task}: {branch}")  # a shift of keys does nothing
            live += [
                (f"{branch}/{n}", weights[n], slopes[n][1])
                for n in moves
                if slopes[n][0] > 2 * seen
            ]
        if inert and len(task) < min(LOOKS, self.max_batch):
            return None
        found.tensors += tensors
        found.inert += inert
        found.dead += dead
        inputs, task = chosen(inputs, [0]), task[:1]  # one is enough
        return _Live(live, inputs, plain[:1], self.answer(inputs, task), seen)

    def change(self, number: int, tensor: Live, live: _Live, found: Liveness) -> None:
        """Really change a tensor in torch; the engine must not agree."""
        name, parameter, step = tensor
        before = parameter.data
        parameter.data = before + step
        (changed,) = self.reference(live.inputs, np.array([number]), "model")
        parameter.data = before
        found.changed += 1
        if (
            relative_error(changed, live.plain)
            > 2 * live.seen
            >= relative_error(live.engine, changed)
        ):
            found.absent.append(f"{self.deltas[number].task}: {name}")

    def sample(self, live: Sequence[Live], tasks: int) -> Sequence[Live]:
        """The tensors of one task to change: all, or an even choice."""
        share = max(2, SAMPLE // tasks)
        if self.evidence.every_tensor or len(live) <= share:
            return live
        return [live[index] for index in self.choose(len(live), share)]


class _Torch(NamedTuple):
    """One task in torch: float32, float64, and in the engine's precision."""

    model: Tuned
    exact: Tuned
    typed: Tuned


class _Live(NamedTuple):
    """What liveness knows of one task: tensors that act, a row, its logits in torch and in the engine."""

    tensors: list[Live]
    inputs: Rows
    plain: NDArray
    engine: NDArray
    seen: float


@dataclass(frozen=True)
class _Case:
    inputs: Rows
    task: NDArray[np.int64]
    exact: NDArray
    plain: NDArray
    precision: str

    def compare(self, name: str, found: NDArray, wanted: NDArray) -> Comparison:
        """Task by task, each on the scale of its own logits; the worst decides."""
        parts = [
            compare(
                name,
                found[rows],
                wanted[rows],
                budget(self.plain[rows], self.exact[rows], self.precision),
            )
            for rows in (np.flatnonzero(self.task == number) for number in np.unique(self.task))
        ]
        worst = max(parts, key=lambda part: part.error / part.budget)
        return replace(
            worst,
            rows=len(self.task),
            flips=sum(part.flips for part in parts),
            passed=all(part.passed for part in parts),
        )


def chosen(inputs: Rows, rows: Sequence[int] | NDArray[np.int64]) -> Rows:
    """Some rows of a batch."""
    return {name: values[rows] for name, values in inputs.items()}


def in_torch(inputs: Rows, model: Tuned) -> list[torch.Tensor]:
    """A batch as tensors, real numbers in the model's dtype."""
    tensors = (torch.from_numpy(values) for values in inputs.values())
    dtype = dtype_of(model.trunk)
    return [t.to(dtype) if t.is_floating_point() else t for t in tensors]


def in_dtype(dtype: torch.dtype, model: Tuned, trunk: torch.nn.Module) -> Tuned:
    """The tuned model in another dtype, over a shared trunk of that dtype."""
    shared = model.trunk
    twin = copy.deepcopy(model, {id(shared): trunk, id(model.backbone): model.backbone})
    return twin.to(dtype)


def _yes_or_no(name: str, rows: int, passed: bool, note: str = "") -> Comparison:
    return Comparison(name, rows, 0.0 if passed else math.inf, 0.0, 0, passed, note)
