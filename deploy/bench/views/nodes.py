"""Where the time of a call goes: a bar of parts for each subject, and tables of parts and operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...page.drawing import (
    CHARACTER,
    WIDTH,
    axis_of,
    draw_line,
    draw_rect,
    draw_text,
    new_canvas,
    series,
    short_name,
    tick_label,
    to_markup,
)
from ...page.view import View
from ..parts import ATTENTION, EMBEDDING, FFN, HEAD, NORM, OTHER, SUMS, TUNERS
from ..wording import milliseconds, percent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from markupsafe import Markup

    from ..nodes import NodeTimes
    from ..report import Report

ORDER = (OTHER, ATTENTION, TUNERS, FFN, NORM, SUMS, EMBEDDING, HEAD)
"""Parts in the order of their colours."""

LANE, BAR, TOP, FOOT, RIGHT = 40, 22, 12, 44, 130
SHARE_SHOWN = 0.01
NOTE = (
    "{case}, from a session of its own under the runtime's profiler, which slows what it measures: read the shares. The "
    "mark is the median of the timed session. A product that was joined from a frozen layer and a branch counts to the "
    "frozen layer's part; nodes are placed by the names that are left in the optimised graph."
)


def node_views(report: Report) -> Iterator[View]:
    """Parts and operators; nothing where no subject was profiled."""
    profiled = list(_profiled(report))
    if not profiled:
        return
    yield View(
        title="Where the time goes",
        note=NOTE.format(case=profiled[0][1].case.label.capitalize()),
        rows=[
            ("subject", "part", "nodes", "ms", "share"),
            *(
                (name, time.name, time.nodes, milliseconds(time.ms), percent(time.ms / nodes.kernels_ms))
                for name, nodes, _ in profiled
                for time in nodes.groups
            ),
        ],
        chart=parts_chart(report),
        legend=ORDER,
    )  # fmt: skip
    yield View(
        title="Nodes before and after the runtime's fusions",
        note="Products of matrices and attentions in the engine's file, and in the graph that ran. Kernels is the sum of all "
        "nodes, between is what a profiled call took beyond it, the profiler's own work among it; p50 is the timed median.",
        rows=[
            ("subject", "products", "products that ran", "attentions", "that ran", "nodes that ran", "kernels ms",
             "between ms", "p50 ms"),
            *(
                (
                    name, *_counts(report, name, nodes), sum(time.nodes for time in nodes.operators),
                    milliseconds(nodes.kernels_ms), milliseconds(max(0.0, nodes.call_ms - nodes.kernels_ms)),
                    "?" if p50 is None else milliseconds(p50),
                )
                for name, nodes, p50 in profiled
            ),
        ],
    )  # fmt: skip
    yield View(
        title="Operators",
        note=f"Of the same session; those below {percent(SHARE_SHOWN)} of the kernels' time are in the report's file.",
        rows=[
            ("subject", "operator", "nodes", "ms", "share"),
            *(
                (name, time.name, time.nodes, milliseconds(time.ms), percent(time.ms / nodes.kernels_ms))
                for name, nodes, _ in profiled
                for time in nodes.operators
                if time.ms >= SHARE_SHOWN * nodes.kernels_ms
            ),
        ],
    )  # fmt: skip


def parts_chart(report: Report) -> Markup:
    """A stacked bar for each subject, and a mark at its timed median."""
    profiled = list(_profiled(report))
    names = [short_name(name) for name, _, _ in profiled]
    left = 16 + CHARACTER * max(map(len, names))
    height = TOP + LANE * len(profiled) + FOOT
    longest = [max(nodes.kernels_ms, p50 or 0.0) for _, nodes, p50 in profiled]
    x = axis_of(longest, left, WIDTH - RIGHT)
    svg = new_canvas(height, "Time by part of the model")
    floor = height - FOOT
    for value in x.ticks(6):
        draw_line(svg, x(value), TOP, x(value), floor, "grid")
        draw_text(svg, x(value), floor + 18, tick_label(value), "label middle")
    draw_text(
        svg, (left + WIDTH - RIGHT) / 2, height - 4, "ms of kernels per call", "label muted middle"
    )
    for row, (name, (_, nodes, p50)) in enumerate(zip(names, profiled, strict=True)):
        top = TOP + LANE * row + (LANE - BAR) / 2
        draw_text(svg, left - 12, top + BAR / 2 + 4, name, "label end")
        times = {time.name: time.ms for time in nodes.groups}
        start = 0.0
        for index, part in enumerate(ORDER):
            wide = x(start + times.get(part, 0.0)) - x(start)
            if wide > 0:
                draw_rect(series(svg, index), x(start), top, wide, BAR, "segment")
            start += times.get(part, 0.0)
        if p50 is not None:
            draw_line(svg, x(p50), top - 5, x(p50), top + BAR + 5, "unity")
        said = f"{milliseconds(nodes.kernels_ms)} ms"
        draw_text(svg, WIDTH - 2, top + BAR / 2 + 4, said, "label end")
    return to_markup(svg)


def _profiled(report: Report) -> Iterator[tuple[str, NodeTimes, float | None]]:
    """Name, node times and timed median of the same case."""
    for index, subject in enumerate(report.subjects):
        if subject.nodes is not None:
            same = [case for case in report.cases if case.case == subject.nodes.case]
            p50 = same[0].results[index].summary.p50_ms if same else None
            yield subject.name, subject.nodes, p50


def _counts(report: Report, name: str, nodes: NodeTimes) -> tuple[object, ...]:
    graph = next(subject.graph for subject in report.subjects if subject.name == name)
    before = ("?", "?") if graph is None else (graph.gemms, graph.attentions)
    return before[0], nodes.gemms, before[1], nodes.attentions
