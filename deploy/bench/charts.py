"""The charts of the page, as SVG that takes its colours from the page's style sheet.

Drawn here rather than by a plotting library because the page has a light and a dark scheme: every
mark carries a class (`s0`, `s1`, ... for the subjects) and no colour of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

from .wording import TIMES, milliseconds

if TYPE_CHECKING:
    from collections.abc import Sequence
    from xml.etree.ElementTree import Element

    from .report import CaseResult, Report, Result

WIDTH = 960
"""Width of every chart in user units; one unit is one pixel at full size."""

SERIES = 8
"""Colours of the style sheet; a ninth subject starts again."""

LOG_SPAN = 8
"""A latency axis that spans more than this factor is logarithmic."""

STRIP_POINTS = 240
"""Samples drawn per strip, evenly chosen in time; the box is computed from all of them."""

TALL = 16
"""Rows of the ratio chart above which its axis is labelled at the top too."""

SHOWN = 95
"""Percentile where the axis of the raw samples ends, so that a stray one does not flatten the rest."""

DASHES = ("", "6 4", "2 3", "9 3 2 3", "4 2", "1 4", "12 3", "7 2 1 2")
CHARACTER = 7.2
"""Width of a label's character, on the wide side."""


@dataclass(frozen=True)
class Axis:
    """Values to positions.

    Attributes:
        low: Value at `start`.
        high: Value at `end`.
        start: Position of `low`.
        end: Position of `high`.
        log: Whether equal factors are equal lengths.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The position of a value."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Round values inside the axis, about `count` of them."""
        if self.log:
            return _log_ticks(self.low, self.high)
        step = _round_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(index * step, 10) for index in range(first, last + 1)]


def latency_chart(report: Report) -> Markup | None:
    """Latency against batch size: a panel per mix, p50 as a line, p50 to p95 as a band.

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
        for value in (result.summary.p50_ms, result.summary.p95_ms)
    ]
    y = _latency_axis(min(values), max(values), height - bottom, top)
    svg = _canvas(height, "Latency against batch size")
    for column, mix in enumerate(mixes):
        start = left + column * (inner + gap)
        x = Axis(batches[0], batches[-1], start + 22, start + inner - 22, log=True)
        _text(svg, start, 16, mix, "label strong")
        for tick in y.ticks(5):
            _line(svg, start, y(tick), start + inner, y(tick), "grid")
            if column == 0:
                _text(svg, left - 10, y(tick) + 4, _tick(tick), "label end")
        _line(svg, start, height - bottom, start + inner, height - bottom, "axis")
        for batch in _spaced(batches, x):
            _line(svg, x(batch), height - bottom, x(batch), height - bottom + 5, "axis")
            _text(svg, x(batch), height - bottom + 19, str(batch), "label middle")
        _text(svg, start + inner / 2, height - 6, "images per call", "label muted middle")
        cases = sorted(
            (case for case in report.cases if case.case.mix == mix),
            key=lambda case: case.case.batch,
        )
        for index in range(len(report.subjects)):
            _latency_series(svg, cases, index, x, y)
    _text(svg, left - 10, 16, "ms", "label muted end")
    return _markup(svg)


def ratio_chart(report: Report) -> Markup | None:
    """Ratio to the baseline: a row per case and subject, a whisker for its interval.

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
    low = min(1.0, *(ratio.low for ratio in ratios))
    high = max(1.0, *(ratio.high for ratio in ratios))
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
    svg = _canvas(height, "Ratio to the baseline")
    for tick in x.ticks(6):
        _line(svg, x(tick), top, x(tick), height - bottom, "grid")
        _text(svg, x(tick), height - bottom + 18, _tick(tick), "label middle")
        if tall:
            _text(svg, x(tick), top - 14, _tick(tick), "label middle")
    _line(svg, x(1.0), top - 8, x(1.0), height - bottom, "unity")
    baseline = report.subjects[0].name
    _text(svg, (left + WIDTH - 190) / 2, height - 5, f"{TIMES} {baseline}", "label muted middle")
    place: float = top
    for case in report.cases:
        first = True
        for of, index, result in rows:
            ratio = result.ratio
            if of is not case or ratio is None:
                continue
            y = place + step / 2
            if first:
                _text(svg, 2, y + 4, case.case.label, "label strong")
                first = False
            if several:
                _text(svg, left - 14, y + 4, _short(result.subject), "label end")
            group = _group(svg, index)
            _line(group, x(ratio.low), y, x(ratio.high), y, "whisker")
            for end in (ratio.low, ratio.high):
                _line(group, x(end), y - 5, x(end), y + 5, "whisker")
            _dot(group, x(ratio.median), y, 4.5)
            _text(svg, WIDTH - 172, y + 4, f"{ratio.median:.3f}", "label strong")
            interval = f"[{ratio.low:.3f}, {ratio.high:.3f}]"
            _text(svg, WIDTH - 2, y + 4, interval, "label muted end")
            place += step
        place += pause
    return _markup(svg)


