"""An engine's file, its tensors left where they lie.

A file of a gigabyte is opened by a runtime that maps the tensors from that very file: what runs is what ships,
and only what is read comes into memory. The graph, which is small, is copied; each tensor in it says where in
the file its data is, as ONNX's external data.
"""

from __future__ import annotations

import math
import mmap
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx

from .engine import BANK_PREFIX
from .streamed import DELIMITED, GRAPH, INITIALIZER, RAW_DATA

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

SMALL = 1024  # bytes; shapes and axes, which a runtime reads while it loads the graph, are copied


class _Field(NamedTuple):
    """A field on the wire: its number, where it and its content begin, and where both end."""

    number: int
    begin: int
    inner: int
    end: int


class EngineFile:
    """The graph of an ONNX file, and its tensors as views of the file.

    Args:
        path: An ONNX file without external data, as `graph.serialise` writes it. It must not change.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        with self.path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._graph = onnx.ModelProto()
        self._places: dict[str, tuple[int, int]] = {}
        rest = bytearray()
        for field in _fields(self._data, 0, len(self._data)):
            if field.number == GRAPH:
                self._read_graph(field)
            else:
                rest += self._data[field.begin : field.end]
        self._graph.MergeFromString(bytes(rest))

    def _read_graph(self, graph: _Field) -> None:
        rest = bytearray()
        for field in _fields(self._data, graph.inner, graph.end):
            if field.number == INITIALIZER:
                self._graph.graph.initializer.append(self._tensor(field))
            else:
                rest += self._data[field.begin : field.end]
        self._graph.graph.MergeFromString(bytes(rest))

    def _tensor(self, tensor: _Field) -> onnx.TensorProto:
        head, place = bytearray(), None
        for field in _fields(self._data, tensor.inner, tensor.end):
            if field.number == RAW_DATA and field.end - field.inner >= SMALL:
                place = field.inner, field.end - field.inner
            else:
                head += self._data[field.begin : field.end]
        proto = onnx.TensorProto.FromString(bytes(head))
        if place is not None:
            self._places[proto.name] = place
            proto.data_location = onnx.TensorProto.EXTERNAL
            for key, value in zip(("offset", "length"), place, strict=True):
                proto.external_data.add(key=key, value=str(value))
            proto.external_data.add(key="location", value=self.path.name)
        return proto

    def model(self) -> bytes:
        """The engine as it is; to be opened with its folder at hand."""
        return self._graph.SerializeToString()

    def with_bank_as_input(self) -> bytes:
        """The engine with its bank an input of any number of rows, whatever it is in the file."""
        model = onnx.ModelProto()
        model.CopyFrom(self._graph)
        for tensor in [t for t in model.graph.initializer if t.name.startswith(BANK_PREFIX)]:
            model.graph.initializer.remove(tensor)
            sizes = [None, *list(tensor.dims)[1:]]
            model.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, sizes)
            )
        described = [v for v in model.graph.value_info if not v.name.startswith(BANK_PREFIX)]
        del model.graph.value_info[:]
        model.graph.value_info.extend(described)
        return model.SerializeToString()

    def bank(self) -> dict[str, NDArray[Any]]:
        """The tensors of a bank that is in the file, `[T, ...]` by name: read-only views of it."""
        return {
            tensor.name: self._view(tensor)
            for tensor in self._graph.graph.initializer
            if tensor.name.startswith(BANK_PREFIX)
        }

    def let_go(self) -> None:
        """Give back the pages that were read through views of the file; they are read again when they are looked at."""
        if hasattr(mmap, "MADV_DONTNEED"):  # of a mapping that is only read it loses nothing
            self._data.madvise(mmap.MADV_DONTNEED)

    def _view(self, tensor: onnx.TensorProto) -> NDArray[Any]:
        if tensor.name not in self._places:
            return onnx.numpy_helper.to_array(tensor)
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        count = math.prod(tensor.dims)
        flat = np.frombuffer(self._data, dtype, count, self._places[tensor.name][0])
        return flat.reshape(tuple(tensor.dims))


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[_Field]:
    """The fields of a message that lies between two places."""
    while at < end:
        begin = at
        key, at = _varint(data, at)
        size = {1: 8, 5: 4}.get(key & 7, 0)
        if key & 7 == DELIMITED:
            size, at = _varint(data, at)
        elif not size:
            _, at = _varint(data, at)
        yield _Field(key >> 3, begin, at, at + size)
        at += size


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
