"""The Open Inference Protocol v2, once for every server: tensors, metadata, configuration, statistics.

The model NAME answers each row with the task that the row names:

    images  FP32  [-1, 3, H, W]    what the engine reads, by its names: pixels, [-1, 3, T, H, W] of clips;
                                   or several tensors, FP32 or INT64, a row of each
    task    BYTES [-1, 1]          a task's name per row; optional when the bundle has one task

    logits  FP32  [-1, K]          columns past a task's own classes hold the lowest float32
    label   BYTES [-1, 1]          the best class's name
    score   FP32  [-1, 1]          its softmax over the task's own classes

The model NAME.all, beside it where the bundle has the engine for it, answers each row with every task. It
takes no `task`, and gives, T tasks in row order:

    logits  FP32  [-1, T, K]
    task    BYTES [-1, T]          the tasks' names
    label   BYTES [-1, T]
    score   FP32  [-1, T]

Tasks without labels have neither `label` nor `score`, and their logits may have more axes.

Messages are plain dicts in the protocol's own spelling, which JSON and protobuf both read. Needs
NumPy only, so that a Triton model can carry it. Source: the v2 dataplane of
https://github.com/kserve/open-inference-protocol with Triton's extensions for binary tensors,
classification, model configuration and statistics.
"""

from __future__ import annotations

import math
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..export.engine import LABEL, LOGITS, SCORE, TASK
from .rejections import InvalidRequest, UnknownModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from .batcher import Batcher
    from .registry import Registry, Request
    from .service import Answers, Service

VERSION = "1"
SERVER = "utune-deploy"
ALL_TASKS = "all_tasks"  # the parameter of a Triton model that answers each row with every task
EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "statistics")

