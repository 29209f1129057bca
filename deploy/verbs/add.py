"""`utune-deploy add`: more tasks in a bundle, without a rebuild."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..options import (
    PATH,
    BackboneChoice,
    backbone_options,
    device_options,
    force_option,
    json_option,
)

if TYPE_CHECKING:
    from pathlib import Path

    from ...export.engine import Device
    from ..console import Console


@click.command("add")
@click.argument("bundle", type=PATH)
@click.argument("deltas", type=PATH, nargs=-1, required=True, metavar="DELTA...")
@backbone_options
@click.option("-o", "--output", type=PATH, required=True, help="The new bundle's folder.")
@click.option("--images", type=PATH, help="Folder of real pictures, or one per task in it.")
@device_options
@json_option
@force_option
@click.pass_obj
def command(
    console: Console,
    bundle: Path,
    deltas: tuple[Path, ...],
    choice: BackboneChoice,
    output: Path,
    images: Path | None,
    device: Device,
    as_json: bool,
    force: bool,
) -> None:
    """Add the tasks in DELTA... to BUNDLE, exported with --bank inputs; its engine stays the same.

    The new tasks are checked on that engine before anything is written.
    """
    from ...export.bundle import open_bundle
    from ...merge.delta import load_delta
    from ...merge.files import digest, refuse_existing
    from ..add import add_tasks
    from ..pictures import read_folder
    from ..reference import Evidence
    from ..task import Task

    refuse_existing(output, force=force, inputs=(*deltas, bundle, *choice.files))
    opened = open_bundle(bundle)
    tasks = [Task(load_delta(path), digest(path)) for path in deltas]
    pictures = {}
    if images is not None:
        pictures = read_folder(images, [(t.delta.task, t.delta.preprocessing) for t in tasks])
    grown = add_tasks(
        opened,
        choice.load(),
        tasks,
        output,
        evidence=Evidence(pictures),
        device=device,
        force=force,
    )
    if as_json:
        console.json({"bundle": str(output), "tasks": [task.name for task in grown.tasks]})
        return
    names = ", ".join(task.delta.task for task in tasks)
    console.result(f"wrote {output}: {names} added, {len(grown.tasks)} tasks, the same engine")
