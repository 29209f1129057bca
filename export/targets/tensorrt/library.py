"""TensorRT and CUDA's runtime, loaded when they are needed, or one error that says how to get them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ....merge.errors import MissingDependency
from .builder import NoTensorRT, load

INSTALL = "pip install 'utune-deploy[tensorrt]'"


def tensorrt() -> Any:
    """The `tensorrt` module, of version 10 or 11.

    Raises:
        MissingDependency: It is not installed, does not load, or is of another version.
    """
    try:
        return load()
    except NoTensorRT as cause:
        raise MissingDependency(
            "the TensorRT target needs TensorRT",
            wanted="tensorrt 10 or 11",
            found=str(cause),
            do=f"{INSTALL}, or write a folder to build elsewhere: export --target tensorrt --prepare",
        ) from cause


def cudart() -> Any:
    """The module of CUDA's runtime, `cuda.bindings.runtime` of cuda-python.

    Raises:
        MissingDependency: It is not installed, or does not load.
    """
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError as cause:
        raise MissingDependency(
            "the TensorRT target needs CUDA's runtime for Python", found=str(cause), do=INSTALL
        ) from cause
