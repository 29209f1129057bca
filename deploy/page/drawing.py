"""What charts are drawn with: axes, and SVG that takes its colours from the page's style sheet.

Drawn here rather than by a plotting library because the page has a light and a dark scheme: every
mark carries a class (`s0`, `s1`, ... for the subjects) and no colour of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from xml.etree.ElementTree import Element

WIDTH = 960
"""Width of every chart in user units; one unit is one pixel at full size."""

SERIES = 8
"""Colours of the style sheet; a ninth subject starts again."""

DASHES = ("", "6 4", "2 3", "9 3 2 3", "4 2", "1 4", "12 3", "7 2 1 2")
CHARACTER = 7.2
"""Width of a label's character, on the wide side."""

LOG_SPAN = 8
"""A latency axis that spans more than this factor is logarithmic."""


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
        step = round_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(index * step, 10) for index in range(first, last + 1)]


def spaced(values: Sequence[float], x: Axis) -> list[float]:
    """The values whose labels do not touch; the largest is always among them."""
    kept: list[float] = []
    for value in reversed(values):
        room = CHARACTER * (len(tick_label(value)) + len(tick_label(kept[-1]))) / 2 if kept else 0
        if not kept or x(kept[-1]) - x(value) >= room + 8:
            kept.append(value)
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


def round_step(rough: float) -> float:
    """A round number at least as large as `rough`."""
    decade = 10.0 ** math.floor(math.log10(rough))
    return decade * next(lead for lead in (1, 2, 2.5, 5, 10) if lead * decade >= rough * 0.999)


def tick_label(value: float) -> str:
    """A tick as its axis has it."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def point_list(points: Sequence[tuple[float, float]]) -> str:
    """Points as SVG has them."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def short_name(name: str) -> str:
    """Both ends of a long name: names that differ do so at the end as often as at the start."""
    return name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}"


def new_canvas(height: float, title: str) -> Element:
    """A chart, with the title that a screen reader says."""
    svg = ElementTree.Element(
        "svg", {"class": "chart", "viewBox": f"0 0 {WIDTH} {height:.0f}", "role": "img"}
    )
    ElementTree.SubElement(svg, "title").text = title
    return svg


def series(svg: Element, index: int) -> Element:
    """What is drawn into it has the colour of a series."""
    return ElementTree.SubElement(svg, "g", {"class": f"s{index % SERIES}"})


def draw_line(parent: Element, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
    """A line of a class of the style sheet."""
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    ElementTree.SubElement(
        parent, "line", {"class": kind, **{key: f"{value:.1f}" for key, value in ends.items()}}
    )


def draw_dot(parent: Element, x: float, y: float, radius: float) -> None:
    """A dot in the colour of its series."""
    place = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": f"{radius:g}"}
    ElementTree.SubElement(parent, "circle", {"class": "dot", **place})


def draw_text(parent: Element, x: float, y: float, text: str, kind: str) -> None:
    """A text of classes of the style sheet."""
    place = {"class": kind, "x": f"{x:.1f}", "y": f"{y:.1f}"}
    ElementTree.SubElement(parent, "text", place).text = text


def to_markup(svg: Element) -> Markup:
    """The chart for the template."""
    # ElementTree has escaped every text and attribute; without a namespace the SVG is inline HTML.
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def draw_polyline(
    parent: Element, points: Sequence[tuple[float, float]], kind: str, dash: str = ""
) -> None:
    """A line through points, perhaps dashed."""
    given = {"class": kind, "points": point_list(points)}
    if dash:
        given["stroke-dasharray"] = dash
    ElementTree.SubElement(parent, "polyline", given)


def draw_rect(parent: Element, x: float, y: float, width: float, height: float, kind: str) -> None:
    """A rectangle of a class of the style sheet."""
    sides = {"x": x, "y": y, "width": width, "height": height}
    ElementTree.SubElement(
        parent, "rect", {"class": kind, **{key: f"{value:.1f}" for key, value in sides.items()}}
    )


def axis_of(values: Sequence[float], start: float, end: float, *, log: bool = False) -> Axis:
    """An axis with room around the values; from zero unless it is logarithmic."""
    low, high = min(values), max(values)
    if log:
        return Axis(low / 1.4, high * 1.4, start, end, log=True)
    step = round_step((high or 1.0) / 5)
    return Axis(0.0, step * math.ceil((high or 1.0) * 1.04 / step), start, end)


class Labels:
    """Texts beside points, left out where they would touch one that is there: the table has every number."""

    HEIGHT = 15

    def __init__(self, svg: Element) -> None:
        self.svg = svg
        self.boxes: list[tuple[float, float, float, float]] = []

    def keep_free(self, left: float, top: float, right: float, bottom: float) -> None:
        """Nothing is written here from now on."""
        self.boxes.append((left, top, right, bottom))

    def put(self, x: float, y: float, text: str, kind: str = "label small") -> bool:
        """Write a text above, below, right of or left of a point; whether there was room."""
        wide, high = CHARACTER * len(text), self.HEIGHT
        for left, base in (
            (x - wide / 2, y - 9),
            (x - wide / 2, y + 18),
            (x + 8, y + 4),
            (x - 8 - wide, y + 4),
        ):
            box = (left - 4, base - high + 3, left + wide + 4, base + 3)
            if left < 0 or left + wide > WIDTH or any(_meet(box, other) for other in self.boxes):
                continue
            self.keep_free(*box)
            draw_text(self.svg, left, base, text, kind)
            return True
        return False


def _meet(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def draw_frame(
    svg: Element, x: Axis, y: Axis, says: tuple[str, str], at: Iterable[float] = ()
) -> None:
    """Grid, ticks and what the axes are.

    Args:
        svg: The chart.
        x: The axis across.
        y: The axis upright.
        says: What stands below the one across and above the one upright.
        at: Where the axis across has its ticks, if not at round values.
    """
    for value in y.ticks(5):
        draw_line(svg, x.start, y(value), x.end, y(value), "grid")
        draw_text(svg, x.start - 10, y(value) + 4, tick_label(value), "label end")
    draw_line(svg, x.start, y.start, x.end, y.start, "axis")
    shown = sorted(set(at)) or x.ticks(6)
    for value in shown:
        draw_line(svg, x(value), y.start, x(value), y.start + 5, "axis")
    for value in spaced(shown, x):
        draw_text(svg, x(value), y.start + 19, tick_label(value), "label middle")
    draw_text(svg, (x.start + x.end) / 2, y.start + 40, says[0], "label muted middle")
    draw_text(svg, x.start - 48, y.end - 16, says[1], "label muted")


def latency_axis(low: float, high: float, start: float, end: float) -> Axis:
    """From zero; logarithmic where the values span more than `LOG_SPAN`."""
    if high / low > LOG_SPAN:
        return Axis(low / 1.15, high * 1.15, start, end, log=True)
    step = round_step(high / 5)
    return Axis(0.0, step * math.ceil(high * 1.02 / step), start, end)
