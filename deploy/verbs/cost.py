"""`utune-deploy cost`: what a load costs, one mixed engine against one model per task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..options import PATH, json_option

if TYPE_CHECKING:
    from pathlib import Path

    from ..bench.cost import Cost
    from ..console import Console

MIB = 1 << 20
POSITIVE = click.FloatRange(0, min_open=True)


@click.command("cost")
@click.argument("report", type=PATH)
@click.option(
    "--price-per-hour",
    "per_hour",
    type=POSITIVE,
    required=True,
    help="Of a machine like the report's, in any currency.",
)
@click.option("--tasks", type=click.IntRange(1), required=True, help="Tasks that are served.")
@click.option("--rate", type=POSITIVE, required=True, help="Images per second over all tasks.")
@click.option(
    "--utilisation",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.7,
    show_default=True,
    help="Most of a machine's time to plan with; the rest is for bursts.",
)
@click.option(
    "--mix", help="How requests spread over tasks, a mix of the report.  [default: its only one]"
)
@click.option(
    "-b",
    "--batch",
    type=click.IntRange(1),
    help="The mixed batch.  [default: the report's largest]",
)
@click.option(
    "--mixed", metavar="SUBJECT", help="The mixed engine.  [default: the smallest of enough tasks]"
)
@click.option(
    "--single",
    metavar="SUBJECT",
    help="What stands for one task's model.  [default: one of a single task, else the backbone]",
)
@click.option("--mixed-memory", type=POSITIVE, metavar="MIB", help="Memory of the mixed engine.")
@click.option("--single-memory", type=POSITIVE, metavar="MIB", help="Memory of one task's model.")
@click.option(
    "--machine-memory",
    type=POSITIVE,
    metavar="MIB",
    help="Memory of a machine.  [default: the report's]",
)
@click.option("--comparison", help="Which comparison of a sweep.")
@json_option
@click.pass_obj
def command(
    console: Console,
    report: Path,
    per_hour: float,
    tasks: int,
    rate: float,
    utilisation: float,
    mix: str | None,
    batch: int | None,
    mixed: str | None,
    single: str | None,
    mixed_memory: float | None,
    single_memory: float | None,
    machine_memory: float | None,
    comparison: str | None,
    as_json: bool,
) -> None:
    """Price the load that REPORT's engines would serve, and say every formula that was used."""
    from ...merge.errors import UsageError
    from ..bench.cost import price
    from ..bench.reading import read_reports

    reports = read_reports(report)
    if comparison is None and len(reports) == 1:
        (comparison,) = reports
    if comparison not in reports:
        raise UsageError(
            "the report is not one comparison",
            where=report,
            wanted=f"--comparison, one of {', '.join(reports)}",
            found=comparison,
        )

    def size(mib: float | None) -> float | None:
        return None if mib is None else mib * MIB

    cost = price(
        reports[comparison],
        tasks=tasks,
        rate=rate,
        per_hour=per_hour,
        utilisation=utilisation,
        mix=mix,
        batch=batch,
        mixed=mixed,
        single=single,
        mixed_bytes=size(mixed_memory),
        single_bytes=size(single_memory),
        machine_bytes=size(machine_memory),
    )
    if as_json:
        console.json(cost.to_json())
    else:
        _print(console, cost)


def _print(console: Console, cost: Cost) -> None:
    """Inputs, the table, what was assumed, the formulas."""
    from ..bench.cost import FORMULAS
    from ..bench.wording import memory

    load = cost.load
    console.result(
        f"{load.tasks} tasks, {load.rate:g} images/s, mix {load.mix}; {load.price:g} per machine and hour, "
        f"utilisation {load.utilisation:g}, memory of a machine {memory(int(load.machine_bytes))}"
    )
    console.result(
        f"mixed: {cost.mixed}, batch {load.batch}, {memory(int(cost.mixed_bytes))}; "
        f"one model: {cost.single}, {memory(int(cost.single_bytes))}\n"
    )
    console.table(
        (
            "",
            "batch",
            "busy",
            "machines",
            "set by",
            "memory in all",
            "idle",
            "per million",
            "limit",
        ),
        [
            (
                way.name,
                "-".join(map(str, dict.fromkeys(way.batch))),
                f"{way.busy:.2f}",
                way.machines,
                way.bound,
                memory(int(way.memory_bytes)),
                f"{100 * way.idle:.0f} %",
                f"{way.per_million:.2f}",
                f"{way.limit_per_million:.2f}",
            )
            for way in cost.ways
        ],
    )
    console.result("")
    for note in cost.notes:
        console.result(f"assumed: {note}")
    width = max(len(symbol) for symbol, _ in FORMULAS)
    for symbol, formula in FORMULAS:
        console.result(f"{symbol:{width}}  {formula}")
