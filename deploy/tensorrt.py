"""Tasks to an engine of TensorRT: a folder that is built here, or on the machine that has the GPU.

The graph keeps to ONNX's own operators. It is held to torch in ONNX Runtime before anything is written,
where a processor at hand computes in its precision; a plan that is built here is held to torch again.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..export import bundle as bundles
from ..export.engine import CPU, Device
from ..export.graph import serialise
from ..export.precision import HALF, QUANTISED
from ..export.targets.tensorrt import builder, folder, library
from ..export.targets.tensorrt.recipe import Profile, Recipe, default_profiles
from ..export.targets.tensorrt.session import TensorRTSession
from ..export.targets.tensorrt.tuner_names import require_nothing_else, tuner_names
from ..merge.calls import calls_of
from ..merge.errors import BuildFailed, CheckFailed, UsageError
from ..merge.files import atomic_folder, canonical_json
from .bank_inputs import bank_inputs
from .begin import begin
from .check import check_engine
from .graphs import finish, graph_of, inputs_of, require_whole_attentions
from .numerics import Numerics, Proved, require, shrink
from .reference import Evidence

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from ..export.engine import Session
    from ..export.parity import Verdict
    from ..merge.backbone import Backbone
    from ..merge.delta import Delta
    from .begin import Begun
    from .graphs import Made
    from .task import Task

NUMBERS = "precision.json"  # what the typing pass and the quantiser did
MORE_TASKS = 2  # times the tasks there are: what a bank that is an input has room for, at least
ROOM = 16


def export_tensorrt(
    output: Path,
    backbone: Backbone,
    tasks: Sequence[Task],
    *,
    prepare: bool,
    weights: str = "plain",
    name: str | None = None,
    mode: str = "auto",
    bank: str = "constants",
    precision: str = "fp32",
    numerics: Numerics | None = None,
    max_batch: int = 16,
    evidence: Evidence | None = None,
    device: Device = CPU,
    force: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> Recipe:
    """Write the folder of a recipe, with the plan in it unless it is only prepared.

    Args:
        output: The folder.
        backbone: The frozen backbone, float32.
        tasks: The tasks in row order.
        prepare: Leave the plan to be built elsewhere.
        weights: See `Recipe`.
        name: As of `export_bundle`.
        mode: See `make_plan`.
        bank: See `make_plan`.
        precision: A key of `export.precision.PRECISIONS`.
        numerics: What stays float32 in it, and examples to calibrate with.
        max_batch: Largest batch of the last profile.
        evidence: Pictures for the check.
        device: Where ONNX Runtime runs the graph for the check.
        force: Replace what stands at `output`.
        progress: Called with the name of each step as it begins.

    Raises:
        MissingDependency: The plan is to be built here, and TensorRT or a device is missing.
        UsageError: The output exists, or mode or weights do not fit the tasks.
        IncompatibleArtefact: A delta does not belong to the backbone.
        BuildFailed: The graph or the plan cannot be made.
        CheckFailed: The graph or the plan does not agree with torch; nothing is written.
    """
    numerics, evidence = numerics or Numerics(), evidence or Evidence()
    require(precision, "tensorrt", numerics.keep, calibrated=numerics.calibration is not None)
    if precision in QUANTISED and weights == "refit":
        raise UsageError(
            "weights in eight bits cannot be replaced: their scales are part of the plan",
            found=f"--weights-form refit, --precision {precision}",
            do="leave out --weights-form refit",
        )
    trt = None if prepare else library.tensorrt()
    begun = begin(
        output,
        backbone,
        tasks,
        name,
        mode=mode,
        bank=bank,
        fan_out=False,
        force=force,
        progress=progress,
    )
    if weights == "refit" and (
        begun.plan.bank == "inputs" or begun.plan.mode in ("merged", bundles.FAN_OUT)
    ):
        raise UsageError(
            "there are no weights of the tasks to refit",
            wanted="mode parallel or multi, the bank constants",
            found=f"mode {begun.plan.mode}, bank {begun.plan.bank}",
            do="leave out --weights-form refit",
        )
    progress("trace")
    made = _graph(begun, backbone, begun.deltas)
    progress("rewrite")
    plan = begun.plan
    stacked = made.bank.tensors if plan.bank == "inputs" and made.bank is not None else {}
    tensors, exact = bank_inputs(stacked, precision), bank_inputs(stacked)
    numerics = numerics.with_examples(
        precision, backbone, evidence, [delta.task for delta in begun.deltas]
    )
    typing = finish(made.model, precision, standard=True, numerics=numerics, bank=exact).typing
    require_whole_attentions(made.model, calls_of(backbone))
    refit = _refit(begun, backbone, made, precision, numerics) if weights == "refit" else ()
    inputs = inputs_of(backbone, made.model)
    identity = bundles.identity_of(
        backbone.identity.to_json(),
        plan.mode,
        plan.bank,
        begun.entries,
        precision,
        inputs,
        numerics=numerics.facts(precision),
    )
    progress("serialise")
    onnx = serialise(made.model, {bundles.IDENTITY: identity})
    checking = _Checking(
        onnx, backbone, begun, tensors, max_batch, evidence, device, precision, output
    )
    progress("check")
    checked = checking.graph()
    report: dict[str, Any] = {"typing": typing.to_json(), "numerics": numerics.facts(precision)}
    if precision in QUANTISED:
        progress("quantise")
        metadata = {bundles.IDENTITY: identity}
        proved = Proved(made.model, onnx, plan.mode, exact, begun.entries, metadata)
        shrunk = shrink(proved, precision, "tensorrt", backbone, numerics, output)
        onnx = checking.onnx = shrunk.file
        checking.evidence = numerics.held_out(evidence, [entry.name for entry in begun.entries])
        report["quantised"] = shrunk.report
        report["agreement"] = [comparison.to_json() for comparison in shrunk.comparisons]
    count = len(tasks)
    recipe = Recipe(
        onnx=folder.ONNX,
        sha256=hashlib.sha256(onnx).hexdigest(),
        precision=precision,
        inputs=inputs,
        profiles=default_profiles(max_batch),
        identity=identity,
        check="passed" if checked else "unchecked",
        tasks=Profile(1, count, max(MORE_TASKS * count, ROOM)) if tensors else None,
        weights=weights,
        refit=refit,
    )
    progress("write")
    entries = [bundles.task_json(entry) for entry in begun.entries]
    with atomic_folder(output) as temporary:
        folder.write_folder(temporary, recipe, onnx, entries, tensors)
        if precision in (*HALF, *QUANTISED):
            (temporary / NUMBERS).write_text(canonical_json(report) + "\n")
        if trt is not None:
            _build(temporary, recipe, trt, progress)
            session = TensorRTSession(
                temporary / builder.PLAN, bank=tensors, tf32=precision == "tf32", identity=identity
            )
            checking.plan(session)
            del session  # the plan's file is about to be moved
    progress("done")
    return recipe


def _graph(begun: Begun, backbone: Backbone, deltas: Sequence[Delta]) -> Made:
    """The traced model, laid out for standard operators."""
    return graph_of(begun.plan, backbone, deltas, begun.sites, begun.groups, "fp32")


def _refit(
    begun: Begun, backbone: Backbone, made: Made, precision: str, numerics: Numerics
) -> tuple[str, ...]:
    """Names of the tasks' tensors in the finished graph, proved against a graph of other tensors."""
    assert made.bank is not None  # modes parallel and multi stack the tasks
    alone = begun.plan.mode == "parallel"
    stacked = {key: t[0] if alone else t for key, t in made.bank.tensors.items()}
    names = tuner_names(made.model, bank_inputs(stacked, precision))
    noise = torch.Generator().manual_seed(0)
    others = [
        replace(
            delta,
            tensors={
                branch: {
                    name: t
                    + 0.1 * (1 + t.abs()) * torch.rand(t.shape, generator=noise, dtype=t.dtype)
                    for name, t in tensors.items()
                }
                for branch, tensors in delta.tensors.items()
            },
        )
        for delta in begun.deltas
    ]
    other = _graph(begun, backbone, others)
    finish(other.model, precision, standard=True, numerics=numerics)
    require_nothing_else(made.model, other.model, names)
    return tuple(names.values())


