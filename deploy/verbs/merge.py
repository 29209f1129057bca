"""`utune-deploy merge`: a task into the frozen weights, with a report of what casting lost."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from ..options import (
    PATH,
    BackboneChoice,
    backbone_options,
    dry_run_option,
    force_option,
    json_option,
)

if TYPE_CHECKING:
    from pathlib import Path

    from ..console import Console

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
SHOWN = 5


@click.command("merge")
@click.argument("delta", type=PATH)
@backbone_options
@click.option("-o", "--output", type=PATH, required=True, help="The checkpoint (.safetensors).")
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    default="fp32",
    show_default=True,
    help="Of the checkpoint; sums run in float64 and are cast once.",
)
@click.option("--report", type=PATH, help="Write the merge-loss report as JSON.")
@dry_run_option
@json_option
@force_option
@click.pass_obj
def command(
    console: Console,
    delta: Path,
    choice: BackboneChoice,
    output: Path,
    dtype: str,
    report: Path | None,
    dry_run: bool,
    as_json: bool,
    force: bool,
) -> None:
    """Fold the task in DELTA into the backbone's weights, exactly or not at all.

    The result is a plain checkpoint that timm loads; its classifier is the task's head.
    """
    import torch
    from safetensors.torch import save_file

    from ...merge.delta import load_delta
    from ...merge.files import atomic_file, refuse_existing
    from ...merge.fold import fold
    from ...merge.fold import report as loss_report

    if not dry_run:
        inputs = (delta, *choice.files)
        refuse_existing(output, force=force, inputs=inputs)
        if report is not None:
            refuse_existing(report, force=force, inputs=inputs)
    task = load_delta(delta)
    merged = fold(task, choice.load(), dtype=getattr(torch, DTYPES[dtype]))
    found = {
        "task": task.task,
        "output": str(output),
        "written": not dry_run,
        **loss_report(merged),
    }
    if not dry_run:
        with atomic_file(output) as temporary:
            tensors = {name: tensor.contiguous() for name, tensor in merged.tensors.items()}
            save_file(tensors, temporary, metadata={"format": "pt"})
        if report is not None:
            with atomic_file(report) as temporary:
                temporary.write_text(json.dumps(found, indent=2) + "\n")
    if as_json:
        console.json(found)
    else:
        verb = "would change" if dry_run else "changed"
        console.result(f"task {task.task} folds exactly: {verb} {len(merged.losses)} tensors")
        rows = [
            (loss.tensor, f"{loss.error:.2e}", f"{loss.unmoved:.1%}", f"{loss.largest:.3g}")
            for loss in merged.losses[:SHOWN]
        ]
        if rows:
            console.table(
                (f"worst tensors in {dtype}", "error of the difference", "not moved", "largest"),
                rows,
            )
        if not dry_run:
            console.result(f"wrote {output}")
    if merged.warning:
        console.warn(merged.warning)
