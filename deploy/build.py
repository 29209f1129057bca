"""Plan, model, graph, engine, check, bundle: each step is a function of the floors below."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from onnx_ir.passes import common

from ..export import bundle as bundles
from ..export.bundle import FAN_OUT
from ..export.engine import CPU, Device
from ..export.graph import OPSET, Inputs, clean, merge_equal, serialise, specs, trace
from ..export.macs import macs
from ..export.parity import Verdict
from ..export.passes import APART, CPU_PASSES, CUDA_PASSES, PASSES, rewrite
from ..export.passes.gathered import RANKS
from ..export.precision import HALF, ON_CUDA, QUANTISED, to_half
from ..merge.attach import answer_shapes
from ..merge.backbone import create
from ..merge.bank import NO_ROOM, Bank, Room, stack
from ..merge.delta import Delta, require_backbone
from ..merge.errors import CheckFailed, IncompatibleArtefact, UsageError
from ..merge.fan_out import FanOut, Group, share
from ..merge.files import atomic_folder, refuse_existing
from ..merge.fold import fold
from ..merge.lower import in_double, lower
from ..merge.mixed import Alone, Mixed, Single
from ..merge.sites import Sites, measure
from .check import Evidence, check_engine, require_runnable
from .numerics import Numerics, Proved, require, shrink
from .plan import Plan, make_plan
from .versions import versions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from ..export.engine import Tensor
    from ..export.precision import Typing
    from ..merge.backbone import Backbone
    from ..merge.tuner import Branch

ENGINE_FILE = "model.onnx"
SERVABLE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # what Triton takes as a model's name


@dataclass(frozen=True)
class Task:
    """A delta and the digest of its file."""

    delta: Delta
    digest: str


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
        BuildFailed: The graph cannot be made.
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
    made = [graph_of(plan, backbone, deltas, sites, groups, precision, room)]
    made += [_fan_out(backbone, groups)] if fan_out and plan.mode != FAN_OUT else []
    progress("rewrite")
    stacked = made[0].bank
    read = plan.bank == "inputs" and stacked is not None
    exact = bank_inputs(stacked.tensors, "fp32") if read and stacked is not None else {}
    numerics = numerics.with_examples(
        precision, backbone, evidence, [delta.task for delta in deltas]
    )
    banks = [exact, {}]
    finished = [
        finish(graph.model, precision, numerics=numerics, bank=read_in)
        for graph, read_in in zip(made, banks, strict=False)
    ]
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
    counted = _counted(made[-1].model, backbone, deltas, sites) if every else {}
    files = [serialise(graph.model, {bundles.IDENTITY: identity}) for graph in made]
    bank_tensors = bank_inputs(stacked.tensors, precision) if exact and stacked is not None else {}
    progress("check")
    verdicts = [
        check_engine(
            file,
            backbone,
            deltas,
            sites,
            mixes=plan.mode == "multi" and number == 0,
            fans=plan.mode == FAN_OUT or number == 1,
            bank=bank_tensors if number == 0 else {},
            max_batch=max_batch,
            evidence=evidence,
            device=device,
            precision="fp32" if precision in QUANTISED else precision,
        )
        for number, file in enumerate(files)
    ]
    if failures := [c for verdict in verdicts for c in verdict.failures]:
        raise CheckFailed(
            "the engine does not agree with torch, so no bundle was written",
            where=output,
            found="; ".join(
                f"{c.name}: {c.error:.2g} > {c.budget:.2g} {c.note}" for c in failures[:3]
            ),
            do="if a branch has no effect, train or drop it; otherwise report this with the deltas",
        )
    shrunk = []
    if precision in QUANTISED:
        progress("quantise")
        metadata = {bundles.IDENTITY: identity}
        for number, (graph, file, read_in) in enumerate(zip(made, files, banks, strict=False)):
            form = FAN_OUT if number else plan.mode
            proved = Proved(graph.model, file, form, read_in, entries, metadata)
            shrunk.append(shrink(proved, precision, "onnxruntime", backbone, numerics, output))
        files = [part.file for part in shrunk]
        verdicts = [
            Verdict((*verdict.comparisons, *part.comparisons))
            for verdict, part in zip(verdicts, shrunk, strict=True)
        ]
    progress("write")
    result = bundles.Bundle(
        path=output,
        name=name,
        mode=plan.mode,
        bank=plan.bank,
        engine=engine,
        tasks=entries,
        backbone=backbone.identity.to_json(),
        plan={
            **plan.to_json(),
            **counted,
            "rewritten": finished[0].rewritten,
            "typing": finished[0].typing.to_json(),
            **({"numerics": facts} if facts else {}),
            **dict(
                zip(("quantised", "quantised_fan_out"), (p.report for p in shrunk), strict=False)
            ),
            "lowered": made[0].lowered,
            "slots": [slot.to_json() for slot in stacked.slots] if stacked is not None else [],
        },
        check=verdicts[0].to_json()
        | ({"fan_out": verdicts[1].to_json()} if len(verdicts) > 1 else {}),
        versions=versions(),
        identity=identity,
        fan_out=second,
    )
    with atomic_folder(output) as folder:
        for description, content in zip(descriptions, files, strict=True):
            (folder / description.file).write_bytes(content)
        if bank_tensors:
            from safetensors.numpy import save_file

            about = {bundles.TASKS: bundles.tasks_digest(entries)}
            save_file(bank_tensors, folder / bundles.BANK, metadata=about)
        bundles.write_manifest(folder, replace(result, path=folder))
        bundles.open_bundle(folder)  # what cannot be opened does not replace what can
    progress("done")
    return bundles.open_bundle(output)


class Begun(NamedTuple):
    """What is decided before anything is traced."""

    name: str
    deltas: list[Delta]
    sites: Sites
    entries: tuple[bundles.Task, ...]
    plan: Plan
    groups: tuple[Group, ...]


def begin(
    output: Path,
    backbone: Backbone,
    tasks: Sequence[Task],
    name: str | None,
    *,
    mode: str,
    bank: str,
    fan_out: bool,
    force: bool,
    progress: Callable[[str], None],
) -> Begun:
    """Hold tasks, backbone and output to what can be built, and plan it; arguments of `export_bundle`.

    Raises:
        UsageError: The output exists, or the mode does not fit the tasks.
        IncompatibleArtefact: A delta does not belong to the backbone.
    """
    refuse_existing(output, force=force)
    name = name or output.name
    if not SERVABLE.fullmatch(name):
        raise UsageError(
            "a bundle of this name could not be served",
            wanted="letters, digits, '_', '.' and '-', beginning with a letter, digit or '_'",
            found=name,
            do="choose another --name",
        )
    deltas = [task.delta for task in tasks]
    dtype = backbone.dtype
    if dtype != torch.float32:
        raise UsageError(
            "an engine is built from a float32 backbone",
            found=dtype,
            do="load the float32 weights that the tasks were trained on",
        )
    progress("measure")
    sites = measure(backbone)
    for delta in deltas:
        require_backbone(delta, backbone, sites)
    require_one_kind_of_answer([delta.labels for delta in deltas])
    entries = manifest_tasks(tasks, backbone, sites)
    every = fan_out or mode == FAN_OUT
    if every:
        require_one_preprocessing(deltas)
    groups = fan_out_groups(backbone, deltas, sites) if every else ()
    plan = make_plan(deltas, backbone, sites, mode=mode, bank=bank, groups=groups)
    return Begun(name, deltas, sites, entries, plan, groups)


class Finished(NamedTuple):
    """What was done to a traced graph: how often each pass rewrote something, and its types."""

    rewritten: dict[str, int]
    typing: Typing


def finish(
    model: ir.Model,
    precision: str,
    *,
    standard: bool = False,
    numerics: Numerics | None = None,
    bank: Mapping[str, NDArray[np.generic]] | None = None,
) -> Finished:
    """Run every pass on a traced graph, in place, and give it the types of a precision.

    Folds are float32 or wider; weights are cast once, behind them.

    Args:
        model: The graph.
        precision: A key of `export.precision.PRECISIONS`.
        standard: Keep to ONNX's own operators, for runtimes that are not ONNX Runtime.
        numerics: What stays float32, and the examples of an audit.
        bank: Float32 tensors by input name for that, where the bank is an input.

    Raises:
        UsageError: A pattern of nodes to keep names none.
        CheckFailed: Values leave the range of the precision.
    """
    rewritten = rewrite(model, APART if precision in QUANTISED else PASSES)
    clean(model)
    typing = (numerics or Numerics()).typed(model, precision, bank)
    if not standard:
        rewritten |= rewrite(model, CUDA_PASSES if precision in ON_CUDA else CPU_PASSES)
        common.TopologicalSortPass()(model)
    return Finished(rewritten, typing)


def bank_inputs(
    tensors: Mapping[str, torch.Tensor], precision: str
) -> dict[str, NDArray[np.generic]]:
    """The bank by input name, in the type in which the engine reads it."""
    arrays = {f"bank/{key}": tensor.float().numpy() for key, tensor in tensors.items()}
    if precision not in HALF:
        return arrays
    return {name: to_half(array, precision)[0] for name, array in arrays.items()}


class Made(NamedTuple):
    """A traced model, its bank, and the tasks whose prompts became prefixes."""

    model: ir.Model
    bank: Bank | None
    lowered: list[str]


def require_one_kind_of_answer(labels: Sequence[tuple[str, ...]]) -> None:
    """Tasks of one bundle all name classes, or none does.

    Raises:
        UsageError: Some do.
    """
    without = sum(not names for names in labels)
    if 0 < without < len(labels):
        raise UsageError(
            "some tasks have labels and others answer with vectors",
            wanted="labels for all tasks of a bundle, or for none",
            found=f"none for {without} of {len(labels)}",
            do="export them into two bundles",
        )


def _width(delta: Delta, answer: tuple[int, ...]) -> int | None:
    """How many values a task without labels answers with; None with labels, which say it.

    Raises:
        IncompatibleArtefact: A task with labels answers with several vectors per row.
    """
    if not delta.labels:
        return answer[-1]
    if len(answer) != 1:
        raise IncompatibleArtefact(
            "a task with labels answers with several vectors per row",
            where=f"task {delta.task}",
            wanted="[B, K], K labels",
            found=["B", *answer],
            do="train it without labels: attach(..., classes=None)",
        )
    return None


def require_one_preprocessing(deltas: Sequence[Delta]) -> None:
    """Tasks that answer the same row must read the same pixels.

    Raises:
        IncompatibleArtefact: Two tasks prepare their pictures differently.
    """
    first = deltas[0]
    for delta in deltas[1:]:
        if delta.preprocessing != first.preprocessing:
            raise IncompatibleArtefact(
                "tasks that answer the same row must prepare their pictures alike",
                where=f"tasks {first.task} and {delta.task}",
                wanted=_differing(first, delta),
                found=_differing(delta, first),
                do="export those that do into one bundle each, or leave out --fan-out",
            )


def _differing(delta: Delta, other: Delta) -> dict[str, object]:
    """What a task's preprocessing says that the other's does not."""
    own, others = (d.preprocessing.to_json() if d.preprocessing else {} for d in (delta, other))
    return {name: value for name, value in own.items() if others.get(name) != value}


def fan_out_groups(backbone: Backbone, deltas: Sequence[Delta], sites: Sites) -> tuple[Group, ...]:
    """What tasks share when every row is answered for all of them."""
    double = in_double(backbone)
    return share(
        backbone, [lower(backbone, delta, sites, double) for delta in deltas], sites, torch.float32
    )


def _counted(
    model: ir.Model, backbone: Backbone, deltas: Sequence[Delta], sites: Sites
) -> dict[str, dict[str, int]]:
    """Multiply-accumulates for one example: of the engine for all tasks, and of the tasks one by one."""
    double = in_double(backbone)
    counted: dict[tuple[frozenset[Branch], int], int] = {}
    alone = 0
    for delta in deltas:
        kind = frozenset(delta.branches.values()), delta.parameters
        if kind not in counted:
            bank = stack([lower(backbone, delta, sites, double)], torch.float32)
            single = _traced(Single(backbone, bank), backbone)
            rewrite(single)
            counted[kind] = macs(single).total
        alone += counted[kind]
    return {"macs": {"every task": macs(model).total, "tasks one by one": alone}}


def _fan_out(backbone: Backbone, groups: Sequence[Group]) -> Made:
    """The engine for every task; each group runs the trunk, and what they share of it becomes one."""
    return Made(merge_equal(_traced(FanOut(backbone, groups), backbone)), None, [])


def _traced(module: torch.nn.Module, backbone: Backbone) -> ir.Model:
    """A module that takes the backbone's inputs alone."""
    return trace(module.eval(), Inputs(_rows(backbone)))


