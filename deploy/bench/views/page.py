"""The report as one HTML page that needs nothing else: no script, no request, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ....merge.files import atomic_file
from ...page.fill import fill
from ...page.tables import Table, table_of
from .. import wording
from ..case import MIXES
from .charts import latency_chart, ratio_chart, samples_chart
from .nodes import node_views
from .roofline import work_view
from .sizes import size_view
from .trends import overhead_views, throughput_view

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...page.view import View
    from ..report import Report

TEMPLATE = Path(__file__).with_name("page.html")


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
    return _render([_page("", report, sections)], report.about.name)


def write_sweep_html(reports: Mapping[str, Report], title: str, path: Path) -> None:
    """Write one page about several reports, whole or not at all.

    Args:
        reports: What was measured, by the name of the comparison.
        title: What the page is about.
        path: The file.
    """
    pages = [_page(name, report, ()) for name, report in reports.items()]
    several = len(pages) > 1
    overview = table_of(_overview(reports)) if several else None
    trends = list(overhead_views(reports)) if several else ()
    with atomic_file(path) as temporary:
        temporary.write_text(_render(pages, title, overview, trends), encoding="utf-8")


def _render(
    pages: Sequence[dict[str, Any]],
    title: str,
    overview: Table | None = None,
    trends: Sequence[View] = (),
) -> str:
    return fill(
        TEMPLATE,
        pages=pages,
        title=f"{title}: latency",
        about=title,
        overview=overview,
        links={page["name"]: f"comparison-{number}" for number, page in enumerate(pages, 1)},
        trends=_tables(trends),
        ms=wording.milliseconds,
        rate=wording.rate,
    )


def _page(
    name: str, report: Report, sections: Sequence[Section | tuple[object, ...]]
) -> dict[str, Any]:
    """What the template shows of one report."""
    return {
        "name": name,
        "report": report,
        "verdict": wording.verdict(report),
        "facts": wording.facts(report),
        "environment": wording.environment(report),
        "mixes": {case.case.mix: MIXES[case.case.mix].says for case in report.cases},
        "latency": latency_chart(report),
        "ratio": ratio_chart(report),
        "samples": samples_chart(report),
        "trends": _tables([throughput_view(report)]),
        "views": _tables(
            [
                *overhead_views({"": report}),
                work_view(report),
                size_view(report),
                *node_views(report),
            ]
        ),
        "tasks": table_of(
            (
                ("task", "row of the bank", "classes"),
                *((task.name, task.row, task.classes) for task in report.about.tasks),
            )
        ),
        "sections": [
            (section.title, section.note, table_of(section.rows))
            for section in (Section(*given) for given in sections)  # type: ignore[arg-type]
        ],
    }


def _tables(views: Sequence[View | None]) -> list[tuple[View, Table | None]]:
    """Those that have something to show."""
    return [
        (view, table_of(view.rows) if view.rows else None) for view in views if view is not None
    ]


def _overview(reports: Mapping[str, Report]) -> list[tuple[str, ...]]:
    rows = [("comparison", "case", "subject", "p50 ms", "ratio", "95 % CI")]
    for name, report in reports.items():
        for case in report.cases:
            for result in case.results:
                ratio = result.ratio
                rows.append(
                    (
                        name,
                        case.case.label,
                        result.subject,
                        wording.milliseconds(result.summary.p50_ms),
                        "1" if ratio is None else f"{ratio.median:.3f}",
                        "" if ratio is None else f"{ratio.low:.3f} to {ratio.high:.3f}",
                    )
                )
    return rows
