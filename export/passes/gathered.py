"""How a branch of a bank looks in the graph: `act(x down^T + d) up^T + u`, its weights gathered by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from .linear import constant, vector_beside

if TYPE_CHECKING:
    from collections.abc import Sequence

DOMAIN = "utune"
RANKS = (16, 32, 64, 128)  # that the kernels have; see `export/kernels/tile.cuh`
CHANNELS = 64  # they take multiples of
ACTIVATIONS = {
    "identity": "Identity",
    "relu": "Relu",
    "gelu": "Gelu",
    "gelu_tanh": "GeluTanh",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
}
"""The activation's name in a tuner, and in a node's."""


@dataclass(frozen=True)
class Gathered:
    """A branch as the exporter writes it.

    Attributes:
        x: `[B, N, Cin]`, what it reads.
        task: `[B]` int64, the bank row of each.
        down: `[T, R, Cin]` in the bank.
        down_bias: `[T, R]`, or None.
        up: `[T, Cout, R]`.
        up_bias: `[T, Cout]`, or None.
        activation: A key of `ACTIVATIONS`.
    """

    x: ir.Value
    task: ir.Value
    down: ir.Value
    down_bias: ir.Value | None
    up: ir.Value
    up_bias: ir.Value | None
    activation: str

    @property
    def biased(self) -> bool:
        """Whether it has biases, both or none."""
        return self.down_bias is not None

    @property
    def biases(self) -> list[ir.Value]:
        """Both biases, or none."""
        return [bias for bias in (self.down_bias, self.up_bias) if bias is not None]

    @property
    def channels(self) -> tuple[int, int] | None:
        """Channels in and out, if the kernels take the branch: three axes, their ranks and channels."""
        sizes = [list(v.shape) if v.shape is not None else [] for v in (self.down, self.up)]
        if any(len(size) != 3 for size in sizes) or self.x.shape is None or len(self.x.shape) != 3:
            return None
        _, rank, inside = sizes[0]
        outside = sizes[1][1]
        if not isinstance(inside, int) or not isinstance(outside, int) or rank not in RANKS:
            return None
        return (inside, outside) if not inside % CHANNELS and not outside % CHANNELS else None


def gathered(value: ir.Value) -> Gathered | None:
    """The branch whose output is `value`, if nothing else reads what is inside it."""
    value, up_bias = _row_bias(value)
    up = _product(value)
    if up is None:
        return None
    hidden, up_bank, task = up
    activation, inner = _activation(hidden)
    if inner is None:
        return None
    inner, down_bias = _row_bias(inner)
    down = _product(inner)
    if down is None or down[2] is not task:
        return None
    biases = [bias for bias in (up_bias, down_bias) if bias is not None]
    if len(biases) == 1 or any(bias[1] is not task for bias in biases):
        return None
    return Gathered(
        down[0],
        task,
        down[1],
        down_bias[0] if down_bias else None,
        up_bank,
        up_bias[0] if up_bias else None,
        activation,
    )


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that gives a value that is read once, when it is an `op_type`."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != op_type or node.domain or value is None:
        return None
    return node if len(value.uses()) == 1 and not value.is_graph_output() else None


def _taken(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """`(bank, task)` of a value that is gathered from the bank by row."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return None
    bank, task = node.inputs
    if bank is None or task is None or (task.shape is not None and len(task.shape) != 1):
        return None
    return (bank, task) if bank.is_initializer() or bank.is_graph_input() else None


