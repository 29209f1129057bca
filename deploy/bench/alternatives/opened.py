"""What an alternative is once it is open."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ..source import Source
    from ..subject import Run


class Opened(NamedTuple):
    """Something that answers the tasks of a bundle.

    Attributes:
        run: See `Subject.run`.
        provider: What really runs it.
        source: See `Subject.source`; None for what is no single engine.
    """

    run: Run
    provider: str
    source: Source | None = None
