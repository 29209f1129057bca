"""Is this engine those tasks? Every claim of a bundle, tested against torch.

The reference is each task alone in torch, in float64, in the literal form it was trained in (deep
prompts as tokens). The engine must agree with it, row by row, whatever else is in the batch; and it
must *disagree* with a reference one of whose tensors was changed, or that tensor is not in it.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch

from ..export.parity import Comparison, Verdict, budget, compare, relative_error
from ..export.targets.onnxruntime import OnnxRuntimeSession
from ..merge.attach import restore

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from ..export.engine import Session
    from ..merge.attach import Tuned
    from ..merge.backbone import Backbone
    from ..merge.delta import Delta
    from ..merge.sites import Sites

ODD = 3
LIVENESS_SECONDS = 60.0  # past this, liveness samples instead of trying every tensor
GARBAGE = 3.0  # standard deviation of what replaces other tasks' tensors


@dataclass(frozen=True)
class Evidence:
    """What a check looks at besides seeded noise.

    Attributes:
        images: Preprocessed real pictures `[n, C, H, W]` float32 by task; tasks without any use noise.
        seed: Of the noise.
        every_tensor: Try every tensor for liveness, however long it takes.
    """

    images: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    seed: int = 0
    every_tensor: bool = False


def check_engine(
    engine: bytes,
    backbone: Backbone,
    deltas: Sequence[Delta],
    sites: Sites,
    *,
    mixes: bool,
    bank: Mapping[str, NDArray[np.float32]],
    max_batch: int,
    evidence: Evidence,
    threads: int | None = None,
    provider: str = "cpu",
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
        threads: Of the engine.
        provider: Of the engine.
    """
    return _Check(engine, backbone, deltas, sites, mixes, bank, max_batch, evidence, threads, provider).run()


