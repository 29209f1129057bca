"""Memory that is let go goes back to the system: the C library keeps freed blocks for itself otherwise."""

from __future__ import annotations

import ctypes
import gc
import os


def give_back() -> None:
    """Collect what nobody refers to, and return free memory where the C library can (glibc's `malloc_trim`)."""
    gc.collect()
    if os.name == "posix" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
