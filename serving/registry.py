"""What a bundle answers: its tasks by name, its shapes, and which requests it takes.

A request is checked alone, row by row, before it meets others; so one bad request never spoils the
engine batch that it would have shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..export.bundle import BANK, FAN_OUT
from ..export.engine import LOGITS, TASK, by_name, row_inputs
from ..export.mapped import map_file
from ..merge.errors import IncompatibleArtefact
from .rejections import InvalidRequest
from .tasks.versions import Version

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from ..export.bundle import Bundle, Engine, Task
    from ..export.engine import Rows, Tensor

MAX_DELAY_MS = 0.1
"""How long a lone request waits for company by default. Short, because under load arrivals gather
while the engine runs; not zero, because of Triton (see `repository.config_text`)."""

ALL = ".all"
"""Behind a bundle's name: the model that answers every task for every row."""

DTYPES = ("float32", "int64")
SHOWN_NAMES = 8


@dataclass(frozen=True)
class Request:
    """A request that was checked: the engine can run it beside any other.

    Attributes:
        inputs: `[n, ...]` each, by name in the engine's order; float32 is finite.
        versions: The task of each answer, as it was when the request was checked: one per row, or all of
            them for the first row, then all for the second.
    """

    inputs: dict[str, NDArray[Any]]
    versions: tuple[Version, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The name of each answer's task."""
        return tuple(version.name for version in self.versions)

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


class Registry:
    """The tasks of a bundle and the shape of its engine, or of its engine of all tasks.

    Attributes:
        bundle: What is served.
        name: The model's name: the bundle's, with `ALL` behind it where all tasks answer.
        inputs: What a request brings, by name in the engine's order.
        answer_shape: Of one task's answer to one row: `(K,)`, or `(Q, K)` with more axes.
        labelled: Whether answers are classes with labels.
        max_batch: Most rows of one request and of one engine call.
        all_tasks: Whether every row is answered by every task, so that requests name none.
        fans_out: Whether the engine answers every task for every row.
        takes_rows: Whether the engine wants a bank row per row.
        versions: The tasks that requests may name, in row order, each in the version in use. Replaced as a
            whole when one changes.
    """

    def __init__(self, bundle: Bundle, *, all_tasks: bool = False) -> None:
        """Read the task table.

        Args:
            bundle: What is served.
            all_tasks: Serve every task for every row, with the engine that does so.

        Raises:
            UsageError: The bundle has no engine of all tasks.
            IncompatibleArtefact: The manifest's engine is not one of rows to logits.
        """
        engine = bundle.require_fan_out() if all_tasks else bundle.engine
        self.bundle = bundle
        self.name = bundle.name + ALL if all_tasks else bundle.name
        self.all_tasks = all_tasks
        self.fans_out = all_tasks or bundle.mode == FAN_OUT
        self.max_batch = engine.max_batch
        self.labelled = all(task.labels for task in bundle.tasks)
        self.inputs: Mapping[str, Tensor] = {t.name: t for t in row_inputs(engine.inputs)}
        self.takes_rows = engine.takes_rows
        logits = [size for t in engine.outputs if t.name == LOGITS for size in t.shape]
        answer = logits[2:] if self.fans_out else logits[1:]
        self.answer_shape = tuple(size for size in answer if isinstance(size, int))
        servable = (
            bool(self.inputs)
            and all(_is_servable(tensor) for tensor in self.inputs.values())
            and list(self.answer_shape) == answer
            and min(self.answer_shape, default=0) >= 1
            and not (self.labelled and len(answer) != 1)
            and not (self.fans_out and self.takes_rows)
        )
        if not servable:
            raise IncompatibleArtefact(
                "the engine cannot be served",
                where=bundle.path / engine.file,
                wanted=f"inputs [batch, ...] of {' or '.join(DTYPES)} and {LOGITS} "
                f"[batch, {'tasks, ' if self.fans_out else ''}{'K' if self.labelled else '...'}], all "
                "sizes but the batch fixed",
                found=[*engine.inputs, *engine.outputs],
            )
        # A free axis of tasks grows with the bank that the engine reads.
        if self.fans_out and not (isinstance(logits[1], str) and engine.reads_bank):
            _require_tasks(bundle, engine, logits[1])
        elif not self.fans_out and not self.takes_rows:
            _require_tasks(bundle, engine, 1)
        bank = _Shipped(bundle) if bundle.bank == "inputs" and not self.fans_out else None
        self.versions: dict[str, Version] = {
            task.name: Version(
                task,
                place=place if self.fans_out else task.row,
                read=None if bank is None else partial(bank.row, task.row),
            )
            for place, task in enumerate(bundle.tasks)
        }
        for task in bundle.tasks:
            self.require_answers(task, where=f"{bundle.path}, task {task.name}")

    @property
    def classes(self) -> int:
        """K, the last size of the logits: the largest class count, or the largest width."""
        return self.answer_shape[-1]

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks' names in row order."""
        return tuple(self.versions)

    @property
    def some_names(self) -> str:
        """The tasks' names for an error's text, which stays short."""
        names = self.names
        more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
        return ", ".join(names[:SHOWN_NAMES]) + more

    def require_answers(self, task: Task, *, where: object) -> None:
        """Refuse a task whose answers the engine's logits cannot hold.

        Raises:
            IncompatibleArtefact: It has too many classes, or labels where the others have none.
        """
        if bool(task.labels) != self.labelled:
            raise IncompatibleArtefact(
                "a task has labels and the others have none"
                if task.labels
                else "a task has no labels and the others have some",
                where=where,
                do="serve it from a bundle of its own",
            )
        width = len(task.labels) if self.labelled else task.width or 0
        if not 1 <= width <= self.classes:
            raise IncompatibleArtefact(
                f"a task has another {'number of labels' if self.labelled else 'width'} than its logits",
                where=where,
                wanted=f"1 to {self.classes}",
                found=width,
            )

    def draw(self) -> dict[str, NDArray[Any]]:
        """One row of seeded noise: normal numbers, ids of 1 or 0."""
        random = np.random.default_rng(0)
        rows = {}
        for name, tensor in self.inputs.items():
            shape = (1, *(int(size) for size in tensor.shape[1:]))
            rows[name] = (
                random.standard_normal(shape).astype(np.float32)
                if tensor.dtype == "float32"
                else np.full(shape, min(1, (tensor.high or 2) - 1), dtype=np.int64)
            )
        return rows

    def check(self, inputs: Rows, tasks: Sequence[str] | None = None) -> Request:
        """A request that the engine can run.

        Args:
            inputs: The one row input, or all of them by name, `[n, ...]` each.
            tasks: A task's name per row; may be left out when the bundle has one task, and is left out
                when all tasks answer.

        Raises:
            InvalidRequest: A missing or unknown input, a wrong dtype or shape, no rows or too many, an
                unknown task, a number of names that is not the number of rows, a value that is not
                finite, or an id that is out of range.
        """
        arrays, count = self._rows(inputs)
        if self.all_tasks:
            if tasks is not None:
                raise InvalidRequest(
                    "the request names tasks, and every task answers it",
                    where=TASK,
                    found=", ".join(dict.fromkeys(tasks)),
                    do=f"leave the tasks out, or ask the model {self.bundle.name}",
                )
            versions = tuple(self.versions.values()) * count
        else:
            versions = self.named(tasks, count)
        return Request(self._finite(arrays), versions)

    def check_version(self, inputs: Rows, version: Version) -> Request:
        """A request that the engine can run, of rows that all ask one version of a task.

        Raises:
            InvalidRequest: As of `check`.
        """
        arrays, count = self._rows(inputs)
        return Request(self._finite(arrays), (version,) * count)

    def check_versions(self, inputs: Rows, versions: tuple[Version, ...]) -> Request:
        """A request that the engine can run, of rows whose versions were looked up by `named`.

        Raises:
            InvalidRequest: As of `check`.
        """
        arrays, _ = self._rows(inputs)
        return Request(self._finite(arrays), versions)

    def _rows(self, inputs: Rows) -> tuple[dict[str, NDArray[Any]], int]:
        """The inputs by name, of the right shapes, and how many rows they have."""
        arrays = by_name(inputs, tuple(self.inputs), InvalidRequest)
        for name, array in arrays.items():
            self._check_shape(name, array)
        return arrays, self._count(arrays)

    def _finite(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The inputs once their values are seen to be right, where kernels can read them."""
        for name, array in arrays.items():
            self._check_values(name, array)
        # A view into a network buffer may start anywhere; kernels expect numbers on their boundary.
        return {k: np.require(v, requirements=["C", "A"]) for k, v in arrays.items()}

    def _check_shape(self, name: str, array: NDArray[Any]) -> None:
        wanted = self.inputs[name]
        if array.dtype != wanted.dtype:
            raise InvalidRequest(
                "an input has the wrong dtype", where=name, wanted=wanted.dtype, found=array.dtype
            )
        if array.shape[1:] != wanted.shape[1:]:
            raise InvalidRequest(
                "an input has the wrong shape",
                where=name,
                wanted=f"[{', '.join(map(str, ('n', *wanted.shape[1:])))}]",
                found=list(array.shape),
            )

    def _count(self, arrays: Mapping[str, NDArray[Any]]) -> int:
        """The number of rows that all inputs have."""
        first, *others = arrays
        count = len(arrays[first])
        for name in others:
            if len(arrays[name]) != count:
                raise InvalidRequest(
                    "the inputs have different numbers of rows",
                    where=name,
                    wanted=f"{count}, as {first} has",
                    found=len(arrays[name]),
                )
        if not count:
            raise InvalidRequest("the request has no rows", where=first)
        if count > self.max_batch:
            raise InvalidRequest(  # Triton's words
                f"inference request batch-size must be <= {self.max_batch} for '{self.name}'",
                where=first,
                found=f"{count} rows",
                do="split it into several requests",
            )
        return count

    def _check_values(self, name: str, array: NDArray[Any]) -> None:
        high = self.inputs[name].high
        if array.dtype == np.float32 and not (finite := np.isfinite(array)).all():
            row = _first_row(~finite)
            raise InvalidRequest(
                "an input holds a value that is not finite",
                where=f"{name}, row {row}",
                wanted="finite float32",
                found=f"{int((~finite[row]).sum())} NaN or infinite values",
            )
        if high is not None and (outside := (array < 0) | (array >= high)).any():
            row = _first_row(outside)
            raise InvalidRequest(
                "an input holds an id that is out of range",
                where=f"{name}, row {row}",
                wanted=f"0 to {high - 1}",
                found=array[row][outside[row]][0],
            )

    def named(self, tasks: Sequence[str] | None, count: int) -> tuple[Version, ...]:
        """The version in use of each row's task.

        Args:
            tasks: As of `check`.
            count: Of rows.

        Raises:
            InvalidRequest: A task is unknown, or they are not one per row.
        """
        versions = self.versions  # one table for all rows, whatever changes meanwhile
        if tasks is None:
            if len(versions) > 1:
                raise InvalidRequest(
                    "the request names no task",
                    where=TASK,
                    wanted=f"one of {self.some_names} for each of the {count} rows",
                )
            return tuple(versions.values()) * count
        if len(tasks) != count:
            raise InvalidRequest(
                "the request needs one task per row", where=TASK, wanted=count, found=len(tasks)
            )
        for row, name in enumerate(tasks):
            if name not in versions:
                raise InvalidRequest(
                    "unknown task",
                    where=f"{TASK}, row {row}",
                    wanted=f"one of {self.some_names}",
                    found=name,
                )
        return tuple(versions[name] for name in tasks)


def _require_tasks(bundle: Bundle, engine: Engine, count: int | str) -> None:
    """Refuse an engine that answers another number of tasks than the bundle has."""
    if count != len(bundle.tasks):
        raise IncompatibleArtefact(
            "the engine answers another number of tasks than the bundle has",
            where=bundle.path / engine.file,
            wanted=f"{len(bundle.tasks)}: {', '.join(task.name for task in bundle.tasks)}",
            found=count,
        )


def _is_servable(tensor: Tensor) -> bool:
    """Whether rows of it can be told apart and joined: a free batch axis, then fixed sizes."""
    _, *sizes = tensor.shape or (0,)
    return (
        tensor.dtype in DTYPES
        and bool(sizes)
        and all(isinstance(size, int) and size >= 1 for size in sizes)
    )


def _first_row(wrong: NDArray[np.bool_]) -> int:
    """The first of `[n, ...]` rows that is wrong anywhere."""
    return int(np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))[0])


class _Shipped:
    """The bank that a bundle shipped.

    Its file is mapped once, when it is first read: what was opened is served to the end, also when the folder is
    moved away, as it is to drain a Triton.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    @cached_property
    def _bank(self) -> dict[str, NDArray[Any]]:
        return map_file(self._bundle.path / BANK)[1]

    def row(self, row: int) -> dict[str, NDArray[Any]]:
        """One task's row of it, `[...]` by engine input name."""
        return {name: tensor[row] for name, tensor in self._bank.items()}
