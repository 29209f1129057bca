"""Memory, size and time to open of each subject, and memory against the number of tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...page.drawing import (
    WIDTH,
    Labels,
    axis_of,
    draw_dot,
    draw_frame,
    draw_polyline,
    draw_text,
    new_canvas,
    series,
    short_name,
    to_markup,
)
from ...page.view import View
from ..taken import per_task
from ..wording import milliseconds, rate

if TYPE_CHECKING:
    from markupsafe import Markup

    from ..footprint import Footprint
    from ..report import Report, SubjectFacts

MB = 1e6
HEIGHT, TOP, BOTTOM, LEFT, RIGHT = 340, 40, 56, 78, 20
NOTE = (
    "Each subject was opened alone in a fresh process and called once with a batch of {batch}; memory is its growth on the "
    "host beyond the loaded runtime, and the peak includes the opening. Times are of that process, files in the system's "
    "cache or not, and no medians."
)


def size_view(report: Report) -> View | None:
    """None where no footprint was measured."""
    measured = [(s, s.footprint) for s in report.subjects if s.footprint is not None]
    if not measured:
        return None
    rows: list[tuple[object, ...]] = [
        ("subject", "tasks", "on disk MB", "weights MB", "open MB", "after a call MB", "peak MB",
         "open ms", "first call ms")
    ]  # fmt: skip
    for subject, found in measured:
        graph, peak = subject.graph, found.peak_bytes
        rows.append(
            (
                subject.name,
                "?" if subject.task_count is None else subject.task_count,
                _mb(found.disk_bytes),
                "?" if graph is None else _mb(graph.parameters_bytes),
                _mb(found.opened_bytes),
                _mb(found.called_bytes),
                "?" if peak is None else _mb(peak),
                milliseconds(found.open_ms),
                milliseconds(found.first_call_ms),
            )
        )
    note = NOTE.format(batch=measured[0][1].batch)
    several = _several(report)
    each = per_task([(tasks, found.called_bytes) for tasks, _, found in several])
    if each is not None:
        note += f" One further task adds {each / MB:.2f} MB, by the engines of {several[0][0]} and {several[-1][0]} tasks."
    chart = memory_chart(report)
    if chart is not None:
        note += " The dashed line is computed, not measured: a merged model for each task, as often as the backbone."
    drawn = tuple(s.name if s.footprint and s.task_count else "" for s in report.subjects)
    legend = drawn if chart is not None else ()
    return View("Memory and size", note, rows, chart, legend)


def memory_chart(report: Report) -> Markup | None:
    """Memory against the number of tasks; None without a backbone and an engine of several tasks."""
    several, bare = _several(report), report.subjects[0]
    if bare.task_count != 0 or bare.footprint is None or not several:
        return None
    one, most = bare.footprint.called_bytes, max(tasks for tasks, _, _ in several)
    points = [
        (index, subject, subject.task_count, subject.footprint.called_bytes / MB)
        for index, subject in enumerate(report.subjects)
        if subject.footprint is not None and subject.task_count
    ]
    x = axis_of([1, most], LEFT, WIDTH - RIGHT, log=True)
    heights = [one / MB, one * most / MB, *(size for _, _, _, size in points)]
    y = axis_of([h for h in heights if h > 0], HEIGHT - BOTTOM, TOP, log=True)
    svg = new_canvas(HEIGHT, "Memory against the number of tasks")
    draw_frame(svg, x, y, ("tasks", "MB after a call"), [1, *(tasks for _, _, tasks, _ in points)])
    labels = Labels(svg)
    labels.keep_free(0, 0, LEFT, HEIGHT)  # the ticks of the axis upright
    draw_polyline(svg, [(x(1), y(one / MB)), (x(most), y(one * most / MB))], "unity", "6 4")
    middle = x(most**0.5), y(one * most**0.5 / MB)
    draw_text(svg, middle[0] - 12, middle[1] - 6, "a merged model per task", "label muted end")
    if len(several) > 1:
        line = [(x(tasks), y(found.called_bytes / MB)) for tasks, _, found in several]
        draw_polyline(svg, line, "axis")
    for index, _, tasks, size in points:
        draw_dot(series(svg, index), x(tasks), y(size), 4.5)
        labels.keep_free(x(tasks) - 5, y(size) - 5, x(tasks) + 5, y(size) + 5)
    for _, subject, tasks, size in points:
        labels.put(x(tasks), y(size), short_name(subject.name))
    return to_markup(svg)


def _several(report: Report) -> list[tuple[int, SubjectFacts, Footprint]]:
    """Engines of several tasks, the fewest first."""
    found = [
        (subject.task_count, subject, subject.footprint)
        for subject in report.subjects
        if subject.footprint is not None and (subject.task_count or 0) > 1
    ]
    return sorted(
        ((tasks or 0, subject, footprint) for tasks, subject, footprint in found),
        key=lambda row: row[0],
    )


def _mb(size: float) -> str:
    return rate(size / MB)
