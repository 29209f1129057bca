"""A case of the benchmark: a batch size and how its rows spread over the tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...merge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from ...export.engine import Rows, Tensor

ZIPF_EXPONENT = 1.0
"""Task k is asked for in proportion to `1 / (k + 1) ** ZIPF_EXPONENT`: few popular tasks, a tail."""


HOT_SHARE = 0.75
"""The part of a batch's rows that the hot task of the mix `hot` has."""


@dataclass(frozen=True)
class Mix:
    """One way to spread a batch over tasks.

    Attributes:
        says: What it does, for the report.
        choose: `(batch, tasks, generator) -> [B]` positions in the list of tasks.
        shares: `(tasks) -> [tasks]` the part of many requests that each task has; they sum to 1.
    """

    says: str
    choose: Callable[[int, int, np.random.Generator], NDArray[np.int64]]
    shares: Callable[[int], NDArray[np.float64]]


def _one(batch: int, tasks: int, generator: np.random.Generator) -> NDArray[np.int64]:
    return np.zeros(batch, np.int64)


def _uniform(batch: int, tasks: int, generator: np.random.Generator) -> NDArray[np.int64]:
    return np.arange(batch, dtype=np.int64) % tasks


def _zipf(batch: int, tasks: int, generator: np.random.Generator) -> NDArray[np.int64]:
    return generator.choice(tasks, size=batch, p=_zipf_shares(tasks)).astype(np.int64)


def _hot(batch: int, tasks: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """From two rows on, one at least is another task's: a batch of the hot task alone is the mix `one`."""
    if tasks == 1 or batch == 1:
        return np.zeros(batch, np.int64)
    others = max(1, round(batch * (1 - HOT_SHARE)))
    return np.r_[np.zeros(batch - others, np.int64), 1 + np.arange(others) % (tasks - 1)]


def _one_share(tasks: int) -> NDArray[np.float64]:
    return np.r_[1.0, np.zeros(tasks - 1)]


def _uniform_shares(tasks: int) -> NDArray[np.float64]:
    return np.full(tasks, 1 / tasks)


def _zipf_shares(tasks: int) -> NDArray[np.float64]:
    weights = np.arange(1, tasks + 1, dtype=np.float64) ** -ZIPF_EXPONENT
    return weights / weights.sum()


def _hot_shares(tasks: int) -> NDArray[np.float64]:
    if tasks == 1:
        return np.ones(1)
    return np.r_[HOT_SHARE, np.full(tasks - 1, (1 - HOT_SHARE) / (tasks - 1))]


MIXES = {
    "one": Mix("every row asks for the first task", _one, _one_share),
    "uniform": Mix("the rows cycle through the tasks in order", _uniform, _uniform_shares),
    "zipf": Mix(
        "the rows are drawn, the k-th task in proportion to 1/k (seeded)", _zipf, _zipf_shares
    ),
    "hot": Mix(
        "three of four rows ask for the first task, the others cycle through the rest",
        _hot,
        _hot_shares,
    ),
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

    def rows(self, inputs: Sequence[Tensor], seed: int) -> Rows:
        """What a call is given, the same for the same seed: the array of a sole input, or arrays by name.

        Real numbers are standard normal noise, ids are drawn below their `high`, other integers are ones, as
        in a mask that leaves nothing out. Latency of a dense network does not depend on what they are.
        """
        generator = np.random.default_rng([seed, self.batch])
        arrays = {tensor.name: self._draw(tensor, generator) for tensor in inputs}
        return arrays if len(inputs) > 1 else next(iter(arrays.values()))

    def _draw(self, tensor: Tensor, generator: np.random.Generator) -> NDArray[Any]:
        """One input `[B, ...]`."""
        shape = (self.batch, *(int(size) for size in tensor.shape[1:]))
        if tensor.dtype != "int64":
            return generator.standard_normal(shape, np.float32)
        if tensor.high is None:
            return np.ones(shape, np.int64)
        return generator.integers(tensor.high, size=shape)
