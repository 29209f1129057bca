"""A bundle in the Open Inference Protocol v2, once for every server: requests, answers, metadata, statistics.

The model NAME answers each row with the task that the row names:

    images  FP32  [-1, 3, H, W]    what the engine reads, by its names: pixels, [-1, 3, T, H, W] of clips;
                                   or several tensors, FP32 or INT64, a row of each
    task    BYTES [-1, 1]          a task's name per row; optional when the bundle has one task

    logits  FP32  [-1, K]          columns past a task's own classes hold a quarter of the lowest float32
    label   BYTES [-1, 1]          the best class's name
    score   FP32  [-1, 1]          its softmax over the task's own classes

The model NAME.all, beside it where the bundle has the engine for it, answers each row with every task. It
takes no `task`, and gives, T tasks in row order:

    logits  FP32  [-1, T, K]
    task    BYTES [-1, T]          the tasks' names
    label   BYTES [-1, T]
    score   FP32  [-1, T]

Tasks without labels have neither `label` nor `score`, and their logits may have more axes.

Every task is a model too, by its own name and in its versions, for clients that know only "model = task": it takes
no `task`, and its logits are its own classes alone. It waits in the same queue.

Messages are plain dicts in the protocol's own spelling, which JSON and protobuf both read. Needs
NumPy only, so that a Triton model can carry it. Source: the v2 dataplane of
https://github.com/kserve/open-inference-protocol with Triton's extensions for binary tensors,
classification, model configuration and statistics.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..export.engine import LABEL, LOGITS, SCORE, TASK
from .rejections import InvalidRequest
from .tensors import InputTensor, OutputRequest, OutputTensor, TensorFacts, datatype, numbers, texts
from .watching.counters import TaskTotals

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from .answering import Answerer
    from .answers import Answers
    from .registry import Registry, Request
    from .tasks.versions import Version

VERSION = "1"
SERVER = "utune-deploy"
ALL_TASKS = "all_tasks"  # the parameter of a Triton model that answers each row with every task
NO_TRACES, NO_LOGS = (f"settings of {what} are not offered here" for what in ("traces", "logs"))
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
)


def read_request(registry: Registry, inputs: Sequence[InputTensor]) -> Request:
    """The checked request that wire tensors spell.

    Raises:
        InvalidRequest: A tensor is missing, surplus, of the wrong type, or not what its shape says;
            or the service refuses its content.
    """
    known = model_inputs(registry)
    needed = list(registry.inputs)
    wanted = None
    if not registry.all_tasks and len(registry.names) > 1:
        needed.append(TASK)
        wanted = f"{TASK}: one of {registry.some_names} for each row"
    tensors = _named_once(registry.name, known, needed, inputs, wanted=wanted)
    task = tensors.get(TASK)
    rows = _row_arrays(known, registry.inputs, tensors)
    return registry.check(rows, None if task is None else read_names(task))


def read_rows(
    model: str, known: Sequence[TensorFacts], inputs: Sequence[InputTensor]
) -> dict[str, NDArray[Any]]:
    """The row inputs that wire tensors spell, `[n, ...]` by name.

    Args:
        model: The model's name.
        known: What it takes, all of them rows.
        inputs: What came.

    Raises:
        InvalidRequest: See `read_request`.
    """
    needed = [facts.name for facts in known]
    return _row_arrays(known, needed, _named_once(model, known, needed, inputs))


def missing_inputs(
    model: str,
    known: Collection[str],
    needed: Collection[str],
    given: Collection[str],
    *,
    wanted: str | None = None,
) -> InvalidRequest:
    """That a request lacks inputs, in Triton's words.

    Args:
        model: The model's name.
        known: What it takes.
        needed: Those that may not be left out.
        given: What came.
        wanted: What an input that may be missing holds.
    """
    few, most = len(needed), len(known)
    count = f"{few} inputs" if few == most else f"number of inputs between {few} and {most}"

    def listed(names: Iterable[str]) -> str:
        return ",".join(f"'{name}'" for name in names)

    return InvalidRequest(
        f"expected {count} but got {len(given)} inputs for model '{model}'. Got input(s) [{listed(given)}], "
        f"but missing required input(s) [{listed(name for name in needed if name not in given)}]. Please "
        "provide all required input(s).",
        wanted=wanted,
    )


def _named_once(
    model: str,
    facts: Sequence[TensorFacts],
    needed: Collection[str],
    inputs: Sequence[InputTensor],
    *,
    wanted: str | None = None,
) -> dict[str, InputTensor]:
    """The tensors by name, each known, of the right type, and given once; none that is needed is missing.

    What is wrong is said in Triton's words.
    """
    known = {each.name: each for each in facts}
    tensors: dict[str, InputTensor] = {}
    for tensor in inputs:
        if tensor.name in tensors:
            raise InvalidRequest(f"input '{tensor.name}' already exists in request")
        if tensor.name not in known:
            raise InvalidRequest(
                f"unexpected inference input '{tensor.name}' for model '{model}'",
                wanted=", ".join(known),
            )
        if tensor.datatype != (right := known[tensor.name].datatype):
            raise InvalidRequest(
                f"inference input '{tensor.name}' data-type is '{tensor.datatype}', but model '{model}' "
                f"expects '{right}'"
            )
        tensors[tensor.name] = tensor
    if any(name not in tensors for name in needed):
        raise missing_inputs(model, known, needed, tensors, wanted=wanted)
    return tensors


def _row_arrays(
    known: Sequence[TensorFacts], rows: Collection[str], tensors: Mapping[str, InputTensor]
) -> dict[str, NDArray[Any]]:
    """The row inputs by name; their shapes are looked at before their content, as Triton does."""
    for facts in known:
        tensor = tensors.get(facts.name)
        if tensor is not None and facts.name in rows and tensor.shape[1:] != facts.dims:
            wanted, found = (_sizes(shape) for shape in ((-1, *facts.dims), tensor.shape))
            raise InvalidRequest(
                f"unexpected shape for input '{tensor.name}' for model '{tensor.model}'. "
                f"Expected {wanted}, got {found}"
            )
    return {name: numbers(tensors[name]) for name in rows}


def _sizes(shape: Iterable[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


def read_names(tensor: InputTensor) -> list[str]:
    """The task names of `[n]` or `[n, 1]` BYTES."""
    if len(tensor.shape) not in (1, 2) or (len(tensor.shape) == 2 and tensor.shape[1] != 1):
        raise InvalidRequest(
            "an input has the wrong shape",
            where=tensor.name,
            wanted="[n, 1] or [n]",
            found=list(tensor.shape),
        )
    return task_names(texts(tensor))


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
                f"unexpected inference output '{output.name}' for model '{registry.name}'",
                wanted=f"one of {', '.join(known)}",
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


def task_statistics(service: Answerer, version: Version) -> dict[str, Any]:
    """What a service has done for one task, in all its versions; a call is shared, so its time is not here."""
    totals = service.counters.read().tasks.get(version.name, TaskTotals())
    return {
        "name": version.name,
        "version": str(version.number),
        "inference_count": totals.rows,
        "inference_stats": {
            "success": {"count": totals.answered, "ns": totals.request_ns},
            "fail": {"count": totals.refused + totals.failed, "ns": 0},
        },
    }


def server_metadata(
    version: str, *, name: str = SERVER, extensions: Iterable[str] = ()
) -> dict[str, Any]:
    """What `GET /v2` says.

    Args:
        version: The server's version.
        name: What it calls itself.
        extensions: Those that it has beside `EXTENSIONS`.
    """
    return {"name": name, "version": version, "extensions": sorted({*EXTENSIONS, *extensions})}


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


def model_inputs(registry: Registry) -> list[TensorFacts]:
    """What requests bring, in the engine's order, and the task's name where rows choose one."""
    rows = [
        TensorFacts(t.name, datatype(t.dtype), tuple(int(size) for size in t.shape[1:]))
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


def alias_metadata(registry: Registry, version: Version, versions: Iterable[int]) -> dict[str, Any]:
    """Of the model that answers with one task: no `task` goes in, and only its own classes come out."""
    return {
        **model_metadata(registry),
        "name": version.name,
        "versions": [str(number) for number in versions],
        "inputs": [_metadata(facts) for facts in alias_inputs(registry)],
        "outputs": [_metadata(facts) for facts in alias_outputs(registry, version)],
    }


def alias_config(registry: Registry, version: Version, *, max_delay_ms: float) -> dict[str, Any]:
    """Its configuration, in Triton's fields."""
    return {
        **model_config(registry, max_delay_ms=max_delay_ms),
        "name": version.name,
        "input": [_config(facts) for facts in alias_inputs(registry)],
        "output": [_config(facts) for facts in alias_outputs(registry, version)],
    }


