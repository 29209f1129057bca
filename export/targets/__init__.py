"""SHELF: the runtimes that an engine can be built for. Each builds and opens."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ...merge.errors import UsageError

if TYPE_CHECKING:
    from types import ModuleType

TARGETS = {
    "onnxruntime": ".onnxruntime",
    "tensorrt": ".tensorrt",
}


def target(name: str) -> ModuleType:
    """The module of a target, loaded when asked for.

    Raises:
        UsageError: No such target.
    """
    if name not in TARGETS:
        raise UsageError("unknown engine target", wanted=f"one of {sorted(TARGETS)}", found=name)
    return import_module(TARGETS[name], __name__)
