"""One task in one version: what a request was promised, whatever happens to the task meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from ...export.bundle import Task

    Row = Callable[[], Mapping[str, NDArray[Any]]]


@dataclass(frozen=True, eq=False)
class Version:
    """A task as it was at one time. Two are the same only if they are one object.

    Attributes:
        task: What a manifest says of it.
        number: Counts the task's versions from 1.
        place: Where an engine that holds its tasks as constants has it.
        read: Gives its row of the bank, `[...]` by engine input name; None where tasks are constants.
    """

    task: Task
    number: int = 1
    place: int = 0
    read: Row | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of its logits."""
        return self.task.labels
