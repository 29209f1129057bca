"""The report as one HTML page that needs nothing else: no script, no request, light and dark."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined

from ...merge.files import atomic_file
from ..bench.charts import SERIES
from ..bench.page import TEMPLATE as BENCHMARK
from ..bench.wording import milliseconds, rate
from . import wording
from .charts import PERCENTILES, latency_chart, throughput_chart
from .statistics import PARTS
from .step import CLOSED

if TYPE_CHECKING:
    from .report import Report

TEMPLATE = Path(__file__).with_name("page.html")

END_OF_STYLE = "</style>"
"""Where the benchmark's page ends to be ours too: its macros, head and style sheet stand before."""


def write_html(report: Report, path: Path) -> None:
    """Write the page, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(render_html(report), encoding="utf-8")


def render_html(report: Report) -> str:
    """The page as text; every text in it that is not ours is escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shared, end, _ = BENCHMARK.read_text(encoding="utf-8").partition(END_OF_STYLE)
    assert end  # the benchmark's page has a style sheet
    template = environment.from_string(shared + TEMPLATE.read_text(encoding="utf-8"))
    names = [f"p{percentile}" for percentile in PERCENTILES]
    return template.render(
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
        series=SERIES,
    )


def _legend(*names: str) -> SimpleNamespace:
    """What the benchmark's legend reads."""
    return SimpleNamespace(subjects=[SimpleNamespace(name=name) for name in names])
