"""The memory that a subject takes, and what one further task adds to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .report import SubjectFacts


def taken(subject: SubjectFacts) -> int | None:
    """Of an engine that has answered, alone in a process; before version 3, growth of the benchmark's own. In bytes."""
    return subject.opened_bytes if subject.footprint is None else subject.footprint.called_bytes


def is_measured(subject: SubjectFacts) -> bool:
    """Whether its memory is known; none at all was memory that the process had already."""
    size = taken(subject)
    return size is not None and size > 0


def per_task(engines: Sequence[tuple[int, int | None]]) -> float | None:
    """What one further task adds: the line through the engines of the fewest and of the most tasks.

    Args:
        engines: Number of tasks and memory in bytes; one whose memory is not known is passed over.

    Returns:
        Bytes per task; None without two numbers of tasks.
    """
    known = sorted((tasks, size) for tasks, size in engines if size is not None)
    if not known or known[0][0] == known[-1][0]:
        return None
    (few, small), (many, large) = known[0], known[-1]
    return (large - small) / (many - few)