def alias_inputs(registry: Registry) -> list[TensorFacts]:
    """The row inputs."""
    return [facts for facts in model_inputs(registry) if facts.name != TASK]


def alias_outputs(registry: Registry, version: Version) -> list[TensorFacts]:
    """The model's outputs, with the task's own number of logits."""
    own = len(version.labels) or version.task.width or registry.classes
    return [
        replace(facts, dims=(*facts.dims[:-1], own)) if facts.name == LOGITS else facts
        for facts in model_outputs(registry)
    ]


def _metadata(facts: TensorFacts) -> dict[str, Any]:
    return {"name": facts.name, "datatype": facts.datatype, "shape": [-1, *facts.dims]}


def _config(facts: TensorFacts) -> dict[str, Any]:
    kind = "TYPE_STRING" if facts.datatype == "BYTES" else f"TYPE_{facts.datatype}"
    return {"name": facts.name, "data_type": kind, "dims": list(facts.dims)}


def statistics(service: Answerer) -> dict[str, Any]:
    """What a service has done, in the statistics extension's fields; times in nanoseconds."""
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
            "compute_input": duration(totals.answered, totals.input_ns),
            "compute_infer": duration(totals.answered, totals.engine_ns),
            "compute_output": duration(totals.answered, totals.output_ns),
        },
    }


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
    for row, version in enumerate(answers.versions):
        labels = version.labels
        own = answers.logits[row, : len(labels)]
        for rank, index in enumerate(np.argsort(-own, kind="stable")[:count]):
            cells[row, rank] = f"{own[index]:f}:{index}:{labels[index]}".encode()
    return cells
