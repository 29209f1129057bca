"""SHELF: the servers that carry the service."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ...merge.errors import UsageError

if TYPE_CHECKING:
    from types import ModuleType

SERVERS = {
    "embedded": ".embedded",
    "ray": ".ray",
    "triton": ".triton",
}


def server(name: str) -> ModuleType:
    """The module of a server, loaded when asked for.

    Raises:
        UsageError: No such server.
    """
    if name not in SERVERS:
        raise UsageError("unknown server", wanted=f"one of {sorted(SERVERS)}", found=name)
    return import_module(SERVERS[name], __name__)
