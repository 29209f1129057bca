"""Facts of the subjects that no round measures: what their graphs hold, what they take alone, where their time goes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...merge.errors import UsageError
from .footprint import measure_footprint
from .nodes import profile_nodes
from .work import Counter, graph_facts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .case import Case
    from .report import About
    from .subject import Subject


def furnish(
    subjects: Sequence[Subject],
    cases: Sequence[Case],
    about: About,
    seed: int,
    *,
    footprint: bool,
    nodes: bool,
) -> list[Subject]:
    """The subjects with what can be found out about each that has a `source`; the others as they are.

    Args:
        subjects: What is timed.
        cases: Cases of the run; memory and nodes are those of the largest batch.
        about: Tasks and inputs.
        seed: Of pictures and task rows.
        footprint: Open each alone in a process of its own.
        nodes: Profile each in a session of its own.

    Raises:
        CheckFailed: Such a process failed.
        UsageError: The nodes of an engine cannot be profiled.
    """
    largest = max(cases, key=lambda case: case.batch)
    rows = largest.rows(about.reads, seed)
    task = largest.task_rows([task.row for task in about.tasks], seed)
    furnished = []
    for subject in subjects:
        source = subject.source
        if source is not None and source.is_graph:
            subject = replace(subject, graph=graph_facts(source), work=_counter(subject, largest))
        if source is not None and footprint:
            subject = replace(subject, footprint=measure_footprint(source, rows, task))
        if source is not None and nodes:
            subject = replace(subject, nodes=profile_nodes(source, largest, rows, task))
        furnished.append(subject)
    return furnished


def _counter(subject: Subject, case: Case) -> Counter | None:
    """None where an operator has no rule; the report then says so."""
    assert subject.source is not None
    counter = Counter(subject.source)
    try:
        counter(case.batch, [0] * case.batch)
    except UsageError:
        return None
    return counter
