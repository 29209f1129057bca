"""The report on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..console import paper
from .wording import facts, milliseconds, rate, verdict

if TYPE_CHECKING:
    from rich.console import Console

    from .report import Report


NAME_WIDTH = 19
"""Room for a subject's name; with the numbers it fills a terminal of 80 columns."""


def print_table(report: Report, console: Console | None = None) -> None:
    """Print verdict, conditions, numbers and warnings.

    Args:
        report: What was measured.
        console: Where to; standard output unless given.
    """
    console = console or paper()
    console.print(Text(verdict(report), "bold"))
    console.print(Text(report.timed, "dim"))
    for label, text in facts(report):
        console.print(Text.assemble((f"{label:10}", "dim"), text))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("ms per call", overflow="fold", min_width=NAME_WIDTH)
    for heading in ("p50", "p90", "p95", "p99", "images/s", "ratio", "95 % CI"):
        table.add_column(heading, justify="right", no_wrap=True)
    for case in report.cases:
        table.add_row(Text(case.case.label, "bold"))
        for result in case.results:
            numbers, ratio = result.summary, result.ratio
            table.add_row(
                Text(result.subject),
                milliseconds(numbers.p50_ms),
                milliseconds(numbers.p90_ms),
                milliseconds(numbers.p95_ms),
                milliseconds(numbers.p99_ms),
                rate(numbers.images_per_second),
                Text("base", "dim") if ratio is None else f"{ratio.median:.3f}",
                "" if ratio is None else f"{ratio.low:.3f}-{ratio.high:.3f}",
            )
        table.add_section()
    console.print(Padding(table, (1, 0), expand=False))
    for warning in report.warnings:
        console.print(Text.assemble(("warning  ", "yellow"), warning))