class _Check:
    def __init__(
        self,
        engine: bytes,
        backbone: Backbone,
        deltas: Sequence[Delta],
        sites: Sites,
        mixes: bool,
        bank: Mapping[str, NDArray[np.float32]],
        max_batch: int,
        evidence: Evidence,
        threads: int | None,
        provider: str,
    ) -> None:
        self.engine, self.backbone, self.deltas, self.sites = engine, backbone, deltas, sites
        self.mixes, self.bank, self.max_batch = mixes, bank, max_batch
        self.evidence, self.threads, self.provider = evidence, threads, provider
        self.session = self.open(engine, bank)
        self.models = [restore(backbone, delta, sites).eval() for delta in deltas]
        double = copy.deepcopy(backbone.model).double()
        self.exact = [_in_double(model, double) for model in self.models]
        self.classes = [len(delta.labels) for delta in deltas]

    def open(self, engine: bytes, bank: Mapping[str, NDArray[np.float32]]) -> Session:
        return OnnxRuntimeSession(engine, provider=self.provider, threads=self.threads, bank=bank)

    def run(self) -> Verdict:
        sizes = sorted({size for size in (1, 2, ODD, self.max_batch) if size <= self.max_batch})
        found = [self.parity(size, real=False) for size in sizes]
        if self.evidence.images:
            found.extend(self.parity(size, real=True) for size in sizes)
        if self.max_batch > 1:
            found.append(self.row_isolation())
        if self.mixes:
            found.append(self.permutation())
            found.append(self.outside_rows())
            if len(self.deltas) > 1:
                found.append(self.task_isolation())
        found.append(self.liveness())
        return Verdict(tuple(found))

    # what is fed

    def batch(self, size: int, *, real: bool = False) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Images and task rows; tasks take turns."""
        task = np.arange(size, dtype=np.int64) % len(self.deltas)
        noise = np.random.default_rng(self.evidence.seed + size)
        shape = (self.backbone.channels, *self.backbone.image_size)
        images = noise.standard_normal((size, *shape)).astype(np.float32)
        if real:
            for row, number in enumerate(task):
                pictures = self.evidence.images.get(self.deltas[number].task)
                if pictures is not None and len(pictures):
                    images[row] = pictures[(row // len(self.deltas)) % len(pictures)]
        return images, task

    def reference(
        self, images: NDArray[np.float32], task: NDArray[np.int64], models: Sequence[Tuned]
    ) -> NDArray:
        """Torch's logits `[B, K]`, task by task; absent classes hold 0."""
        dtype = next(models[0].trunk.parameters()).dtype
        logits = np.zeros((len(images), max(self.classes)), dtype=np.float64)
        with torch.no_grad():
            for number in np.unique(task):
                rows = np.flatnonzero(task == number)
                given = models[number](torch.from_numpy(images[rows]).to(dtype))
                logits[rows, : self.classes[number]] = given.double().numpy()
        return logits

    def answer(
        self, images: NDArray[np.float32], task: NDArray[np.int64], session: Session | None = None
    ) -> NDArray:
        """The engine's logits `[B, K]`; absent classes hold 0 after making sure they cannot win."""
        logits = (session or self.session).run(images, task if self.mixes else None).astype(np.float64)
        for row, number in enumerate(task):
            absent = logits[row, self.classes[number] :]
            if absent.size and not (absent < logits[row, : self.classes[number]].min()).all():
                return np.full_like(logits, np.nan)
            logits[row, self.classes[number] :] = 0.0
        return logits

    # what is compared

    def parity(self, size: int, *, real: bool) -> Comparison:
        images, task = self.batch(size, real=real)
        exact = self.reference(images, task, self.exact)
        allowed = budget(self.reference(images, task, self.models), exact, "fp32")
        name = f"parity, batch {size}, {'real images' if real else 'seeded noise'}"
        return compare(name, self.answer(images, task), exact, allowed)

    def row_isolation(self) -> Comparison:
        size = min(self.max_batch, max(2, 2 * len(self.deltas)))
        images, task = self.batch(size, real=bool(self.evidence.images))
        exact = self.reference(images, task, self.exact)
        allowed = budget(self.reference(images, task, self.models), exact, "fp32")
        alone = np.concatenate(
            [self.answer(images[row : row + 1], task[row : row + 1]) for row in range(size)]
        )
        return compare("row isolation: mixed batch == one by one", self.answer(images, task), alone, allowed)

    def permutation(self) -> Comparison:
        size = min(self.max_batch, 2 * len(self.deltas))
        images, task = self.batch(size)
        order = np.random.default_rng(self.evidence.seed).permutation(size)
        straight = self.answer(images, task)[order]
        exact = self.reference(images, task, self.exact)
        allowed = budget(self.reference(images, task, self.models), exact, "fp32")
        shuffled = self.answer(images[order], task[order])
        return compare("permutation of rows and tasks", shuffled, straight, allowed)

    def outside_rows(self) -> Comparison:
        """A task row that the bank does not have answers NaN, and its neighbours do not notice."""
        images, _ = self.batch(min(self.max_batch, 3))
        tasks = np.array([len(self.deltas), 0, -1], dtype=np.int64)[: len(images)]
        logits = self.session.run(images, tasks)
        outside = (tasks < 0) | (tasks >= len(self.deltas))
        quiet = np.isnan(logits[outside]).all() and np.isfinite(logits[~outside]).all()
        return _yes_or_no("task rows outside the bank answer NaN", len(images), bool(quiet))

    def task_isolation(self) -> Comparison:
        """Other tasks' tensors replaced by garbage: bit for bit the same answers.

        Tasks are halved by each bit of their number, so that every pair is separated once.
        """
        count = len(self.deltas)
        images, task = self.batch(count)
        before = self.session.run(images, task)
        same = True
        for bit in range(max(1, (count - 1).bit_length())):
            for kept in (0, 1):
                keep = np.array([(row >> bit) & 1 == kept for row in range(count)])
                if keep.all() or not keep.any():
                    continue
                after = self.with_garbage(~keep).run(images, task)
                same &= np.array_equal(before[keep], after[keep])
                same &= not np.array_equal(before[~keep], after[~keep])  # the garbage did arrive
        return _yes_or_no("isolation from other tasks' tensors, bit for bit", count, same)

    def with_garbage(self, spoiled: NDArray[np.bool_]) -> Session:
        """The engine with the spoiled tasks' rows of the bank replaced."""
        noise = np.random.default_rng(self.evidence.seed)

        def spoil(values: NDArray[np.float32]) -> NDArray[np.float32]:
            values = values.copy()
            values[spoiled] = GARBAGE * noise.standard_normal(values[spoiled].shape)
            return values

        if self.bank:
            return self.open(self.engine, {name: spoil(value) for name, value in self.bank.items()})
        model = onnx.load_from_string(self.engine)
        for tensor in model.graph.initializer:
            if tensor.name.startswith("bank/"):
                tensor.CopyFrom(onnx.numpy_helper.from_array(spoil(onnx.numpy_helper.to_array(tensor)), tensor.name))
        return self.open(model.SerializeToString(), {})

    def liveness(self) -> Comparison:
        """Change one tensor in torch: the engine must no longer agree with it.

        A tensor that does not change torch's own answer either is inert in the task itself (a bias of
        the keys, say) and is named; a branch none of whose tensors matter fails the check.
        """
        images, _ = self.batch(1, real=bool(self.evidence.images))
        tried = inert = 0
        names: list[str] = []
        dead: list[str] = []
        unseen: list[str] = []
        every, began = True, time.monotonic()
        for number, (delta, model) in enumerate(zip(self.deltas, self.models, strict=True)):
            task = np.array([number])
            engine = self.answer(images, task)
            exact = self.reference(images, task, self.exact)
            plain = self.reference(images, task, self.models)
            allowed = budget(plain, exact, "fp32")
            for branch, weights in zip(delta.branches, model.weights, strict=True):
                alive = False
                for name, parameter in weights.items():  # type: ignore[attr-defined]
                    late = time.monotonic() - began > LIVENESS_SECONDS
                    if late and not self.evidence.every_tensor and alive:
                        every = False
                        continue
                    tried += 1
                    before = parameter.data
                    parameter.data = before + _nudge(before, tried)
                    changed = self.reference(images, task, self.models)
                    parameter.data = before
                    if relative_error(changed, plain) <= 2 * allowed:
                        inert += 1
                        names.append(f"{delta.task}: {branch}/{name}")
                        continue
                    alive = True
                    if relative_error(engine, changed) <= allowed:
                        unseen.append(f"{delta.task}: {branch}/{name}")
                if not alive:
                    dead.append(f"{delta.task}: {branch}")
        note = f"{tried} tensors changed one by one" + ("" if every else ", a sample")
        if names:
            note += f"; {inert} without effect in torch either ({', '.join(names[:3])})"
        if dead or unseen:
            note += f"; dead branches: {dead[:3]}; not in the engine: {unseen[:3]}"
        return _yes_or_no("liveness of every tensor", tried, not dead and not unseen, note)


def _in_double(model: Tuned, trunk: torch.nn.Module) -> Tuned:
    """The tuned model in float64, over a shared float64 trunk."""
    shared = model.trunk
    twin = copy.deepcopy(model, {id(shared): trunk, id(model.backbone): model.backbone})
    return twin.double()


def _nudge(value: torch.Tensor, seed: int) -> torch.Tensor:
    """Seeded noise as large as the tensor itself."""
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    size = float(value.double().pow(2).mean().sqrt())
    return (noise.sign() * noise.abs().clamp(min=0.5) * (size or 0.1)).to(value.dtype)


def _yes_or_no(name: str, rows: int, passed: bool, note: str = "") -> Comparison:
    return Comparison(name, rows, 0.0 if passed else math.inf, 0.0, 0, passed, note)
