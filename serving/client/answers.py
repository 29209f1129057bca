"""What a client is told: answers to rows, and facts of tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...export.engine import LOGITS
from ...merge.no_class import NO_CLASS
from ...merge.preprocessing import Preprocessing
from ..protocol import LABEL, SCORE
from ..rejections import BadReply
from .tensors import texts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

_NO_CLASS_IN_HALF = float(np.finfo(np.float16).min)
"""What an engine in float16 gives in the place of `NO_CLASS`."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What a task says to one picture, video or row.

    Attributes:
        label: The best class's name; None for a task without labels.
        score: Its softmax over the task's classes; None for a task without labels.
        logits: `[K]` float32, K the task's classes, in the order of its labels; `[..., K]` of a task without
            labels. Of a video, the mean over its views.
        task: The task that was asked; None where none was named and the server did not say.
    """

    label: str | None
    score: float | None
    logits: NDArray[np.float32]
    task: str | None


@dataclass(frozen=True)
class TaskInfo:
    """A task that a server has.

    Attributes:
        name: Its name.
        version: The version that answers.
        versions: All that are kept.
        labels: Its classes, in the order of the logits; none of a task without labels.
        preprocessing: How it wants its pictures; None if it reads none.
        width: Of a task without labels, the size of the last axis of its answer.
        resident: Whether it lies in the engine's bank now.
        pinned: Whether it may not be moved out.
        delta: SHA-256 of the file that it was made of.
        alias: The model that answers with it alone, where Triton has one for each task; see `docs/triton.md`.
        no_alias: Why this one has none there.
    """

    name: str
    version: int
    versions: tuple[int, ...]
    labels: tuple[str, ...]
    preprocessing: Preprocessing | None
    width: int | None
    resident: bool
    pinned: bool
    delta: str
    alias: str | None = None
    no_alias: str | None = None

    @property
    def views(self) -> int:
        """Rows that one picture or video of the task becomes."""
        clip = self.preprocessing and self.preprocessing.clip
        return clip.views if clip else 1


def read_task(entry: Mapping[str, Any], *, where: object) -> TaskInfo:
    """A task from its entry in a reply.

    Raises:
        BadReply: A field is missing or of another kind.
        IncompatibleArtefact: Its preprocessing cannot be read.
    """
    try:
        settings = entry["preprocessing"]
        return TaskInfo(
            name=str(entry["name"]),
            version=int(entry["version"]),
            versions=tuple(int(version) for version in entry["versions"]),
            labels=tuple(str(label) for label in entry["labels"]),
            preprocessing=None
            if settings is None
            else Preprocessing.from_json(settings, where=f"{where}, task {entry['name']}"),
            width=None if entry["width"] is None else int(entry["width"]),
            resident=bool(entry["resident"]),
            pinned=bool(entry["pinned"]),
            delta=str(entry["delta"]),
            alias=_text(entry.get("alias")),
            no_alias=_text(entry.get("no_alias")),
        )
    except (KeyError, TypeError, ValueError) as cause:
        raise BadReply("a task's entry cannot be read", where=where, found=repr(cause)) from cause


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def read_answers(
    outputs: Mapping[str, NDArray[Any]], tasks: Sequence[str | None], *, where: object
) -> list[Answer]:
    """The answers to the rows of one request.

    Args:
        outputs: The reply's tensors.
        tasks: The task of each row.
        where: Who answered.

    Raises:
        BadReply: A tensor is missing, or not of so many rows.
    """
    count = len(tasks)
    logits = outputs.get(LOGITS)
    labels, scores = outputs.get(LABEL), outputs.get(SCORE)
    if logits is None or logits.ndim < 2 or (labels is None) != (scores is None):
        raise BadReply("the reply lacks an output", where=where, found=", ".join(outputs))
    if any(len(array) != count for array in (logits, labels, scores) if array is not None):
        raise BadReply("the reply has another number of rows", where=where, wanted=count)
    said: list[tuple[str | None, float | None]] = [(None, None)] * count
    if labels is not None and scores is not None:
        try:
            said = list(zip(texts(labels), scores.ravel().tolist(), strict=True))
        except ValueError as cause:  # no text, or not one for each row
            raise BadReply("the labels cannot be read", where=where, found=str(cause)) from cause
    return [
        Answer(label, score, _own(row), task)
        for (label, score), row, task in zip(said, logits, tasks, strict=True)
    ]


def mean(views: Sequence[Answer], labels: Sequence[str]) -> Answer:
    """The answer to a video, from those to its views: the mean of the logits, in float64.

    Args:
        views: At least one, of one task.
        labels: The task's classes.
    """
    if len(views) == 1:
        return views[0]
    logits = np.mean([view.logits for view in views], axis=0, dtype=np.float64)
    label = score = None
    if labels:
        shifted = np.exp(logits - logits.max())
        label, score = labels[int(logits.argmax())], float(shifted.max() / shifted.sum())
    return Answer(label, score, np.asarray(logits, dtype=np.float32), views[0].task)


def _own(row: NDArray[np.float32]) -> NDArray[np.float32]:
    """A row's logits without the columns behind them that no class of its task has."""
    absent = (row < NO_CLASS / 2) | (row == _NO_CLASS_IN_HALF)
    absent = absent.reshape(-1, row.shape[-1]).all(axis=0)
    width = int(np.flatnonzero(~absent)[-1]) + 1 if not absent.all() else row.shape[-1]
    return row[..., :width].copy()
