"""Where the time of a call goes: kernel times by operator and by part of the model, from the runtime's profiler.

The profiled session is one of its own, beside the timed one: the profiler writes an event for every node and slows what
it measures. Its shares are read, its sum is held to the timed median, and its milliseconds are no latency.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from ...export.products import is_attention, is_gemm
from ...export.targets.onnxruntime import OPTIMISED, OnnxRuntimeSession
from ...merge.errors import UsageError
from .parts import OTHER, parts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from ...export.engine import Rows
    from .case import Case
    from .source import Source

KERNEL = "_kernel_time"
CALLS = 5
"""Profiled calls, after one that does not count."""

US_PER_MS = 1000


@dataclass(frozen=True)
class NodeTime:
    """Nodes of one kind in one call.

    Attributes:
        name: An operator, or a part of the model.
        nodes: How many ran.
        ms: The sum of their kernels' medians, in ms.
    """

    name: str
    nodes: int
    ms: float


@dataclass(frozen=True)
class NodeTimes:
    """A profiled session, apart from the timed one: the profiler slows what it measures.

    Attributes:
        case: What was run.
        calls: Profiled calls; a node's time is its median over them.
        call_ms: One profiled call from outside, the median, in ms.
        kernels_ms: The sum of its kernels, in ms; less than `call_ms` by what lies between kernels.
        gemms: Products of matrices in the optimised graph.
        attentions: Attention nodes in the optimised graph.
        groups: By part of the model, the longest first.
        operators: By operator, the longest first.
    """

    case: Case
    calls: int
    call_ms: float
    kernels_ms: float
    gemms: int
    attentions: int
    groups: tuple[NodeTime, ...]
    operators: tuple[NodeTime, ...]


def profile_nodes(source: Source, case: Case, rows: Rows, task: NDArray[np.int64]) -> NodeTimes:
    """Profile one case of an engine.

    Args:
        source: The engine.
        case: What `rows` are, for the report.
        rows: What a call is given.
        task: `[B]` rows of the bank; passed over by an engine that has no `task` input.

    Raises:
        UsageError: The engine is no graph of ONNX Runtime on the CPU.
    """
    if not source.is_graph or source.device.provider != "cpu":
        raise UsageError(
            "kernel times are those of ONNX Runtime on the CPU",
            where=source.file,
            found=f"provider {source.device.provider}",
            do="leave out --nodes: on a CUDA device this profiler sees when kernels are launched, not when they run",
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = source.model if isinstance(source.model, bytes) else source.file
        assert model is not None  # only a model in memory has no file
        session = OnnxRuntimeSession(model, source.device, bank=source.bank, profile=folder)
        took = []
        for _ in range(1 + CALLS):
            began = time.perf_counter()
            session.run(rows, task if source.takes_task else None)
            took.append(1e3 * (time.perf_counter() - began))
        events = json.loads(session.end_profile().read_text(encoding="utf-8"))
        graph = ir.from_proto(onnx.load(folder / OPTIMISED))
    return summarise_events(events, graph, case, took)


def summarise_events(
    events: Iterable[Mapping[str, object]], graph: ir.Model, case: Case, took: list[float]
) -> NodeTimes:
    """Kernel times of all calls but the first, which also makes room for what it computes: each node's median.

    Args:
        events: Of the profile, in order of time.
        graph: The graph that ran.
        case: What was run.
        took: Each call from outside in ms, the first one included.
    """
    places = parts(graph)
    runs: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        name, arguments = str(event["name"]), event.get("args")
        if event.get("cat") == "Node" and name.endswith(KERNEL) and isinstance(arguments, dict):
            node = name.removesuffix(KERNEL), str(arguments["op_name"])
            runs[node].append(float(str(event["dur"])) / US_PER_MS)
    groups: dict[str, list[float]] = defaultdict(list)
    operators: dict[str, list[float]] = defaultdict(list)
    for (name, operator), every in runs.items():
        ms = statistics.median(every[1:] or every)
        groups[places.get(name, OTHER)].append(ms)
        operators[operator].append(ms)
    kinds = [node.op_type for node in graph.graph]
    return NodeTimes(
        case=case,
        calls=len(took) - 1,
        call_ms=statistics.median(took[1:]),
        kernels_ms=sum(map(sum, operators.values())),
        gemms=sum(map(is_gemm, kinds)),
        attentions=sum(map(is_attention, kinds)),
        groups=_times(groups),
        operators=_times(operators),
    )


def _times(found: Mapping[str, list[float]]) -> tuple[NodeTime, ...]:
    times = (NodeTime(name, len(ms), sum(ms)) for name, ms in found.items())
    return tuple(sorted(times, key=lambda time: -time.ms))
