"""How often two engines say the same: the verdict on precisions that no error analysis bounds.

Eight bits have no budget of the kind that `parity` has. What counts is whether answers change on examples that
the calibration did not see, so each task is judged by two shares of its own rows: the same best class, and
logits that point the same way.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .parity import Comparison

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

MOST = 0.95  # the share of rows that the cosine and the error are said for


@dataclass(frozen=True)
class Least:
    """What is asked of each task.

    Attributes:
        agreement: Share of rows whose best class is the reference's; of tasks with two classes or more.
        cosine: Cosine between the logits and the reference's that 95 % of the rows reach.
    """

    agreement: float = 0.99
    cosine: float = 0.99

    @classmethod
    def of_plan(cls, plan: Mapping[str, Any]) -> Least:
        """What a bundle was held to when it was made; the defaults if it is not in eight bits."""
        return cls(**plan.get("quantised", {}).get("least", {}))

    def to_json(self) -> dict[str, Any]:
        """The thresholds as JSON values."""
        return asdict(self)


def agreement(
    name: str, found: NDArray[Any], reference: NDArray[Any], least: Least, *, classes: bool
) -> Comparison:
    """Hold one task's logits to reference logits.

    Args:
        name: Of the comparison.
        found: `[n, ..., K]`.
        reference: The same.
        least: What is asked.
        classes: Whether the largest logit is the answer; otherwise only the direction counts.

    Returns:
        `error` and `budget` are the share of rows that differ and the largest that passes; without classes, one
        minus the cosine. `flips` counts every row that differs, however close its classes were.
    """
    rows = len(reference)
    if found.shape != reference.shape or not np.isfinite(found).all():
        return Comparison(name, rows, np.inf, 0.0, rows, passed=False, note="not finite")
    a, b = (x.reshape(rows, -1).astype(np.float64) for x in (found, reference))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = np.where(lengths > 0, (a * b).sum(axis=1) / np.where(lengths > 0, lengths, 1.0), 0.0)
    cosine = float(np.quantile(cosines, 1 - MOST))
    errors = np.abs(a - b).max(axis=1) / (np.abs(b).max() or 1.0)
    note = (
        f"cosine {cosine:.4f}, error {np.quantile(errors, MOST):.2g} of the largest logit, "
        f"in {MOST:.0%} of the rows"
    )
    turned = cosine >= least.cosine
    if not classes:
        return Comparison(name, rows, 1 - cosine, 1 - least.cosine, 0, turned, note)
    differ = (found.argmax(-1) != reference.argmax(-1)).reshape(rows, -1).any(axis=1)
    share, allowed = float(differ.mean()), 1 - least.agreement
    # the allowance is of rows: a hundredth of 100 rows is one row, whatever the digits of 1 - 0.99
    passed = turned and int(differ.sum()) <= int(allowed * rows + 1e-9)
    return Comparison(name, rows, share, allowed, int(differ.sum()), passed, note)