def _product(value: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """`(x, bank, task)` of `x bank[task]^T`."""
    matmul = _producer(value, "MatMul")
    transpose = _producer(matmul.inputs[1], "Transpose") if matmul is not None else None
    if matmul is None or transpose is None or matmul.inputs[0] is None:
        return None
    if list(transpose.attributes.get_ints("perm", [])) != [0, 2, 1]:
        return None
    taken = _taken(transpose.inputs[0])
    return (matmul.inputs[0], *taken) if taken is not None else None


def _row_bias(value: ir.Value) -> tuple[ir.Value, tuple[ir.Value, ir.Value] | None]:
    """`(x, (bank, task))` of `x + bank[task]`, one vector for all tokens of a row; `(value, None)` else."""
    add = _producer(value, "Add")
    if add is None:
        return value, None
    for x, bias in (add.inputs, add.inputs[::-1]):
        unsqueeze = _producer(bias, "Unsqueeze")
        if unsqueeze is None or x is None:
            continue
        axes = constant(unsqueeze.inputs[1])
        taken = _taken(unsqueeze.inputs[0])
        if axes is not None and axes.ravel().tolist() in ([1], [-2]) and taken is not None:
            return x, taken
    return value, None


def _activation(value: ir.Value) -> tuple[str, ir.Value | None]:
    """The activation that gives a value, and what it reads; `identity` where there is none."""
    node = value.producer()
    if node is None or len(value.uses()) != 1 or value.is_graph_output():
        return "identity", None
    if node.op_type == "Gelu":
        tanh = node.attributes.get_string("approximate", "none") == "tanh"
        return ("gelu_tanh" if tanh else "gelu"), node.inputs[0]
    if node.op_type in ("Relu", "Tanh", "Sigmoid"):
        return node.op_type.lower(), node.inputs[0]
    return "identity", value


def frozen_bias(base: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """`(x W, b)` of a frozen layer's output `x W + b` that is read once; `(base, None)` else."""
    add = _producer(base, "Add")
    if add is not None:
        for x, bias in (add.inputs, add.inputs[::-1]):
            matmul = x.producer() if x is not None else None
            if matmul is None or matmul.op_type != "MatMul" or x is None or bias is None:
                continue
            if (
                vector_beside(x, bias) is not None
                and bias.shape is not None
                and len(bias.shape) == 1
            ):
                return x, bias
    return base, None


class Body:
    """The nodes of a function, written down one by one.

    Args:
        inputs: Names of its inputs.
    """

    def __init__(self, inputs: list[str]) -> None:
        self.given = {name: ir.val(name) for name in inputs}
        self.nodes: list[ir.Node] = []

    def add(self, op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """A node with one output."""
        self.nodes.append(ir.node(op, list(inputs), attributes=attributes))
        return self.nodes[-1].outputs[0]

    def by_row(self, bank: str) -> ir.Value:
        """Rows of a bank, one for each row of the batch."""
        return self.add("Gather", self.given[bank], self.given["task"], axis=0)

    def vectors(self, bank: str) -> ir.Value:
        """`[B, 1, C]` of a bank `[T, C]`."""
        return self.add("Unsqueeze", self.by_row(bank), self.add("Constant", value_ints=[1]))

    def branch(self, x: ir.Value, activation: str, *, biased: bool) -> ir.Value:
        """`act(x down^T + down_bias) up^T`, `[B, N, Cout]`."""
        hidden = self.add("MatMul", x, self.add("Transpose", self.by_row("down"), perm=[0, 2, 1]))
        if biased:
            hidden = self.add("Add", hidden, self.vectors("down_bias"))
        if activation in ("relu", "tanh", "sigmoid"):
            hidden = self.add(activation.capitalize(), hidden)
        elif activation != "identity":
            tanh = "tanh" if activation == "gelu_tanh" else "none"
            hidden = self.add("Gelu", hidden, approximate=tanh)
        return self.add("MatMul", hidden, self.add("Transpose", self.by_row("up"), perm=[0, 2, 1]))

    def function(
        self,
        name: str,
        outputs: dict[str, ir.Value],
        opset: int,
        attributes: Sequence[ir.Attr] = (),
    ) -> ir.Function:
        """The function of these nodes."""
        for output, value in outputs.items():
            value.name = output
        graph = ir.Graph(
            list(self.given.values()),
            list(outputs.values()),
            nodes=self.nodes,
            opset_imports={"": opset},
        )
        return ir.Function(DOMAIN, name, graph=graph, attributes=list(attributes))


def declare(model: ir.Model, function: ir.Function) -> None:
    """Add a function to the model that defines it once."""
    model.functions.setdefault(function.identifier(), function)
    model.opset_imports[DOMAIN] = 1
