"""The columns that NVIDIA's perf_analyzer writes with `-f`, in its order, units and digits.

Times are whole microseconds; rates have six digits; the rows are in the order of their throughput. Source:
https://github.com/triton-inference-server/perf_analyzer/blob/main/src/report_writer.cc. Percentiles differ from its
own by less than the distance of two samples: it takes the nearest one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...merge.files import atomic_file
from .statistics import PARTS
from .step import CLOSED

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ..bench.latency import Latency
    from .numbers import StepResult
    from .report import Report

PERCENTILES = (50, 90, 95, 99)
CLIENT = "Client Send,"
SERVER = (
    "Network+Server Send/Recv,Server Queue,Server Compute Input,Server Compute Infer,"
    "Server Compute Output,"
)


def write_csv(report: Report, path: Path) -> None:
    """Write the file, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(to_csv(report), encoding="ascii", newline="\n")


def to_csv(report: Report) -> str:
    """The file's text. A step without a good answer has no row; without statistics in every step, no server's columns."""
    steps = [step for step in report.steps if step.latency is not None]
    with_server = all(step.server is not None for step in steps)
    first = "Concurrency" if report.loop == CLOSED else "Request Rate"
    latencies = ",".join(f"p{percentile} latency" for percentile in PERCENTILES)
    lines = [
        f"{first},Inferences/Second,{CLIENT}{SERVER if with_server else ''}Client Recv,{latencies}"
    ]
    steps.sort(key=lambda step: step.rows_per_second)
    lines += [",".join(_cells(step, with_server=with_server)) for step in steps]
    return "\n".join([*lines, ""])


def _cells(step: StepResult, *, with_server: bool) -> Iterator[str]:
    latency = step.latency
    assert latency is not None  # a step without has no row
    yield f"{step.level:g}"
    yield f"{step.rows_per_second:g}"
    yield str(int(step.send_us))
    if with_server:
        yield from _server(step, latency)
    yield str(int(step.receive_us))
    for percentile in PERCENTILES:
        yield str(int(getattr(latency, f"p{percentile}_ms") * 1000))


def _server(step: StepResult, latency: Latency) -> Iterator[str]:
    """What is neither the client's nor counted by the server, then the parts that it counts."""
    server = step.server
    assert server is not None  # asked for only where all steps have it
    means = [getattr(server, part).mean_ns for part in PARTS]
    waited_ns = int(latency.mean_ms * 1e6 - (step.send_us + step.receive_us) * 1e3)
    yield str(max(waited_ns - sum(means), 0) // 1000)
    for mean_ns in means:
        yield str(mean_ns // 1000)
