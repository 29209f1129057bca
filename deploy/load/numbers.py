"""From every request's times to a step's numbers, once: never a percentile of percentiles.

A closed loop counts the requests that ended while it was measured, and a latency is from sending to the answer. An
open loop counts the requests that were due then, however late their answers came, and a latency is from when the
request was due.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ..bench.latency import latency_of
from .statistics import difference
from .step import CLOSED, WINDOWS
from .wire import OK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ..bench.latency import Latency
    from .changes import Changes
    from .drive import Run
    from .statistics import ServerCounts
    from .step import Step

NS_PER_MS = 1_000_000
NS_PER_US = 1_000
NS_PER_S = 1_000_000_000

STABLE = 0.10
"""Windows that differ by no more than this fraction agree."""

LAG_SHARE = 0.10
"""The sender's own lag may be so large a part of the latency at the same percentile."""

LAG_FREE_MS = {50: 0.1, 99: 1.0}
"""A lag below this is the operating system's, at the percentile."""

HELD = 0.95
"""A rate is held if so large a part of it is answered."""


@dataclass(frozen=True)
class Window:
    """A part of the measured time.

    Attributes:
        answered_per_second: Requests with a good answer that came in it, per second.
        offered_per_second: Requests that were due in it, per second; None in a closed loop.
        p50_ms: Median latency, in ms; None without an answer.
    """

    answered_per_second: float
    offered_per_second: float | None
    p50_ms: float | None


@dataclass(frozen=True)
class Errors:
    """Requests without a good answer, of one kind.

    Attributes:
        status: The kind in a word: a status of HTTP or gRPC, or what was wrong with the answer.
        count: How many.
        says: What the first one was told.
    """

    status: str
    count: int
    says: str


@dataclass(frozen=True)
class StepResult:
    """A step's numbers.

    Attributes:
        level: Callers, or requests per second that were asked for.
        offered_per_second: Requests that were due, per second; None in a closed loop.
        answered_per_second: Requests with a good answer that came while it was measured, per second.
        rows_per_second: The rows of these.
        latency: Of good answers; None without one.
        lag: How late the client itself sent, see `Sample.due_ns`; None without a request.
        send_us: Mean time that sending took, in microseconds.
        receive_us: Mean time from a reply's first bytes to its end, in microseconds.
        errors: Requests without a good answer, the most frequent kind first.
        windows: Equal parts of the measured time.
        stable: Whether they agree.
        client_bound: Whether the client, rather than the server, set the pace: the step says nothing of the server.
        server: What the server counted; None where it has no statistics.
        changes: Tasks that came and went meanwhile; None where none did.
        at_ms: Of every good answer, when it came (closed loop) or was due (open), from the start, in ms.
        samples_ms: Its latency, in ms.
        lags_ms: How late it was sent, in ms.
    """

    level: float
    offered_per_second: float | None
    answered_per_second: float
    rows_per_second: float
    latency: Latency | None
    lag: Latency | None
    send_us: float
    receive_us: float
    errors: tuple[Errors, ...]
    windows: tuple[Window, ...]
    stable: bool
    client_bound: bool
    server: ServerCounts | None
    changes: Changes | None
    at_ms: tuple[float, ...]
    samples_ms: tuple[float, ...]
    lags_ms: tuple[float, ...]

    @property
    def failed(self) -> int:
        """Requests without a good answer."""
        return sum(kind.count for kind in self.errors)

    @property
    def holds(self) -> bool:
        """Whether what was offered was answered; False of a closed loop, which offers no rate."""
        offered = self.offered_per_second
        return offered is not None and self.answered_per_second >= HELD * offered > 0


