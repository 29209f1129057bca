"""What a bundle answers: its tasks by name, its shapes, and which requests it takes.

A request is checked alone, row by row, before it meets others; so one bad request never spoils the
engine batch that it would have shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..export.engine import IMAGES, LOGITS, TASK
from ..merge.errors import IncompatibleArtefact
from .rejections import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ..export.bundle import Bundle

MAX_DELAY_MS = 0.1
"""How long a lone request waits for company by default. Short, because under load arrivals gather
while the engine runs; not zero, because of Triton (see `repository.config_text`)."""


@dataclass(frozen=True)
class Request:
    """A request that was checked: the engine can run it beside any other.

    Attributes:
        images: `[n, 3, H, W]`, or `[n, 3, T, H, W]` of clips, float32, finite.
        tasks: The task's name of each row, `n` of them.
        rows: `[n]` int64, the bank row of each.
    """

    images: NDArray[np.float32]
    tasks: tuple[str, ...]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tasks)


class Registry:
    """The tasks of a bundle and the shape of its engine.

    Attributes:
        bundle: What is served.
        image_shape: `(3, H, W)` of one row, `(3, T, H, W)` of a clip.
        classes: K, the width of the logits.
        max_batch: Most rows of one request and of one engine call.
        takes_rows: Whether the engine wants a bank row per image.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Read the task table.

        Raises:
            IncompatibleArtefact: The manifest's engine is not one of images and rows to logits.
        """
        self.bundle = bundle
        self.max_batch = bundle.engine.max_batch
        inputs = {tensor.name: tensor for tensor in bundle.engine.inputs}
        outputs = {tensor.name: tensor for tensor in bundle.engine.outputs}
        image_shape = inputs[IMAGES].shape[1:] if IMAGES in inputs else ()
        classes = outputs[LOGITS].shape[-1] if LOGITS in outputs else 0
        self.image_shape = tuple(size for size in image_shape if isinstance(size, int))
        fixed = self.image_shape == image_shape and len(image_shape) in (3, 4)
        if not fixed or not isinstance(classes, int) or classes < 1:
            raise IncompatibleArtefact(
                "the engine cannot be served",
                where=bundle.path,
                wanted=f"{IMAGES} [batch, 3, H, W] or [batch, 3, T, H, W] and {LOGITS} [batch, K], all "
                "sizes but the batch fixed",
                found=[*bundle.engine.inputs, *bundle.engine.outputs],
            )
        self.classes = classes
        self.takes_rows = TASK in inputs
        self._tasks = {task.name: task for task in bundle.tasks}
        if not self.takes_rows and len(self._tasks) != 1:
            raise IncompatibleArtefact(
                "a bundle of several tasks has an engine that takes no task row",
                where=bundle.path,
                wanted=f"an engine input {TASK!r}",
                found=sorted(inputs),
            )
        for task in bundle.tasks:
            if not 1 <= len(task.labels) <= classes:
                raise IncompatibleArtefact(
                    "a task has another number of labels than its logits",
                    where=f"{bundle.path}, task {task.name}",
                    wanted=f"1 to {classes}",
                    found=len(task.labels),
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks' names in row order."""
        return tuple(self._tasks)

    def labels(self, task: str) -> tuple[str, ...]:
        """The class names of a known task, in the order of its logits."""
        return self._tasks[task].labels

    def check(self, images: NDArray[np.float32], tasks: Sequence[str] | None = None) -> Request:
        """A request that the engine can run.

        Args:
            images: `[n, *image_shape]` float32.
            tasks: A task's name per row; may be left out when the bundle has one task.

        Raises:
            InvalidRequest: Wrong dtype or shape, no rows or too many, an unknown task, a number of
                names that is not the number of rows, or a pixel that is not finite.
        """
        shape = ", ".join(map(str, self.image_shape))
        if images.dtype != np.float32:
            raise InvalidRequest(
                "the images have the wrong dtype",
                where=IMAGES,
                wanted="float32",
                found=images.dtype,
            )
        if images.shape[1:] != self.image_shape:
            raise InvalidRequest(
                "the images have the wrong shape",
                where=IMAGES,
                wanted=f"[n, {shape}]",
                found=list(images.shape),
            )
        count = len(images)
        if not 1 <= count <= self.max_batch:
            raise InvalidRequest(
                "the request has too many rows" if count else "the request has no rows",
                where=IMAGES,
                wanted=f"1 to {self.max_batch} rows",
                found=count,
                do="split it into several requests" if count else None,
            )
        names = self._names(tasks, count)
        finite = np.isfinite(images)
        if not finite.all():
            row = int(np.flatnonzero(~finite.reshape(count, -1).all(axis=1))[0])
            raise InvalidRequest(
                "the images hold a value that is not finite",
                where=f"{IMAGES}, row {row}",
                wanted="finite float32",
                found=f"{int((~finite[row]).sum())} NaN or infinite values",
            )
        rows = np.array([self._tasks[name].row for name in names], dtype=np.int64)
        # A view into a network buffer may start anywhere; kernels expect float32 on its boundary.
        return Request(np.require(images, requirements=["C", "A"]), names, rows)

    def _names(self, tasks: Sequence[str] | None, count: int) -> tuple[str, ...]:
        """The task of each row, every one known."""
        if tasks is None:
            if len(self._tasks) > 1:
                raise InvalidRequest(
                    "the request names no task",
                    where=TASK,
                    wanted=f"one of {', '.join(self._tasks)} for each of the {count} rows",
                )
            return self.names * count
        if len(tasks) != count:
            raise InvalidRequest(
                "the request needs one task per row", where=TASK, wanted=count, found=len(tasks)
            )
        for row, name in enumerate(tasks):
            if name not in self._tasks:
                raise InvalidRequest(
                    "unknown task",
                    where=f"{TASK}, row {row}",
                    wanted=f"one of {', '.join(self._tasks)}",
                    found=name,
                )
        return tuple(tasks)
