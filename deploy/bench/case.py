"""A case of the benchmark: a batch size and how its rows spread over the tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...merge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

ZIPF_EXPONENT = 1.0
"""Task k is asked for in proportion to `1 / (k + 1) ** ZIPF_EXPONENT`: few popular tasks, a tail."""


@dataclass(frozen=True)
class Mix:
    """One way to spread a batch over tasks.

    Attributes:
        says: What it does, for the report.
        choose: `(batch, tasks, generator) -> [B]` positions in the list of tasks.
    """

    says: str
    choose: Callable[[int, int, np.random.Generator], NDArray[np.int64]]


def _one(batch: int, tasks: int, generator: np.random.Generator) -> NDArray[np.int64]:
    return np.zeros(batch, np.int64)


def _uniform(batch: int, tasks: int, generator: np.random.Generator) -> NDArray[np.int64]:
    return np.arange(batch, dtype=np.int64) % tasks


def _zipf(batch: int, tasks: int, generator: np.random.Generator) -> NDArray[np.int64]:
    weights = np.arange(1, tasks + 1, dtype=np.float64) ** -ZIPF_EXPONENT
    return generator.choice(tasks, size=batch, p=weights / weights.sum()).astype(np.int64)


MIXES = {
    "one": Mix("every row asks for the first task", _one),
    "uniform": Mix("the rows cycle through the tasks in order", _uniform),
    "zipf": Mix("the rows are drawn, the k-th task in proportion to 1/k (seeded)", _zipf),
}


@dataclass(frozen=True)
class Case:
    """What one call of the engine is given.

    Attributes:
        batch: Rows `B`, at least 1.
        mix: A key of `MIXES`.

    Raises:
        UsageError: The batch is empty or the mix unknown.
    """

    batch: int
    mix: str = "uniform"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UsageError("a batch has at least one row", found=self.batch)
        if self.mix not in MIXES:
            raise UsageError(
                "unknown task mix", wanted=f"one of {', '.join(MIXES)}", found=self.mix
            )

    @property
    def label(self) -> str:
        """Its name in tables and charts."""
        return f"batch {self.batch}, {self.mix}"

    def task_rows(self, rows: Sequence[int], seed: int) -> NDArray[np.int64]:
        """The `task` input `[B]`, drawn from the bank rows `rows`; the same for the same seed."""
        generator = np.random.default_rng([seed, self.batch])
        positions = MIXES[self.mix].choose(self.batch, len(rows), generator)
        return np.asarray(rows, np.int64)[positions]

    def images(self, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
        """The `images` input `[B, *shape]`: standard normal noise, the same for the same seed.

        Latency of a dense network does not depend on what the pictures show.
        """
        generator = np.random.default_rng([seed, self.batch])
        return generator.standard_normal((self.batch, *shape), np.float32)
