"""What a comparison says whatever its reports are of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Compared:
    """Two reports, side by side.

    Attributes:
        a: The first file.
        b: The second file.
        dates: When each began.
        threshold: A change that matters, a fraction.
        confidence: Coverage of every interval, a fraction.
        only_a: Names of those cases that only the first has.
        only_b: Names of those that only the second has.
        warnings: What a reader should doubt, one sentence each.
    """

    format: ClassVar[str]
    version: ClassVar[int]

    a: str
    b: str
    dates: tuple[str, str]
    threshold: float
    confidence: float
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def allowed(self) -> str:
        """What the second had to keep to."""
        return f"at most {1 + self.threshold:g} times"

    @property
    def failures(self) -> tuple[str, ...]:
        """What fails and by how much, a clause each."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """The JSON value."""
        return {"format": self.format, "version": self.version, **asdict(self)}
