"""An engine or a bank written to its file piece by piece: what nobody could hold is never held.

The bytes are those that protobuf and safetensors write themselves. A tensor that is left out leaves a hole of its
size, whose place is told; whoever has its values writes them there.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from .graph import require_fits, signed
from .mapped import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import numpy as np
    import onnx
    from google.protobuf.message import Message
    from numpy.typing import NDArray

GRAPH = 7  # fields of onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data
INITIALIZER = 5
RAW_DATA = 9
DELIMITED = 2  # protobuf's wire type of bytes and messages
ALIGNMENT = 8  # of safetensors' data


class _Hollow:
    """What is serialised of a tensor, without its bytes."""

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        self.name, self.dtype, self.shape = tensor.name, tensor.dtype, tensor.shape
        self.doc_string, self.metadata_props = tensor.doc_string, tensor.metadata_props

    def tobytes(self) -> bytes:
        """Nothing: they are written behind the rest."""
        return b""


def write_engine(
    model: ir.Model, path: Path, metadata: Mapping[str, str], *, without: str | None = None
) -> dict[str, int]:
    """Write a model as one ONNX file, tensor by tensor; byte for byte what `graph.serialise` gives.

    Args:
        model: The finished graph; it keeps its tensors.
        path: The file.
        metadata: Of the model.
        without: Tensors whose names begin so are left out.

    Returns:
        Where in the file the data of each tensor begins that was left out.

    Raises:
        BuildFailed: The file would be over protobuf's limit of 2 GiB.
    """
    return write_model(signed(model, metadata), path, without=without)


def write_model(model: ir.Model, path: Path, *, without: str | None = None) -> dict[str, int]:
    """The same with the metadata that the model has."""
    values = model.graph.initializers
    held = {
        name: tensor
        for name, value in values.items()
        if (tensor := value.const_value) is not None
        and tensor.dtype != ir.DataType.STRING
        and not isinstance(tensor, ir.serde.TensorProtoTensor)  # a message already
    }
    try:
        for name, tensor in held.items():
            values[name].const_value = _Hollow(tensor)  # type: ignore[assignment]
        proto = ir.to_proto(model)
    finally:
        for name, tensor in held.items():
            values[name].const_value = tensor
    tensors = [_Tensor(entry, held.get(entry.name)) for entry in proto.graph.initializer]
    proto.graph.ClearField("initializer")
    before, after = _around(proto.graph, INITIALIZER)
    inside = len(before) + len(after) + sum(tensor.size for tensor in tensors)
    proto.ClearField("graph")
    first, last = _around(proto, GRAPH)
    start = first + _opening(GRAPH, inside)
    require_fits(len(start) + inside + len(last))
    holes: dict[str, int] = {}
    with path.open("wb") as file:
        file.write(start + before)
        for tensor in tensors:
            file.write(tensor.head)
            if tensor.left is not None and without and tensor.name.startswith(without):
                holes[tensor.name] = file.tell()
                file.seek(tensor.left.nbytes, 1)
            elif tensor.left is not None:
                file.write(tensor.left.tobytes())
            file.write(tensor.tail)
        file.write(after + last)
    return holes


class _Tensor:
    """One initializer on the wire.

    Attributes:
        name: Its name.
        head: Its bytes up to its data.
        left: The tensor whose data follows; None if the head is all.
        tail: Its bytes behind its data.
        size: Bytes altogether.
    """

    def __init__(self, proto: onnx.TensorProto, left: ir.TensorProtocol | None) -> None:
        self.name, self.left = proto.name, left
        if left is None:
            inner, self.tail, length = proto.SerializeToString(), b"", 0
        else:
            proto.ClearField("raw_data")
            inner, self.tail = _around(proto, RAW_DATA)
            length = left.nbytes
            inner += _opening(RAW_DATA, length)
        self.head = _opening(INITIALIZER, len(inner) + length + len(self.tail)) + inner
        self.size = len(self.head) + length + len(self.tail)


def _around(message: Message, number: int) -> tuple[bytes, bytes]:
    """The bytes of a message's fields in front of a field, and of those behind it."""
    first, last = type(message)(), type(message)()
    first.CopyFrom(message)
    last.CopyFrom(message)
    for field, _ in message.ListFields():
        (last if field.number < number else first).ClearField(field.name)
    return first.SerializeToString(), last.SerializeToString()


def _opening(field: int, length: int) -> bytes:
    """What stands in front of a field of so many bytes."""
    return _varint(field << 3 | DELIMITED) + _varint(length)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
    kind: str = "F32",
) -> dict[str, int]:
    """Write a safetensors file of tensors that are all left out.

    Args:
        path: The file.
        shapes: By name.
        metadata: Of the file.
        kind: A key of `mapped.DTYPES`, the type of all of them.

    Returns:
        Where in the file the data of each tensor begins.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name in sorted(shapes):
        end = begin + DTYPES[kind].itemsize * math.prod(shapes[name])
        entries[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [begin, end]}
        begin = end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    start = 8 + len(header)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(start + begin)
    return {name: start + entries[name]["data_offsets"][0] for name in shapes}


def fill(
    path: Path, holes: Mapping[str, int], rows: Iterable[Mapping[str, NDArray[np.generic]]]
) -> None:
    """Write the rows of tensors that were left out, one row of all of them at a time.

    Args:
        path: The file.
        holes: Where each tensor begins.
        rows: Their rows in order, C-contiguous or not, by tensor.
    """
    with path.open("r+b") as file:
        for number, row in enumerate(rows):
            for name, value in row.items():
                file.seek(holes[name] + number * value.nbytes)
                file.write(value.tobytes())
