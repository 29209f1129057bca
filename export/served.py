"""A bundle's engine as one graph that a server runs without code of ours: task names in, answers out.

Around the engine come what `serving` does in NumPy, as nodes:

    task [B, 1] text  ->  row of the bank                              LabelEncoder
    logits [B, K]     ->  top-1 and softmax over the task's own classes, in float64
    row and class     ->  the label's text                             Gather over text

A server batches the rows of several requests, and no node can refuse one of them. So a row that `serving`
would refuse (an unknown task, a number that is not finite, an id out of range) is answered with NaN, an
empty label and `valid` false, and its neighbours as if it were not there.

`task_names` is the small graph of aliases: a model that knows its task gives that name to every row.

Text runs on the CPU provider alone; ONNX Runtime puts those nodes there by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir import tape
from onnx_ir.passes import common

from ..merge.errors import BuildFailed, UsageError
from .bundle import FAN_OUT, IDENTITY
from .engine import LABEL, LOGITS, SCORE, TASK, VALID, row_inputs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from .bundle import Bundle, Engine
    from .engine import Tensor

TARGET = "onnxruntime"
ML = "ai.onnx.ml"
ML_OPSET = 3
OPSET, IR_VERSION = 18, 10  # of the graph of aliases, which any server of the last years reads
LARGEST = (1 << 31) - 1  # bytes of one protobuf message
OWN = "served/"  # before the names of values that are added here

_KINDS = {
    "float32": ir.DataType.FLOAT,
    "int64": ir.DataType.INT64,
    "text": ir.DataType.STRING,
    "bool": ir.DataType.BOOL,
}


def serve_graph(bundle: Bundle, all_tasks: bool = False) -> bytes:
    """The graph of the model NAME, or of NAME.all.

    Inputs are the engine's row inputs and `task [B, 1]` text. Outputs are `logits [B, K]` float32 (with more
    axes without labels), `label [B, 1]` text, `score [B, 1]` float32 and `valid [B, 1]` bool; without
    labels `logits` and `valid`. Where all tasks answer there is no input `task`, and outputs are
    `logits [B, T, K]`, `task [B, T]` text, `label [B, T]`, `score [B, T]` and `valid [B, 1]`.

    Args:
        bundle: Its bank becomes constants of the graph.
        all_tasks: Answer every task for every row.

    Raises:
        UsageError: The engine is no ONNX graph, or no engine answers all tasks.
        BuildFailed: The graph is over protobuf's limit of 2 GiB.
    """
    engine = bundle.require_fan_out() if all_tasks else bundle.engine
    if engine.target != TARGET:
        raise UsageError(
            "only an ONNX engine can be served without our code",
            where=bundle.path,
            wanted=f"target {TARGET}",
            found=f"target {engine.target}",
            do=f"export it with --target {TARGET}, or use the layout `hot`",
        )
    file = bundle.path / engine.file
    model = ir.from_proto(onnx.load_model_from_string(file.read_bytes()))
    model.opset_imports[ML] = ML_OPSET
    _Wrapping(model.graph, bundle, engine, all_tasks).wrap()
    common.TopologicalSortPass()(model)
    model.metadata_props[IDENTITY] = bundle.identity
    proto = ir.to_proto(model)
    if (size := proto.ByteSize()) > LARGEST:
        raise BuildFailed(
            "the engine and its bank are too large for one ONNX file",
            where=file,
            wanted=f"at most {LARGEST} bytes",
            found=f"{size} bytes",
        )
    return proto.SerializeToString()


def task_names(tasks: Sequence[str], rows: Tensor) -> bytes:
    """A graph with an output per task, which says the task's name once for each row of an input.

    Args:
        tasks: Names; that of the output too.
        rows: The input, of which only the number of rows matters.
    """
    x = ir.Value(
        name=rows.name, type=ir.TensorType(_KINDS[rows.dtype]), shape=ir.Shape(list(rows.shape))
    )
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": OPSET}, name="task_names")
    ops = _Ops(graph)
    size = ops("Concat", ops("Shape", x, start=0, end=1), ops.ints([1]), axis=0)
    for name in tasks:
        said = ops("Expand", ops.text([[name]]), size)
        graph.outputs.append(_named(said, name, "text", [rows.shape[0], 1]))
    ops.close()
    return ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()


class _Ops:
    """Writes nodes and constants into a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._tape = tape.Tape()
        self._count = 0

    def __call__(self, kind: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        """The output of a new node."""
        domain = str(attributes.pop("domain", ""))
        value = self._tape.op(kind, inputs, attributes, domain=domain)  # pyright: ignore[reportArgumentType]
        value.name = self._name()
        return value

    def constant(self, array: NDArray) -> ir.Value:
        """A constant of an array's own type."""
        return self._register(ir.tensor(array))

    def ints(self, values: object) -> ir.Value:
        """An int64 constant."""
        return self.constant(np.array(values, dtype=np.int64))

    def text(self, values: object) -> ir.Value:
        """A constant of texts, nested as `values`."""
        array = np.array(values, dtype=object)
        flat = [str(text).encode() for text in array.ravel()]
        return self._register(ir.StringTensor(flat, shape=ir.Shape(array.shape)))

    def close(self) -> None:
        """Put the nodes into the graph."""
        self._graph.extend(self._tape.nodes)
        for number, node in enumerate(self._tape.nodes):
            node.name = f"{OWN}{node.op_type}/{number}"

    def _register(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=self._name(),
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape([int(str(size)) for size in tensor.shape]),
            const_value=tensor,
        )
        self._graph.register_initializer(value)
        return value

    def _name(self) -> str:
        self._count += 1
        return f"{OWN}{self._count}"


class _Wrapping:
    """One engine's graph, and what is written around it."""

    def __init__(self, graph: ir.Graph, bundle: Bundle, engine: Engine, all_tasks: bool) -> None:
        self._graph = graph
        self._bundle = bundle
        self._engine = engine
        self._all_tasks = all_tasks
        self._labelled = all(task.labels for task in bundle.tasks)
        self._inputs: Mapping[str, ir.Value] = {value.name or "": value for value in graph.inputs}
        self._batch = next(t.shape[0] for t in engine.inputs if t.name in self._inputs)
        self._ops = _Ops(graph)
        for value in (*(v for node in graph for v in node.outputs), *graph.initializers.values()):
            if value.name in (LABEL, SCORE, VALID):  # these names are given below
                value.name = f"{OWN}engine/{value.name}"

    def wrap(self) -> None:
        """Give the graph its served inputs and outputs."""
        ops, bundle = self._ops, self._bundle
        self._hold_bank()
        valid = self._valid_inputs()  # [B], may be None
        answer = next(value for value in self._graph.outputs if value.name == LOGITS)
        answer.name = OWN + LOGITS
        self._graph.outputs.clear()
        place = None
        if not self._all_tasks:
            place, known = self._place()
            valid = self._both(valid, known)
            if bundle.mode == FAN_OUT:  # [B, T, ...] -> [B, ...]
                column = ops("Unsqueeze", place, ops.ints([1]))
                answer = ops("GatherND", answer, column, batch_dims=1)
        tensor = next(t for t in self._engine.outputs if t.name == LOGITS)
        sizes = list(tensor.shape)
        if bundle.mode == FAN_OUT and not self._all_tasks:
            del sizes[1]
        if self._all_tasks:
            sizes[1] = len(bundle.tasks)
        valid = self._both(valid, self._finite(answer, len(sizes)))
        assert valid is not None
        column = ops("Unsqueeze", valid, ops.ints([1]))
        nan = ops.constant(np.array(np.nan, dtype=np.float32))
        lifted = ops("Unsqueeze", valid, ops.ints(list(range(1, len(sizes)))))
        outputs = [_named(ops("Where", lifted, answer, nan), LOGITS, "float32", sizes)]
        per_row = [self._batch, len(bundle.tasks) if self._all_tasks else 1]
        if self._all_tasks:
            size = ops("Shape", answer, start=0, end=2)
            said = ops("Expand", ops.text([[task.name for task in bundle.tasks]]), size)
            outputs.append(_named(said, TASK, "text", per_row))
        if self._labelled:
            label, score = self._best(answer, place, column)
            outputs.append(_named(label, LABEL, "text", per_row))
            score = ops("Where", column, score, nan)
            outputs.append(_named(score, SCORE, "float32", per_row))
        outputs.append(
            _named(ops("Identity", column), VALID, "bool", [self._batch, 1])
        )  # its own value: an output is read by nobody
        self._graph.outputs.extend(outputs)
        ops.close()

    def _hold_bank(self) -> None:
        """Make constants of the bank's inputs."""
        if not self._engine.reads_bank:
            return
        for name, array in self._bundle.read_bank().items():
            if (value := self._inputs.get(name)) is not None:
                self._graph.inputs.remove(value)
                value.const_value = ir.tensor(array, name=name)
                value.shape = ir.Shape(array.shape)
                self._graph.register_initializer(value)

    def _valid_inputs(self) -> ir.Value | None:
        """Of each row `[B]` bool whether its numbers are finite and its ids in range; None if all are.

        Ids are clipped into their range: an id outside would end the call for every row.
        """
        ops, valid = self._ops, None
        for tensor in row_inputs(self._engine.inputs):
            value = self._inputs[tensor.name]
            if tensor.dtype == "float32":
                valid = self._both(valid, self._finite(value, len(tensor.shape)))
            elif tensor.high is not None:
                low, top = ops.ints(0), ops.ints(tensor.high - 1)
                uses = list(value.uses())
                clipped = ops("Clip", value, low, top)
                for node, index in uses:
                    node.replace_input_with(index, clipped)
                off = ops("Cast", ops("Sub", value, clipped), to=ir.DataType.BOOL.value)
                count = ops("Cast", off, to=ir.DataType.FLOAT.value)
                total = ops("ReduceSum", count, self._axes(len(tensor.shape)), keepdims=0)
                zero = ops.constant(np.array(0, dtype=np.float32))
                valid = self._both(valid, ops("Equal", total, zero))
        return valid

    def _finite(self, value: ir.Value, rank: int) -> ir.Value:
        """Of each row `[B]` bool whether all numbers are finite: zero times another is NaN."""
        ops = self._ops
        zero = ops.constant(np.array(0, dtype=np.float32))
        total = ops("ReduceSum", ops("Mul", value, zero), self._axes(rank), keepdims=0)
        return ops("Not", ops("IsNaN", total))

    def _axes(self, rank: int) -> ir.Value:
        return self._ops.ints(list(range(1, rank)))

    def _both(self, one: ir.Value | None, other: ir.Value) -> ir.Value:
        return other if one is None else self._ops("And", one, other)

    def _place(self) -> tuple[ir.Value, ir.Value]:
        """The tasks' places in the bundle `[B]` int64, 0 for an unknown one; and which are known, bool."""
        ops, tasks = self._ops, self._bundle.tasks
        shape = [self._batch, 1]
        given = ir.Value(
            name=TASK, type=ir.TensorType(ir.DataType.STRING), shape=ir.Shape(list(shape))
        )
        found = ops(
            "LabelEncoder",
            ops("Reshape", given, ops.ints([-1])),
            domain=ML,
            keys_strings=[task.name for task in tasks],
            values_int64s=list(range(len(tasks))),
            default_int64=-1,
        )
        zero = ops.ints(0)
        known = ops("GreaterOrEqual", found, zero)
        place = ops("Max", found, zero)
        if (row := self._inputs.get(TASK)) is not None:
            self._graph.inputs.remove(row)
            bank_rows = ops("Gather", ops.ints([task.row for task in tasks]), place)
            row.name = OWN + TASK
            ir.convenience.replace_all_uses_with(row, bank_rows)
        self._graph.inputs.append(given)
        return place, known

    def _best(
        self, answer: ir.Value, place: ir.Value | None, valid: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Label and score of each answer, `[B, 1]`, or `[B, T]` of all tasks, as `Service` computes them.

        Args:
            answer: `[B, K]`, or `[B, T, K]` of all tasks.
            place: `[B]` int64, each row's task; None where all tasks answer.
            valid: `[B, 1]` bool.
        """
        ops, tasks = self._ops, self._bundle.tasks
        counts = np.array([len(task.labels) for task in tasks])
        logits = next(t for t in self._engine.outputs if t.name == LOGITS)
        classes = ops.ints(list(range(int(logits.shape[-1]))))
        before = np.cumsum(counts) - counts
        if place is None:
            widths, starts = ops.ints(counts[:, None]), ops.ints(before[None])
        else:
            column = ops("Unsqueeze", place, ops.ints([1]))  # [B, 1]
            widths = ops("Gather", ops.ints(counts), column)
            starts = ops("Gather", ops.ints(before), column)
        lowest = ops.constant(np.array(-np.inf))
        exact = ops("Cast", answer, to=ir.DataType.DOUBLE.value)
        own = ops("Where", ops("Less", classes, widths), exact, lowest)
        last = ops.ints([-1])
        kept = 1 if place is not None else 0  # [B, 1], or [B, T]
        best = ops("ArgMax", own, axis=-1, keepdims=kept)
        shifted = ops("Exp", ops("Sub", own, ops("ReduceMax", own, last, keepdims=1)))
        total = ops("ReduceSum", shifted, last, keepdims=kept)
        score = ops("Div", ops.constant(np.array(1.0)), total)
        texts = ops.text([*(label for task in tasks for label in task.labels), ""])
        index = ops("Where", valid, ops("Add", starts, best), ops.ints(int(counts.sum())))
        return ops("Gather", texts, index), ops("Cast", score, to=ir.DataType.FLOAT.value)


def _named(value: ir.Value, name: str, kind: str, shape: Sequence[int | str]) -> ir.Value:
    """The value as an output of the graph."""
    value.name = name
    value.type = ir.TensorType(_KINDS[kind])
    value.shape = ir.Shape(list(shape))
    return value
