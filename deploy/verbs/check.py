"""`utune-deploy check`: a bundle against the deltas and the backbone it claims to be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..options import (
    PATH,
    BackboneChoice,
    backbone_options,
    device_options,
    json_option,
)

if TYPE_CHECKING:
    from pathlib import Path

    from ...export.engine import Device
    from ..console import Console


@click.command("check")
@click.argument("bundle", type=PATH)
@click.argument("deltas", type=PATH, nargs=-1, required=True, metavar="DELTA...")
@backbone_options
@click.option("--images", type=PATH, help="Folder of real pictures, or one per task in it.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the noise.")
@click.option(
    "--every-tensor", is_flag=True, help="Try every tensor for liveness, however long it takes."
)
@device_options
@json_option
@click.pass_obj
def command(
    console: Console,
    bundle: Path,
    deltas: tuple[Path, ...],
    choice: BackboneChoice,
    images: Path | None,
    seed: int,
    every_tensor: bool,
    device: Device,
    as_json: bool,
) -> None:
    """Check that BUNDLE answers as the tasks in DELTA... do in torch.

    Exit code 3 when a comparison fails, 4 when bundle, deltas and backbone do not belong together.
    """
    from ...export.agreement import Least
    from ...export.bundle import BANK, open_bundle
    from ...merge.delta import load_delta, require_backbone
    from ...merge.errors import CheckFailed
    from ...merge.files import digest
    from ...merge.sites import measure
    from ..check import check_engine
    from ..held import bank_rows, require_same_backbone, require_tasks
    from ..pictures import read_folder
    from ..reference import Evidence

    opened = open_bundle(bundle)
    loaded = [load_delta(path, keep=False) for path in deltas]
    given = dict(zip(map(digest, deltas), loaded, strict=True))
    tasks = require_tasks(opened, given)
    backbone = choice.load()
    require_same_backbone(opened, backbone)
    sites = measure(backbone)
    for delta in tasks:
        require_backbone(delta, backbone, sites)
    pictures = {}
    if images is not None:
        pictures = read_folder(images, [(delta.task, delta.preprocessing) for delta in tasks])
    evidence = Evidence(pictures, seed, every_tensor, Least.of_plan(opened.plan))
    verdicts = {
        engine.file: check_engine(
            bundle / engine.file,
            backbone,
            tasks,
            sites,
            mixes=engine is opened.engine and opened.mode == "multi",
            fans=engine is opened.engine_of_all,
            bank=bundle / BANK if engine.reads_bank else {},
            rows=bank_rows(opened, backbone, tasks, sites) if engine is opened.engine else None,
            max_batch=engine.max_batch,
            evidence=evidence,
            device=device,
            precision=engine.precision,
        )
        for engine in (opened.engine, opened.fan_out)
        if engine is not None
    }
    compared = [(file, c) for file, verdict in verdicts.items() for c in verdict.comparisons]
    failed = [c.name for _, c in compared if not c.passed]
    if as_json:
        main = verdicts[opened.engine.file].to_json()
        every = {"fan_out": verdicts[opened.fan_out.file].to_json()} if opened.fan_out else {}
        console.json({"bundle": str(bundle), **main, **every, "passed": not failed})
    else:
        rows = [
            (
                "pass" if c.passed else "FAIL",
                file,
                c.name,
                c.rows,
                f"{c.error:.1e}",
                f"{c.budget:.1e}",
                c.flips,
                c.note,
            )
            for file, c in compared
        ]
        head = ("", "engine", "comparison", "rows", "error", "budget", "flips", "note")
        if len(verdicts) == 1:  # no need to say which
            head, rows = head[:1] + head[2:], [row[:1] + row[2:] for row in rows]
        console.table(head, rows)
    if failed:
        raise CheckFailed(
            "the bundle does not answer as its tasks do in torch",
            where=bundle,
            found=", ".join(failed),
            do="do not ship it; export it again",
        )
    if not as_json:
        console.result(f"{bundle}: all {len(compared)} comparisons passed")
