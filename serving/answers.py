"""What the service says to one request."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .tasks.versions import Version


@dataclass(frozen=True)
class Answers:
    """Logits, the best classes, and which versions of which tasks they are of.

    Attributes:
        logits: `[n, K]` float32, K the largest class count; columns past a task's own classes hold
            a quarter of the lowest float32. `[n, Q, K]` where a task answers with more axes.
        labels: The name of the best of the task's own classes, `n` of them; none without labels.
        scores: `[n]` float32, the softmax of that class over the task's own classes; `[0]` without
            labels.
        versions: The task of each answer, as it was when the request was checked.
        engine_ns: How long the engine call took that these rows were part of.

    Where every task answers every row, the answers to the first row stand before those to the second.
    """

    logits: NDArray[np.float32]
    labels: tuple[str, ...]
    scores: NDArray[np.float32]
    versions: tuple[Version, ...]
    engine_ns: int

    @property
    def tasks(self) -> tuple[str, ...]:
        """The name of each answer's task."""
        return tuple(version.name for version in self.versions)

    def __len__(self) -> int:
        return len(self.versions)

    def split(self, size: int) -> list[Answers]:
        """The same in parts of `size` answers each."""
        return [
            replace(
                self,
                logits=self.logits[at : at + size],
                labels=self.labels[at : at + size],
                scores=self.scores[at : at + size],
                versions=self.versions[at : at + size],
            )
            for at in range(0, len(self), size)
        ]
