"""Examples that ranges are measured on: pictures or arrays of the user's, or seeded noise.

Every second example of a task is held out: it makes no range and judges the result.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..export.engine import IMAGES, TASK
from ..export.saturation import Examples
from ..merge.errors import UsageError
from .pictures import read_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    GivenBank: TypeAlias = (
        Mapping[str, NDArray[Any]] | Callable[[Sequence[int]], Mapping[str, NDArray[Any]]]
    )

    from ..merge.backbone import Backbone
    from ..merge.preprocessing import Preprocessing

ROWS = 1024  # of all tasks together, at most
LEAST = 8  # of each task, where half of them judge
NOISE = 16
AT_ONCE = 8
_NO_BANK: GivenBank = MappingProxyType({})


@dataclass(frozen=True)
class Calibration:
    """Examples and the task that each belongs to.

    Attributes:
        inputs: In words: what they are.
        rows: Row inputs by name, `[n, ...]` each.
        task: `[n]`, the bank row of each.
        real: Whether they are the user's, and not noise.
    """

    inputs: str
    rows: Mapping[str, NDArray[Any]]
    task: NDArray[np.int64]
    real: bool = True

    @property
    def digest(self) -> str:
        """SHA-256 over the numbers themselves."""
        found = hashlib.sha256(self.task.tobytes())
        for name, values in sorted(self.rows.items()):
            found.update(f"{name} {values.dtype} {values.shape}".encode())
            found.update(np.ascontiguousarray(values).tobytes())
        return found.hexdigest()

    def halves(self) -> tuple[Calibration, Calibration]:
        """Every other example of each task: those to calibrate with, and those held out."""
        odd = _turns(self.task) % 2 == 1
        return self.some(~odd), self.some(odd)

    def some(self, chosen: NDArray[np.bool_]) -> Calibration:
        """Those of a mask `[n]`."""
        rows = {name: values[chosen] for name, values in self.rows.items()}
        return replace(self, rows=rows, task=self.task[chosen])

    def examples(
        self, names: Sequence[str], bank: GivenBank = _NO_BANK, *, at_once: int = AT_ONCE
    ) -> Examples:
        """The examples as an engine with these inputs takes them, tasks taking turns.

        Args:
            names: Of the engine's inputs.
            bank: Float32 tensors by input name, where the bank is an input; or what gives them of some tasks, who
                then are the rows of a batch's own bank.
            at_once: Examples of a batch.
        """
        batches = _Batches(self, tuple(names), bank, at_once)
        return Examples(self.inputs, len(self.task), batches)


class _Batches:
    """Batches that are cut when they are asked for."""

    def __init__(
        self, of: Calibration, names: tuple[str, ...], bank: GivenBank, at_once: int
    ) -> None:
        self.of, self.names, self.bank, self.at_once = of, names, bank, at_once

    def __iter__(self) -> Iterator[dict[str, NDArray[Any]]]:
        order = np.argsort(_turns(self.of.task), kind="stable")
        for at in range(0, len(order), self.at_once):
            chosen = order[at : at + self.at_once]
            rows = {name: values[chosen] for name, values in self.of.rows.items()}
            task, bank = self.of.task[chosen], self.bank
            if callable(bank):
                asked, task = np.unique(task, return_inverse=True)
                bank = bank(asked.tolist())
            given = {**rows, TASK: task, **bank}
            yield {name: given[name] for name in self.names}


def _turns(task: NDArray[np.int64]) -> NDArray[np.int64]:
    """The how-manieth example of its task each is."""
    turn = np.zeros(len(task), dtype=np.int64)
    for number in np.unique(task):
        rows = np.flatnonzero(task == number)
        turn[rows] = np.arange(len(rows))
    return turn


def noise(backbone: Backbone, tasks: int, seed: int = 0) -> Calibration:
    """Seeded noise, as `check` feeds it: one example of each of up to 64 tasks, 16 at least."""
    count = max(NOISE, min(tasks, 4 * NOISE))
    task = np.linspace(0, tasks - 1, count).round().astype(np.int64)
    if backbone.pictures:
        drawn = np.random.default_rng(seed + count)
        shape = (count, *backbone.input_size)
        rows = {IMAGES: drawn.standard_normal(shape).astype(np.float32)}
    else:
        values = backbone.draw(count, seed=seed + count)
        rows = {e.name: t.numpy() for e, t in zip(backbone.inputs, values, strict=True)}
    return Calibration("seeded noise", rows, task, real=False)


def of_pictures(
    pictures: Mapping[str, NDArray[np.float32]], tasks: Sequence[str], inputs: str
) -> Calibration:
    """Preprocessed pictures by task, as one set; tasks without any have none in it."""
    found = [(number, pictures[name]) for number, name in enumerate(tasks) if name in pictures]
    task = np.concatenate([np.full(len(rows), number) for number, rows in found])
    rows = {IMAGES: np.concatenate([rows for _, rows in found])}
    return Calibration(inputs, rows, task.astype(np.int64))


def read_calibration(
    path: Path, backbone: Backbone, tasks: Sequence[tuple[str, Preprocessing | None]]
) -> Calibration:
    """Examples of a folder of pictures, or of a file of arrays.

    Args:
        path: A folder, with one folder per task in it or for all of them; or an `.npz` file with an array
            `[n, ...]` by the name of each row input, `TASK/INPUT` for one task's own.
        backbone: Whose inputs they are.
        tasks: Names and preprocessing, in row order.

    Raises:
        UsageError: There is nothing there, too little, or not what the backbone reads.
    """
    if path.is_dir():
        each = max(LEAST, ROWS // len(tasks))
        pictures = read_folder(path, tasks, enough=each, spread=True)
        found = of_pictures(pictures, [name for name, _ in tasks], f"pictures of {path.name}")
    elif path.suffix == ".npz" and path.is_file():
        found = _arrays(path, backbone, [name for name, _ in tasks])
    else:
        raise UsageError(
            "there are no examples to calibrate with",
            where=path,
            wanted="a folder, or an .npz file",
        )
    for number, (name, _) in enumerate(tasks):
        if (count := int((found.task == number).sum())) < LEAST:
            raise UsageError(
                f"there are too few examples to calibrate task {name} with",
                where=path,
                wanted=f"at least {LEAST}; half of them judge the result",
                found=count,
            )
    return found


def _arrays(path: Path, backbone: Backbone, tasks: Sequence[str]) -> Calibration:
    inputs = [entry.name for entry in backbone.inputs]
    wanted = {
        entry.name: (tuple(value.shape[1:]), value.numpy().dtype)
        for entry, value in zip(backbone.inputs, backbone.draw(2), strict=True)
    }
    task, rows = [], {name: [] for name in inputs}
    with np.load(path, allow_pickle=False) as file:
        for number, name in enumerate(tasks):
            own = [key if (key := f"{name}/{i}") in file else i for i in inputs]
            if missing := [key for key in own if key not in file]:
                raise UsageError(
                    "the file of examples lacks an array",
                    where=path,
                    wanted=f"{', '.join(missing)}, or the same after '{name}/'",
                    found=", ".join(file.files),
                )
            arrays = {i: file[key] for i, key in zip(inputs, own, strict=True)}
            for i, array in arrays.items():
                if (array.shape[1:], array.dtype) != wanted[i]:
                    raise UsageError(
                        "an array of examples is not what the backbone reads",
                        where=f"{path}: {i}",
                        wanted=f"[n, {', '.join(map(str, wanted[i][0]))}] {wanted[i][1]}",
                        found=f"{list(array.shape)} {array.dtype}",
                    )
            if len({len(array) for array in arrays.values()}) > 1:
                raise UsageError("arrays of examples have different numbers of rows", where=path)
            count = min(len(arrays[inputs[0]]), max(LEAST, ROWS // len(tasks)))
            task += [number] * count
            for i, array in arrays.items():
                rows[i].append(array[:count])
    stacked = {name: np.concatenate(parts) for name, parts in rows.items()}
    return Calibration(f"arrays of {path.name}", stacked, np.array(task, dtype=np.int64))
