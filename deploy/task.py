"""A task on its way into a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..merge.delta import Delta


@dataclass(frozen=True)
class Task:
    """A delta and the digest of its file."""

    delta: Delta
    digest: str
