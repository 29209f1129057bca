"""Do two runs of the same inputs agree? An error budget, top-1 agreement, a verdict.

The budget is not a magic tolerance. Torch in the engine's precision is itself off from float64 by some
error; an engine that orders the same sums differently may be off by a few times as much:

    budget = SLACK * error(torch in that precision) + FLOOR units in the last place of the largest logit

In half precision both sum in float32 and differ only in where they round, so less slack is allowed.

A top-1 flip counts only where the reference's margin is wider than the budget: closer than that,
both answers are right.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SLACK = 8.0  # other summation orders: about the square root of the longest sum over torch's own blocking
FLOOR = 64.0  # units in the last place, where torch happens to be exact
ROUNDINGS = (
    4.0  # in place of both, where sums are wider than what is stored: other places of rounding
)
UNIT = {
    "fp32": 2.0**-24,
    "tf32": 2.0**-11,
    "fp16": 2.0**-11,
    "bf16": 2.0**-8,
    "int8": 2.0**-8,
    "fp8": 2.0**-4,
}


@dataclass(frozen=True)
class Comparison:
    """One comparison of logits.

    Attributes:
        name: What was compared.
        rows: Number of rows.
        error: Largest absolute difference over the largest absolute reference logit.
        budget: Largest error that passes, in the same unit.
        flips: Rows whose top-1 class differs although the reference is decided.
        passed: The verdict.
        note: What a reader should know besides.
    """

    name: str
    rows: int
    error: float
    budget: float
    flips: int
    passed: bool
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; a NaN error becomes None."""
        values = asdict(self)
        values["error"] = self.error if np.isfinite(self.error) else None
        return values


@dataclass(frozen=True)
class Verdict:
    """All comparisons of one engine.

    Attributes:
        comparisons: In the order in which they ran.
    """

    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """Every comparison passed, and there was one."""
        return bool(self.comparisons) and all(c.passed for c in self.comparisons)

    @property
    def failures(self) -> list[Comparison]:
        """The comparisons that did not pass."""
        return [c for c in self.comparisons if not c.passed]

    def to_json(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        return {
            "passed": self.passed,
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
        }


def relative_error(found: NDArray, reference: NDArray) -> float:
    """`max|found - reference| / max|reference|`; infinite when a value is not finite."""
    if found.shape != reference.shape or not np.isfinite(found).all():
        return float("inf")
    scale = float(np.abs(reference).max()) or 1.0
    return float(np.abs(found.astype(np.float64) - reference).max()) / scale


def budget(torch_run: NDArray, reference: NDArray, precision: str) -> float:
    """The error that an engine may show, given torch's own in that precision.

    Args:
        torch_run: Torch's logits in the engine's precision.
        reference: The same in float64.
        precision: A key of `UNIT`.
    """
    slack = SLACK if precision == "fp32" else ROUNDINGS
    return slack * relative_error(torch_run, reference) + floor(precision)


def floor(precision: str) -> float:
    """The error that passes even where torch happens to be exact."""
    return (FLOOR if precision == "fp32" else ROUNDINGS) * UNIT[precision]


def compare(
    name: str, found: NDArray, reference: NDArray, allowed: float, note: str = ""
) -> Comparison:
    """Hold logits `[B, K]`, or `[B, ..., K]`, to reference logits."""
    error = relative_error(found, reference)
    flips = 0
    if found.shape == reference.shape and reference.shape[-1] > 1:
        scale = float(np.abs(reference).max()) or 1.0
        ordered = np.sort(reference, axis=-1)
        decided = ordered[..., -1] - ordered[..., -2] > 2 * allowed * scale
        flips = int((decided & (found.argmax(-1) != reference.argmax(-1))).sum())
    return Comparison(
        name=name,
        rows=len(reference),
        error=error,
        budget=allowed,
        flips=flips,
        passed=error <= allowed and flips == 0,
        note=note,
    )
