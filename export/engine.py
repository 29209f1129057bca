"""What an engine is to the floors above: rows and their tasks in, logits out.

An engine reads three kinds of inputs, told apart by their names alone:

    row inputs   what a request brings, `[B, ...]` float32 or int64: `images`, or `input_ids` beside
                 `attention_mask`; every input that is not one of the two below
    `task`       the bank row of each, where rows choose their tasks
    `bank/...`   the tasks' tensors, where the bank is an input

A target (see `targets/`) builds an engine file and opens it as a `Session`. Nothing here needs torch,
onnx or a runtime, so a server can import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from ..merge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

IMAGES = "images"  # [B, 3, H, W] float32, [B, 3, T, H, W] of clips: the one row input of a picture engine
TASK = "task"  # [B] int64, a row of the bank
BANK_PREFIX = "bank/"  # of the names of bank inputs
LOGITS = "logits"  # [B, K] float32, K the largest class count; [B, T, K] when every task answers each row
LABEL = "label"  # of served models: the best class's name
SCORE = "score"  # of served models: its softmax over the task's own classes
VALID = "valid"  # of graphs that are served without our code: whether the row could be answered

Rows: TypeAlias = "NDArray[Any] | Mapping[str, NDArray[Any]]"
"""What an engine is given: the array of its one row input, or arrays by name."""


@dataclass(frozen=True)
class Tensor:
    """One input or output of an engine.

    Attributes:
        name: Its name in the graph.
        dtype: NumPy's name of its element type.
        shape: Sizes; a free axis is a name (`"batch"`).
        high: Of integer ids, the number that all lie below; they are not negative. None: not stated.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    high: int | None = None


def is_row_input(name: str) -> bool:
    """Whether an input of that name is brought by a request."""
    return name != TASK and not name.startswith(BANK_PREFIX)


def row_inputs(inputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Those of an engine's inputs that a request brings, in the engine's order."""
    return tuple(tensor for tensor in inputs if is_row_input(tensor.name))


def by_name(
    inputs: Rows, names: Sequence[str], refusal: type[UsageError] = UsageError
) -> dict[str, NDArray[Any]]:
    """The row inputs of an engine by name, in the engine's order.

    Args:
        inputs: The array of the one row input, or arrays by name.
        names: The engine's row inputs.
        refusal: What is raised.

    Raises:
        UsageError: A name is missing or unknown, or one array is given for several inputs.
    """
    if not isinstance(inputs, Mapping):
        if len(names) != 1:
            raise refusal(
                "the engine reads several inputs, and one array without a name is given",
                wanted=f"arrays by name: {', '.join(names)}",
                found=f"one array of shape {list(inputs.shape)}",
            )
        return {names[0]: inputs}
    if set(inputs) != set(names):
        raise refusal(
            "the inputs are not those that the engine reads",
            wanted=", ".join(names),
            found=", ".join(map(str, inputs)) or "none",
        )
    return {name: inputs[name] for name in names}


@dataclass(frozen=True)
class Device:
    """Where an engine runs, and with what.

    Attributes:
        provider: `cpu` or `cuda`; never another silently.
        threads: Threads inside one operator; None lets the runtime choose.
        kernels: A library of fused operators for the provider, see `export/kernels`; None for standard ones.
        prepared: A folder where engine files are kept as ONNX Runtime prepares them, see `targets/prepared.py`; of the
            provider `cpu`.
        arena: Keep the memory that a call took for the next one; without it the system gives and takes it. Of the
            provider `cpu`.
        memory_mb: The most that the runtime takes of a CUDA device, in MiB; None sets no limit.
    """

    provider: str = "cpu"
    threads: int | None = None
    kernels: Path | None = None
    prepared: Path | None = None
    arena: bool = True
    memory_mb: int | None = None


CPU = Device()


class Bound(Protocol):
    """A batch of one size on the device: `feed` it, `run` it, `fetch` its answer, as often as you like.

    It reads the bank that there was when it was bound.
    """

    def feed(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        """Copy rows, and `task`, to the device; by name, of the shapes that were bound."""
        ...

    def run(self) -> None:
        """Compute the answer; returns when the device has."""
        ...

    def fetch(self) -> NDArray[np.float32]:
        """The answer, copied to the host."""
        ...


class Session(Protocol):
    """An open engine. Safe to call from several threads."""

    provider: str
    """The execution provider that really runs it, in the runtime's own name."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the exporter wrote into the engine file."""
        ...

    def run(self, inputs: Rows, task: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Logits of rows.

        Args:
            inputs: The one row input, or all of them by name, `[B, ...]` each: `[B, 3, H, W]` float32 of
                pictures, `[B, 3, T, H, W]` of clips.
            task: `[B]`, the bank row of each; an engine of one task, or of every task at once, takes none.

        Returns:
            `[B, K]`, `[B, Q, K]` where a task answers with more axes; with an axis of tasks behind the
            first where every task answers each row. Columns past a task's own classes hold a
            quarter of the lowest float32; a row outside the bank yields NaN.

        Raises:
            UsageError: The inputs are not those that the engine reads, or the task rows are missing.
        """
        ...

    def bind(self, inputs: Rows, task: NDArray[np.int64] | None = None) -> Bound:
        """Rows of one batch size whose inputs and answer stay where the provider computes.

        Raises:
            UsageError: As of `run`; or the shape of the answer is not known before it runs.
        """
        ...

    def replace_bank(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Serve from other task tensors from the next call on (bank as inputs only)."""
        ...

    def reserve(self, rows: int) -> None:
        """Make the bank so many rows long, to be written one by one; what it held is gone.

        Memory that no row was written to is not touched where the system allows that (the CPU of Linux and
        macOS).

        Raises:
            UsageError: The tasks are constants of this engine, or its target cannot write single rows.
        """
        ...

    def write_row(self, row: int, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Put one task's tensors, `[...]` each by input name, into a row that `reserve` made.

        No call that is running may have been given this row; calls with other rows may run meanwhile.

        Raises:
            IncompatibleArtefact: A tensor is missing, unknown, or of another type or shape than the engine reads.
        """
        ...
