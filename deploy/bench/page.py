"""The report as one HTML page that needs nothing else: no script, no request, light and dark."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import Environment, StrictUndefined

from ...merge.files import atomic_file
from . import wording
from .case import MIXES
from .charts import SERIES, latency_chart, ratio_chart, samples_chart

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .report import Report

TEMPLATE = Path(__file__).with_name("page.html")

NUMBER = re.compile(r"[^\w\s]?\s?\d[\d.,]*(e[+-]?\d+)?\s?(\W|[A-Za-z]{1,3})?")
"""A cell that reads as a number; a column of such cells is set flush right."""


class Section(NamedTuple):
    """A table that the caller adds to the page; a plain tuple will do.

    Attributes:
        title: Its heading.
        rows: The first row names the columns; cells are shown as `str` has them.
        note: A sentence above the table.
    """

    title: str
    rows: Sequence[Sequence[object]]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table as the page sets it.

    Attributes:
        heads: Names of the columns.
        rows: Cells; every row is as long as `heads`.
        numeric: Which columns are flush right.
    """

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]


def write_html(
    report: Report, path: Path, sections: Sequence[Section | tuple[object, ...]] = ()
) -> None:
    """Write the page, whole or not at all.

    Args:
        report: What was measured.
        path: The file.
        sections: Further tables, set between the measurements and the environment.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(render_html(report, sections), encoding="utf-8")


def render_html(report: Report, sections: Sequence[Section | tuple[object, ...]] = ()) -> str:
    """The page as text; every text in it that is not ours is escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        report=report,
        verdict=wording.verdict(report),
        facts=wording.facts(report),
        environment=wording.environment(report),
        mixes={case.case.mix: MIXES[case.case.mix].says for case in report.cases},
        memory=wording.memory,
        ms=wording.milliseconds,
        rate=wording.rate,
        series=SERIES,
        latency=latency_chart(report),
        ratio=ratio_chart(report),
        samples=samples_chart(report),
        tasks=_table(
            (
                ("task", "row of the bank", "classes"),
                *((task.name, task.row, task.classes) for task in report.about.tasks),
            )
        ),
        sections=[
            (section.title, section.note, _table(section.rows))
            for section in (Section(*given) for given in sections)  # type: ignore[arg-type]
        ],
    )


def _table(rows: Sequence[Sequence[object]]) -> Table:
    heads, *body = (tuple(str(cell) for cell in row) for row in rows)
    numeric = tuple(
        bool(body) and all(NUMBER.fullmatch(row[column].strip()) for row in body)
        for column in range(len(heads))
    )
    return Table(heads=heads, rows=tuple(body), numeric=numeric)
