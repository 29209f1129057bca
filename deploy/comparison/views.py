"""What every comparison has around its table, on the terminal and as Markdown for a pull request."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .verdict import VERDICTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

    from .compared import Compared
    from .verdict import Contrast

COLOURS = {"slower": "red", "faster": "green", "undecided": "yellow"}


def tally(verdicts: Iterable[str]) -> str:
    """How many there are of each verdict: `2 slower, 7 equal`; those of one room alone come last."""
    counts = Counter(verdicts)
    order = [*VERDICTS, *sorted(counts.keys() - set(VERDICTS))]
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in order if counts[verdict])


def percent(share: float) -> str:
    """A fraction that a person gave, in percent."""
    return f"{100 * share:g} %"


def empty_table(first: str, heads: Sequence[str]) -> Table:
    """A table of names, numbers and a verdict; it fits a terminal of 80 columns.

    Args:
        first: Heads the names.
        heads: Head the numbers.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=0)
    table.add_column(first, overflow="fold", min_width=16)
    for heading in heads:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True, min_width=9)
    return table


def print_around(
    comparison: Compared, finding: str, table: Table, description: str, console: Console
) -> None:
    """Print the outcome, both files, the table and the warnings.

    Args:
        comparison: What was found.
        finding: The outcome in a sentence.
        table: The cases.
        description: How to read it.
        console: Where to.
    """
    console.print(Text(finding, "bold red" if comparison.failures else "bold"))
    for side, file, date in zip("AB", (comparison.a, comparison.b), comparison.dates, strict=True):
        console.print(Text.assemble((f"{side}  ", "dim"), f"{file}  ", (date, "dim")))
    console.print(Padding(table, (1, 0)))
    console.print(Text(description, "dim"))
    for side, names in (("A", comparison.only_a), ("B", comparison.only_b)):
        if names:
            console.print(Text.assemble((f"only in {side}  ", "dim"), "; ".join(names)))
    for warning in comparison.warnings:
        console.print(Text.assemble(("warning  ", "yellow"), warning))


def markdown_around(
    comparison: Compared, finding: str, rows: Sequence[Sequence[str]], marks: str, description: str
) -> str:
    """The same as Markdown, the small print folded away.

    Args:
        comparison: What was found.
        finding: The outcome, with what it is about.
        rows: Cells of the table, escaped; the first row heads it.
        marks: One letter per column: `l` for words, `r` for numbers.
        description: How to read it.
    """
    limit = percent(comparison.threshold)
    heads, *body = (f"| {' | '.join(row)} |" for row in rows)
    lines = [
        f"### {finding}",
        "",
        heads,
        "|" + "".join("---|" if mark == "l" else "--:|" for mark in marks),
        *body,
        "",
        "<details><summary>How to read it, and what to doubt</summary>",
        "",
        f"A is `{comparison.a}` ({comparison.dates[0]}), B is `{comparison.b}` ({comparison.dates[1]}). "
        f"{escape(description)} Intervals are of {percent(comparison.confidence)}. Equal: the interval holds 1 and "
        f"stays within {limit}; undecided: it holds 1 and reaches past {limit}.",
        "",
    ]
    for side, names in (("A", comparison.only_a), ("B", comparison.only_b)):
        lines += [f"- Only in {side}: {escape('; '.join(names))}"] if names else []
    lines += [f"- {escape(warning)}" for warning in comparison.warnings]
    return "\n".join([*lines, "", "</details>", ""])


def cells(value: Contrast | None) -> tuple[str, str]:
    """A ratio and its interval, for a narrow table; empty where there is none."""
    return (
        ("", "") if value is None else (f"{value.ratio:.3f}", f"{value.low:.3f}-{value.high:.3f}")
    )


def escape(text: str) -> str:
    """Names and paths are a reader's text, not Markdown or HTML."""
    for mark in "\\`*_|[]":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