_DATATYPES = {"float32": "FP32", "int64": "INT64"}
_NUMBERS = {"FP32": np.dtype("<f4"), "INT64": np.dtype("<i8")}


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
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    content: bytes | memoryview | Sequence[Any]


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
        datatype: `FP32` or `BYTES`.
        array: `[n, ...]`; float32, or object holding UTF-8 bytes.
    """

    name: str
    datatype: str
    array: NDArray[Any]

    def raw(self) -> bytes:
        """Little-endian bytes; a BYTES element is its length in four bytes, then its bytes."""
        if self.datatype == "BYTES":
            return b"".join(struct.pack("<I", len(item)) + item for item in self.array.flat)
        return self.array.astype(_NUMBERS[self.datatype], copy=False).tobytes()

    def values(self) -> list[float] | list[str]:
        """The elements in row order as JSON values; a float32 comes back bit for bit."""
        if self.datatype == "BYTES":
            return [item.decode() for item in self.array.flat]
        return self.array.ravel().tolist()


async def infer(
    batcher: Batcher, inputs: Sequence[InputTensor], outputs: Sequence[OutputRequest]
) -> list[OutputTensor]:
    """One inference request, from wire tensors to wire tensors.

    Raises:
        InvalidRequest: The request cannot be answered as written.
        Overloaded: The queue is full.
        Stopping: The server drains.
        EngineFailed: The engine could not answer.
    """
    registry = batcher.service.registry
    start = time.perf_counter_ns()
    try:
        check_outputs(registry, outputs)
        request = read_request(registry, inputs)
        answers = await batcher.submit(request)
    except Exception:
        batcher.service.counters.failure(time.perf_counter_ns() - start)
        raise
    return write_answers(registry, answers, outputs)


def read_request(registry: Registry, inputs: Sequence[InputTensor]) -> Request:
    """The checked request that wire tensors spell.

    Raises:
        InvalidRequest: A tensor is missing, surplus, of the wrong type, or not what its shape says;
            or the service refuses its content.
    """
    known = {facts.name: facts for facts in model_inputs(registry)}
    tensors: dict[str, InputTensor] = {}
    for tensor in inputs:
        if tensor.name not in known or tensor.name in tensors:
            raise InvalidRequest(
                "an input is given twice" if tensor.name in tensors else "unknown input",
                wanted=f"{', '.join(known)}, once each",
                found=tensor.name,
            )
        wanted = known[tensor.name].datatype
        if tensor.datatype != wanted:
            raise InvalidRequest(
                "an input has the wrong datatype",
                where=tensor.name,
                wanted=wanted,
                found=tensor.datatype,
            )
        tensors[tensor.name] = tensor
    if any(name not in tensors for name in registry.inputs):
        raise InvalidRequest(
            "an input is missing", wanted=", ".join(registry.inputs), found=sorted(tensors)
        )
    rows = {name: _numbers(tensors[name]) for name in registry.inputs}
    task = tensors.get(TASK)
    return registry.check(rows, None if task is None else _names(task))


def task_names(elements: Iterable[bytes | str]) -> list[str]:
    """The task names of BYTES elements.

    Raises:
        InvalidRequest: An element is not text in UTF-8.
    """
    names = []
    for row, element in enumerate(elements):
        try:
            names.append(element if isinstance(element, str) else bytes(element).decode())
        except (UnicodeDecodeError, TypeError, ValueError) as cause:
            raise InvalidRequest(
                "a task name is not text in UTF-8", where=f"{TASK}, row {row}", found=repr(element)
            ) from cause
    return names


def check_outputs(registry: Registry, outputs: Sequence[OutputRequest]) -> None:
    """Refuse outputs that are not there before any work is done.

    Raises:
        InvalidRequest: Unknown output, or classes of an output that has none.
    """
    known = [facts.name for facts in model_outputs(registry)]
    with_classes = [LOGITS] if registry.labelled and not registry.all_tasks else []
    for output in outputs:
        if output.name not in known:
            raise InvalidRequest(
                "unknown output", wanted=f"one of {', '.join(known)}", found=output.name
            )
        if output.classes < 0 or (output.classes and output.name not in with_classes):
            raise InvalidRequest(
                "this output cannot be given as classes",
                where=output.name,
                wanted=f"a positive number of classes of {LOGITS}"
                if with_classes
                else "the output itself",
                found=output.classes,
            )


def write_answers(
    registry: Registry, answers: Answers, outputs: Sequence[OutputRequest] = ()
) -> list[OutputTensor]:
    """The reply's tensors: those asked for, or all, in the order of the model's outputs."""
    known = model_outputs(registry)
    asked = {output.name: output.classes for output in outputs} or {f.name: 0 for f in known}
    written = []
    for facts in known:
        if facts.name not in asked:
            continue
        if asked[facts.name]:
            best = _best(registry, answers, asked[facts.name])
            written.append(OutputTensor(facts.name, "BYTES", best))
        else:
            array = _output(facts.name, answers).reshape(-1, *facts.dims)
            written.append(OutputTensor(facts.name, facts.datatype, array))
    return written


def server_metadata(version: str) -> dict[str, Any]:
    """What `GET /v2` says."""
    return {"name": SERVER, "version": version, "extensions": list(EXTENSIONS)}


def model_metadata(registry: Registry) -> dict[str, Any]:
    """Names, types and shapes; -1 is the batch axis."""
    return {
        "name": registry.name,
        "versions": [VERSION],
        "platform": SERVER,
        "inputs": [_metadata(facts) for facts in model_inputs(registry)],
        "outputs": [_metadata(facts) for facts in model_outputs(registry)],
    }


def model_config(registry: Registry, *, max_delay_ms: float) -> dict[str, Any]:
    """The model's configuration in the fields of Triton's `ModelConfig`."""
    optional = {"optional": True} if len(registry.names) == 1 else {}
    return {
        "name": registry.name,
        "platform": SERVER,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": registry.max_batch,
        "input": [
            {**_config(facts), **(optional if facts.name == TASK else {})}
            for facts in model_inputs(registry)
        ],
        "output": [_config(facts) for facts in model_outputs(registry)],
        "dynamic_batching": {"max_queue_delay_microseconds": round(max_delay_ms * 1e3)},
    }


def model_statistics(services: Iterable[Service]) -> dict[str, Any]:
    """What the services have done, in the statistics extension's fields; times in nanoseconds."""
    return {"model_stats": [_statistics(service) for service in services]}


