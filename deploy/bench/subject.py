"""A subject: something that answers a batch, with the name it has in the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from ...export.engine import Rows, Session

EVERY_TASK = ", every task"
"""Behind the name of a subject that answers every row for every task."""


@dataclass(frozen=True)
class Subject:
    """What is timed. The first one of a benchmark is the baseline.

    Attributes:
        name: Short, unique in the benchmark.
        note: A sentence that says what it is.
        run: `(rows, task [B] int64) -> logits [B, ...] float32`; the call that is timed, from host
            memory to host memory. The rows are the array `[B, ...]` of the one input, or arrays by name.
        provider: The execution provider that really runs it, in the runtime's own name.
        opened_bytes: How much the process grew when it was opened (resident set), if measured.
    """

    name: str
    note: str
    run: Callable[[Any, NDArray[np.int64]], NDArray[np.float32]]
    provider: str = "unknown"
    opened_bytes: int | None = None


def open_subject(
    name: str, note: str, open_session: Callable[[], Session], *, takes_task: bool = True
) -> Subject:
    """Open a session as a subject and measure the memory that it takes.

    The growth of the process is that of the host's memory only, and the first session of a process
    also pays for loading the runtime.

    Args:
        name: Short, unique in the benchmark.
        note: A sentence that says what it is.
        open_session: Opens the engine.
        takes_task: Whether the engine has a `task` input; one that has none is called without.
    """
    process = psutil.Process()
    before = process.memory_info().rss
    session = open_session()
    grown = process.memory_info().rss - before

    def run_single(rows: Rows, task: NDArray[np.int64]) -> NDArray[np.float32]:
        return session.run(rows)

    return Subject(
        name=name,
        note=note,
        run=session.run if takes_task else run_single,
        provider=session.provider,
        opened_bytes=grown,
    )
