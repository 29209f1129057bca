"""A subject: something that answers a batch, with the name it has in the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from ...export.engine import Bound, Rows, Session
    from .footprint import Footprint
    from .nodes import NodeTimes
    from .source import Source
    from .work import GraphFacts, Work

    Run = Callable[[Any, NDArray[np.int64]], NDArray[np.float32]]
    """`(rows, task [B]) -> logits [B, ...]`; see `Subject.run`."""

BARE = "backbone only"
"""The frozen model without any tuner."""

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
        opened_bytes: Of reports before version 3; nothing measures it now, see `footprint`.
        engine: Target, precision and opset of its engine, if it has one.
        identity: Identity of its bundle, if it is one.
        task_count: How many tasks it holds; 0 for a bare backbone, None where that is not known.
        rank: Largest rank of its bank, if it has one.
        source: How its engine is opened again, if it is one engine; graph, work, footprint and nodes follow from it.
        work: `(batch, task rows) -> Work` of one call; None if its products cannot be counted.
        graph: What its engine's graph holds, if it has one.
        footprint: Its memory and size, if measured.
        nodes: Where its time goes, if it was profiled.
    """

    name: str
    note: str
    run: Run
    provider: str = "unknown"
    opened_bytes: int | None = None
    engine: str | None = None
    identity: str | None = None
    task_count: int | None = None
    rank: int | None = None
    source: Source | None = None
    work: Callable[[int, Sequence[int]], Work | None] | None = None
    graph: GraphFacts | None = None
    footprint: Footprint | None = None
    nodes: NodeTimes | None = None


class Resident:
    """Runs an engine on rows that lie on the device already, and leaves the answer there.

    The rows of a batch size and a mix of tasks are copied once, when they are first asked for, and the answer
    to them is fetched once; later calls compute the same answer again, and return when the device has.
    """

    def __init__(self, session: Session, *, takes_task: bool) -> None:
        self.session, self.takes_task = session, takes_task
        self.bound: dict[int | bytes, tuple[Bound, NDArray[np.float32]]] = {}

    def __call__(self, rows: Rows, task: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Subject.run`."""
        case = task.tobytes() if self.takes_task else len(task)
        if case not in self.bound:
            bound = self.session.bind(rows, task if self.takes_task else None)
            bound.run()
            self.bound[case] = (bound, bound.fetch())
        bound, answer = self.bound[case]
        bound.run()
        return answer


def open_subject(
    name: str,
    note: str,
    open_session: Callable[[], Session],
    *,
    takes_task: bool = True,
    resident: bool = False,
    engine: str | None = None,
    identity: str | None = None,
    task_count: int | None = None,
    rank: int | None = None,
    source: Source | None = None,
) -> Subject:
    """Open a session as a subject.

    Args:
        name: Short, unique in the benchmark.
        note: A sentence that says what it is.
        open_session: Opens the engine.
        takes_task: Whether the engine has a `task` input; one that has none is called without.
        resident: Time runs whose inputs and answer stay on the device; see `Resident`.
        engine: See `Subject`.
        identity: See `Subject`.
        task_count: See `Subject`.
        rank: See `Subject`.
        source: See `Subject`.
    """
    session = open_session()

    def run_single(rows: Rows, task: NDArray[np.int64]) -> NDArray[np.float32]:
        return session.run(rows)

    run = session.run if takes_task else run_single
    return Subject(
        name=name,
        note=note,
        run=Resident(session, takes_task=takes_task) if resident else run,
        provider=session.provider,
        engine=engine,
        identity=identity,
        task_count=task_count,
        rank=rank,
        source=source,
    )