def repository_index(batchers: Iterable[Batcher]) -> list[dict[str, str]]:
    """The models that are served."""
    return [
        {
            "name": batcher.service.registry.name,
            "version": VERSION,
            "state": "READY" if batcher.ready else "UNAVAILABLE",
        }
        for batcher in batchers
    ]


def find_model(batchers: Iterable[Batcher], name: str, version: str = "") -> Batcher:
    """The served model of that name and version.

    Raises:
        UnknownModel: There is none.
    """
    models = {batcher.service.registry.name: batcher for batcher in batchers}
    if name not in models or version not in ("", VERSION):
        raise UnknownModel(
            "unknown model or version",
            wanted=f"{' or '.join(models)} version {VERSION}",
            found=f"{name} version {version}" if version else name,
        )
    return models[name]


def model_inputs(registry: Registry) -> list[TensorFacts]:
    """What requests bring, in the engine's order, and the task's name where rows choose one."""
    rows = [
        TensorFacts(t.name, _DATATYPES[t.dtype], tuple(int(size) for size in t.shape[1:]))
        for t in registry.inputs.values()
    ]
    return rows if registry.all_tasks else [*rows, TensorFacts(TASK, "BYTES", (1,))]


def model_outputs(registry: Registry) -> list[TensorFacts]:
    """The outputs in the order of every reply."""
    if registry.all_tasks:
        per_row = (len(registry.names),)
        outputs = [
            TensorFacts(LOGITS, "FP32", (*per_row, *registry.answer_shape)),
            TensorFacts(TASK, "BYTES", per_row),
        ]
    else:
        per_row = (1,)
        outputs = [TensorFacts(LOGITS, "FP32", registry.answer_shape)]
    if registry.labelled:
        outputs += [TensorFacts(LABEL, "BYTES", per_row), TensorFacts(SCORE, "FP32", per_row)]
    return outputs


def _metadata(facts: TensorFacts) -> dict[str, Any]:
    return {"name": facts.name, "datatype": facts.datatype, "shape": [-1, *facts.dims]}


def _config(facts: TensorFacts) -> dict[str, Any]:
    kind = "TYPE_STRING" if facts.datatype == "BYTES" else f"TYPE_{facts.datatype}"
    return {"name": facts.name, "data_type": kind, "dims": list(facts.dims)}


def _statistics(service: Service) -> dict[str, Any]:
    totals = service.counters.read()

    def duration(count: int, nanoseconds: int) -> dict[str, int]:
        return {"count": count, "ns": nanoseconds}

    return {
        "name": service.registry.name,
        "version": VERSION,
        "last_inference": totals.last_ms,
        "inference_count": totals.rows,
        "execution_count": totals.batches,
        "inference_stats": {
            "success": duration(totals.answered, totals.request_ns),
            "fail": duration(totals.failed, totals.failed_ns),
            "queue": duration(totals.answered, totals.queue_ns),
            "compute_input": duration(totals.answered, 0),
            "compute_infer": duration(totals.answered, totals.engine_ns),
            "compute_output": duration(totals.answered, 0),
        },
    }


