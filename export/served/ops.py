"""Nodes and constants written one by one, as the graphs of this folder need them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

OWN = "served/"  # before the names of values that are added here
ML = "ai.onnx.ml"
OPSET, ML_OPSET, IR_VERSION = (
    18,
    3,
    10,
)  # of graphs that are new here: any server of today reads them

KINDS = {
    "float32": ir.DataType.FLOAT,
    "int64": ir.DataType.INT64,
    "uint8": ir.DataType.UINT8,
    "text": ir.DataType.STRING,
    "bool": ir.DataType.BOOL,
}


class Ops:
    """Writes nodes and constants into a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._tape = tape.Tape()
        self._count = 0

    def __call__(self, kind: str, *inputs: ir.Value | None, **attributes: object) -> ir.Value:
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

    def place(self, task: ir.Value, names: Sequence[str]) -> tuple[ir.Value, ir.Value]:
        """Where each row's task stands among the names, `[B]` int64, 0 if it does not; and if it does, bool.

        Args:
            task: `[B, 1]` text.
            names: The tasks.
        """
        found = self(
            "LabelEncoder",
            self("Reshape", task, self.ints([-1])),
            domain=ML,
            keys_strings=list(names),
            values_int64s=list(range(len(names))),
            default_int64=-1,
        )
        zero = self.ints(0)
        return self("Max", found, zero), self("GreaterOrEqual", found, zero)

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


def named(value: ir.Value, name: str, kind: str, shape: Sequence[int | str]) -> ir.Value:
    """The value as an input or output of a graph."""
    value.name = name
    value.type = ir.TensorType(KINDS[kind])
    value.shape = ir.Shape(list(shape))
    return value


def whole(graph: ir.Graph, ops: Ops) -> bytes:
    """A graph that is new here as a file."""
    ops.close()
    graph.opset_imports.update({"": OPSET, ML: ML_OPSET})
    return ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
