"""Tensors as the Open Inference Protocol carries them: bytes, or JSON and protobuf values, and their types.

Source: the tensor data section of https://github.com/kserve/open-inference-protocol, and Triton's extension
for binary tensors. What is wrong with a size is said in Triton's words, which its suites look for.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .rejections import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

BYTES = "BYTES"
DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""NumPy's types of the protocol's names, little-endian; `BYTES` has none."""

_KINDS = {"b": "truth values", "u": "whole numbers", "i": "integers", "f": "numbers"}
_TAKES = {"b": "b", "u": "iu", "i": "iu", "f": "iuf"}


def datatype(dtype: str) -> str:
    """The protocol's name of NumPy's."""
    return next(name for name, known in DATATYPES.items() if known.name == dtype)


@dataclass(frozen=True)
class TensorFacts:
    """An input or output of a model as its metadata states it.

    Attributes:
        name: Its name.
        datatype: The protocol's name of its element type.
        dims: Its sizes without the batch.
    """

    name: str
    datatype: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class InputTensor:
    """An input as it came over the network.

    Attributes:
        name: Its name.
        datatype: The protocol's name of its element type.
        shape: Its sizes.
        content: Little-endian bytes, or a list of numbers or strings, flat or nested.
        model: The model that it was sent to.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    content: bytes | memoryview | Sequence[Any]
    model: str = ""


@dataclass(frozen=True)
class OutputRequest:
    """An output that the client asks for.

    Attributes:
        name: Its name.
        classes: With the classification extension, how many best classes; 0 for the tensor itself.
    """

    name: str
    classes: int = 0


@dataclass(frozen=True)
class OutputTensor:
    """An output of a reply.

    Attributes:
        name: Its name.
        datatype: The protocol's name of its element type.
        array: `[n, ...]`; numbers, or object holding bytes.
    """

    name: str
    datatype: str
    array: NDArray[Any]

    def raw(self) -> bytes:
        """Little-endian bytes; a BYTES element is its length in four bytes, then its bytes."""
        if self.datatype == BYTES:
            return b"".join(struct.pack("<I", len(item)) + item for item in self.array.flat)
        return self.array.astype(DATATYPES[self.datatype], copy=False).tobytes()

    def values(self) -> list[Any]:
        """The elements in row order as JSON values; a float32 comes back bit for bit.

        Raises:
            InvalidRequest: An element is not text: it has to be asked for as binary data.
        """
        if self.datatype != BYTES:
            return self.array.ravel().tolist()
        try:
            return [item.decode() for item in self.array.flat]
        except UnicodeDecodeError as cause:
            raise InvalidRequest(
                "an output is not text, which JSON would need",
                where=self.name,
                do="ask for it with binary_data",
            ) from cause


def text_output(name: str, text: str) -> OutputTensor:
    """A text as BYTES `[1]`."""
    return OutputTensor(name, BYTES, np.array([text.encode()], dtype=object))


def numbers(tensor: InputTensor) -> NDArray[Any]:
    """An input of numbers as its shape says, a view where the bytes allow it.

    Raises:
        InvalidRequest: Its type is unknown, or its content is not what its shape and type say.
    """
    if tensor.datatype not in DATATYPES:
        raise InvalidRequest(
            "an input has a datatype that is not known here",
            where=tensor.name,
            wanted=", ".join(DATATYPES),
            found=tensor.datatype,
        )
    dtype = DATATYPES[tensor.datatype]
    count = math.prod(tensor.shape)
    if isinstance(tensor.content, (bytes, memoryview)):
        if len(tensor.content) != count * dtype.itemsize:
            raise _bytes_error(tensor, count * dtype.itemsize, len(tensor.content))
        return _shaped(np.frombuffer(tensor.content, dtype=dtype), tensor)
    try:
        values = np.asarray(tensor.content)
        if tensor.datatype == "UINT64" and values.dtype.kind == "f" and values.size:
            values = _whole(tensor)
    except (ValueError, OverflowError, TypeError) as cause:  # ragged or too deep
        raise _values_error(tensor) from cause
    # NumPy reads integers that leave int64 as another kind than "i", and beside others as floats.
    if values.size and values.dtype.kind not in _TAKES[dtype.kind]:
        raise _values_error(tensor)
    if dtype.kind in "iu" and values.size:
        room = np.iinfo(dtype)
        if values.min() < room.min or values.max() > room.max:
            raise _values_error(tensor)
    if values.size != count:
        raise _bytes_error(tensor, count * dtype.itemsize, values.size * dtype.itemsize)
    if count and values.ndim != 1 and values.shape != tensor.shape:
        raise _shape_error(tensor, "a list that is flat or nested as its shape", values.shape)
    with np.errstate(over="ignore"):  # what leaves a float's range becomes infinite
        return _shaped(values.astype(dtype.newbyteorder("=")), tensor)


def texts(tensor: InputTensor) -> list[bytes | str]:
    """The elements of a BYTES input in row order.

    Raises:
        InvalidRequest: Its content is not what its shape and type say.
    """
    if isinstance(tensor.content, (bytes, memoryview)):
        elements: list[Any] = _split_bytes(tensor)
    else:
        elements = list(tensor.content)
        for size in tensor.shape[1:]:
            if all(isinstance(element, list) and len(element) == size for element in elements):
                elements = [inner for element in elements for inner in element]
        if not all(isinstance(element, (str, bytes)) for element in elements):
            raise _values_error(tensor)
    count = math.prod(tensor.shape)
    if len(elements) < count:
        raise InvalidRequest(
            f"expected {count} string elements for {_addressed(tensor)}, got {len(elements)}"
        )
    if len(elements) > count:  # Triton names the first that is too many
        raise InvalidRequest(
            f"unexpected number of string elements {count + 1} for {_addressed(tensor)}, expecting {count}",
            found=f"{len(elements)} elements",
        )
    return elements


def _whole(tensor: InputTensor) -> NDArray[Any]:
    """Integers of which some leave int64."""
    values = np.asarray(tensor.content, dtype=object)
    if not all(type(value) is int and 0 <= value < 1 << 64 for value in values.flat):
        raise _values_error(tensor)
    return values.astype(np.uint64)


def _shaped(values: NDArray[Any], tensor: InputTensor) -> NDArray[Any]:
    try:
        return values.reshape(tensor.shape)
    except (ValueError, OverflowError) as cause:  # of no elements, and still too large for an array
        raise _shape_error(tensor, "sizes that an array can have", tensor.shape) from cause


def _split_bytes(tensor: InputTensor) -> list[bytes]:
    content = bytes(tensor.content)
    elements = []
    at = 0
    while at < len(content):
        left = len(content) - at
        if left < 4:
            raise InvalidRequest(
                f"incomplete string length indicator for inference input '{tensor.name}', expecting 4 bytes "
                f"but only {left} bytes available"
            )
        (length,) = struct.unpack_from("<I", content, at)
        at, left = at + 4, left - 4
        if left < length:
            raise InvalidRequest(
                f"incomplete string data for inference input '{tensor.name}', expecting string of length "
                f"{length} but only {left} bytes available"
            )
        elements.append(content[at : at + length])
        at += length
    return elements


def _addressed(tensor: InputTensor) -> str:
    return f"inference input '{tensor.name}' for model '{tensor.model}'"


def _bytes_error(tensor: InputTensor, wanted: int, found: int) -> InvalidRequest:
    return InvalidRequest(
        f"input byte size mismatch for input '{tensor.name}' for model '{tensor.model}'. "
        f"Expected {wanted}, got {found}"
    )


def _shape_error(tensor: InputTensor, wanted: str, found: Sequence[int]) -> InvalidRequest:
    return InvalidRequest(
        "an input does not hold what its shape says",
        where=f"{tensor.name} {list(tensor.shape)}",
        wanted=wanted,
        found=list(found),
    )


def _values_error(tensor: InputTensor) -> InvalidRequest:
    known = DATATYPES.get(tensor.datatype)
    kind = f"{_KINDS[known.kind]} of {tensor.datatype}" if known else "strings"
    return InvalidRequest(
        "an input holds values of the wrong kind",
        where=tensor.name,
        wanted=f"a list of {kind}, flat or nested as its shape",
    )
