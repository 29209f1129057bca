"""The rows of a bank that ONNX Runtime reads, written one at a time beside the calls that run.

On the CPU an `OrtValue` shares the memory of the array that it was made from, so a row is written through the
array. On a CUDA device the runtime has no copy into a part of a value: the driver's own copy is called
with the value's address.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ...merge.errors import MissingDependency, UtuneError
from .private import ort

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

BFLOAT16 = 16  # in onnx.TensorProto.DataType
HOST_TO_DEVICE = 1  # cudaMemcpyHostToDevice
CUDART = ("libcudart.so.13", "libcudart.so.12", "cudart64_13.dll", "cudart64_12.dll")


class HostRows:
    """Rows in this process's memory.

    Attributes:
        values: What the engine reads, `[rows, ...]` by input name.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Read from these arrays, which are C-contiguous and stay alive with this object."""
        self._arrays = arrays
        self.values = {name: host_value(array) for name, array in arrays.items()}

    def write(self, row: int, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Copy one task's tensors into a row."""
        for name, value in tensors.items():
            self._arrays[name][row] = value


class DeviceRows:
    """Rows on a CUDA device.

    Attributes:
        values: What the engine reads, `[rows, ...]` by input name.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        types: Mapping[str, np.dtype[Any]],
        device: str,
    ) -> None:
        """Take memory on the device, not written to.

        Raises:
            MissingDependency: CUDA's runtime library, which the provider needs too, is not loaded.
        """
        self.values = {
            name: ort.OrtValue.ortvalue_from_shape_and_type(
                list(shape), BFLOAT16 if _is_bfloat16(types[name]) else types[name], device, 0
            )
            for name, shape in shapes.items()
        }
        self._copy = _loaded_cudart().cudaMemcpy
        self._copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def write(self, row: int, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Copy one task's tensors into a row; returns when they are there.

        Raises:
            UtuneError: CUDA refuses.
        """
        for name, value in tensors.items():
            flat = np.ascontiguousarray(value)
            there = self.values[name].data_ptr() + row * flat.nbytes
            if error := self._copy(there, flat.ctypes.data, flat.nbytes, HOST_TO_DEVICE):
                raise UtuneError(
                    "CUDA could not copy a row of the bank", where=name, found=f"error {error}"
                )


def host_value(array: NDArray[Any]) -> ort.OrtValue:
    """A value over a C-contiguous array's own memory; numpy has no bfloat16 of its own."""
    if _is_bfloat16(array.dtype):
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def _is_bfloat16(dtype: np.dtype[Any]) -> bool:
    return dtype == ml_dtypes.bfloat16


def _loaded_cudart() -> ctypes.CDLL:
    """CUDA's runtime, as the provider loaded it: a second copy would know none of its memory."""
    mode = getattr(os, "RTLD_NOLOAD", 0) | ctypes.RTLD_GLOBAL
    for name in CUDART:
        try:
            return ctypes.CDLL(name, mode=mode)
        except OSError:
            continue
    raise MissingDependency(
        "CUDA's runtime library is not loaded",
        wanted=" or ".join(CUDART),
        do="run `utune-deploy doctor`",
    )
