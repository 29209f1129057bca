"""Up to which rate a server holds, as an interval between two steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .numbers import StepResult


@dataclass(frozen=True)
class Saturation:
    """The point beyond which requests come faster than they are answered: above `holds`, at most `fails`.

    Attributes:
        holds: The largest rate per second that was held, like every valid one below it; None if none was.
        fails: The next valid rate, which was not held; None if all were.
    """

    holds: float | None
    fails: float | None


def saturation(results: Sequence[StepResult]) -> Saturation:
    """The interval that the steps of an open loop leave; see `StepResult.holds`.

    Steps in which the client could not keep its schedule are left out: they say nothing of the server.
    """
    holds = None
    valid = [result for result in results if not result.client_bound]
    for result in sorted(valid, key=lambda result: result.level):
        if not result.holds:
            return Saturation(holds, result.level)
        holds = result.level
    return Saturation(holds, None)
