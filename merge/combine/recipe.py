"""How tasks are combined: a method and its numbers, held to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..differences import Ranks
from ..errors import UsageError
from . import ELECTING, METHODS, RANDOM, SPARSE
from .algebra import disjoint_mean, drop, trim, weighted_sum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

DENSITY = 0.2
RANK = 16


@dataclass(frozen=True)
class Recipe:
    """How tasks are combined.

    Attributes:
        method: A key of `METHODS`.
        density: Share of each tensor that the methods of `SPARSE` keep; `DENSITY` if None.
        seed: Of the methods of `RANDOM`; 0 if None.
        ranks: Cuts the result to a low rank; `RANK` for svd if None.
    """

    method: str
    density: float | None = None
    seed: int | None = None
    ranks: Ranks | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(
                "there is no such method", wanted=f"one of {', '.join(METHODS)}", found=self.method
            )
        for option, value, methods in (
            ("a density", self.density, SPARSE),
            ("a seed", self.seed, RANDOM),
        ):
            if value is not None and self.method not in methods:
                raise UsageError(
                    f"{option} means nothing here", wanted=", ".join(methods), found=self.method
                )
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(
                "the density is out of range", wanted="above 0, at most 1", found=self.density
            )
        if self.method == "cat" and self.ranks is not None:
            raise UsageError(
                "method cat keeps every rank", found=str(self.ranks), do="use --method svd"
            )

    def settings(self) -> dict[str, str]:
        """What was chosen, as text, defaults resolved."""
        found = {"method": self.method}
        if self.method in SPARSE:
            found["density"] = repr(self.kept)
        if self.method in RANDOM:
            found["seed"] = str(self.seed or 0)
        if self.cut is not None:
            found |= {key: f"{value}" for key, value in vars(self.cut).items() if value is not None}
        return found

    @property
    def kept(self) -> float:
        """The density."""
        return DENSITY if self.density is None else self.density

    @property
    def cut(self) -> Ranks | None:
        """The ranks of the result."""
        return self.ranks or (Ranks(RANK) if self.method == "svd" else None)

    def weight(self, tasks: int) -> float:
        """Of each task when none is given: the mean of a sum, the whole of what is a mean already."""
        return 1.0 if self.method in ELECTING else 1 / tasks

    def merge(
        self, parts: Sequence[Tensor], weights: Sequence[float], seeds: Sequence[str]
    ) -> Tensor:
        """One tensor of the result from the tasks' differences there, float64."""
        if self.method in ("ties", "magnitude"):
            parts = [trim(part, self.kept) for part in parts]
        elif self.method in RANDOM:
            parts = [
                drop(part, self.kept, self.seed or 0, seed)
                for part, seed in zip(parts, seeds, strict=True)
            ]
        return (disjoint_mean if self.method in ELECTING else weighted_sum)(parts, weights)
