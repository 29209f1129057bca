"""`utune-deploy bench`: the engine against the bare backbone, side by side in one run."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from ..bench.beside import KINDS, Beside
from ..options import PATH, device_options, force_option, json_option, memory_options

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ...export.engine import Device
    from ..bench.measure import Progress
    from ..bench.pace import Pace
    from ..bench.sweep import Part
    from ..console import Console


@click.command("bench")
@click.argument("bundle", type=PATH, required=False)
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
    help="one, uniform, zipf or hot; repeatable.  [default: uniform]",
)
@click.option(
    "--against",
    type=PATH,
    multiple=True,
    help="Another bundle to time in the same run; repeatable.",
)
@click.option(
    "--beside",
    "kinds",
    multiple=True,
    help=f"What else answers BUNDLE's tasks: {', '.join(KINDS)}; repeatable.",
)
@click.option(
    "--delta", "deltas", type=PATH, multiple=True, help="With --beside: a task's delta; repeatable."
)
@click.option("--weights", type=PATH, help="With --beside: the frozen weights.")
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
@click.option(
    "--ceiling/--no-ceiling",
    default=True,
    show_default=True,
    help="Measure what the machine does at best: a large product and a large sum.",
)
@click.option(
    "--footprint/--no-footprint",
    default=True,
    show_default=True,
    help="Measure memory, size and time to open of each subject alone in a process of its own.",
)
@click.option(
    "--nodes",
    is_flag=True,
    help="Profile each engine once, apart from the timed session: time by operator and by part of the model.",
)
@click.option(
    "--recipe",
    type=PATH,
    help="A YAML file that names bundles, cases and comparisons, instead of BUNDLE and the options of one run.",
)
@click.option("--fresh", is_flag=True, help="With --recipe: run again what is there already.")
@click.option("-o", "--output", type=PATH, help="Folder for report.json and report.html.")
@device_options
@memory_options
@json_option
@force_option
@click.pass_context
def command(
    context: click.Context,
    bundle: Path | None,
    batches: tuple[int, ...],
    mixes: tuple[str, ...],
    against: tuple[Path, ...],
    kinds: tuple[str, ...],
    deltas: tuple[Path, ...],
    weights: Path | None,
    rounds: int,
    warmup: int,
    seconds: float,
    resident: bool,
    ceiling: bool,
    footprint: bool,
    nodes: bool,
    recipe: Path | None,
    fresh: bool,
    output: Path | None,
    device: Device,
    as_json: bool,
    force: bool,
) -> None:
    """Time BUNDLE against its backbone alone, in the same runtime and the same run.

    With --recipe, time everything that a YAML file names; a run that was stopped goes on where it was.
    """
    from ...merge.errors import UsageError

    console: Console = context.obj
    if recipe is not None:
        _refuse_beside_recipe(context)
        if output is None:
            raise UsageError("a recipe needs a folder for its reports", wanted="-o FOLDER")
        _sweep(console, recipe, output, fresh=fresh, as_json=as_json)
        return
    if bundle is None or fresh:
        raise UsageError(
            "there is nothing to time" if bundle is None else "--fresh belongs to --recipe",
            wanted="a BUNDLE, or --recipe FILE",
        )
    from ...export.bundle import open_bundle
    from ...merge.files import refuse_existing
    from ..bench.case import Case
    from ..bench.pace import Pace, weight
    from ..bench.report import Settings, write_json
    from ..bench.run import bench
    from ..bench.table import print_table
    from ..bench.views.page import write_html

    if output is not None:
        refuse_existing(output / "report.json", force=force)
        refuse_existing(output / "report.html", force=force)
    beside = None
    if kinds:
        beside = Beside(kinds, weights, deltas)
    elif deltas or weights:
        raise UsageError("--delta and --weights belong to --beside", wanted="--beside KIND")
    opened = open_bundle(bundle)
    sizes = batches or tuple(sorted({1, min(8, opened.engine.max_batch)}))
    spread = mixes or ("uniform",)
    cases = [Case(batch, mix) for batch in sizes for mix in spread]
    line = _Line(console, Pace([weight(case, 1) for case in cases]))
    report = bench(
        opened,
        [open_bundle(path) for path in against],
        batches=sizes,
        mixes=spread,
        device=device,
        resident=resident,
        beside=beside,
        settings=Settings(warmup_rounds=warmup, min_rounds=rounds, min_seconds=seconds),
        ceiling=ceiling,
        footprint=footprint,
        nodes=nodes,
        progress=line,
    )
    line.clear()
    if as_json:
        console.json(report.to_json())
    else:
        print_table(report)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_json(report, output / "report.json")
        write_html(report, output / "report.html")
        console.say(f"wrote {output / 'report.json'} and {output / 'report.html'}")


class _Line:
    """Progress as one line that is written over where a person is watching, as a line for every case elsewhere.

    Args:
        console: Which may be quiet.
        pace: For the time left.
        names: What each case belongs to, where there is more than one thing.
    """

    def __init__(self, console: Console, pace: Pace, names: Sequence[str] = ()) -> None:
        self.console, self.pace, self.names = console, pace, names
        self.live = sys.stderr.isatty() and not console.quiet
        self.told = 0

    def __call__(self, now: Progress) -> None:
        text = self.pace.line(now)
        if self.names:
            text = f"{self.names[now.number - 1]}, {text}"
        if self.live:
            click.echo(f"\r{text}\033[K", nl=False, err=True)
        elif now.number != self.told:
            self.told = now.number
            self.console.say(text)

    def clear(self) -> None:
        """Leave nothing behind."""
        if self.live:
            click.echo("\r\033[K", nl=False, err=True)


def _refuse_beside_recipe(context: click.Context) -> None:
    """What a recipe says itself is not also said on the command line."""
    from ...merge.errors import UsageError

    own = ("recipe", "fresh", "output", "as_json", "force")
    both = [
        parameter.opts[-1]
        for parameter in context.command.params
        if parameter.name not in own
        and context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    ]
    if both:
        raise UsageError(
            "a recipe says itself what is timed and how",
            wanted="--recipe FILE -o FOLDER alone",
            found=", ".join(both),
        )


def _sweep(console: Console, recipe: Path, output: Path, *, fresh: bool, as_json: bool) -> None:
    """Run a recipe and print its reports."""
    from ..bench.pace import Pace
    from ..bench.recipe import read_recipe
    from ..bench.sweep import sweep, weights
    from ..bench.table import print_table

    lines: list[_Line] = []

    def started(todo: list[Part], had: int) -> None:
        console.say(f"{len(todo)} cases to run, {had} there already")
        lines.append(_Line(console, Pace(weights(todo)), [part.together.name for part in todo]))

    reports = sweep(
        read_recipe(recipe),
        output,
        fresh=fresh,
        started=started,
        progress=lambda now: lines[0](now),
    )
    lines[0].clear()
    if as_json:
        console.json({name: report.to_json() for name, report in reports.items()})
    else:
        for name, report in reports.items():
            console.result(click.style(name, bold=True))
            print_table(report)
    console.say(f"wrote {output / 'report.json'} and {output / 'report.html'}")