def numbers(run: Run, step: Step, rows: int, changes: Changes | None = None) -> StepResult:
    """A step's numbers.

    Args:
        run: What happened.
        step: What was driven.
        rows: Rows of each request.
        changes: Tasks that came and went meanwhile.
    """
    closed = step.loop == CLOSED
    times = np.array([sample[:5] for sample in run.samples], np.int64).reshape(-1, 5)
    due, sent, written, first, ended = times.T
    good = np.array([sample.status == OK for sample in run.samples], bool)
    at, origin = (ended, sent) if closed else (due, due)
    counted = (at >= run.began_ns) & (at < run.ended_ns)
    kept = np.flatnonzero(good & counted)
    kept = kept[np.argsort(at[kept], kind="stable")]
    latency_ms, lag_ms = (ended - origin) / NS_PER_MS, (sent - due) / NS_PER_MS
    seconds = (run.ended_ns - run.began_ns) / NS_PER_S
    windows = _windows(run, at, ended, good, latency_ms, closed=closed)
    latency, lag = latency_of(latency_ms[kept]), latency_of(lag_ms[counted])
    answered = _within(ended[good], run.began_ns, run.ended_ns) / seconds
    return StepResult(
        level=step.level,
        offered_per_second=None if closed else int(counted.sum()) / seconds,
        answered_per_second=answered,
        rows_per_second=answered * rows,
        latency=latency,
        lag=lag,
        send_us=_mean(written[kept] - sent[kept]) / NS_PER_US,
        receive_us=_mean(ended[kept] - first[kept]) / NS_PER_US,
        errors=_errors(run, counted & ~good),
        windows=windows,
        stable=_agree(windows),
        client_bound=_client_bound(latency, lag),
        server=difference(run.before, run.after),
        changes=changes,
        at_ms=tuple(((at[kept] - run.began_ns) / NS_PER_MS).tolist()),
        samples_ms=tuple(latency_ms[kept].tolist()),
        lags_ms=tuple(lag_ms[kept].tolist()),
    )


def _windows(
    run: Run,
    at: NDArray[np.int64],
    ended: NDArray[np.int64],
    good: NDArray[np.bool_],
    latency_ms: NDArray[np.float64],
    *,
    closed: bool,
) -> tuple[Window, ...]:
    edges = np.linspace(run.began_ns, run.ended_ns, WINDOWS + 1).astype(np.int64)
    found = []
    for low, high in pairwise(edges.tolist()):
        seconds = (high - low) / NS_PER_S
        inside = (at >= low) & (at < high)
        of = latency_of(latency_ms[inside & good])
        found.append(
            Window(
                answered_per_second=_within(ended[good], low, high) / seconds,
                offered_per_second=None if closed else int(inside.sum()) / seconds,
                p50_ms=of and of.p50_ms,
            )
        )
    return tuple(found)


def _agree(windows: Sequence[Window]) -> bool:
    """Whether throughput and median latency are alike in all; of an open loop, throughput beside what was offered."""
    medians = [window.p50_ms for window in windows]
    rates = [
        window.answered_per_second / (window.offered_per_second or 1)
        if window.offered_per_second is not None
        else window.answered_per_second
        for window in windows
    ]
    if None in medians or not all(rates):
        return False
    return all(max(v) <= (1 + STABLE) * min(v) for v in (rates, [m for m in medians if m]) if v)


def _client_bound(latency: Latency | None, lag: Latency | None) -> bool:
    if latency is None or lag is None:
        return False
    return any(
        late > max(LAG_SHARE * whole, LAG_FREE_MS[percentile])
        for percentile, late, whole in (
            (50, lag.p50_ms, latency.p50_ms),
            (99, lag.p99_ms, latency.p99_ms),
        )
    )


def _errors(run: Run, bad: NDArray[np.bool_]) -> tuple[Errors, ...]:
    counts = Counter(run.samples[index].status for index in np.flatnonzero(bad))
    return tuple(
        Errors(status, count, run.says.get(status, "")) for status, count in counts.most_common()
    )


def _within(times: NDArray[np.int64], low: int, high: int) -> int:
    return int(((times >= low) & (times < high)).sum())


def _mean(values: NDArray[np.int64]) -> float:
    return float(values.mean()) if values.size else 0.0
