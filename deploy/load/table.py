"""The report on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..bench.wording import milliseconds, rate
from ..console import paper
from .wording import facts, label, state, timed, verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from .report import Report

NONE = "-"


def print_table(report: Report, console: Console | None = None) -> None:
    """Print verdict, conditions, numbers and warnings.

    Args:
        report: What was measured.
        console: Where to; standard output unless given.
    """
    console = console or paper()
    console.print(Text(verdict(report), "bold"))
    console.print(Text(timed(report), "dim"))
    for name, text in facts(report):
        console.print(Text.assemble((f"{name:10}", "dim"), text))
    _print(
        console, "ms per request", ("p50", "p90", "p95", "p99", "answers/s", ""), _latencies(report)
    )
    _print(
        console,
        "ms in the server",
        ("queue", "engine", "in+out", "rows/call", "lag p99"),
        _server(report),
    )
    if report.changing is not None:
        heads = ("changes", "failed", "p99 during", "p99 apart")
        _print(console, "tasks come and go", heads, _changes(report))
    for warning in report.warnings:
        console.print(Text.assemble(("warning  ", "yellow"), warning))


def _print(
    console: Console, first: str, heads: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, min_width=16, no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right" if head else "left", no_wrap=bool(head))
    for name, *cells in rows:
        table.add_row(Text(name), *map(Text, cells))
    console.print(Padding(table, (1, 0, 0, 0), expand=False))


def _latencies(report: Report) -> list[list[str]]:
    rows = []
    for step in report.steps:
        latency = step.latency
        cells = [NONE] * 4
        if latency is not None:
            values = (latency.p50_ms, latency.p90_ms, latency.p95_ms, latency.p99_ms)
            cells = [milliseconds(value) for value in values]
        rows.append([label(report, step), *cells, rate(step.answered_per_second), state(step)])
    return rows


def _server(report: Report) -> list[list[str]]:
    rows = []
    for step in report.steps:
        lag = NONE if step.lag is None else milliseconds(step.lag.p99_ms)
        cells = [NONE] * 4
        if step.server is not None:
            server = step.server
            around = server.compute_input.mean_ns + server.compute_output.mean_ns
            means = (server.queue.mean_ns, server.compute_infer.mean_ns, around)
            batch = NONE if server.mean_batch is None else f"{server.mean_batch:.2f}"
            cells = [*(milliseconds(mean / 1e6) for mean in means), batch]
        rows.append([label(report, step), *cells, lag])
    return rows


def _changes(report: Report) -> list[list[str]]:
    rows = []
    for step in report.steps:
        changes = step.changes
        if changes is None:
            continue
        tails = [
            NONE if latency is None else milliseconds(latency.p99_ms)
            for latency in (changes.during, changes.apart)
        ]
        counts = [str(changes.added + changes.removed), str(changes.failed)]
        rows.append([label(report, step), *counts, *tails])
    return rows
