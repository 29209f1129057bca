"""Plan, model, graph, engine, check, bundle: each step is a function of the floors below."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..export import bundle as bundles
from ..export.bundle import FAN_OUT
from ..export.engine import CPU, Device
from ..export.graph import OPSET, specs
from ..export.parity import Verdict
from ..export.precision import QUANTISED, Losses
from ..merge.bank import NO_ROOM, Room
from ..merge.calls import calls_of
from ..merge.errors import CheckFailed, UsageError
from ..merge.files import atomic_folder
from ..merge.memory import give_back
from .bank_inputs import bank_inputs
from .begin import begin
from .check import check_engine
from .files import write_bank, write_graph
from .graphs import (
    counted,
    fan_out_graph,
    finish,
    graph_of,
    inputs_of,
    require_whole_attentions,
)
from .held import require_runnable
from .numerics import Numerics, Proved, require, shrink
from .reference import Evidence
from .versions import versions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ..merge.backbone import Backbone
    from .task import Task

ENGINE_FILE = "model.onnx"


def export_bundle(
    output: Path,
    backbone: Backbone,
    tasks: Sequence[Task],
    *,
    name: str | None = None,
    mode: str = "auto",
    bank: str = "constants",
    fan_out: bool = False,
    precision: str = "fp32",
    numerics: Numerics | None = None,
    max_batch: int = 16,
    room: Room = NO_ROOM,
    evidence: Evidence | None = None,
    device: Device = CPU,
    force: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> bundles.Bundle:
    """Build, check and write a bundle; nothing is written unless the check passes.

    Args:
        output: The bundle's folder.
        backbone: The frozen backbone, float32.
        tasks: The tasks in row order.
        name: Served name; the folder's name if None.
        mode: See `make_plan`.
        bank: See `make_plan`.
        fan_out: Add a second engine, which answers every task for every row.
        precision: A key of `export.precision.PRECISIONS`.
        numerics: What stays float32 in it, and examples to calibrate with.
        max_batch: Largest batch that is checked and may be asked for.
        room: With a bank that is an input, sizes that its slots have at least.
        evidence: Pictures for the check.
        device: Where the check runs the engine.
        force: Replace what stands at `output`.
        progress: Called with the name of each step as it begins.

    Raises:
        UsageError: The output exists, or the mode does not fit the tasks.
        IncompatibleArtefact: A delta does not belong to the backbone.
        BuildFailed: The graph cannot be made, or its attentions are in pieces.
        CheckFailed: The engine does not agree with torch; nothing is written.
    """
    require_runnable(precision, device)
    numerics, evidence = numerics or Numerics(), evidence or Evidence()
    require(precision, "onnxruntime", numerics.keep, calibrated=numerics.calibration is not None)
    if room != NO_ROOM and bank != "inputs":
        raise UsageError(
            "room for larger tasks is for a bank that tasks can be added to", do="add --bank inputs"
        )
    name, deltas, sites, entries, plan, groups = begin(
        output,
        backbone,
        tasks,
        name,
        mode=mode,
        bank=bank,
        fan_out=fan_out,
        force=force,
        progress=progress,
    )
    every = fan_out or mode == FAN_OUT
    progress("trace")
    shrinks = precision in QUANTISED
    made = [graph_of(plan, backbone, deltas, sites, groups, precision, room, streamed=not shrinks)]
    made += [fan_out_graph(backbone, groups)] if fan_out and plan.mode != FAN_OUT else []
    progress("rewrite")
    held = made[0].bank if plan.bank == "inputs" else None
    exact = [bank_inputs(held.tensors) if held is not None else {}, {}]
    numerics = numerics.with_examples(
        precision, backbone, evidence, [delta.task for delta in deltas]
    )
    finished = [
        finish(graph.model, precision, numerics=numerics, bank=graph.streamed or bank_of)
        for graph, bank_of in zip(made, exact, strict=False)
    ]
    calls = calls_of(backbone)
    whole = [require_whole_attentions(graph.model, calls) for graph in made]
    facts = numerics.facts(precision)
    descriptions = [
        bundles.Engine(
            target="onnxruntime",
            file=file,
            precision=precision,
            opset=OPSET,
            max_batch=max_batch,
            inputs=inputs_of(backbone, graph.model),
            outputs=specs(graph.model.graph.outputs),
        )
        for file, graph in zip((ENGINE_FILE, bundles.FAN_OUT_FILE), made, strict=False)
    ]
    engine, second = descriptions[0], descriptions[1] if len(descriptions) > 1 else None
    identity = bundles.identity_of(
        backbone.identity.to_json(),
        plan.mode,
        plan.bank,
        entries,
        precision,
        engine.inputs,
        second,
        facts,
    )
    progress("serialise")
    work = counted(made[-1].model, backbone, deltas, sites) if every else {}
    slots, rows, lowered = made[0].slots, made[0].rows, list(made[0].lowered)
    with atomic_folder(output) as folder:
        files = [folder / description.file for description in descriptions]
        about = {bundles.IDENTITY: identity}
        losses = Losses(precision)
        for number, file in enumerate(files):
            write_graph(made[number], file, about, losses)
        bank_file = folder / bundles.BANK
        if plan.bank == "inputs":
            whose = {bundles.TASKS: bundles.tasks_digest(entries)}
            write_bank(made[0], bank_file, whose, precision, losses)
        graphs = [graph.model for graph in made] if shrinks else []
        del made, held  # what is in the files is read from there
        give_back()
        progress("check")
        verdicts = [
            check_engine(
                file,
                backbone,
                deltas,
                sites,
                mixes=plan.mode == "multi" and number == 0,
                fans=plan.mode == FAN_OUT or number == 1,
                bank=bank_file if plan.bank == "inputs" and number == 0 else {},
                rows=rows if number == 0 else None,
                max_batch=max_batch,
                evidence=evidence,
                device=device,
                precision="fp32" if shrinks else precision,
            )
            for number, file in enumerate(files)
        ]
        _require_passed(verdicts, output)
        shrunk = []
        if shrinks:
            progress("quantise")
        for number, (graph, file) in enumerate(zip(graphs, files, strict=False)):
            form = FAN_OUT if number else plan.mode
            proved = Proved(graph, file, form, exact[number], entries, about)
            shrunk.append(shrink(proved, precision, "onnxruntime", backbone, numerics, output))
            file.write_bytes(shrunk[-1].file)
            compared = (*verdicts[number].comparisons, *shrunk[-1].comparisons)
            verdicts[number] = Verdict(compared)
        progress("write")
        result = bundles.Bundle(
            path=folder,
            name=name,
            mode=plan.mode,
            bank=plan.bank,
            engine=engine,
            tasks=entries,
            backbone=backbone.identity.to_json(),
            plan={
                **plan.to_json(),
                **whole[0],
                **work,
                "rewritten": finished[0].rewritten,
                "typing": finished[0].typing.with_losses(losses).to_json(),
                **({"numerics": facts} if facts else {}),
                **dict(
                    zip(
                        ("quantised", "quantised_fan_out"),
                        (part.report for part in shrunk),
                        strict=False,
                    )
                ),
                "lowered": lowered,
                "slots": [slot.to_json() for slot in slots],
            },
            check=verdicts[0].to_json()
            | ({"fan_out": verdicts[1].to_json()} if len(verdicts) > 1 else {}),
            versions=versions(),
            identity=identity,
            fan_out=second,
        )
        bundles.write_manifest(folder, result)
        written = bundles.open_bundle(folder)  # what cannot be opened does not replace what can
    progress("done")
    return replace(written, path=output)


def _require_passed(verdicts: Sequence[Verdict], output: Path) -> None:
    """Hold engines to their verdicts.

    Raises:
        CheckFailed: A comparison did not pass.
    """
    if failures := [c for verdict in verdicts for c in verdict.failures]:
        raise CheckFailed(
            "the engine does not agree with torch, so no bundle was written",
            where=output,
            found="; ".join(
                f"{c.name}: {c.error:.2g} > {c.budget:.2g} {c.note}" for c in failures[:3]
            ),
            do="if a branch has no effect, train or drop it; otherwise report this with the deltas",
        )
