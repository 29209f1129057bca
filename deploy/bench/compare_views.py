"""A comparison on the terminal and as Markdown for a pull request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .wording import milliseconds, plural

if TYPE_CHECKING:
    from .compare import Comparison, Row
    from .contrast import Contrast

COLOURS = {"slower": "red", "faster": "green", "undecided": "yellow"}
DESCRIPTION = (
    "B/A is the ratio of the two runs' medians. The runs are not paired, so each is resampled on its own, and "
    "whatever made one run's machine slower is in it. {beside} is the ratio of the ratios to {baseline} of the same "
    "rounds, which cancels that; the verdict rests on it where both runs have it."
)


def finding(comparison: Comparison) -> str:
    """The outcome in a sentence."""
    judged = [row for row in comparison.rows if row.verdict != "baseline"]
    counts = {
        verdict: sum(row.verdict == verdict for row in judged)
        for verdict in ("slower", "faster", "undecided", "equal")
    }
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    limit = f"{100 * comparison.threshold:g} %"
    failed = len(comparison.too_slow)
    head = f"{failed} of {plural(len(judged), 'case')}" if failed else "No case"
    verb = "are" if failed > 1 else "is"
    return f"{head} {verb} slower by more than {limit} ({told})"


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the outcome, a table and the warnings.

    Args:
        comparison: What was found.
        console: Where to; standard output unless given.
    """
    console = console or Console()
    failed = bool(comparison.too_slow)
    console.print(Text(finding(comparison), "bold red" if failed else "bold"))
    for side, file, date in zip("AB", (comparison.a, comparison.b), comparison.dates, strict=True):
        console.print(Text.assemble((f"{side}  ", "dim"), f"{file}  ", (date, "dim")))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=0)
    table.add_column("ms per call", overflow="fold", min_width=16)
    for heading in ("A p50", "B p50", "B/A", f"{_percent(comparison)} CI", "beside", "CI"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True, min_width=9)
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
            *_cells(row.medians),
            *(("", "") if row.ratios is None else _cells(row.ratios)),
            Text(_verdict(row), COLOURS.get(row.verdict, "dim")),
        )
    console.print(Padding(table, (1, 0)))
    console.print(Text(_description(comparison, "beside"), "dim"))
    for side, names in (("A", comparison.only_a), ("B", comparison.only_b)):
        if names:
            console.print(Text.assemble((f"only in {side}  ", "dim"), "; ".join(names)))
    for warning in comparison.warnings:
        console.print(Text.assemble(("warning  ", "yellow"), warning))


def to_markdown(comparison: Comparison) -> str:
    """The same as Markdown: the outcome, the table, and the small print folded away."""
    limit = f"{100 * comparison.threshold:g} %"
    lines = [
        f"### Latency: {finding(comparison)}",
        "",
        f"| subject | case | A p50 ms | B p50 ms | B/A | beside {_escape(comparison.baseline)} | verdict |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for row in comparison.rows:
        name = f"{row.comparison}: {row.subject}" if row.comparison else row.subject
        verdict = _verdict(row)
        cells = (
            _escape(name),
            row.case.label,
            *map(milliseconds, row.p50_ms),
            _interval(row.medians),
            "" if row.ratios is None else _interval(row.ratios),
            f"**{verdict}**" if row.too_slow else verdict,
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "<details><summary>How to read it, and what to doubt</summary>",
        "",
        f"A is `{comparison.a}` ({comparison.dates[0]}), B is `{comparison.b}` ({comparison.dates[1]}). "
        f"{_escape(_description(comparison, 'The column beside ' + comparison.baseline))} Intervals are of "
        f"{_percent(comparison)}. Equal: the interval holds 1 and stays within {limit}; undecided: it holds 1 and "
        f"reaches past {limit}.",
        "",
    ]
    for side, names in (("A", comparison.only_a), ("B", comparison.only_b)):
        lines += [f"- Only in {side}: {_escape('; '.join(names))}"] if names else []
    lines += [f"- {_escape(warning)}" for warning in comparison.warnings]
    return "\n".join([*lines, "", "</details>", ""])


def _description(comparison: Comparison, beside: str) -> str:
    return DESCRIPTION.format(beside=beside[0].upper() + beside[1:], baseline=comparison.baseline)


def _verdict(row: Row) -> str:
    return "too slow" if row.too_slow else row.verdict


def _percent(comparison: Comparison) -> str:
    return f"{100 * comparison.confidence:g} %"


def _cells(value: Contrast) -> tuple[str, str]:
    return f"{value.ratio:.3f}", f"{value.low:.3f}-{value.high:.3f}"


def _interval(value: Contrast) -> str:
    return f"{value.ratio:.3f} ({value.low:.3f} to {value.high:.3f})"


def _escape(text: str) -> str:
    """Names and paths are a reader's text, not Markdown or HTML."""
    for mark in "\\`*_|[]":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
