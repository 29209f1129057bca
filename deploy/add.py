"""More tasks in a bundle whose bank is an input: the engine stays as it is, to the byte."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.numpy import save_file

from ..export import bundle as bundles
from ..export.agreement import Least
from ..export.engine import CPU
from ..merge.bank import Slot
from ..merge.delta import require_backbone
from ..merge.errors import CheckFailed, UsageError
from ..merge.files import atomic_folder, refuse_existing
from ..merge.lower import in_double, lower
from ..merge.rows import Rows
from ..merge.sites import measure
from .bank_inputs import bank_inputs
from .begin import manifest_tasks, require_one_kind_of_answer
from .check import check_engine
from .held import require_runnable, require_same_backbone
from .reference import Evidence

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..export.engine import Device
    from ..merge.backbone import Backbone
    from .task import Task


def add_tasks(
    bundle: bundles.Bundle,
    backbone: Backbone,
    tasks: Sequence[Task],
    output: Path,
    *,
    evidence: Evidence | None = None,
    device: Device = CPU,
    force: bool = False,
) -> bundles.Bundle:
    """Write a bundle with more tasks and the same engine.

    The new tasks are checked on that engine; the old ones keep their rows, which the bundle's own check
    showed to be independent of the others.

    Args:
        bundle: Exported with `--bank inputs`.
        backbone: Its backbone.
        tasks: What to add; every branch must fit a slot of the bank.
        output: The new bundle's folder; may be the old one with `force`.
        evidence: Pictures for the check.
        device: Where the check runs the engine.
        force: Replace what stands at `output`.

    Raises:
        UsageError: The bank is no input, the output exists, or a task name is taken.
        IncompatibleArtefact: A delta belongs to another backbone, or has no slot in the bank.
        CheckFailed: The engine does not answer as the new tasks do; nothing is written.
    """
    refuse_existing(output, force=force)
    if bundle.bank != "inputs":
        raise UsageError(
            "tasks can be added only where the bank is an input of the engine",
            where=bundle.path,
            wanted="bank inputs",
            found=f"mode {bundle.mode}, bank {bundle.bank}",
            do="export it again with all tasks, or with --bank inputs",
        )
    if bundle.fan_out is not None:
        raise UsageError(
            "the engine that answers every task at once holds its tasks, so none can be added",
            where=bundle.path / bundle.fan_out.file,
            do="export it again with all tasks, or without --fan-out",
        )
    require_runnable(bundle.engine.precision, device)
    names = [*(task.name for task in bundle.tasks), *(task.delta.task for task in tasks)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError("a task of that name is there already", found=", ".join(twice))
    require_same_backbone(bundle, backbone)
    sites = measure(backbone)
    deltas = [task.delta for task in tasks]
    for delta in deltas:
        require_backbone(delta, backbone, sites)
    manifest = bundle.path / bundles.MANIFEST
    slots = tuple(Slot.from_json(manifest, entry) for entry in bundle.plan["slots"])
    double = in_double(backbone)
    rows = Rows(slots, [lower(backbone, delta, sites, double) for delta in deltas])
    filled = list(rows)
    stacked = {key: torch.stack([row[key] for row in filled]) for key in filled[0]}
    new = bank_inputs(stacked, bundle.engine.precision)
    old = bundle.read_bank()
    verdict = check_engine(
        bundle.path / bundle.engine.file,
        backbone,
        deltas,
        sites,
        mixes=True,
        bank=new,
        rows=rows,
        max_batch=bundle.engine.max_batch,
        evidence=replace(evidence or Evidence(), least=Least.of_plan(bundle.plan)),
        device=device,
        precision=bundle.engine.precision,
    )
    if not verdict.passed:
        raise CheckFailed(
            "the engine does not answer as the new tasks do in torch, so nothing was written",
            where=bundle.path,
            found="; ".join(f"{c.name}: {c.note}" for c in verdict.failures),
        )
    require_one_kind_of_answer(
        [*(task.labels for task in bundle.tasks), *(d.labels for d in deltas)]
    )
    added = manifest_tasks(tasks, backbone, sites, first=len(bundle.tasks))
    check = {**bundle.check, "added": [*bundle.check.get("added", []), verdict.to_json()]}
    with atomic_folder(output) as folder:
        shutil.copyfile(bundle.path / bundle.engine.file, folder / bundle.engine.file)
        grown = replace(bundle, path=folder, tasks=(*bundle.tasks, *added), check=check)
        save_file(
            {name: np.concatenate([old[name], new[name]]) for name in old},
            folder / bundles.BANK,
            metadata={bundles.TASKS: bundles.tasks_digest(grown.tasks)},
        )
        bundles.write_manifest(folder, grown)
        bundles.open_bundle(folder)  # what cannot be opened does not replace what can
    return bundles.open_bundle(output)
