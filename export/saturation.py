"""What the values of a float32 graph reach, before they are given a type that ends sooner.

The float32 graph runs on examples and reports the largest magnitude of every value. A node that would read or
give a value beyond the largest finite half is named and the export refused, or the node stays float32 where
that was asked for. What a fused operator holds inside (the scores of an attention) is not seen: such operators
accumulate in float32.

Magnitudes of 1e30 and more are masks, not activations: constants that an attention or an answer is filled
with. The typing pass clips those and counts them, so they are not counted here.
"""

from __future__ import annotations

import itertools
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from ..merge.errors import CheckFailed
from .engine_file import EngineFile
from .islands import Islands, find_islands, matched
from .passes.linear import constant
from .precision import HALF, MASK, NUMPY, retype
from .streamed import write_model
from .targets.onnxruntime import DATA_FOLDER
from .targets.private import ort

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from .precision import Typing

AUTO = "auto"  # the pattern that keeps whatever the audit finds
NEAR = 4.0  # a value within this factor of the range is mentioned
SHOWN = 6


@dataclass(frozen=True)
class Audit:
    """What the values that become half reached in float32.

    Attributes:
        inputs: What the graph was run on.
        rows: How many examples.
        limit: Largest finite number of the half.
        largest: Largest magnitude of any value that becomes half.
        near: Values past a quarter of the range, and what they reached.
    """

    inputs: str
    rows: int
    limit: float
    largest: float
    near: dict[str, float]


class Examples(NamedTuple):
    """What a float32 graph is run on.

    Attributes:
        inputs: In words: seeded noise, or where the pictures come from.
        rows: How many examples.
        batches: All inputs of the graph by name, a batch at a time; may be gone through more than once.
    """

    inputs: str
    rows: int
    batches: Iterable[Mapping[str, NDArray[Any]]]


def retype_audited(
    model: ir.Model, precision: str, patterns: Sequence[str], examples: Examples
) -> Typing:
    """`retype` to a half, after a look at what its values reach.

    Args:
        model: A float32 graph, changed in place.
        precision: `fp16` or `bf16`.
        patterns: Of nodes that stay float32; `auto` stands for those whose values would leave the range.
        examples: What the graph is run on.

    Raises:
        UsageError: A pattern names no node.
        CheckFailed: A value leaves the range, and nobody asked for its node to stay float32.
    """
    assert precision in HALF
    named = matched(model, [pattern for pattern in patterns if pattern != AUTO])
    keep = [node for nodes in named.values() for node in nodes]
    limit = float(ml_dtypes.finfo(NUMPY[precision]).max)
    reached = magnitudes(model, examples.batches)
    islands = find_islands(model, keep)
    found: list[ir.Node] = []
    while beyond := _beyond(islands, reached, limit):
        if AUTO not in patterns:
            raise _refusal(beyond, precision, limit, examples)
        found += list(beyond)
        islands = find_islands(model, [*keep, *found])
    half = {
        value.name or "": reached[value.name or ""]
        for node in islands.halves
        for value in _values(node, islands)
        if value.name in reached
    }
    audit = Audit(
        examples.inputs,
        examples.rows,
        limit,
        max(half.values(), default=0.0),
        {name: value for name, value in half.items() if value > limit / NEAR},
    )
    kept = {pattern: [node.name or "" for node in nodes] for pattern, nodes in named.items()}
    if AUTO in patterns:
        kept[AUTO] = [node.name or "" for node in found]
    return replace(retype(model, precision, islands), kept=kept, audit=asdict(audit))


def magnitudes(model: ir.Model, batches: Iterable[Mapping[str, NDArray[Any]]]) -> dict[str, float]:
    """The largest magnitude below `MASK` of every float32 value that is no constant, by name.

    Args:
        model: A float32 graph; left as it is.
        batches: All its inputs by name, a batch at a time. Where there are constants among them, they are inputs
            here, whose first axis is free: a bank with the rows that the batch needs.
    """
    find_islands(model)  # fills types in
    batches = iter(batches)
    first = next(batches)
    names = [
        value.name
        for value in [*model.graph.inputs, *(o for node in model.graph for o in node.outputs)]
        if value.dtype == ir.DataType.FLOAT and value.name
    ]
    wanted = [f"{name}.reached" for name in names]
    found = np.zeros(len(names))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "audit.onnx")
        with _as_inputs(model, [name for name in first if name in model.graph.initializers]):
            write_model(model, file)
        proto = onnx.ModelProto.FromString(EngineFile(file).model())
        _measure(proto, names)
        session = _opened(proto, folder)
        for batch in itertools.chain([first], batches):
            found = np.maximum(found, np.array(session.run(wanted, dict(batch)), dtype=np.float64))
        del session  # its tensors are mapped from the file
    return dict(zip(names, found.tolist(), strict=True))


