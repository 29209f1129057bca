"""The charts of what was timed: latency against batch size, the ratio to the baseline, every sample."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np

from ...page.drawing import (
    CHARACTER,
    DASHES,
    SERIES,
    WIDTH,
    Axis,
    draw_dot,
    draw_line,
    draw_polyline,
    draw_text,
    latency_axis,
    new_canvas,
    point_list,
    series,
    short_name,
    spaced,
    tick_label,
    to_markup,
)
from ..wording import TIMES, milliseconds

if TYPE_CHECKING:
    from collections.abc import Sequence
    from xml.etree.ElementTree import Element

    from markupsafe import Markup

    from ..report import CaseResult, Report, Result


STRIP_POINTS = 240
"""Samples drawn per strip, evenly chosen in time; the box is computed from all of them."""

TALL = 16
"""Rows of the ratio chart above which its axis is labelled at the top too."""

SHOWN = 95
"""Percentile where the axis of the raw samples ends, so that a stray one does not flatten the rest."""


def latency_chart(report: Report) -> Markup | None:
    """Latency against batch size: a panel per mix, p50 as a line, p50 to p95 as a band, p99 as a thin line.

    None when only one batch size was timed: there is nothing to draw it against.
    """
    mixes = list(dict.fromkeys(case.case.mix for case in report.cases))
    batches = sorted({case.case.batch for case in report.cases})
    if len(batches) == 1:
        return None
    top, bottom, left, gap, height = 34, 46, 58, 26, 330
    inner = (WIDTH - left - 12 - gap * (len(mixes) - 1)) / len(mixes)
    values = [
        value
        for case in report.cases
        for result in case.results
        for value in (result.summary.p50_ms, result.summary.p99_ms)
    ]
    y = latency_axis(min(values), max(values), height - bottom, top)
    svg = new_canvas(height, "Latency against batch size")
    for column, mix in enumerate(mixes):
        start = left + column * (inner + gap)
        x = Axis(batches[0], batches[-1], start + 22, start + inner - 22, log=True)
        draw_text(svg, start, 16, mix, "label strong")
        for tick in y.ticks(5):
            draw_line(svg, start, y(tick), start + inner, y(tick), "grid")
            if column == 0:
                draw_text(svg, left - 10, y(tick) + 4, tick_label(tick), "label end")
        draw_line(svg, start, height - bottom, start + inner, height - bottom, "axis")
        for batch in spaced(batches, x):
            draw_line(svg, x(batch), height - bottom, x(batch), height - bottom + 5, "axis")
            draw_text(svg, x(batch), height - bottom + 19, str(batch), "label middle")
        draw_text(svg, start + inner / 2, height - 6, "images per call", "label muted middle")
        cases = sorted(
            (case for case in report.cases if case.case.mix == mix),
            key=lambda case: case.case.batch,
        )
        for index in range(len(report.subjects)):
            _latency_series(svg, cases, index, x, y)
    draw_text(svg, left - 10, 16, "ms", "label muted end")
    return to_markup(svg)


def ratio_chart(report: Report) -> Markup | None:
    """Ratio to the baseline: a row per case and subject, a whisker for its interval, an upright line for its bound.

    None when only the baseline was timed.
    """
    rows = [
        (case, index, result)
        for case in report.cases
        for index, result in enumerate(case.results)
        if result.ratio is not None
    ]
    ratios = [result.ratio for _, _, result in rows if result.ratio is not None]
    if not ratios:
        return None
    bounds = [bound for case, _, result in rows if (bound := case.bound(result)) is not None]
    low = min(1.0, *bounds, *(ratio.low for ratio in ratios))
    high = max(1.0, *bounds, *(ratio.high for ratio in ratios))
    room = max(0.06 * (high - low), 0.01)
    several = len(report.subjects) > 2
    names = [case.case.label for case in report.cases]
    left = 24 + CHARACTER * max(len(name) for name in names)
    if several:
        left += 16 + CHARACTER * min(max(len(s.name) for s in report.subjects[1:]), 24)
    tall = len(rows) > TALL
    top, step, pause, bottom = 32 if tall else 14, 22, 12 if several else 4, 44
    height = top + bottom + step * len(rows) + pause * len(report.cases)
    x = Axis(low - room, high + room, left, WIDTH - 190)
    svg = new_canvas(height, "Ratio to the baseline")
    for tick in x.ticks(6):
        draw_line(svg, x(tick), top, x(tick), height - bottom, "grid")
        draw_text(svg, x(tick), height - bottom + 18, tick_label(tick), "label middle")
        if tall:
            draw_text(svg, x(tick), top - 14, tick_label(tick), "label middle")
    draw_line(svg, x(1.0), top - 8, x(1.0), height - bottom, "unity")
    baseline = report.subjects[0].name
    draw_text(
        svg, (left + WIDTH - 190) / 2, height - 5, f"{TIMES} {baseline}", "label muted middle"
    )
    place: float = top
    for case in report.cases:
        first = True
        for of, index, result in rows:
            ratio = result.ratio
            if of is not case or ratio is None:
                continue
            y = place + step / 2
            if first:
                draw_text(svg, 2, y + 4, case.case.label, "label strong")
                first = False
            if several:
                draw_text(svg, left - 14, y + 4, short_name(result.subject), "label end")
            group = series(svg, index)
            draw_line(group, x(ratio.low), y, x(ratio.high), y, "whisker")
            for end in (ratio.low, ratio.high):
                draw_line(group, x(end), y - 5, x(end), y + 5, "whisker")
            draw_dot(group, x(ratio.median), y, 4.5)
            bound = case.bound(result)
            if bound is not None:
                draw_line(svg, x(bound), y - 8, x(bound), y + 8, "bound")
            draw_text(svg, WIDTH - 172, y + 4, f"{ratio.median:.3f}", "label strong")
            interval = f"[{ratio.low:.3f}, {ratio.high:.3f}]"
            draw_text(svg, WIDTH - 2, y + 4, interval, "label muted end")
            place += step
        place += pause
    return to_markup(svg)


def samples_chart(report: Report) -> Markup:
    """Raw samples: a panel per case, a strip and a box (quartiles, median) per subject."""
    columns = 2 if len(report.cases) > 1 else 1
    gap, lane, head, foot = 44, 34, 28, 40
    wide = (WIDTH - gap * (columns - 1)) / columns
    tall = head + lane * len(report.subjects) + foot
    rows = math.ceil(len(report.cases) / columns)
    svg = new_canvas(rows * tall, "Distribution of the samples")
    names = [short_name(subject.name) for subject in report.subjects]
    label = 12 + CHARACTER * max(len(name) for name in names)
    for number, case in enumerate(report.cases):
        left, top = (number % columns) * (wide + gap), (number // columns) * tall
        every = [np.asarray(result.samples_ms) for result in case.results]
        low = min(float(samples.min()) for samples in every)
        high = max(float(np.percentile(samples, SHOWN)) for samples in every)
        room = max(0.04 * (high - low), 1e-6 * high)
        x = Axis(low - room, high + room, left + label, left + wide - 54)
        floor = top + head + lane * len(every)
        rounds = case.results[0].summary.samples
        draw_text(svg, left, top + 14, case.case.label, "label strong")
        draw_text(svg, left + wide - 54, top + 14, f"{rounds:,} rounds", "label muted end")
        for tick in x.ticks(4):
            draw_line(svg, x(tick), top + head - 4, x(tick), floor, "grid")
            draw_text(svg, x(tick), floor + 16, tick_label(tick), "label middle")
        # Further left than the names: the first tick may stand at the very start of the axis.
        draw_text(svg, left + label - 28, floor + 16, "ms", "label muted end")
        for index, result in enumerate(case.results):
            y = top + head + lane * (index + 0.5)
            draw_text(svg, left + label - 10, y + 4, names[index], "label end")
            _strip(series(svg, index), every[index], x, y, lane)
            beyond = int((every[index] > x.high).sum())
            if beyond:
                draw_text(svg, left + wide - 48, y - 1, f"+{beyond} to", "label small muted")
                text = milliseconds(result.summary.max_ms)
                draw_text(svg, left + wide - 48, y + 11, text, "label small muted")
    return to_markup(svg)


def _latency_series(
    svg: Element, cases: Sequence[CaseResult], index: int, x: Axis, y: Axis
) -> None:
    group = series(svg, index)
    results: list[tuple[float, Result]] = [
        (x(case.case.batch), case.results[index]) for case in cases
    ]
    p50 = [(at, y(result.summary.p50_ms)) for at, result in results]
    p95 = [(at, y(result.summary.p95_ms)) for at, result in results]
    ElementTree.SubElement(
        group, "polygon", {"class": "band", "points": point_list([*p50, *reversed(p95)])}
    )
    ElementTree.SubElement(group, "polyline", {"class": "edge", "points": point_list(p95)})
    p99 = [(at, y(result.summary.p99_ms)) for at, result in results]
    draw_polyline(group, p99, "edge", "2 3")
    line = {"class": "line", "points": point_list(p50)}
    if DASHES[index % SERIES]:
        line["stroke-dasharray"] = DASHES[index % SERIES]
    ElementTree.SubElement(group, "polyline", line)
    for a, b in p50:
        draw_dot(group, a, b, 3.2)


def _strip(group: Element, samples: np.ndarray, x: Axis, y: float, lane: float) -> None:
    chosen = np.unique(np.linspace(0, samples.size - 1, STRIP_POINTS).astype(int))
    shown = [value for value in samples[chosen].tolist() if value <= x.high]
    # The golden ratio spreads any run of points evenly over the lane, the same on every drawing.
    spread = [(index * 0.618034) % 1 - 0.5 for index in range(len(shown))]
    path = "".join(
        f"M{x(value):.1f} {y + (lane - 12) * shift:.1f}h0"
        for value, shift in zip(shown, spread, strict=True)
    )
    ElementTree.SubElement(group, "path", {"class": "points", "d": path})
    lower, median, upper = (x(min(float(q), x.high)) for q in np.percentile(samples, (25, 50, 75)))
    box = {"x": lower, "y": y - 7, "width": max(upper - lower, 1), "height": 14}
    ElementTree.SubElement(
        group, "rect", {"class": "box", **{key: f"{value:.1f}" for key, value in box.items()}}
    )
    draw_line(group, median, y - 10, median, y + 10, "median")
