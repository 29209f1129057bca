"""The charts of the page, drawn with the benchmark's pens: every mark takes its colour from the style sheet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..page.drawing import (
    CHARACTER,
    DASHES,
    LOG_SPAN,
    WIDTH,
    Axis,
    draw_dot,
    draw_line,
    draw_polyline,
    draw_text,
    latency_axis,
    new_canvas,
    series,
    tick_label,
    to_markup,
)
from .step import CLOSED
from .wording import label

if TYPE_CHECKING:
    from collections.abc import Sequence
    from xml.etree.ElementTree import Element

    from markupsafe import Markup

    from .numbers import StepResult
    from .report import Report

PERCENTILES = (50, 90, 95, 99)
TOP, BOTTOM, LEFT, RIGHT, HEIGHT = 34, 46, 62, 34, 330

NEAR = 16
"""Labels that are closer than this, in height, touch."""


def latency_chart(report: Report) -> Markup | None:
    """Percentiles of the latency against the load; None of fewer than two steps with answers."""
    steps = sorted(_answered(report), key=lambda step: step.level)
    levels = [step.level for step in steps]
    if len(set(levels)) < 2:
        return None
    closed = report.loop == CLOSED
    log = closed or levels[-1] / levels[0] > LOG_SPAN
    x = Axis(levels[0], levels[-1], LEFT + 22, WIDTH - RIGHT, log=log)
    svg = new_canvas(HEIGHT, "Latency against load")
    y = _frame(svg, steps, "callers" if closed else "requests per second")
    for level in _apart(levels, x):
        draw_line(svg, x(level), HEIGHT - BOTTOM, x(level), HEIGHT - BOTTOM + 5, "axis")
        draw_text(svg, x(level), HEIGHT - BOTTOM + 19, tick_label(level), "label middle")
    for index, percentile in enumerate(PERCENTILES, 1):
        _series(svg, steps, [x(step.level) for step in steps], y, percentile, index)
    return to_markup(svg)


def throughput_chart(report: Report) -> Markup | None:
    """Latency against the answers that there were; None of fewer than two steps with answers."""
    steps = sorted(_answered(report), key=lambda step: step.level)
    rates = [step.answered_per_second for step in steps]
    if len(steps) < 2 or max(rates) == 0:
        return None
    x = Axis(0.0, max(rates) * 1.06, LEFT + 10, WIDTH - RIGHT - 60)
    svg = new_canvas(HEIGHT, "Latency against throughput")
    y = _frame(svg, steps, "answers per second")
    for tick in x.ticks(8):
        draw_line(svg, x(tick), HEIGHT - BOTTOM, x(tick), HEIGHT - BOTTOM + 5, "axis")
        draw_text(svg, x(tick), HEIGHT - BOTTOM + 19, tick_label(tick), "label middle")
    at = [x(rate) for rate in rates]
    for index, percentile in ((1, 50), (4, 99)):
        _series(svg, steps, at, y, percentile, index)
    _name(svg, report, steps, at, y)
    return to_markup(svg)


def _answered(report: Report) -> list[StepResult]:
    return [step for step in report.steps if step.latency is not None]


def _frame(svg: Element, steps: Sequence[StepResult], beneath: str) -> Axis:
    """The axis of the latencies with its grid, and the name of the other one."""
    values = [_of(step, percentile) for step in steps for percentile in (50, 99)]
    y = latency_axis(min(values), max(values), HEIGHT - BOTTOM, TOP)
    for tick in y.ticks(5):
        draw_line(svg, LEFT, y(tick), WIDTH - 12, y(tick), "grid")
        draw_text(svg, LEFT - 10, y(tick) + 4, tick_label(tick), "label end")
    draw_line(svg, LEFT, HEIGHT - BOTTOM, WIDTH - 12, HEIGHT - BOTTOM, "axis")
    draw_text(svg, (LEFT + WIDTH) / 2, HEIGHT - 6, beneath, "label muted middle")
    draw_text(svg, LEFT - 10, 16, "ms", "label muted end")
    return y


def _series(
    svg: Element,
    steps: Sequence[StepResult],
    at: Sequence[float],
    y: Axis,
    percentile: int,
    index: int,
) -> None:
    """A percentile as a line; the points of steps that say nothing of the server are hollow."""
    group = series(svg, index)
    points = [(x, y(_of(step, percentile))) for x, step in zip(at, steps, strict=True)]
    draw_polyline(group, points, "line", DASHES[index - 1])
    for (a, b), step in zip(points, steps, strict=True):
        draw_dot(group, a, b, 3.6)
        if step.client_bound:
            group[-1].set("class", "hollow")


def _name(
    svg: Element, report: Report, steps: Sequence[StepResult], at: Sequence[float], y: Axis
) -> None:
    """The names of the steps above their p99, as far as they do not touch."""
    placed: list[tuple[float, float, float]] = []
    for x, step in zip(at, steps, strict=True):
        text, height = label(report, step), y(_of(step, 99)) - 10
        half = CHARACTER * len(text) / 2
        left, right = x - half, x + half
        if any(
            left < end and right > start and abs(height - other) < NEAR
            for start, end, other in placed
        ):
            continue
        placed.append((left, right, height))
        draw_text(svg, x, height, text, "label small middle")


def _of(step: StepResult, percentile: int) -> float:
    return float(getattr(step.latency, f"p{percentile}_ms"))


def _apart(levels: Sequence[float], x: Axis) -> list[float]:
    """The levels whose names do not touch; the highest is among them."""
    kept: list[float] = []
    for level in reversed(levels):
        if not kept or x(kept[-1]) - x(level) >= CHARACTER * len(tick_label(kept[-1])) + 8:
            kept.append(level)
    return kept
