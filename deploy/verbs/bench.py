"""`utune-deploy bench`: the engine against the bare backbone, side by side in one run."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from ..options import PATH, device_options, force_option, json_option

if TYPE_CHECKING:
    from pathlib import Path

    from ...export.engine import Device
    from ..console import Console


@click.command("bench")
@click.argument("bundle", type=PATH)
@click.option(
    "-b",
    "--batch",
    "batches",
    multiple=True,
    type=click.IntRange(1),
    help="Batch size; repeatable.  [default: 1, 8]",
)
@click.option(
    "-m",
    "--mix",
    "mixes",
    multiple=True,
    help="one, uniform or zipf; repeatable.  [default: uniform]",
)
@click.option(
    "--against",
    type=PATH,
    multiple=True,
    help="Another bundle to time in the same run; repeatable.",
)
@click.option(
    "--rounds",
    type=click.IntRange(2),
    default=50,
    show_default=True,
    help="Counted rounds at least.",
)
@click.option(
    "--warmup", type=click.IntRange(1), default=5, show_default=True, help="Rounds not counted."
)
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=3.0,
    show_default=True,
    help="Seconds per case at least.",
)
@click.option(
    "--resident",
    is_flag=True,
    help="Time engines whose inputs and answers stay on the device (IO binding, one CUDA graph).",
)
@click.option("-o", "--output", type=PATH, help="Folder for report.json and report.html.")
@device_options
@json_option
@force_option
@click.pass_obj
def command(
    console: Console,
    bundle: Path,
    batches: tuple[int, ...],
    mixes: tuple[str, ...],
    against: tuple[Path, ...],
    rounds: int,
    warmup: int,
    seconds: float,
    resident: bool,
    output: Path | None,
    device: Device,
    as_json: bool,
    force: bool,
) -> None:
    """Time BUNDLE against its backbone alone, in the same runtime and the same run."""
    from ...export.bundle import open_bundle
    from ...merge.files import refuse_existing
    from ..bench.page import write_html
    from ..bench.report import Settings, write_json
    from ..bench.run import bench
    from ..bench.table import print_table

    if output is not None:
        refuse_existing(output / "report.json", force=force)
        refuse_existing(output / "report.html", force=force)

    def progress(now) -> None:
        if sys.stderr.isatty() and not console.quiet:
            click.echo(f"\r{now}\033[K", nl=False, err=True)

    opened = open_bundle(bundle)
    report = bench(
        opened,
        [open_bundle(path) for path in against],
        batches=batches or tuple(sorted({1, min(8, opened.engine.max_batch)})),
        mixes=mixes or ("uniform",),
        device=device,
        resident=resident,
        settings=Settings(warmup_rounds=warmup, min_rounds=rounds, min_seconds=seconds),
        progress=progress,
    )
    progress("")
    if as_json:
        console.json(report.to_json())
    else:
        print_table(report)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_json(report, output / "report.json")
        write_html(report, output / "report.html")
        console.say(f"wrote {output / 'report.json'} and {output / 'report.html'}")
