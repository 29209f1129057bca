"""Ray, loaded when it is needed, or one error that says how to get it."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from ....merge.errors import MissingDependency

INSTALL = "pip install 'utune-deploy[ray]'"
OLDEST = (2, 55)


def ray() -> Any:
    """The `ray` module.

    Raises:
        MissingDependency: It is not installed, does not load, or is too old.
    """
    # A server tells nobody that it runs. Read when Ray is imported first.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    module = _load("ray")
    version = getattr(module, "__version__", None)  # a folder of that name has none
    if version is None or tuple(map(int, version.split(".")[:2])) < OLDEST:
        raise MissingDependency(
            "the engine ray needs a newer Ray",
            wanted=f"ray {'.'.join(map(str, OLDEST))} or newer",
            found=version or "a module of that name that is not Ray",
            do=INSTALL,
        )
    return module


def serve() -> Any:
    """The `ray.serve` module.

    Raises:
        MissingDependency: As of `ray`.
    """
    ray()
    return _load("ray.serve")


def _load(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as cause:
        raise MissingDependency(
            "the engine ray needs Ray Serve", where=name, found=str(cause), do=INSTALL
        ) from cause
