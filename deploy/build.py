"""Plan, model, graph, engine, check, bundle: each step is a function of the floors below."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..export import bundle as bundles
from ..export.graph import OPSET, Inputs, clean, serialise, specs, trace
from ..export.passes import rewrite
from ..merge.backbone import create
from ..merge.bank import Bank, stack
from ..merge.delta import Delta, require_backbone
from ..merge.errors import CheckFailed, UsageError
from ..merge.files import atomic_folder, refuse_existing
from ..merge.fold import fold
from ..merge.lower import in_double, lower
from ..merge.mixed import Mixed, Single
from ..merge.sites import Sites, measure
from .check import Evidence, check_engine
from .plan import Plan, make_plan
from .versions import versions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import onnx_ir as ir

    from ..merge.backbone import Backbone

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
    max_batch: int = 16,
    evidence: Evidence | None = None,
    threads: int | None = None,
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
        max_batch: Largest batch that is checked and may be asked for.
        evidence: Pictures for the check.
        threads: Of the engine during the check; None lets the runtime choose.
        force: Replace what stands at `output`.
        progress: Called with the name of each step as it begins.

    Raises:
        UsageError: The output exists, or the mode does not fit the tasks.
        IncompatibleArtefact: A delta does not belong to the backbone.
        BuildFailed: The graph cannot be made.
        CheckFailed: The engine does not agree with torch; nothing is written.
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
    dtype = next(backbone.model.parameters()).dtype
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
    plan = make_plan(deltas, backbone, sites, mode=mode, bank=bank)
    progress("trace")
    model, stacked, lowered = _graph(plan, backbone, deltas, sites)
    progress("rewrite")
    rewritten = rewrite(model)
    clean(model)
    entries = manifest_tasks(tasks)
    identity = bundles.identity_of(
        backbone.identity.to_json(),
        plan.mode,
        plan.bank,
        entries,
        "fp32",
        specs(model.graph.inputs),
    )
    progress("serialise")
    engine = serialise(model, {bundles.IDENTITY: identity})
    bank_tensors = (
        {f"bank/{key}": tensor.float().numpy() for key, tensor in stacked.tensors.items()}
        if plan.bank == "inputs" and stacked is not None
        else {}
    )
    progress("check")
    verdict = check_engine(
        engine,
        backbone,
        deltas,
        sites,
        mixes=plan.mode == "multi",
        bank=bank_tensors,
        max_batch=max_batch,
        evidence=evidence or Evidence(),
        threads=threads,
    )
    if not verdict.passed:
        raise CheckFailed(
            "the engine does not agree with torch, so no bundle was written",
            where=output,
            found="; ".join(
                f"{c.name}: {c.error:.2g} > {c.budget:.2g} {c.note}" for c in verdict.failures[:3]
            ),
            do="if a branch has no effect, train or drop it; otherwise report this with the deltas",
        )
    progress("write")
    result = bundles.Bundle(
        path=output,
        name=name,
        mode=plan.mode,
        bank=plan.bank,
        engine=bundles.Engine(
            target="onnxruntime",
            file=ENGINE_FILE,
            precision="fp32",
            opset=OPSET,
            max_batch=max_batch,
            inputs=specs(model.graph.inputs),
            outputs=specs(model.graph.outputs),
        ),
        tasks=entries,
        backbone=backbone.identity.to_json(),
        plan={
            **plan.to_json(),
            "rewritten": rewritten,
            "lowered": lowered,
            "slots": [slot.to_json() for slot in stacked.slots] if stacked is not None else [],
        },
        check=verdict.to_json(),
        versions=versions(),
        identity=identity,
    )
    with atomic_folder(output) as folder:
        (folder / ENGINE_FILE).write_bytes(engine)
        if bank_tensors:
            from safetensors.numpy import save_file

            about = {bundles.TASKS: bundles.tasks_digest(entries)}
            save_file(bank_tensors, folder / bundles.BANK, metadata=about)
        bundles.write_manifest(folder, replace(result, path=folder))
    progress("done")
    return bundles.open_bundle(output)


def _graph(
    plan: Plan, backbone: Backbone, deltas: Sequence[Delta], sites: Sites
) -> tuple[ir.Model, Bank | None, list[str]]:
    """The traced model, its bank, and the tasks whose prompts became prefixes."""
    images = backbone.example(batch=2)
    if plan.mode == "merged":
        merged = fold(deltas[0], backbone, sites=sites)
        arguments = {**backbone.identity.arguments, "num_classes": len(deltas[0].labels)}
        plain = create(backbone.identity.architecture, arguments).model
        plain.load_state_dict(dict(merged.tensors))
        return trace(plain, Inputs(images)), None, []
    double = in_double(backbone)
    constant = [lower(backbone, delta, sites, double) for delta in deltas]
    lowered = [d.task for d, c in zip(deltas, constant, strict=True) if c is not d]
    stacked = stack(constant, torch.float32)
    if plan.mode == "parallel":
        return trace(Single(backbone, stacked).eval(), Inputs(images)), stacked, lowered
    module = Mixed(backbone, stacked).eval()
    task = torch.tensor([0, min(1, len(deltas) - 1)])
    if plan.bank == "inputs":
        bank = {f"bank/{key}": tensor for key, tensor in stacked.tensors.items()}
        return trace(module, Inputs(images, task, bank)), stacked, lowered
    rename = {f"bank_{i}": f"bank/{key}" for i, key in enumerate(stacked.tensors)}
    return trace(module, Inputs(images, task), rename=rename), stacked, lowered


def manifest_tasks(tasks: Sequence[Task], first: int = 0) -> tuple[bundles.Task, ...]:
    """What a manifest says of tasks whose rows begin at `first`."""
    return tuple(
        bundles.Task(t.delta.task, row, t.delta.labels, t.delta.preprocessing, t.digest)
        for row, t in enumerate(tasks, start=first)
    )


def backbone_engine(backbone: Backbone) -> bytes:
    """The backbone alone, through the same passes: the baseline of every benchmark."""
    model = trace(backbone.model, Inputs(backbone.example(batch=2)))
    rewrite(model)
    return serialise(clean(model), {})
