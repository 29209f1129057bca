"""A comparison on the terminal and as Markdown for a pull request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from ..comparison.views import (
    COLOURS,
    cells,
    empty_table,
    escape,
    markdown_around,
    percent,
    print_around,
    tally,
)
from ..console import paper
from .wording import milliseconds, plural

if TYPE_CHECKING:
    from rich.console import Console

    from .compare import Comparison, Row

DESCRIPTION = (
    "B/A is the ratio of the two runs' medians. The runs are not paired, so each is resampled on its own, and "
    "whatever made one run's machine slower is in it. {beside} is the ratio of the ratios to {baseline} of the same "
    "rounds, which cancels that; the verdict rests on it where both runs have it."
)


def finding(comparison: Comparison) -> str:
    """The outcome in a sentence."""
    judged = [row for row in comparison.rows if row.verdict != "baseline"]
    failed = len(comparison.too_slow)
    head = f"{failed} of {plural(len(judged), 'case')}" if failed else "No case"
    verb = "are" if failed > 1 else "is"
    told = tally(row.verdict for row in judged)
    return f"{head} {verb} slower by more than {percent(comparison.threshold)} ({told})"


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the outcome, a table and the warnings.

    Args:
        comparison: What was found.
        console: Where to; standard output unless given.
    """
    heads = ("A p50", "B p50", "B/A", f"{percent(comparison.confidence)} CI", "beside", "CI")
    table = empty_table("ms per call", heads)
    heading = None
    several = len({row.comparison for row in comparison.rows}) > 1
    for row in comparison.rows:
        if (row.comparison, row.case) != heading:
            heading = row.comparison, row.case
            table.add_section()
            name = f"{row.comparison}: " if several else ""
            table.add_row(Text(f"{name}{row.case.label}", "bold"))
        table.add_row(
            Text(row.subject),
            *map(milliseconds, row.p50_ms),
            *cells(row.medians),
            *cells(row.ratios),
            Text(_verdict(row), COLOURS.get(row.verdict, "dim")),
        )
    description = _description(comparison, "beside")
    print_around(comparison, finding(comparison), table, description, console or paper())


def to_markdown(comparison: Comparison) -> str:
    """The same as Markdown: the outcome, the table, and the small print folded away."""
    beside = f"beside {escape(comparison.baseline)}"
    rows = [("subject", "case", "A p50 ms", "B p50 ms", "B/A", beside, "verdict")]
    for row in comparison.rows:
        name = f"{row.comparison}: {row.subject}" if row.comparison else row.subject
        old, new = map(milliseconds, row.p50_ms)
        ratios = "" if row.ratios is None else str(row.ratios)
        verdict = f"**{_verdict(row)}**" if row.too_slow else _verdict(row)
        rows.append((escape(name), row.case.label, old, new, str(row.medians), ratios, verdict))
    description = _description(comparison, "The column beside " + comparison.baseline)
    return markdown_around(
        comparison, f"Latency: {finding(comparison)}", rows, "llrrrrl", description
    )


def _description(comparison: Comparison, beside: str) -> str:
    return DESCRIPTION.format(beside=beside[0].upper() + beside[1:], baseline=comparison.baseline)


def _verdict(row: Row) -> str:
    return "too slow" if row.too_slow else row.verdict