def _opened(proto: onnx.ModelProto, folder: str) -> ort.InferenceSession:
    """A session that holds neither weights, which stay in their file, nor the memory of its last call."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry(DATA_FOLDER, folder)
    return ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@contextmanager
def _as_inputs(model: ir.Model, names: Sequence[str]) -> Iterator[None]:
    """Constants are inputs with a free first axis meanwhile."""
    graph = model.graph
    moved = [graph.initializers[name] for name in names]
    held = [(value.const_value, value.shape) for value in moved]
    order = list(graph.initializers)
    for value in moved:
        del graph.initializers[value.name or ""]
        value.const_value = None
        value.shape = ir.Shape([None, *list(value.shape or ())[1:]])
        graph.inputs.append(value)
    try:
        yield
    finally:
        for value, (tensor, shape) in zip(moved, held, strict=True):
            graph.inputs.remove(value)
            value.const_value, value.shape = tensor, shape
            graph.initializers[value.name or ""] = value
        values = dict(graph.initializers)
        graph.initializers.clear()
        for name in order:
            graph.initializers[name] = values[name]


def _measure(proto: onnx.ModelProto, names: Sequence[str]) -> None:
    """Let a model answer with the largest magnitude of each value instead of its own outputs."""
    graph, node = proto.graph, onnx.helper.make_node
    for name, value in (("audit.mask", MASK), ("audit.zero", 0.0)):
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.float32), name))
    for name in names:
        graph.node.extend(
            [
                node("Abs", [name], [f"{name}.abs"]),
                node("Less", [f"{name}.abs", "audit.mask"], [f"{name}.is_value"]),
                node(
                    "Where", [f"{name}.is_value", f"{name}.abs", "audit.zero"], [f"{name}.values"]
                ),
                node("ReduceMax", [f"{name}.values"], [f"{name}.reached"], keepdims=0),
            ]
        )
    del graph.output[:]
    graph.output.extend(
        onnx.helper.make_tensor_value_info(f"{name}.reached", onnx.TensorProto.FLOAT, [])
        for name in names
    )


def _values(node: ir.Node, islands: Islands) -> list[ir.Value]:
    """The values that a node in half reads or gives in half; constants are counted where they are cast."""
    around = [*node.inputs, *node.outputs]
    return [v for v in around if v is not None and v in islands.floats and constant(v) is None]


def _beyond(
    islands: Islands, reached: Mapping[str, float], limit: float
) -> dict[ir.Node, tuple[str, float]]:
    """Nodes in half with a value past the range, the first such value of each and what it reached."""
    found = {}
    for node in islands.halves:
        for value in _values(node, islands):
            if (size := reached.get(value.name or "", 0.0)) > limit:
                found.setdefault(node, (value.name or "", size))
    return found


def _refusal(
    beyond: Mapping[ir.Node, tuple[str, float]], precision: str, limit: float, examples: Examples
) -> CheckFailed:
    some = [
        f"{node.name} ({node.op_type}): {value} reaches {size:.3g}"
        for node, (value, size) in list(beyond.items())[:SHOWN]
    ]
    more = f"; and {len(beyond) - SHOWN} more nodes" if len(beyond) > SHOWN else ""
    return CheckFailed(
        f"values leave the range of {precision}, so nothing was written",
        wanted=f"magnitudes up to {limit:.5g} on {examples.inputs}, {examples.rows} examples",
        found="; ".join(some) + more,
        do="keep these nodes in float32 with --keep-fp32 NAME (globs, repeatable), or all such with "
        "--keep-fp32 auto; or use bf16",
    )
