"""A section of the page: a chart, the table that has its numbers, and a sentence that says what both are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from markupsafe import Markup


@dataclass(frozen=True)
class View:
    """What the page shows of one thing.

    Attributes:
        title: Its heading.
        note: What is shown, and how it is to be read.
        rows: The table; the first row names the columns. Empty where another table of the page has the numbers.
        chart: Its picture; None where there is nothing to draw.
        legend: Names of the series, in the order of their colours, an empty text for one that is not drawn; empty
            without one.
    """

    title: str
    note: str
    rows: Sequence[Sequence[object]] = ()
    chart: Markup | None = None
    legend: tuple[str, ...] = ()
