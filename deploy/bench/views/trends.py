"""Charts across cases and subjects: throughput against latency, and the overhead against tasks and against rank."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from ...page.drawing import (
    DASHES,
    SERIES,
    WIDTH,
    Axis,
    Labels,
    axis_of,
    draw_dot,
    draw_frame,
    draw_line,
    draw_polyline,
    draw_text,
    new_canvas,
    series,
    to_markup,
)
from ...page.view import View
from ..wording import TIMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from markupsafe import Markup

    from ..report import Report
    from ..summary import Ratio

HEIGHT, TOP, BOTTOM, LEFT, RIGHT = 340, 44, 56, 70, 24
LOG_SPAN = 8
APART = 7


@dataclass(frozen=True)
class Point:
    """One subject beside its baseline.

    Attributes:
        comparison: Name of its report in a sweep, else "".
        subject: Its name.
        case: Its case in words.
        tasks: How many tasks it holds.
        rank: The largest rank of its bank; 0 if that is not known.
        ratio: What was measured.
        bound: What the multiply-accumulates say, if they are counted.
    """

    comparison: str
    subject: str
    case: str
    tasks: int
    rank: int
    ratio: Ratio
    bound: float | None


def throughput_view(report: Report) -> View | None:
    """Images per second against the median latency; None with one batch size."""
    mixes = list(dict.fromkeys(case.case.mix for case in report.cases))
    batches = {case.case.batch for case in report.cases}
    if len(batches) == 1:
        return None
    return View(
        title="Throughput against latency",
        note="A point for each batch size, which stands beside it: up is more images per second, left is a shorter wait. "
        "One call at a time, back to back; no queue. The numbers are those of the table above.",
        chart=throughput_chart(report, mixes),
        legend=tuple(subject.name for subject in report.subjects),
    )


def throughput_chart(report: Report, mixes: list[str]) -> Markup:
    """A panel for each mix, one below the other, on the same axes."""
    every = [result.summary for case in report.cases for result in case.results]
    waits = [summary.p50_ms for summary in every]
    svg = new_canvas(HEIGHT * len(mixes), "Throughput against latency")
    for number, mix in enumerate(mixes):
        top = HEIGHT * number
        wide = max(waits) / min(waits) > LOG_SPAN
        x = axis_of(waits, LEFT, WIDTH - RIGHT, log=wide)
        rates = [summary.images_per_second for summary in every]
        y = axis_of(rates, top + HEIGHT - BOTTOM, top + TOP)
        draw_frame(svg, x, y, ("p50, ms per call", "images/s"))
        draw_text(svg, LEFT + 40, top + TOP - 16, mix, "label strong")
        labels = Labels(svg)
        cases = sorted(
            (case for case in report.cases if case.case.mix == mix),
            key=lambda case: case.case.batch,
        )
        placed = []
        for index in range(len(report.subjects)):
            summaries = [(case.case.batch, case.results[index].summary) for case in cases]
            points = [(x(s.p50_ms), y(s.images_per_second)) for _, s in summaries]
            group = series(svg, index)
            draw_polyline(group, points, "line", DASHES[index % SERIES])
            for (batch, _), (a, b) in zip(summaries, points, strict=True):
                draw_dot(group, a, b, 3.6)
                labels.keep_free(a - 4, b - 4, a + 4, b + 4)
                placed.append((a, b, str(batch)))
        for a, b, batch in placed:
            labels.put(a, b, batch)
    return to_markup(svg)


def overhead_views(reports: Mapping[str, Report]) -> Iterator[View]:
    """The ratio to the baseline against the number of tasks, and against rank, where there are two of them.

    Args:
        reports: One named "", or those of a sweep by their names.
    """
    points = list(_points(reports))
    for what, varies, fixed in (
        ("number of tasks", lambda p: p.tasks, lambda p: (p.case, f"rank {p.rank or 'unknown'}")),
        ("rank", lambda p: p.rank, lambda p: (p.case, f"{p.tasks} tasks")),
    ):
        known = sorted((p for p in points if varies(p)), key=lambda p: (*fixed(p), varies(p)))
        grouped = {", ".join(key): list(of) for key, of in groupby(known, key=fixed)}
        lines = {
            name: of for name, of in grouped.items() if len({varies(point) for point in of}) > 1
        }
        if lines:
            yield View(
                title=f"Overhead against the {what}",
                note="Dots are measured ratios to the baseline of the same run with their 95 % intervals, joined within a "
                f"comparison; the thin dashed lines are the ratios of multiply-accumulates. {_shown(len(lines))}",
                rows=[
                    ("case", *(["comparison"] if len(reports) > 1 else []), "subject", "tasks", "rank", "ratio",
                     "95 % low", "95 % high", "bound"),
                    *(
                        (
                            p.case, *([p.comparison] if len(reports) > 1 else []), p.subject, p.tasks, p.rank or "?",
                            f"{p.ratio.median:.3f}", f"{p.ratio.low:.3f}", f"{p.ratio.high:.3f}",
                            "?" if p.bound is None else f"{p.bound:.3f}",
                        )
                        for of in lines.values()
                        for p in of
                    ),
                ],
                chart=overhead_chart(
                    [[(varies(p), p) for p in of] for of in list(lines.values())[:SERIES]], what
                ),
                legend=tuple(list(lines)[:SERIES]),
            )  # fmt: skip


def overhead_chart(lines: list[list[tuple[int, Point]]], what: str) -> Markup:
    """A line for each case: measured, with whiskers, and counted."""
    points = [point for line in lines for _, point in line]
    across = [value for line in lines for value, _ in line]
    high = max(max(p.ratio.high, p.bound or 0) for p in points)
    low = min(1.0, *(min(p.ratio.low, p.bound or 1) for p in points))
    room = max(0.08 * (high - low), 0.01)
    x = axis_of(across, LEFT, WIDTH - RIGHT, log=True)
    y = Axis(low - room, high + room, HEIGHT - BOTTOM, TOP)
    svg = new_canvas(HEIGHT, f"Overhead against the {what}")
    draw_frame(svg, x, y, (what, f"{TIMES} baseline"), across)
    draw_line(svg, x.start, y(1.0), x.end, y(1.0), "unity")
    for index, line in enumerate(lines):
        group = series(svg, index)
        aside = APART * (index - (len(lines) - 1) / 2)  # or the intervals lie on each other
        for run in _runs(line):
            measured = [(x(value) + aside, y(p.ratio.median)) for value, p in run]
            counted = [(x(value) + aside, y(p.bound)) for value, p in run if p.bound is not None]
            draw_polyline(group, measured, "line", DASHES[index % SERIES])
            draw_polyline(group, counted, "thin", "3 4")
        for value, p in line:
            at = x(value) + aside
            draw_line(group, at, y(p.ratio.low), at, y(p.ratio.high), "whisker")
            draw_dot(group, at, y(p.ratio.median), 4)
    return to_markup(svg)


def _runs(line: list[tuple[int, Point]]) -> Iterator[list[tuple[int, Point]]]:
    """What a line may join: engines of one comparison that differ in nothing but what varies."""
    for comparison in dict.fromkeys(p.comparison for _, p in line):
        run = [(value, p) for value, p in line if p.comparison == comparison]
        if len({value for value, _ in run}) == len(run) > 1:
            yield run


def _points(reports: Mapping[str, Report]) -> Iterator[Point]:
    for name, report in reports.items():
        for case in report.cases:
            for subject, result in zip(report.subjects, case.results, strict=True):
                if result.ratio is not None and subject.task_count and subject.engine:
                    yield Point(
                        comparison=name,
                        subject=subject.name,
                        case=case.case.label,
                        tasks=subject.task_count,
                        rank=subject.rank or 0,
                        ratio=result.ratio,
                        bound=case.bound(result),
                    )


def _shown(lines: int) -> str:
    return f"The first {SERIES} of {lines} lines are drawn." if lines > SERIES else ""
