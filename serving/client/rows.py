"""What users ask with, as rows of a model's inputs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ...export.engine import IMAGES, TASK
from ..pictures import read_rows
from ..rejections import InvalidRequest
from .tensors import elements

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..pictures import Picture
    from .answers import TaskInfo
    from .calls import ModelFacts

Source: TypeAlias = "Picture | NDArray[Any] | Mapping[str, NDArray[Any]]"
"""A picture or video; or one row that is prepared already: the array of the model's one input, or arrays by
name, each without the batch axis."""

_KINDS = {"FP32": ("float32", "f"), "INT64": ("int64", "iu")}


@dataclass(frozen=True)
class Item:
    """One thing that is asked.

    Attributes:
        source: What the user gave.
        task: Its task's name; None to leave it to a server of one task.
    """

    source: Source
    task: str | None

    @property
    def is_picture(self) -> bool:
        """Whether it is prepared here, as its task says."""
        return not isinstance(self.source, (np.ndarray, Mapping))


def items(
    sources: Sequence[Source] | NDArray[Any] | Mapping[str, NDArray[Any]],
    tasks: str | Sequence[str] | None,
) -> list[Item]:
    """The things that are asked, in order.

    Args:
        sources: One by one; or arrays `[n, ...]`, cut along their first axis.
        tasks: A name for all, one for each, or none.

    Raises:
        InvalidRequest: There are other numbers of tasks than of sources.
    """
    if isinstance(sources, (str, bytes, os.PathLike)):
        raise InvalidRequest(
            "several things are asked with one", found=type(sources).__name__, do="give a list"
        )
    one_by_one: list[Any]
    if isinstance(sources, Mapping):
        arrays = {name: np.asarray(array) for name, array in sources.items()}
        counts = {len(array) if array.ndim else 0 for array in arrays.values()}
        if len(counts) > 1:
            raise InvalidRequest(
                "the inputs have different numbers of rows",
                found=", ".join(f"{name} {list(a.shape)}" for name, a in arrays.items()),
            )
        one_by_one = [
            {name: array[row] for name, array in arrays.items()}
            for row in range(max(counts, default=0))
        ]
    else:
        one_by_one = list(sources)
    names = [tasks] * len(one_by_one) if tasks is None or isinstance(tasks, str) else list(tasks)
    if len(names) != len(one_by_one):
        raise InvalidRequest(
            "the request needs one task per row", wanted=len(one_by_one), found=len(names)
        )
    return [Item(source, name) for source, name in zip(one_by_one, names, strict=True)]


def prepare(
    asked: Sequence[Item], facts: Sequence[TaskInfo | None], model: ModelFacts
) -> list[dict[str, NDArray[Any]]]:
    """The rows of each item, `[views, ...]` by input, with its task's name where it has one.

    Args:
        asked: What is asked.
        facts: The task of each; None for an item that is no picture.
        model: Whose inputs they are.

    Raises:
        InvalidRequest: A row is not what the model's inputs are.
        UsageError: A picture cannot be read, or not for its task.
    """
    return [
        _named(_picture(item, task, model) if task else _arrays(item, model), item.task)
        for item, task in zip(asked, facts, strict=True)
    ]


def join(rows: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Rows of several items as the inputs of one request, `[n, ...]` each."""
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _picture(item: Item, task: TaskInfo, model: ModelFacts) -> dict[str, NDArray[Any]]:
    if set(_inputs(model)) != {IMAGES}:
        raise InvalidRequest(
            "the model does not read pictures",
            wanted=f"arrays by name: {', '.join(_inputs(model))}",
            found=type(item.source).__name__,
        )
    if task.preprocessing is None:
        raise InvalidRequest(
            "the task reads no pictures",
            where=task.name,
            wanted="an array",
            found=type(item.source).__name__,
        )
    if not _is_picture(item.source):
        raise InvalidRequest(
            "this is neither a picture nor a row",
            wanted="a path, the bytes of a file, a Pillow picture or several, an array, or arrays by name",
            found=type(item.source).__name__,
        )
    return {IMAGES: read_rows(item.source, task.preprocessing)}  # type: ignore[arg-type]


def _is_picture(source: Any) -> bool:
    if isinstance(source, Sequence) and not isinstance(source, (str, bytes)):
        return bool(source) and all(hasattr(frame, "convert") for frame in source)
    return isinstance(source, (str, bytes, os.PathLike)) or hasattr(source, "convert")


def _arrays(item: Item, model: ModelFacts) -> dict[str, NDArray[Any]]:
    wanted = _inputs(model)
    given = item.source if isinstance(item.source, Mapping) else None
    if given is None:
        if len(wanted) != 1:
            raise InvalidRequest(
                "one array is given for several inputs",
                wanted=f"arrays by name: {', '.join(wanted)}",
            )
        given = {next(iter(wanted)): item.source}
    if set(given) != set(wanted):
        raise InvalidRequest(
            "the row has other inputs than the model",
            wanted=", ".join(wanted),
            found=", ".join(map(str, given)),
        )
    return {
        name: _row(name, np.asarray(given[name]), *facts)[None] for name, facts in wanted.items()
    }


def _row(name: str, array: NDArray[Any], datatype: str, sizes: tuple[int, ...]) -> NDArray[Any]:
    """An array in its input's dtype, where that loses nothing.

    Raises:
        InvalidRequest: It would, or the array is of another shape.
    """
    dtype, kinds = _KINDS.get(datatype, ("", ""))
    if array.dtype.kind not in kinds or not np.can_cast(array.dtype, dtype, "safe"):
        raise InvalidRequest(
            "an input has the wrong dtype",
            where=name,
            wanted=dtype or datatype,
            found=array.dtype,
            do=f"cast it: array.astype(np.{dtype})" if array.dtype.kind in kinds else None,
        )
    if array.shape != sizes:
        raise InvalidRequest(
            "an input has the wrong shape",
            where=name,
            wanted=f"{list(sizes)} of one row",
            found=list(array.shape),
        )
    return array.astype(dtype, copy=False)


def _inputs(model: ModelFacts) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: facts for name, facts in model.inputs.items() if name != TASK}


def _named(rows: dict[str, NDArray[Any]], task: str | None) -> dict[str, NDArray[Any]]:
    if task is None:
        return rows
    count = len(next(iter(rows.values())))
    return {**rows, TASK: elements([task] * count)[:, None]}
