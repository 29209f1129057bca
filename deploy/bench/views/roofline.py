"""The roofline: what each subject did of what the machine can do, a point for every case.

S. Williams, A. Waterman, D. Patterson, Roofline, CACM 52(4), 2009. Across: FLOP for each byte of the products' operands;
upright: FLOP per second. Both ceilings were measured in the same run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...page.drawing import (
    DASHES,
    SERIES,
    WIDTH,
    Axis,
    Labels,
    draw_dot,
    draw_frame,
    draw_polyline,
    draw_text,
    new_canvas,
    series,
    to_markup,
)
from ...page.view import View
from ..wording import GIGA, milliseconds, percent, product_words, three_digits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from markupsafe import Markup

    from ..case import Case
    from ..ceilings import Ceilings
    from ..report import Report, Result
    from ..work import Work

HEIGHT, TOP, BOTTOM, LEFT, RIGHT = 380, 40, 56, 70, 20
NOTE = (
    "Work is counted from the graph: two FLOP for each multiply-accumulate of a product, and the bytes that the products "
    "read and write, each weight once. Norms, sums and activation functions are not in it. The ceilings are the best of several "
    "calls in this run, through the same runtime and threads: {product}, and {sum}. The bound is the longer of the two "
    "times that the ceilings give; what stays in a cache is not held to the memory's, so small models can pass the slope."
)
UNMEASURED = (
    "Work is counted from the graph: two FLOP for each multiply-accumulate of a product, and the bytes that the products "
    "read and write, each weight once. Norms, sums and activation functions are not in it. No ceiling was measured."
)


def work_view(report: Report) -> View | None:
    """Counted work and what was reached of the ceilings; None where nothing was counted."""
    counted = list(_counted(report))
    if not counted:
        return None
    ceilings = report.ceilings
    heads = ["case", "subject", "GFLOP", "weights MB", "activations MB", "FLOP/byte", "GFLOP/s"]
    rows: list[tuple[object, ...]] = [tuple(heads)]
    if ceilings is not None:
        rows = [(*heads, "of ceiling", "bound ms", "p50 ms")]
    for case, _, result, work in counted:
        p50 = result.summary.p50_ms
        cells = (
            case.label,
            result.subject,
            three_digits(work.flops / GIGA),
            f"{work.weight_bytes / 1e6:,.1f}",
            f"{work.activation_bytes / 1e6:,.1f}",
            f"{work.flops / work.bytes:.1f}",
            f"{speed(work, result) / GIGA:.1f}",
        )
        if ceilings is not None:
            bound = milliseconds(ceilings.bound_ms(work))
            cells += (percent(ceilings.reached(work, p50)), bound, milliseconds(p50))
        rows.append(cells)
    if ceilings is None:
        return View("Work", UNMEASURED, rows)
    product, moved = product_words(ceilings)
    drawn = {result.subject for _, _, result, _ in counted}
    return View(
        title="Work, and what the machine can do",
        note=NOTE.format(product=product, sum=moved),
        rows=rows,
        chart=roofline_chart(report, ceilings),
        legend=tuple(s.name if s.name in drawn else "" for s in report.subjects),
    )


def roofline_chart(report: Report, ceilings: Ceilings) -> Markup:
    """Both ceilings, and a point for each subject and case with its batch size beside it."""
    counted = list(_counted(report))
    across = [work.flops / work.bytes for _, _, _, work in counted]
    upright = [speed(work, result) / GIGA for _, _, result, work in counted]
    top = ceilings.flops_per_second / GIGA
    x = Axis(
        min(*across, ceilings.ridge) / 3, max(*across, ceilings.ridge) * 3, LEFT, WIDTH - RIGHT, log=True
    )  # fmt: skip
    low = min(*upright, ceilings.bytes_per_second * x.low / GIGA)
    y = Axis(low / 1.5, top * 2, HEIGHT - BOTTOM, TOP, log=True)
    svg = new_canvas(HEIGHT, "Roofline")
    draw_frame(svg, x, y, ("FLOP per byte of the products' operands", "GFLOP/s"))
    slope = [
        (x.low, ceilings.bytes_per_second * x.low / GIGA),
        (ceilings.ridge, top),
        (x.high, top),
    ]
    draw_polyline(svg, [(x(a), y(b)) for a, b in slope], "unity")
    labels = Labels(svg)
    says = f"{top:.0f} GFLOP/s, the largest product"
    labels.keep_free(WIDTH - RIGHT - 260, y(top) - 24, WIDTH, y(top) - 2)
    draw_text(svg, WIDTH - RIGHT, y(top) - 8, says, "label muted end")
    beside = f"slope: {ceilings.bytes_per_second / GIGA:.1f} GB/s, the largest sum"
    labels.keep_free(x.start, TOP - 8, x.start + 270, TOP + 14)
    draw_text(svg, x.start + 8, TOP + 8, beside, "label muted")
    points = sorted(counted, key=lambda row: -row[0].batch)
    for _, index, result, work in points:
        place = x(work.flops / work.bytes), y(speed(work, result) / GIGA)
        draw_dot(series(svg, index), *place, 4.5)
        labels.keep_free(place[0] - 5, place[1] - 5, place[0] + 5, place[1] + 5)
    for case, _, result, work in points:
        place = x(work.flops / work.bytes), y(speed(work, result) / GIGA)
        labels.put(*place, str(case.batch))
    for index in range(len(report.subjects)):
        own = sorted(
            (case.batch, x(work.flops / work.bytes), y(speed(work, result) / GIGA))
            for case, of, result, work in counted
            if of == index and case.mix == counted[0][0].mix
        )
        if len(own) > 1:
            draw_polyline(
                series(svg, index), [(a, b) for _, a, b in own], "thin", DASHES[index % SERIES]
            )
    return to_markup(svg)


def speed(work: Work, result: Result) -> float:
    """FLOP per second at the median."""
    return work.flops / (result.summary.p50_ms / 1e3)


def _counted(report: Report) -> Iterator[tuple[Case, int, Result, Work]]:
    """Every case with the number of its subject, if it was counted and has any work."""
    for case in report.cases:
        for index, result in enumerate(case.results):
            if result.work is not None and result.work.macs:
                yield case.case, index, result, result.work
