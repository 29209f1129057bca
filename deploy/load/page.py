"""The report as one HTML page that needs nothing else: no script, no request, light and dark."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from ...merge.files import atomic_file
from ..bench.wording import milliseconds, rate
from ..page.fill import fill
from . import wording
from .charts import PERCENTILES, latency_chart, throughput_chart
from .statistics import PARTS
from .step import CLOSED

if TYPE_CHECKING:
    from .report import Report

TEMPLATE = Path(__file__).with_name("page.html")


def write_html(report: Report, path: Path) -> None:
    """Write the page, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(render_html(report), encoding="utf-8")


def render_html(report: Report) -> str:
    """The page as text; every text in it that is not ours is escaped."""
    names = [f"p{percentile}" for percentile in PERCENTILES]
    return fill(
        TEMPLATE,
        report=report,
        title=f"{report.model} under load",
        verdict=wording.verdict(report),
        timed=wording.timed(report),
        facts=wording.facts(report),
        environment=wording.environment(report),
        rows=[(wording.label(report, step), wording.state(step), step) for step in report.steps],
        latency=latency_chart(report),
        throughput=throughput_chart(report),
        offered=report.loop != CLOSED,
        percentiles=_legend("", *names),  # the first series is the benchmark's baseline
        parts=PARTS,
        ms=milliseconds,
        rate=rate,
    )


def _legend(*names: str) -> SimpleNamespace:
    """What the benchmark's legend reads."""
    return SimpleNamespace(subjects=[SimpleNamespace(name=name) for name in names])
