"""TensorRT: the engine is a plan, built on the machine that runs it from a typed ONNX file.

    recipe.py    what is built: profiles, form of the weights, compatibility
    builder.py   builds it; alone, so that it can be copied to a machine with nothing but TensorRT
    folder.py    the folder that is copied there
    refit.py     which weights of the graph are the tasks', proved by value
    plan.py      what was built, and whether it fits this machine
    session.py   the open engine;  bound.py  one batch size of it;  cuda.py  memory, streams, graphs

Written to the Python API of TensorRT 10 and 11; `docs/tensorrt.md` says what has been run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .session import TensorRTSession


def open_session(*args: Any, **settings: Any) -> TensorRTSession:
    """See `TensorRTSession`."""
    from .session import TensorRTSession

    return TensorRTSession(*args, **settings)
