"""A bundle's engine as one graph that a server runs without code of ours: task names in, answers out.

Around the engine come what `serving` does in NumPy, as nodes:

    task [B, 1] text  ->  row of the bank                              LabelEncoder
    logits [B, K]     ->  top-1 and softmax over the task's own classes, in float64
    row and class     ->  the label's text                             Gather over text

A server batches the rows of several requests, and no node can refuse one of them. So a row that `serving`
would refuse (an unknown task, a number that is not finite, an id out of range) is answered with NaN, an
empty label and `valid` false, and its neighbours as if it were not there.

Text runs on the CPU provider alone; ONNX Runtime puts those nodes there by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from ...merge.errors import BuildFailed, UsageError
from ..bundle import FAN_OUT, IDENTITY
from ..engine import LABEL, LOGITS, SCORE, TASK, VALID, row_inputs
from .ops import ML, ML_OPSET, OWN, Ops, named

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..bundle import Bundle, Engine

TARGET = "onnxruntime"
LARGEST = (1 << 31) - 1  # bytes of one protobuf message


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
        self._ops = Ops(graph)
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
                chosen = ops("Unsqueeze", place, ops.ints([1]))
                answer = ops("GatherND", answer, chosen, batch_dims=1)
        sizes = self._answer_sizes()
        valid = self._both(valid, self._finite(answer, len(sizes)))
        assert valid is not None
        column = ops("Unsqueeze", valid, ops.ints([1]))
        nan = ops.constant(np.array(np.nan, dtype=np.float32))
        lifted = ops("Unsqueeze", valid, ops.ints(list(range(1, len(sizes)))))
        outputs = [named(ops("Where", lifted, answer, nan), LOGITS, "float32", sizes)]
        per_row = [self._batch, len(bundle.tasks) if self._all_tasks else 1]
        if self._all_tasks:
            size = ops("Shape", answer, start=0, end=2)
            said = ops("Expand", ops.text([[task.name for task in bundle.tasks]]), size)
            outputs.append(named(said, TASK, "text", per_row))
        if self._labelled:
            label, score = self._best(answer, place, column)
            outputs.append(named(label, LABEL, "text", per_row))
            score = ops("Where", column, score, nan)
            outputs.append(named(score, SCORE, "float32", per_row))
        flags = ops("Identity", column)  # a value of its own: nodes read the other one
        outputs.append(named(flags, VALID, "bool", [self._batch, 1]))
        self._graph.outputs.extend(outputs)
        ops.close()

    def _answer_sizes(self) -> list[int | str]:
        """The shape of the logits that are served."""
        sizes = list(next(t for t in self._engine.outputs if t.name == LOGITS).shape)
        if self._all_tasks:
            sizes[1] = len(self._bundle.tasks)  # may be free in the engine
        elif self._bundle.mode == FAN_OUT:
            del sizes[1]
        return sizes

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
        given = named(ir.Value(), TASK, "text", [self._batch, 1])
        place, known = ops.place(given, [task.name for task in tasks])
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