def _numbers(tensor: InputTensor) -> NDArray[Any]:
    """An FP32 or INT64 input as its shape says, a view where the bytes allow it."""
    dtype = _NUMBERS[tensor.datatype]
    count = math.prod(tensor.shape)
    if isinstance(tensor.content, (bytes, memoryview)):
        if len(tensor.content) != count * dtype.itemsize:
            raise _size_error(tensor, f"{count * dtype.itemsize} bytes", len(tensor.content))
        return np.frombuffer(tensor.content, dtype=dtype).reshape(tensor.shape)
    try:
        values = np.asarray(tensor.content)
    except (ValueError, OverflowError, TypeError) as cause:  # ragged or too deep
        raise _values_error(tensor) from cause
    # NumPy reads integers that leave int64 as another kind than "i".
    if values.size and values.dtype.kind not in ("iuf" if tensor.datatype == "FP32" else "i"):
        raise _values_error(tensor)
    if values.size != count or (values.ndim != 1 and values.shape != tensor.shape):
        raise _size_error(tensor, f"{count} elements", f"{values.size} of shape {values.shape}")
    with np.errstate(over="ignore"):  # what leaves float32's range is refused as not finite
        return values.astype(dtype.newbyteorder("=")).reshape(tensor.shape)


def _names(tensor: InputTensor) -> list[str]:
    """The task names of `[n]` or `[n, 1]` BYTES."""
    if len(tensor.shape) not in (1, 2) or (len(tensor.shape) == 2 and tensor.shape[1] != 1):
        raise InvalidRequest(
            "an input has the wrong shape",
            where=tensor.name,
            wanted="[n, 1] or [n]",
            found=list(tensor.shape),
        )
    elements: list[Any]
    if isinstance(tensor.content, (bytes, memoryview)):
        elements = _split_bytes(tensor)
    else:
        elements = list(tensor.content)
        if len(tensor.shape) == 2 and all(isinstance(e, list) and len(e) == 1 for e in elements):
            elements = [element[0] for element in elements]
        if not all(isinstance(element, (str, bytes)) for element in elements):
            raise _values_error(tensor)
    if len(elements) != tensor.shape[0]:
        raise _size_error(tensor, f"{tensor.shape[0]} elements", len(elements))
    return task_names(elements)


def _split_bytes(tensor: InputTensor) -> list[bytes]:
    content = bytes(tensor.content)
    elements = []
    at = 0
    while at < len(content):
        end = at + 4
        if end <= len(content):
            (length,) = struct.unpack_from("<I", content, at)
            at, end = end, end + length
        if end > len(content):
            raise _size_error(tensor, "elements behind their length in 4 bytes", "a cut element")
        elements.append(content[at:end])
        at = end
    return elements


def _size_error(tensor: InputTensor, wanted: object, found: object) -> InvalidRequest:
    return InvalidRequest(
        "an input does not hold what its shape says",
        where=f"{tensor.name} {list(tensor.shape)}",
        wanted=wanted,
        found=found,
    )


def _values_error(tensor: InputTensor) -> InvalidRequest:
    kind = {"FP32": "numbers", "INT64": "integers", "BYTES": "strings"}[tensor.datatype]
    return InvalidRequest(
        "an input holds values of the wrong kind",
        where=tensor.name,
        wanted=f"a list of {kind}, flat or nested as its shape",
    )


def _output(name: str, answers: Answers) -> NDArray[Any]:
    """An output of all answers, one after the other."""
    if name == LOGITS:
        return answers.logits
    if name == SCORE:
        return answers.scores
    texts = answers.labels if name == LABEL else answers.tasks
    return np.array([text.encode() for text in texts], dtype=object)


def _best(registry: Registry, answers: Answers, count: int) -> NDArray[Any]:
    """`[n, count]` of `value:index:label`, best first; empty where a task has fewer classes."""
    count = min(count, registry.classes)
    cells = np.full((len(answers), count), b"", dtype=object)
    for row, task in enumerate(answers.tasks):
        labels = registry.labels(task)
        own = answers.logits[row, : len(labels)]
        for rank, index in enumerate(np.argsort(-own, kind="stable")[:count]):
            cells[row, rank] = f"{own[index]:f}:{index}:{labels[index]}".encode()
    return cells