def samples_chart(report: Report) -> Markup:
    """Raw samples: a panel per case, a strip and a box (quartiles, median) per subject."""
    columns = 2 if len(report.cases) > 1 else 1
    gap, lane, head, foot = 44, 34, 28, 40
    wide = (WIDTH - gap * (columns - 1)) / columns
    tall = head + lane * len(report.subjects) + foot
    rows = math.ceil(len(report.cases) / columns)
    svg = _canvas(rows * tall, "Distribution of the samples")
    names = [_short(subject.name) for subject in report.subjects]
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
        _text(svg, left, top + 14, case.case.label, "label strong")
        _text(svg, left + wide - 54, top + 14, f"{rounds:,} rounds", "label muted end")
        for tick in x.ticks(4):
            _line(svg, x(tick), top + head - 4, x(tick), floor, "grid")
            _text(svg, x(tick), floor + 16, _tick(tick), "label middle")
        # Further left than the names: the first tick may stand at the very start of the axis.
        _text(svg, left + label - 28, floor + 16, "ms", "label muted end")
        for index, result in enumerate(case.results):
            y = top + head + lane * (index + 0.5)
            _text(svg, left + label - 10, y + 4, names[index], "label end")
            _strip(_group(svg, index), every[index], x, y, lane)
            beyond = int((every[index] > x.high).sum())
            if beyond:
                _text(svg, left + wide - 48, y - 1, f"+{beyond} to", "label small muted")
                text = milliseconds(result.summary.max_ms)
                _text(svg, left + wide - 48, y + 11, text, "label small muted")
    return _markup(svg)


def _latency_series(
    svg: Element, cases: Sequence[CaseResult], index: int, x: Axis, y: Axis
) -> None:
    group = _group(svg, index)
    results: list[tuple[float, Result]] = [
        (x(case.case.batch), case.results[index]) for case in cases
    ]
    p50 = [(at, y(result.summary.p50_ms)) for at, result in results]
    p95 = [(at, y(result.summary.p95_ms)) for at, result in results]
    ElementTree.SubElement(
        group, "polygon", {"class": "band", "points": _points([*p50, *reversed(p95)])}
    )
    ElementTree.SubElement(group, "polyline", {"class": "edge", "points": _points(p95)})
    line = {"class": "line", "points": _points(p50)}
    if DASHES[index % SERIES]:
        line["stroke-dasharray"] = DASHES[index % SERIES]
    ElementTree.SubElement(group, "polyline", line)
    for a, b in p50:
        _dot(group, a, b, 3.2)


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
    _line(group, median, y - 10, median, y + 10, "median")


def _latency_axis(low: float, high: float, start: float, end: float) -> Axis:
    if high / low > LOG_SPAN:
        return Axis(low / 1.15, high * 1.15, start, end, log=True)
    step = _round_step(high / 5)
    return Axis(0.0, step * math.ceil(high * 1.02 / step), start, end)


def _spaced(batches: Sequence[int], x: Axis) -> list[int]:
    """The batch sizes whose labels do not touch; the largest is always among them."""
    kept: list[int] = []
    for batch in reversed(batches):
        if not kept or x(kept[-1]) - x(batch) >= CHARACTER * len(str(kept[-1])) + 8:
            kept.append(batch)
    return kept[::-1]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for leads in ((1, 2, 5), (1,)):
        ticks = [
            round(lead * 10.0**decade, 10)
            for decade in decades
            for lead in leads
            if low <= lead * 10.0**decade <= high
        ]
        if len(ticks) <= 9:
            return ticks
    return ticks


def _round_step(rough: float) -> float:
    decade = 10.0 ** math.floor(math.log10(rough))
    return decade * next(lead for lead in (1, 2, 2.5, 5, 10) if lead * decade >= rough * 0.999)


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _short(name: str) -> str:
    """Both ends of a long name: names that differ do so at the end as often as at the start."""
    return name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}"


def _canvas(height: float, title: str) -> Element:
    svg = ElementTree.Element(
        "svg", {"class": "chart", "viewBox": f"0 0 {WIDTH} {height:.0f}", "role": "img"}
    )
    ElementTree.SubElement(svg, "title").text = title
    return svg


def _group(svg: Element, index: int) -> Element:
    return ElementTree.SubElement(svg, "g", {"class": f"s{index % SERIES}"})


def _line(parent: Element, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    ElementTree.SubElement(
        parent, "line", {"class": kind, **{key: f"{value:.1f}" for key, value in ends.items()}}
    )


def _dot(parent: Element, x: float, y: float, radius: float) -> None:
    place = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": f"{radius:g}"}
    ElementTree.SubElement(parent, "circle", {"class": "dot", **place})


def _text(parent: Element, x: float, y: float, text: str, kind: str) -> None:
    place = {"class": kind, "x": f"{x:.1f}", "y": f"{y:.1f}"}
    ElementTree.SubElement(parent, "text", place).text = text


def _markup(svg: Element) -> Markup:
    # ElementTree has escaped every text and attribute; without a namespace the SVG is inline HTML.
    return Markup(ElementTree.tostring(svg, encoding="unicode"))
