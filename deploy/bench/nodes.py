"""Where the time of a call goes: kernel times by operator and by part of the model, from the runtime's profiler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .case import Case


@dataclass(frozen=True)
class NodeTime:
    """Nodes of one kind in one call.

    Attributes:
        name: An operator, or a part of the model.
        nodes: How many ran.
        ms: The sum of their kernels, in ms.
    """

    name: str
    nodes: int
    ms: float


@dataclass(frozen=True)
class NodeTimes:
    """A profiled session, apart from the timed one: the profiler slows what it measures.

    Attributes:
        case: What was run.
        calls: Profiled calls; times are means over them.
        call_ms: One profiled call from outside, in ms.
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
