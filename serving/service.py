"""The one service behind every server: rows and task names in, logits, labels and scores out.

Servers reach the service through the `Batcher`; a script calls `Service.answer`, or `answer_all` where
the bundle has an engine that answers every task for every row.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..export.engine import CPU, LOGITS
from ..merge.errors import UsageError
from .counters import Counters
from .registry import Registry
from .rejections import EngineFailed, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from ..export.bundle import Bundle
    from ..export.engine import Device, Rows, Session
    from ..merge.errors import UtuneError
    from .registry import Request


@dataclass(frozen=True)
class Answers:
    """What the service says to one request.

    Attributes:
        logits: `[n, K]` float32, K the largest class count; columns past a task's own classes hold
            the lowest float32. `[n, Q, K]` where a task answers with more axes.
        labels: The name of the best of the task's own classes, `n` of them; none without labels.
        scores: `[n]` float32, the softmax of that class over the task's own classes; `[0]` without
            labels.
        tasks: The task of each answer.
        engine_ns: How long the engine call took that these rows were part of.

    Where every task answers every row, the answers to the first row stand before those to the second.
    """

    logits: NDArray[np.float32]
    labels: tuple[str, ...]
    scores: NDArray[np.float32]
    tasks: tuple[str, ...]
    engine_ns: int

    def __len__(self) -> int:
        return len(self.tasks)

    def split(self, size: int) -> list[Answers]:
        """The same in parts of `size` answers each."""
        return [
            replace(
                self,
                logits=self.logits[at : at + size],
                labels=self.labels[at : at + size],
                scores=self.scores[at : at + size],
                tasks=self.tasks[at : at + size],
            )
            for at in range(0, len(self), size)
        ]


class Service:
    """An open bundle and an open engine. Safe to call from several threads.

    Attributes:
        registry: The bundle's tasks and shapes.
        session: The engine that runs it.
        counters: What was done so far.
    """

    def __init__(
        self,
        bundle: Bundle,
        session: Session,
        *,
        all_tasks: bool = False,
        fan_out: Callable[[], Session] | None = None,
    ) -> None:
        """Join the two.

        Args:
            bundle: What is served.
            session: Its engine.
            all_tasks: Answer every task for every row; then `session` is the engine that does so.
            fan_out: Opens that engine, for a service of one task per row that offers `every` beside it.
                Needless where `session` is that engine.

        Raises:
            UsageError: The bundle has no engine of all tasks.
            IncompatibleArtefact: See `Registry`.
        """
        self.registry = Registry(bundle, all_tasks=all_tasks)
        self.session = session
        self.counters = Counters(self.registry.names)
        self._open_fan_out = (lambda: session) if self.registry.fans_out else fan_out

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        device: Device = CPU,
        *,
        all_tasks: bool = False,
    ) -> Service:
        """The service over a bundle whose engine is opened here.

        Args:
            bundle: What is served.
            device: Where the engine runs.
            all_tasks: Answer every task for every row.

        Raises:
            UsageError: The bundle has no engine of all tasks.
            MissingDependency: The provider cannot be loaded.
            IncompatibleArtefact: The engine cannot be loaded or served.
        """

        def fan_out() -> Session:
            return bundle.open_fan_out(device)

        if all_tasks:
            return cls(bundle, fan_out(), all_tasks=True)
        return cls(
            bundle,
            bundle.open_session(device),
            fan_out=fan_out if bundle.engine_of_all is not None else None,
        )

    @cached_property
    def every(self) -> Service | None:
        """The service of the same bundle that answers every task for every row; None without its engine.

        The engine is opened when this is first asked for.

        Raises:
            MissingDependency: The provider cannot be loaded.
            IncompatibleArtefact: The engine cannot be loaded or served.
        """
        if self.registry.all_tasks:
            return self
        if self._open_fan_out is None:
            return None
        return Service(self.registry.bundle, self._open_fan_out(), all_tasks=True)

    def answer_all(self, inputs: Rows) -> list[Answers]:
        """Answer one request with every task, in the calling thread.

        Args:
            inputs: As of `answer`.

        Returns:
            For each row the answers of all tasks, in row order.

        Raises:
            UsageError: The bundle has no engine of all tasks.
            InvalidRequest: See `Registry.check`.
            EngineFailed: The engine raised, or its logits are not finite.
        """
        if self.every is None:
            raise UsageError(
                "the service has no engine that answers every task at once",
                where=self.registry.bundle.path,
            )
        return self.every.answer(inputs).split(len(self.registry.names))

    def answer(self, inputs: Rows, tasks: Sequence[str] | None = None) -> Answers:
        """Answer one request in the calling thread.

        Args:
            inputs: The one row input, or all of them by name, `[n, ...]` each; pictures as the rows' tasks
                want them preprocessed.
            tasks: A task's name per row; may be left out when the bundle has one task.

        Raises:
            InvalidRequest: See `Registry.check`.
            EngineFailed: The engine raised, or its logits are not finite.
        """
        start = time.perf_counter_ns()
        try:
            request = self.registry.check(inputs, tasks)
        except InvalidRequest as refusal:
            self.counters.failure(refusal, time.perf_counter_ns() - start)
            raise
        queued = time.perf_counter_ns()
        (result,) = self.run([request])
        spent = time.perf_counter_ns() - start
        if not isinstance(result, Answers):
            self.counters.failure(result, spent, request.tasks)
            raise result
        self.counters.answer(
            len(request),
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
        try:
            logits = self.session.run(
                {
                    name: _joined([r.inputs[name] for r in requests])
                    for name in self.registry.inputs
                },
                _joined([r.rows for r in requests]) if self.registry.takes_rows else None,
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
        self.counters.batch(
            sum(map(len, requests)), len({task for request in requests for task in request.tasks})
        )
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
        """The answers to one request, from what the engine said to its rows."""
        if self.registry.all_tasks:  # [n, T, ...] -> [n * T, ...]
            logits = logits.reshape(-1, *logits.shape[2:])
        elif self.registry.fans_out:  # [n, T, ...] -> [n, ...], of each row its own task
            logits = logits[np.arange(len(request)), request.rows]
        if not np.isfinite(logits).all():
            return EngineFailed(
                "the engine answered with a value that is not finite",
                where=LOGITS,
                found=f"tasks {', '.join(sorted(set(request.tasks)))}",
            )
        labels: tuple[str, ...] = ()
        scores = np.empty(0, dtype=np.float32)
        if self.registry.labelled:
            labels, scores = self._best(request.tasks, logits)
        return Answers(
            logits=logits, labels=labels, scores=scores, tasks=request.tasks, engine_ns=engine_ns
        )

    def _best(
        self, tasks: Sequence[str], logits: NDArray[np.float32]
    ) -> tuple[tuple[str, ...], NDArray[np.float32]]:
        """Top-1 and its softmax over each answer's own classes, computed in float64."""
        labels = [self.registry.labels(task) for task in tasks]
        own = np.array([len(names) for names in labels])
        padding = np.arange(logits.shape[1]) >= own[:, None]
        masked = np.where(padding, -np.inf, logits.astype(np.float64))
        best = masked.argmax(axis=1)
        shifted = np.exp(masked - masked.max(axis=1, keepdims=True))
        return (
            tuple(names[index] for names, index in zip(labels, best, strict=True)),
            (1.0 / shifted.sum(axis=1)).astype(np.float32),
        )


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
