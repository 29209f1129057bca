"""The one service behind every server: images and task names in, logits, labels and scores out.

Servers reach the service through the `Batcher`; a script calls `Service.answer`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..export.engine import LOGITS
from .counters import Counters
from .registry import Registry
from .rejections import EngineFailed, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ..export.bundle import Bundle
    from ..export.engine import Session
    from ..merge.errors import UtuneError
    from .registry import Request


@dataclass(frozen=True)
class Answers:
    """What the service says to one request.

    Attributes:
        logits: `[n, K]` float32, K the largest class count; columns past a task's own classes hold
            the lowest float32.
        labels: The name of the best of the task's own classes, `n` of them.
        scores: `[n]` float32, the softmax of that class over the task's own classes.
        tasks: The task of each row.
        engine_ns: How long the engine call took that these rows were part of.
    """

    logits: NDArray[np.float32]
    labels: tuple[str, ...]
    scores: NDArray[np.float32]
    tasks: tuple[str, ...]
    engine_ns: int

    def __len__(self) -> int:
        return len(self.labels)


class Service:
    """An open bundle and an open engine. Safe to call from several threads.

    Attributes:
        registry: The bundle's tasks and shapes.
        session: The engine that runs it.
        counters: What was done so far.
    """

    def __init__(self, bundle: Bundle, session: Session) -> None:
        """Join the two.

        Raises:
            IncompatibleArtefact: See `Registry`.
        """
        self.registry = Registry(bundle)
        self.session = session
        self.counters = Counters(self.registry.names)

    @classmethod
    def open(cls, bundle: Bundle, *, provider: str = "cpu", threads: int | None = None) -> Service:
        """The service over a bundle whose engine is opened here.

        Raises:
            MissingDependency: The provider cannot be loaded.
            IncompatibleArtefact: The engine cannot be loaded or served.
        """
        return cls(bundle, bundle.open_session(provider=provider, threads=threads))

    def answer(self, images: NDArray[np.float32], tasks: Sequence[str] | None = None) -> Answers:
        """Answer one request in the calling thread.

        Args:
            images: `[n, *image_shape]` float32, preprocessed as the rows' tasks want it.
            tasks: A task's name per row; may be left out when the bundle has one task.

        Raises:
            InvalidRequest: See `Registry.check`.
            EngineFailed: The engine raised, or its logits are not finite.
        """
        start = time.perf_counter_ns()
        try:
            request = self.registry.check(images, tasks)
        except InvalidRequest:
            self.counters.failure(time.perf_counter_ns() - start)
            raise
        queued = time.perf_counter_ns()
        (result,) = self.run([request])
        spent = time.perf_counter_ns() - start
        if not isinstance(result, Answers):
            self.counters.failure(spent)
            raise result
        self.counters.answer(
            request.tasks,
            request_ns=spent,
            queue_ns=queued - start,
            engine_ns=result.engine_ns,
        )
        return result

    def run(self, requests: Sequence[Request]) -> list[Answers | UtuneError]:
        """Run checked requests in one engine call.

        When the call raises, each request is run alone, so that only those fail that must.

        Args:
            requests: At least one; together at most `max_batch` rows.

        Returns:
            For each request its answers or its error.
        """
        start = time.perf_counter_ns()
        images = [request.images for request in requests]
        rows = [request.rows for request in requests]
        try:
            logits = self.session.run(
                images[0] if len(images) == 1 else np.concatenate(images),
                np.concatenate(rows) if self.registry.takes_rows else None,
            )
        except Exception as cause:  # whatever a runtime raises belongs to the request, not to us
            if len(requests) > 1:
                return [result for request in requests for result in self.run([request])]
            failure = EngineFailed(
                "the engine failed",
                where=self.session.provider,
                found=(str(cause) or repr(cause)).splitlines()[0],
            )
            failure.__cause__ = cause
            return [failure]
        self.counters.batch()
        spent = time.perf_counter_ns() - start
        ends = np.cumsum([len(request) for request in requests])[:-1]
        parts = np.split(logits, ends)
        return [
            self._answers(request, part, spent)
            for request, part in zip(requests, parts, strict=True)
        ]

    def _answers(
        self, request: Request, logits: NDArray[np.float32], engine_ns: int
    ) -> Answers | UtuneError:
        """Top-1 and its softmax over each row's own classes, computed in float64."""
        if not np.isfinite(logits).all():
            return EngineFailed(
                "the engine answered with a value that is not finite",
                where=LOGITS,
                found=f"tasks {', '.join(sorted(set(request.tasks)))}",
            )
        labels = [self.registry.labels(task) for task in request.tasks]
        own = np.array([len(names) for names in labels])
        padding = np.arange(logits.shape[1]) >= own[:, None]
        masked = np.where(padding, -np.inf, logits.astype(np.float64))
        best = masked.argmax(axis=1)
        shifted = np.exp(masked - masked.max(axis=1, keepdims=True))
        return Answers(
            logits=logits,
            labels=tuple(names[index] for names, index in zip(labels, best, strict=True)),
            scores=(1.0 / shifted.sum(axis=1)).astype(np.float32),
            tasks=request.tasks,
            engine_ns=engine_ns,
        )