def _rows(backbone: Backbone) -> dict[str, torch.Tensor]:
    names = [entry.name for entry in backbone.inputs]
    return dict(zip(names, backbone.draw(batch=2), strict=True))


def inputs_of(backbone: Backbone, model: ir.Model) -> tuple[Tensor, ...]:
    """The graph's inputs, with what their integers are below."""
    below = {
        entry.name: 2 if entry.values == "mask" else entry.high
        for entry in backbone.inputs
        if entry.values != "normal"
    }
    return tuple(replace(t, high=below.get(t.name)) for t in specs(model.graph.inputs))


def graph_of(
    plan: Plan,
    backbone: Backbone,
    deltas: Sequence[Delta],
    sites: Sites,
    groups: Sequence[Group],
    precision: str,
    room: Room = NO_ROOM,
) -> Made:
    """The traced model of a plan's engine.

    Args:
        plan: Of the tasks.
        backbone: The frozen backbone.
        deltas: The tasks in row order.
        sites: Of the backbone.
        groups: What tasks share, in mode `fan-out`.
        precision: In half, the bank is laid out for fused kernels; `fp32` for standard operators.
        room: Sizes that the bank's slots have at least.
    """
    if plan.mode == FAN_OUT:
        return _fan_out(backbone, groups)
    rows = _rows(backbone)
    if plan.mode == "merged":
        merged = fold(deltas[0], backbone, sites=sites)
        arguments = {**backbone.identity.arguments, "num_classes": len(deltas[0].labels)}
        plain = create(backbone.identity.architecture, arguments).model
        plain.load_state_dict(dict(merged.tensors))
        return Made(trace(plain, Inputs(rows)), None, [])
    double = in_double(backbone)
    constant = [lower(backbone, delta, sites, double) for delta in deltas]
    lowered = [d.task for d, c in zip(deltas, constant, strict=True) if c is not d]
    stacked = stack(constant, torch.float32, ranks=RANKS if precision in HALF else (), room=room)
    mixes = not any(b.tuner.no_bank for b in deltas[0].branches.values())
    if plan.mode == "parallel" and precision in HALF and mixes:
        rename = {f"bank_{i}": f"bank/{key}" for i, key in enumerate(stacked.tensors)}
        module = Alone(backbone, stacked).eval()
        return Made(trace(module, Inputs(rows), rename=rename), stacked, lowered)
    if plan.mode == "parallel":
        return Made(_traced(Single(backbone, stacked), backbone), stacked, lowered)
    module = Mixed(backbone, stacked).eval()
    task = torch.tensor([0, min(1, len(deltas) - 1)])
    if plan.bank == "inputs":
        bank = {f"bank/{key}": tensor for key, tensor in stacked.tensors.items()}
        return Made(trace(module, Inputs(rows, task, bank)), stacked, lowered)
    rename = {f"bank_{i}": f"bank/{key}" for i, key in enumerate(stacked.tensors)}
    return Made(trace(module, Inputs(rows, task), rename=rename), stacked, lowered)


def manifest_tasks(
    tasks: Sequence[Task], backbone: Backbone, sites: Sites, first: int = 0
) -> tuple[bundles.Task, ...]:
    """What a manifest says of tasks whose rows begin at `first`.

    Raises:
        IncompatibleArtefact: A task with labels answers with several vectors per row.
    """
    answers = answer_shapes(backbone, [t.delta for t in tasks], sites)
    return tuple(
        bundles.Task(
            t.delta.task,
            row,
            t.delta.labels,
            t.delta.preprocessing,
            t.digest,
            _width(t.delta, answer),
        )
        for row, (t, answer) in enumerate(zip(tasks, answers, strict=True), start=first)
    )


def backbone_engine(backbone: Backbone, precision: str = "fp32") -> bytes:
    """The backbone alone, through the same passes: the baseline of every benchmark.

    Raises:
        UsageError: The precision takes its ranges from examples of a task.
    """
    if precision in QUANTISED:
        raise UsageError(
            f"there is no bare backbone in {precision} to time beside: its ranges come from examples",
            do="name a bundle in fp32 first, and this one with --against",
        )
    model = _traced(backbone.model, backbone)
    finish(model, precision)
    return serialise(model, {})
