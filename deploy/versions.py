"""Versions of Python and of the libraries that shape a result."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = (
    "utune-deploy",
    "torch",
    "timm",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime-gpu",
    "tensorrt",
    "safetensors",
    "numpy",
    "tritonclient",
)


@cache
def versions() -> dict[str, str]:
    """Version by library; `absent` where it is not installed."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "absent"
    if (
        found["onnxruntime-gpu"] == "absent"
    ):  # where there is no such wheel, plain onnxruntime serves
        del found["onnxruntime-gpu"]
        try:
            found["onnxruntime"] = version("onnxruntime")
        except PackageNotFoundError:
            found["onnxruntime"] = "absent"
    return found
