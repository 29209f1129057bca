"""safetensors as NumPy views that copy nothing: a whole bank, or one task's row of it, read where it lies.

The library's own reader for NumPy knows no bfloat16 and copies what it reads; a server that keeps thousands
of tasks on the disk reads one row of a large file at a time. The format is the library's
(https://github.com/huggingface/safetensors): eight bytes with the header's length, the header as JSON, the data.
"""

from __future__ import annotations

import json
import math
import mmap
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ..merge.errors import IncompatibleArtefact

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
}
MAX_HEADER = 100 << 20  # bytes; the library refuses longer ones


def map_file(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """The metadata and the tensors of a file, mapped into memory: pages are read when they are looked at.

    Raises:
        IncompatibleArtefact: It is not safetensors, or holds a type that engines do not read.
    """
    try:
        with path.open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as cause:  # ValueError: an empty file cannot be mapped
        raise _malformed(path, str(cause)) from cause
    return read_views(view, where=path)


def read_views(
    data: bytes | mmap.mmap, *, where: object
) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """The metadata and the tensors of a file's bytes, as read-only views of them.

    Args:
        data: The file.
        where: What an error names.

    Raises:
        IncompatibleArtefact: See `map_file`.
    """
    length = int.from_bytes(data[:8], "little")
    start = 8 + length
    if len(data) < 8 or length > MAX_HEADER or start > len(data):
        raise _malformed(where, "a header that is cut")
    try:
        header = json.loads(data[8:start])
        metadata = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
        return metadata, {str(n): _view(data, start, entry) for n, entry in header.items()}
    except (
        ArithmeticError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as cause:
        raise _malformed(where, str(cause)) from cause


def _view(data: bytes | mmap.mmap, start: int, entry: Mapping[str, Any]) -> NDArray[Any]:
    """One tensor.

    Raises:
        ValueError: Its place, size and type do not agree.
        KeyError: A field is missing, or its type is unknown.
    """
    dtype = DTYPES[entry["dtype"]]
    shape = [int(size) for size in entry["shape"]]
    begin, end = (start + int(offset) for offset in entry["data_offsets"])
    count = math.prod(shape)
    if min(shape, default=0) < 0 or not start <= begin <= end <= len(data):
        raise ValueError("a tensor lies outside the file")
    if end - begin != count * dtype.itemsize:
        raise ValueError("a tensor is not as large as its shape says")
    return np.frombuffer(data, dtype, count, begin).reshape(shape)


def _malformed(where: object, found: str) -> IncompatibleArtefact:
    return IncompatibleArtefact(
        "the file is no safetensors file that can be read",
        where=where,
        found=found,
        do="copy it again, or make it again",
    )
