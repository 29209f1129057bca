"""`utune-deploy load`: latency and throughput of a running server under load."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..options import PATH, BackboneChoice, force_option, json_option

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import TypeVar

    from ..console import Console
    from ..load.numbers import StepResult
    from ..load.report import Changing, Report
    from ..load.step import Step
    from ..load.target import Target

    T = TypeVar("T", int, float)

NO_BACKBONE = BackboneChoice(None, {}, None)


def _levels(kind: Callable[[str], T]) -> Callable[..., tuple[T, ...]]:
    """Reads `1,2,4`."""

    def read(_: click.Context, parameter: click.Parameter, text: str | None) -> tuple[T, ...]:
        try:
            return tuple(kind(part) for part in (text or "").split(",") if part or text)
        except ValueError as cause:
            raise click.BadParameter("numbers with commas between, such as 1,2,4") from cause

    return read


@click.command("load")
@click.argument("url", metavar="URL")
@click.option("--model", help="The served bundle's name, where there are several.")
@click.option(
    "--concurrency",
    metavar="N,N,...",
    callback=_levels(int),
    help="Callers that each send the next request when they have the answer.  [default: 1,2,4,8]",
)
@click.option(
    "--rate",
    "rates",
    metavar="R,R,...",
    callback=_levels(float),
    help="Requests per second, sent when they are due.",
)
@click.option("--constant", is_flag=True, help="With --rate: evenly, not at random.")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    help="A task to ask for; repeatable.  [default: all that the server lists]",
)
@click.option(
    "-m",
    "--mix",
    default="uniform",
    show_default=True,
    help="How rows spread over the tasks: one, uniform, zipf or hot.",
)
@click.option(
    "-b",
    "--batch",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Rows of each request.",
)
@click.option(
    "--encoding",
    type=click.Choice(["binary", "json"]),
    default="binary",
    show_default=True,
    help="Of tensors over HTTP.",
)
@click.option(
    "--input", "given", type=PATH, help="Rows in an npz file, by input.  [default: drawn]"
)
@click.option(
    "--warmup",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    help="Seconds not counted.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=6.0,
    show_default=True,
    help="Seconds per step that are.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Seconds after which a request is given up.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of rows, tasks and arrivals.",
)
@click.option("--add", type=PATH, help="A delta or packed task to add and remove meanwhile.")
@click.option(
    "--every",
    type=click.FloatRange(0, min_open=True),
    help="With --add: seconds between two changes.  [default: 1]",
)
@click.option("-o", "--output", type=PATH, help="Folder for report.json and report.html.")
@click.option("--csv", type=PATH, help="A file with the columns of perf_analyzer.")
@json_option
@force_option
@click.pass_obj
def command(
    console: Console,
    url: str,
    model: str | None,
    concurrency: tuple[int, ...],
    rates: tuple[float, ...],
    constant: bool,
    tasks: tuple[str, ...],
    mix: str,
    batch: int,
    encoding: str,
    given: Path | None,
    warmup: float,
    seconds: float,
    timeout: float,
    seed: int,
    add: Path | None,
    every: float | None,
    output: Path | None,
    csv: Path | None,
    as_json: bool,
    force: bool,
) -> None:
    """Load the server at URL, and report latency and throughput, step by step.

    URL is http://, https://, grpc:// or grpcs://, host and port. Either --concurrency or --rate says what is driven.
    """
    from ...merge.errors import UsageError
    from ...merge.files import refuse_existing
    from ..load.rows import DRAWN, draw_rows, read_rows
    from ..load.run import load
    from ..load.step import Settings, steps_of
    from ..load.target import find
    from ..load.traffic import write_traffic

    steps = steps_of(concurrency or (() if rates else (1, 2, 4, 8)), rates, constant=constant)
    settings = Settings(warmup, seconds, timeout, seed)
    if every is not None and add is None:
        raise UsageError("--every belongs to --add", wanted="--add FILE")
    for path in _outputs(output, csv):
        refuse_existing(path, force=force, inputs=tuple(p for p in (given, add) if p))
    target = find(url, model, tasks)
    rows = draw_rows(target, seed) if given is None else read_rows(target, given)
    source = DRAWN if given is None else str(given)
    traffic = write_traffic(
        target, rows, batch=batch, mix=mix, encoding=encoding, seed=seed, source=source
    )
    packed, changing = (b"", None) if add is None else _brought(url, target, add, every or 1.0)
    report = load(
        target,
        traffic,
        steps,
        settings,
        changing=changing,
        packed=packed,
        told=lambda step, result: console.say(_line(step, result)),
    )
    _tell(console, report, output, csv, as_json=as_json)


def _outputs(output: Path | None, csv: Path | None) -> list[Path]:
    reports = [] if output is None else [output / "report.json", output / "report.html"]
    return reports if csv is None else [*reports, csv]


def _brought(url: str, target: Target, path: Path, every_s: float) -> tuple[bytes, Changing]:
    """A packed task that is added and removed meanwhile, and what the report says of it.

    Raises:
        UsageError: The server has a task of that name: it would be gone afterwards.
    """
    from ...merge.errors import UsageError
    from ...serving.client import Client
    from ...serving.tasks.packed import read_packed
    from ..load.report import Changing
    from .task import _layout, _packed

    with Client(url, model=target.model) as client:
        data = _packed(path, _layout(client), NO_BACKBONE)
        name = read_packed(data, where=path).task.name
        if any(task.name == name for task in client.tasks()):
            raise UsageError(
                "the server has a task of that name already",
                where=target.address,
                found=name,
                do="name a file of another task: this one would be removed",
            )
    return data, Changing(name, every_s)


def _line(step: Step, result: StepResult) -> str:
    from ..bench.wording import milliseconds, rate
    from ..load.wording import state

    latency = result.latency
    tail = "no answer" if latency is None else f"p50 {milliseconds(latency.p50_ms)} ms"
    after = f" ({state(result)})" if state(result) else ""
    return f"{step.label}: {rate(result.answered_per_second)} answers/s, {tail}{after}"


def _tell(
    console: Console, report: Report, output: Path | None, csv: Path | None, *, as_json: bool
) -> None:
    """Print the report, and write what files are asked for."""
    from ..load.page import write_html
    from ..load.perf_csv import write_csv
    from ..load.report import write_json
    from ..load.table import print_table

    if as_json:
        console.json(report.to_json())
    else:
        print_table(report)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_json(report, output / "report.json")
        write_html(report, output / "report.html")
        console.say(f"wrote {output / 'report.json'} and {output / 'report.html'}")
    if csv is not None:
        write_csv(report, csv)
        console.say(f"wrote {csv}")
