"""A step of a load: how many callers, or how many requests a second, and for how long."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...merge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

CLOSED, POISSON, CONSTANT = "closed", "poisson", "constant"

LOOPS = {
    CLOSED: "callers that each send the next request when they have the answer",
    POISSON: "requests that are sent when they are due, at random (Poisson), whatever became of the others",
    CONSTANT: "requests that are sent when they are due, evenly, whatever became of the others",
}

WINDOWS = 3
"""Equal parts of the measured time that have to agree."""


@dataclass(frozen=True)
class Step:
    """One level of the load.

    Attributes:
        loop: A key of `LOOPS`.
        level: Callers of a closed loop, a whole number; requests per second of an open one.
    """

    loop: str
    level: float

    @property
    def label(self) -> str:
        """Its name in tables and charts."""
        if self.loop != CLOSED:
            return f"{self.level:g}/s"
        return f"{self.level:g} caller" if self.level == 1 else f"{self.level:g} callers"


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        warmup_s: Seconds of each step that are not counted.
        seconds: Seconds of each step that are.
        timeout_s: Seconds after which a request is given up; it then counts as an error.
        seed: Of rows, tasks and arrivals.

    Raises:
        UsageError: A setting is out of range.
    """

    warmup_s: float = 1.0
    seconds: float = 6.0
    timeout_s: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("warmup_s", "seconds", "timeout_s"):
            value, least = getattr(self, name), 0.0
            if not math.isfinite(value) or value < least or (name != "warmup_s" and value == least):
                raise UsageError(
                    "a setting of the load is out of range",
                    where=name,
                    wanted="a number of seconds above 0",
                    found=value,
                )


def steps_of(
    concurrency: Sequence[int], rates: Sequence[float], *, constant: bool = False
) -> tuple[Step, ...]:
    """The steps that are asked for, in order, each level once.

    Args:
        concurrency: Callers of a closed loop.
        rates: Requests per second of an open loop.
        constant: Whether requests of an open loop are due evenly.

    Raises:
        UsageError: Both loops are asked for or none is, or a level is out of range.
    """
    if bool(concurrency) == bool(rates):
        raise UsageError(
            "a load is either callers that wait or requests at a rate",
            wanted="--concurrency or --rate",
            found="both" if rates else "neither",
        )
    if constant and concurrency:
        raise UsageError("callers that wait have no arrivals", wanted="--rate", found="--constant")
    levels = dict.fromkeys(concurrency or rates)
    for level in levels:
        if not math.isfinite(level) or level <= 0:
            raise UsageError("a level of the load is out of range", wanted="above 0", found=level)
    loop = CLOSED if concurrency else CONSTANT if constant else POISSON
    return tuple(Step(loop, level) for level in levels)
