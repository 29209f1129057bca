"""What `export` is told about an engine's numbers besides their precision, and what follows from it.

A half is audited and cast before the check. Eight bits come behind it: the float32 graph is held to torch in
every way that `check` knows, then quantised, and the result is held to the float32 engine on held-out examples.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..export.agreement import Least, agreement
from ..export.bundle import FAN_OUT
from ..export.engine import BANK_PREFIX, CPU, IMAGES, TASK
from ..export.graph import serialise
from ..export.precision import HALF, QUANTISED, retype
from ..export.quantise import FORMATS, choose, digests, quantise
from ..export.saturation import AUTO, retype_audited
from ..export.targets.onnxruntime import OnnxRuntimeSession
from ..merge.errors import CheckFailed, MissingDependency, UsageError
from ..merge.rows import Rows
from .bank_inputs import bank_inputs
from .calibration import noise, of_pictures

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import onnx_ir as ir
    from numpy.typing import NDArray

    from ..export import bundle as bundles
    from ..export.parity import Comparison
    from ..export.precision import Typing
    from ..merge.backbone import Backbone
    from .calibration import Calibration
    from .reference import Evidence


AUDITED = 1  # examples of a batch: every value of the graph is alive until its magnitude is taken


@dataclass(frozen=True)
class Numerics:
    """Choices.

    Attributes:
        keep: Patterns of nodes that stay float32.
        calibration: The user's examples; None where there are none.
        method: How ranges are made of examples, a key of `ranges.METHODS`.
        least: How far eight bits must agree with float32.
    """

    keep: tuple[str, ...] = ()
    calibration: Calibration | None = None
    method: str = "minmax"
    least: Least = field(default_factory=Least)

    def facts(self, precision: str) -> dict[str, Any]:
        """What of the choices decides an engine's answers, for its manifest and its identity."""
        used = self.calibration if precision in QUANTISED or AUTO in self.keep else None
        return {
            **({"keep_fp32": list(self.keep)} if self.keep else {}),
            **({"method": self.method} if precision in QUANTISED else {}),
            **(
                {
                    "calibration": {
                        "inputs": used.inputs,
                        "rows": len(used.task),
                        "sha256": used.digest,
                    }
                }
                if used is not None
                else {}
            ),
        }

    def with_examples(
        self, precision: str, backbone: Backbone, evidence: Evidence, tasks: Sequence[str]
    ) -> Numerics:
        """The same, with what `check` is fed where a half is to be audited and the user gave no examples."""
        if self.calibration is not None or precision not in HALF:
            return self
        given = (
            of_pictures(evidence.images, tasks, "the pictures of --images")
            if evidence.images
            else noise(backbone, len(tasks), evidence.seed)
        )
        return replace(self, calibration=given)

    def held_out(self, evidence: Evidence, tasks: Sequence[str]) -> Evidence:
        """Evidence with the held-out pictures, where it has none, and what is asked of their answers."""
        if evidence.images or self.calibration is None or IMAGES not in self.calibration.rows:
            return replace(evidence, least=self.least)
        held = self.calibration.halves()[1]
        images = {name: held.rows[IMAGES][held.task == row] for row, name in enumerate(tasks)}
        return replace(evidence, images=images, least=self.least)

    def typed(
        self,
        model: ir.Model,
        precision: str,
        bank: Mapping[str, NDArray[Any]] | Rows | None = None,
    ) -> Typing:
        """Give a float32 graph the types of a precision, in place; a half is audited first.

        Args:
            model: The graph.
            precision: A key of `export.precision.PRECISIONS`.
            bank: Its tensors in float32 by input name, where the bank is an input; or its rows, where the graph has no
                values of them.

        Raises:
            UsageError: A pattern names no node.
            CheckFailed: Values leave the range of the half.
        """
        if precision in QUANTISED:
            choose(
                model, None, self.keep
            )  # a pattern that names nothing is refused before the check
        if precision not in HALF or self.calibration is None:
            return retype(model, precision)
        names = [value.name or "" for value in model.graph.inputs]
        if isinstance(bank, Rows):
            names += [name for name in model.graph.initializers if name.startswith(BANK_PREFIX)]
            examples = self.calibration.examples(
                names, lambda numbers: bank_inputs(bank.some(numbers)), at_once=AUDITED
            )
        else:
            examples = self.calibration.examples(names, bank or {}, at_once=AUDITED)
        return retype_audited(model, precision, self.keep, examples)


