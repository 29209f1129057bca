"""Tasks that come and go while a load runs, and what requests saw of it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...merge.errors import UtuneError
from ...serving.client import Client, Retry
from ..bench.latency import latency_of
from .step import CLOSED
from .wire import OK, now

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..bench.latency import Latency
    from .drive import Run
    from .step import Step

NS_PER_MS = 1_000_000

ASK_S = 60.0
"""Seconds that a change may take."""


@dataclass(frozen=True)
class Changes:
    """What additions and removals did to the requests of a step.

    Attributes:
        added: Additions that were carried out.
        removed: Removals that were.
        failed: Changes that were refused.
        during: Latency of requests that were open during an addition; None without one.
        apart: Latency of all others; None without one.
    """

    added: int
    removed: int
    failed: int
    during: Latency | None
    apart: Latency | None


@dataclass(frozen=True)
class Change:
    """A change, from asking for it to its answer; times in nanoseconds of `wire.now`."""

    kind: str
    began_ns: int
    ended_ns: int
    failed: bool = False


class Changer:
    """Adds a packed task and removes it again, in a thread of its own; `with` starts and ends it.

    The server ends as it began: what is there at the end is removed.

    Args:
        url: The server.
        model: Its bundle.
        task: A packed task's file and its name.
        every_s: Seconds between two changes.
    """

    def __init__(self, url: str, model: str, task: tuple[bytes, str], every_s: float) -> None:
        self._data, self._name = task
        self._every_s = every_s
        self._client = Client(url, model=model, deadline_s=ASK_S, retry=Retry(attempts=1))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.changes: list[Change] = []

    def __enter__(self) -> Changer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._client.close()

    def _run(self) -> None:
        there = False
        while not self._stop.wait(self._every_s):
            if there:
                there = not self._change("remove", lambda: self._client.remove(self._name))
            else:
                there = self._change("add", lambda: self._client.add(self._data))
        if there:
            self._change("remove", lambda: self._client.remove(self._name))

    def _change(self, kind: str, change: Callable[[], object]) -> bool:
        """Whether it was carried out."""
        began_ns = now()
        try:
            change()
        except UtuneError:
            self.changes.append(Change(kind, began_ns, now(), failed=True))
            return False
        self.changes.append(Change(kind, began_ns, now()))
        return True


def effect(run: Run, step: Step, changes: Sequence[Change]) -> Changes:
    """What the changes of a step did to its requests.

    Args:
        run: What happened.
        step: What was driven.
        changes: Of any step; those outside the measured time are left out.
    """
    closed = step.loop == CLOSED
    within = [c for c in changes if c.ended_ns > run.began_ns and c.began_ns < run.ended_ns]
    counted = [
        (sample.sent_ns if closed else sample.due_ns, sample.ended_ns)
        for sample in run.samples
        if sample.status == OK
        and run.began_ns <= (sample.ended_ns if closed else sample.due_ns) < run.ended_ns
    ]
    began, ended = np.array(counted, np.int64).reshape(-1, 2).T
    hit = np.zeros(began.size, bool)
    for change in within:
        if change.kind == "add":
            hit |= (began < change.ended_ns) & (ended > change.began_ns)
    latency_ms = (ended - began) / NS_PER_MS
    return Changes(
        added=sum(c.kind == "add" and not c.failed for c in within),
        removed=sum(c.kind == "remove" and not c.failed for c in within),
        failed=sum(c.failed for c in within),
        during=latency_of(latency_ms[hit]),
        apart=latency_of(latency_ms[~hit]),
    )
