"""Whether a reply is an answer: as many rows as were asked for, and numbers that are finite."""
# Generated protobuf modules build their classes at import, where a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .wire import Reply

UNREADABLE = "unreadable answer"
ROWS = "wrong number of rows"
NUMBERS = "numbers not finite"

FLOATS = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}


def fault(reply: Reply, rows: int, *, over_grpc: bool) -> str | None:
    """What is wrong with an answer, in a word; None if nothing is.

    Args:
        reply: With status `OK`.
        rows: How many were asked for.
        over_grpc: Whether it is a message of gRPC.
    """
    try:
        tensors = list(_grpc(reply) if over_grpc else _http(reply))
        for shape, values in tensors:
            if not shape or shape[0] != rows:
                return ROWS
            if values is not None and values.size != math.prod(shape):
                return UNREADABLE
            if values is not None and not np.isfinite(values).all():
                return NUMBERS
    except Exception:  # whatever a foreign reply makes a parser raise
        return UNREADABLE
    return None if tensors else UNREADABLE


def _http(reply: Reply) -> Iterator[tuple[list[int], Any]]:
    """Shape and, of real numbers, values of each output."""
    head = len(reply.answer) if reply.head is None else reply.head
    at = head
    for output in json.loads(reply.answer[:head])["outputs"]:
        dtype = FLOATS.get(output["datatype"])
        size = output.get("parameters", {}).get("binary_data_size")
        values = None
        if size is not None:
            if dtype:
                values = np.frombuffer(reply.answer[at : at + size], dtype)
            at += size
        elif dtype:
            values = np.asarray(output["data"], np.float64)
        yield output["shape"], values


def _grpc(reply: Reply) -> Iterator[tuple[list[int], Any]]:
    """Shape and, of real numbers, values of each output."""
    from tritonclient.grpc import service_pb2

    read = service_pb2.ModelInferResponse.FromString(reply.answer)
    for number, output in enumerate(read.outputs):
        dtype = FLOATS.get(output.datatype)
        values = None
        if dtype and read.raw_output_contents:
            values = np.frombuffer(read.raw_output_contents[number], dtype)
        elif dtype:
            contents = output.contents
            values = np.asarray(contents.fp64_contents or contents.fp32_contents, np.float64)
        yield list(output.shape), values
