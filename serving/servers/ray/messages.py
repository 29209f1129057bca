"""What the processes say to each other. Errors travel as values: a traceback from elsewhere helps no caller."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ....merge import errors
from ... import rejections

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from ....merge.errors import UtuneError

KINDS: Mapping[str, type[errors.UtuneError]] = {
    kind.__name__: kind
    for module in (errors, rejections)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, errors.UtuneError)
}


@dataclass(frozen=True)
class Key:
    """One version of one task, the same in every process.

    Attributes:
        name: The task's name.
        number: The version's number.
        file: Its packed file, named by its content; empty where the bundle shipped it. A number that was given to a
            task that was refused is given again, so it alone would not do.
    """

    name: str
    number: int
    file: str = ""


@dataclass(frozen=True)
class Ask:
    """A checked request beside its tensors.

    Attributes:
        versions: Of each row; none where every task answers every row.
        every: Whether it does.
        priority: See `Batcher.submit`.
        timeout_us: See `Batcher.submit`.
    """

    versions: tuple[Key, ...]
    every: bool = False
    priority: int = 0
    timeout_us: int = 0

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task of each row."""
        return tuple(key.name for key in self.versions)


@dataclass(frozen=True)
class Reply:
    """What a replica answers; see `service.Answers` for its fields.

    Attributes:
        logits: As there.
        labels: As there.
        scores: As there.
        engine_ns: As there.
        calls: Rows and tasks of each engine call that no reply has told of yet.
    """

    logits: NDArray[np.float32]
    labels: tuple[str, ...]
    scores: NDArray[np.float32]
    engine_ns: int
    calls: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Refusal:
    """An error that a user can act on, as a value."""

    kind: str
    what: str
    details: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, error: UtuneError) -> Refusal:
        """The value of an error."""
        return cls(type(error).__name__, error.what, dict(error.details))

    def error(self) -> UtuneError:
        """The error of the value."""
        return KINDS.get(self.kind, errors.UtuneError)(self.what, **dict(self.details))


@dataclass(frozen=True)
class TaskRow:
    """A task in the table that the fronts read.

    Attributes:
        name: Its name.
        current: The number of the version in use.
        pinned: Whether it stays in the engines' memory.
        versions: Of each version its key and what a manifest says of the task, as JSON values.
    """

    name: str
    current: int
    pinned: bool
    versions: tuple[tuple[Key, dict[str, Any]], ...]


@dataclass(frozen=True)
class Table:
    """All tasks at one time.

    Attributes:
        epoch: Counts the tables.
        tasks: They.
        changeable: Whether there will ever be another one.
    """

    epoch: int
    tasks: tuple[TaskRow, ...]
    changeable: bool