def require(precision: str, target: str, keep: Sequence[str], *, calibrated: bool) -> None:
    """Refuse choices that a precision cannot follow.

    Args:
        precision: A key of `export.precision.PRECISIONS`.
        target: A key of `export.targets.TARGETS`.
        keep: Patterns of nodes that stay float32.
        calibrated: Whether there are examples.

    Raises:
        UsageError: They are of another precision, or eight bits lack examples.
        MissingDependency: Nothing that could serve the engine computes in the precision.
    """
    if precision in QUANTISED and (precision, target) not in FORMATS:
        raise MissingDependency(
            f"ONNX Runtime has no products in {precision}, and would compute them in float32",
            wanted="--target tensorrt",
            found=f"--target {target}",
            do="add --target tensorrt --prepare, or use --precision int8",
        )
    if precision in QUANTISED and not calibrated:
        raise UsageError(
            f"{precision} takes its ranges from examples, and is judged by others of them",
            wanted="--calibration FOLDER or FILE.npz, of pictures as the tasks will see",
        )
    if precision in QUANTISED and AUTO in keep:
        raise UsageError(
            "--keep-fp32 auto is of fp16 and bf16, whose range ends",
            do=f"name products; {precision} has a range of its own for each",
        )
    if precision not in (*HALF, *QUANTISED) and (keep or calibrated):
        raise UsageError(
            "--keep-fp32 and --calibration are of fp16, bf16, int8 and fp8",
            found=f"--precision {precision}",
            do="leave them out: everything is float32 already",
        )


class Proved(NamedTuple):
    """A float32 engine that was held to torch.

    Attributes:
        model: Its graph.
        file: The engine, or where it lies.
        mode: Of its plan; `fan-out` of one that answers every task for every row.
        bank: By input name, float32, where the bank is an input.
        tasks: Names and labels, in row order.
        metadata: Of the engine file.
    """

    model: ir.Model
    file: Path | bytes
    mode: str
    bank: Mapping[str, NDArray[Any]]
    tasks: tuple[bundles.Task, ...]
    metadata: Mapping[str, str]


class Shrunk(NamedTuple):
    """An engine in eight bits, what was done, and how far it agrees with the float32 one."""

    file: bytes
    report: dict[str, Any]
    comparisons: tuple[Comparison, ...]


def shrink(
    proved: Proved, precision: str, target: str, backbone: Backbone, numerics: Numerics, where: Path
) -> Shrunk:
    """Quantise a proved engine and judge what comes of it.

    Raises:
        UsageError: A pattern names no product, or no product is left to quantise.
        BuildFailed: A value is not finite on the calibration examples.
        CheckFailed: It does not agree with the float32 engine on the held-out examples.
    """
    calibration = numerics.calibration
    assert calibration is not None
    used, held = calibration.halves()
    names = [value.name or "" for value in proved.model.graph.inputs]
    frozen = None if proved.mode == "merged" else digests(_weights(backbone))
    done = quantise(
        proved.model,
        FORMATS[precision, target],
        used.examples(names, proved.bank).batches,
        frozen=frozen,
        keep=numerics.keep,
        method=numerics.method,
    )
    file = serialise(proved.model, proved.metadata)
    reference = OnnxRuntimeSession(proved.file, CPU, bank=proved.bank)
    found = OnnxRuntimeSession(file, CPU, bank=proved.bank, as_written=precision == "fp8")
    compared = tuple(_compared(proved, found, reference, held, numerics.least))
    if failures := [c for c in compared if not c.passed]:
        raise CheckFailed(
            f"the {precision} engine does not agree with the float32 one, so nothing was written",
            where=where,
            wanted=f"of every task's held-out examples, {numerics.least.agreement:.2%} with the same best class "
            f"and 95 % with a cosine of {numerics.least.cosine} or more",
            found="; ".join(
                f"{c.name}: {c.flips} of {c.rows} differ, {c.note}" for c in failures[:3]
            ),
            do="try --calibration-method percentile, keep products in float32 with --keep-fp32, give more "
            "examples, or say what is enough with --least-agreement and --least-cosine",
        )
    report = {
        **done.to_json(),
        "calibration": {
            "inputs": calibration.inputs,
            "rows": len(used.task),
            "held_out": len(held.task),
            "sha256": calibration.digest,
        },
        "least": numerics.least.to_json(),
    }
    return Shrunk(file, report, compared)


def _weights(backbone: Backbone) -> list[NDArray[Any]]:
    return [t.numpy() for t in backbone.model.state_dict().values() if t.is_floating_point()]


def _compared(
    proved: Proved,
    found: OnnxRuntimeSession,
    reference: OnnxRuntimeSession,
    held: Calibration,
    least: Least,
) -> list[Comparison]:
    """Task by task, on mixed batches of held-out examples."""
    rows = list(held.rows)
    answers: tuple[list[NDArray[Any]], list[NDArray[Any]]] = ([], [])
    numbers: list[NDArray[np.int64]] = []
    for batch in held.examples([*rows, TASK]).batches:
        task = batch[TASK]
        numbers.append(task)
        for session, answered in zip((found, reference), answers, strict=True):
            logits = session.run(
                {name: batch[name] for name in rows}, task if session.mixes_tasks else None
            )
            answered.append(
                logits[np.arange(len(task)), task] if proved.mode == FAN_OUT else logits
            )
    task = np.concatenate(numbers)
    a, b = (np.concatenate(parts) for parts in answers)
    compared = []
    for entry in proved.tasks:
        own, width = task == entry.row, len(entry.labels) or entry.width
        name = f"agreement of {entry.name} with float32, {held.inputs} held out"
        compared.append(
            agreement(
                name, a[own][..., :width], b[own][..., :width], least, classes=len(entry.labels) > 1
            )
        )
    return compared
