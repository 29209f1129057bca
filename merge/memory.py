"""Memory that is let go goes back to the system: the C library keeps freed blocks for itself otherwise."""

from __future__ import annotations

import ctypes
import gc
import os

import psutil

GROWTH = 128 << 20
"""Bytes that the process may grow by before it is worth a collection, which walks every object that there is."""


class _Least:
    """What the process held behind the last collection, in bytes."""

    resident = 0


def give_back() -> None:
    """Collect what nobody refers to, and return free memory where the C library can (glibc's `malloc_trim`).

    Nothing is done while the process has grown by less than `GROWTH` since it was last done. What is young is
    looked at first, and all that there is only where that was not enough.
    """
    process = psutil.Process()
    for generation in (1, 2):
        if process.memory_info().rss < _Least.resident + GROWTH:
            return
        gc.collect(generation)
        if os.name == "posix" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
            trim(0)
    _Least.resident = process.memory_info().rss
