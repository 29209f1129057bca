"""A template with its facts: every text that is not ours is escaped, every name must be there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .drawing import SERIES

SHARED = Path(__file__).parent


def fill(template: Path, **facts: Any) -> str:
    """The page as text.

    Args:
        template: A file that may include what stands beside it or in this room: `head.html`, `macros.html`.
        **facts: What it shows.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, SHARED], encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["series"] = SERIES  # macros that are imported see globals alone
    return environment.get_template(template.name).render(**facts)
