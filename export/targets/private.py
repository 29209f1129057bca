"""ONNX Runtime, told to keep to itself before it is loaded.

Its wheels for Linux report their use over the network and write a device's identity under the home directory
unless `ORT_DISABLE_TELEMETRY` is set (seen with 1.31.1). Whoever wants that sets the variable to 0.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

__all__ = ["calibrators", "ort"]


def calibrators() -> Any:
    """ONNX Runtime's module of calibrators. It needs onnx, which a server does not."""
    from onnxruntime.quantization import calibrate

    return calibrate
