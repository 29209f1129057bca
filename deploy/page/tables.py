"""A table as a page sets it: a column of numbers is flush right."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

NUMBER = re.compile(r"[^\w\s]?\s?\d[\d.,]*(e[+-]?\d+)?\s?(\W|[A-Za-z]{1,3})?")
"""A cell that reads as a number; a column of such cells is set flush right."""


@dataclass(frozen=True)
class Table:
    """A table as the page sets it.

    Attributes:
        heads: Names of the columns.
        rows: Cells; every row is as long as `heads`.
        numeric: Which columns are flush right.
    """

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]


def table_of(rows: Sequence[Sequence[object]]) -> Table:
    """A table of cells as `str` has them; the first row names the columns."""
    heads, *body = (tuple(str(cell) for cell in row) for row in rows)
    numeric = tuple(
        bool(body) and all(NUMBER.fullmatch(row[column].strip()) for row in body)
        for column in range(len(heads))
    )
    return Table(heads=heads, rows=tuple(body), numeric=numeric)