def _build(path: Path, recipe: Recipe, trt: Any, progress: Callable[[str], None]) -> None:
    progress("build")
    try:
        builder.build(path, recipe.to_json(), trt)
    except builder.Cancelled as cause:
        raise KeyboardInterrupt from cause
    except builder.Stopped as cause:
        raise BuildFailed("TensorRT did not build the engine", found=str(cause)) from cause


class _Checking:
    """The graph, and perhaps the plan, held to torch."""

    def __init__(
        self,
        onnx: bytes,
        backbone: Backbone,
        begun: Begun,
        bank: Mapping[str, NDArray[Any]],
        max_batch: int,
        evidence: Evidence,
        device: Device,
        precision: str,
        output: Path,
    ) -> None:
        self.onnx, self.backbone, self.begun, self.bank = onnx, backbone, begun, bank
        self.max_batch, self.evidence, self.device = max_batch, evidence, device
        self.precision, self.output = precision, output

    def graph(self) -> bool:
        """Check the graph in ONNX Runtime; whether that was possible."""
        if self.precision == "bf16" and self.device.provider == "cpu":
            return False
        # on the CPU, a tf32 graph is the float32 graph that it is
        exact = self.precision == "tf32" and self.device.provider == "cpu"
        exact = exact or self.precision in QUANTISED  # the float32 graph, before it is quantised
        self._require(self._check("fp32" if exact else self.precision), "graph")
        return True

    def plan(self, session: Session) -> None:
        """Check an open plan."""
        self._require(self._check(self.precision, session), "plan")

    def _check(self, precision: str, session: Session | None = None) -> Verdict:
        mode = self.begun.plan.mode
        with tempfile.TemporaryDirectory() as folder:
            engine = Path(folder) / "model.onnx"
            engine.write_bytes(self.onnx)
            return check_engine(
                engine,
                self.backbone,
                self.begun.deltas,
                self.begun.sites,
                mixes=mode == "multi",
                fans=mode == bundles.FAN_OUT,
                bank=self.bank,
                max_batch=self.max_batch,
                evidence=self.evidence,
                device=self.device,
                precision=precision,
                session=session,
            )

    def _require(self, verdict: Verdict, what: str) -> None:
        if failures := verdict.failures:
            raise CheckFailed(
                f"the {what} does not agree with torch, so nothing was written",
                where=self.output,
                found="; ".join(
                    f"{c.name}: {c.error:.2g} > {c.budget:.2g} {c.note}" for c in failures[:3]
                ),
                do="report this with the deltas",
            )
