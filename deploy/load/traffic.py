"""The requests of a load, written before it begins: rows that are drawn or given, a task for each, whole messages."""
# Generated protobuf modules build their classes at import, where a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from ...export.engine import TASK
from ...merge.errors import UsageError
from ..bench.case import MIXES
from .http_wire import message

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from .target import Target

BINARY, JSON = "binary", "json"

FEWEST, MOST = 32, 1024
"""Bounds of the number of distinct requests."""

BUDGET = 64 << 20
"""Bytes that they may take in between."""

JSON_GROWTH = 5
"""A number of JSON takes about so many times its four bytes."""


@dataclass(frozen=True)
class Traffic:
    """What is sent, over and over in order.

    Attributes:
        messages: Whole requests of HTTP, or serialised ones of gRPC.
        rows: Rows of each.
        mix: A key of `MIXES`; how the rows spread over the tasks.
        task_rows: Rows of each task in all messages together.
        encoding: `BINARY` or `JSON`.
        source: Where the rows come from, in words.
    """

    messages: tuple[bytes, ...]
    rows: int
    mix: str
    task_rows: dict[str, int]
    encoding: str
    source: str


def write_traffic(
    target: Target,
    rows: Mapping[str, NDArray[Any]],
    *,
    batch: int,
    mix: str,
    encoding: str,
    seed: int,
    source: str,
) -> Traffic:
    """Every request of a load.

    Args:
        target: The model and its tasks.
        rows: Of `draw_rows` or `read_rows`; taken in turn.
        batch: Rows of each request.
        mix: A key of `MIXES`.
        encoding: `BINARY` or `JSON`; gRPC has the first only.
        seed: Of the tasks.
        source: Where the rows come from, in words.

    Raises:
        UsageError: The batch is larger than the model takes, the mix is unknown, or the encoding is not gRPC's.
    """
    _refuse(target, batch, mix, encoding)
    count = _count(rows, batch, len(target.tasks), encoding)
    names = _tasks(target.tasks, batch * count, mix, seed)
    held = len(next(iter(rows.values())))
    texts = _Texts(rows) if encoding == JSON else None
    messages = []
    for number in range(count):
        span = np.arange(number * batch, (number + 1) * batch)
        inputs = {name: array[span % held] for name, array in rows.items()}
        if names:
            asked = [[names[at].encode()] for at in span]
            inputs[TASK] = np.array(asked, object)
        if target.address.is_grpc:
            messages.append(_grpc(target, inputs))
        elif texts is None:
            messages.append(_binary(target, inputs))
        else:
            messages.append(_json(target, inputs, texts, (span % held).tolist()))
    task_rows = dict.fromkeys(target.tasks, 0) | dict(Counter(names))
    return Traffic(tuple(messages), batch, mix, task_rows, encoding, source)


def _refuse(target: Target, batch: int, mix: str, encoding: str) -> None:
    if mix not in MIXES:
        raise UsageError("unknown task mix", wanted=f"one of {', '.join(MIXES)}", found=mix)
    if batch > target.facts.max_batch:
        raise UsageError(
            "a request has more rows than the model takes",
            where=f"{target.address}, {target.model}",
            wanted=f"at most {target.facts.max_batch}",
            found=batch,
        )
    if encoding == JSON and target.address.is_grpc:
        raise UsageError(
            "gRPC carries tensors as bytes only", wanted="--encoding binary, or http://", found=JSON
        )


def _count(rows: Mapping[str, NDArray[Any]], batch: int, tasks: int, encoding: str) -> int:
    """How many distinct requests: as many as fit the budget, in whole turns of the tasks."""
    size = sum(array[:1].nbytes for array in rows.values()) * batch
    size *= JSON_GROWTH if encoding == JSON else 1
    wanted = min(max(BUDGET // max(size, 1), FEWEST), MOST)
    turn = tasks // math.gcd(tasks, batch) if tasks else 1
    return math.ceil(wanted / turn) * turn


def _tasks(tasks: Sequence[str], count: int, mix: str, seed: int) -> list[str]:
    """A task for each of so many rows; the mix holds over all of them, not within each request."""
    if not tasks:
        return []
    generator = np.random.default_rng([seed, count])
    places = MIXES[mix].choose(count, len(tasks), generator)
    if mix != "uniform":  # which cycles; others would come in blocks
        places = generator.permutation(places)
    return [tasks[int(place)] for place in places]


def _binary(target: Target, inputs: Mapping[str, NDArray[Any]]) -> bytes:
    raw = {name: _raw(array) for name, array in inputs.items()}
    entries = [
        {**_entry(target, name, array), "parameters": {"binary_data_size": len(raw[name])}}
        for name, array in inputs.items()
    ]
    value = {"inputs": entries, "parameters": {"binary_data_output": True}}
    head = json.dumps(value, separators=(",", ":")).encode()
    body = head + b"".join(raw.values())
    return message(target.address, "POST", _path(target), body, len(head))


def _json(
    target: Target, inputs: Mapping[str, NDArray[Any]], texts: _Texts, rows: Sequence[int]
) -> bytes:
    entries = []
    for name, array in inputs.items():
        if name == TASK:
            data = json.dumps([element.decode() for element in array.flat])
        else:
            data = f"[{','.join(texts(name, row) for row in rows)}]"
        entries.append(f'{json.dumps(_entry(target, name, array))[:-1]}, "data": {data}}}')
    body = f'{{"inputs": [{", ".join(entries)}]}}'.encode()
    return message(target.address, "POST", _path(target), body)


def _grpc(target: Target, inputs: Mapping[str, NDArray[Any]]) -> bytes:
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(
        model_name=target.model,
        inputs=[_entry(target, name, array) for name, array in inputs.items()],
        raw_input_contents=[_raw(array) for array in inputs.values()],
    )
    return request.SerializeToString()


def _entry(target: Target, name: str, array: NDArray[Any]) -> dict[str, Any]:
    datatype, _ = target.facts.inputs[name]
    return {"name": name, "datatype": datatype, "shape": list(array.shape)}


def _path(target: Target) -> str:
    return f"/v2/models/{quote(target.model, safe='')}/infer"


def _raw(array: NDArray[Any]) -> bytes:
    """Its elements in row order; of BYTES, each behind its length in four bytes."""
    if array.dtype != object:
        return array.tobytes()
    return b"".join(len(item).to_bytes(4, "little") + item for item in array.flat)


class _Texts:
    """The numbers of a row as JSON has them, written once."""

    def __init__(self, rows: Mapping[str, NDArray[Any]]) -> None:
        self._rows = rows
        self._known: dict[tuple[str, int], str] = {}

    def __call__(self, name: str, row: int) -> str:
        if (name, row) not in self._known:
            values = self._rows[name][row].ravel().tolist()
            text = [v.decode() if isinstance(v, bytes) else v for v in values]
            self._known[name, row] = json.dumps(text)[1:-1]
        return self._known[name, row]
