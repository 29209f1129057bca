"""The one service behind every server: rows and task names in, logits, labels and scores out.

Servers reach the service through the `Batcher`; a script calls `Service.answer`, or `answer_all` where
the bundle has an engine that answers every task for every row.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..export.engine import CPU, LOGITS
from ..merge.errors import UsageError
from .answers import Answers
from .registry import Registry
from .rejections import EngineFailed, InvalidRequest
from .tasks.life import Tasks, description, entry, fixed, refusal_to_change
from .tasks.resident import Resident, default_rows, row_bytes
from .tasks.store import Store
from .watching.counters import Counters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ..export.bundle import Bundle
    from ..export.engine import Device, Rows, Session
    from ..merge.errors import UtuneError
    from .registry import Request
    from .tasks.versions import Version


class Service:
    """An open bundle and an open engine. Safe to call from several threads.

    Attributes:
        registry: The bundle's tasks and shapes.
        session: The engine that runs it.
        counters: What was done so far.
        resident: Which tasks stand in the engine's bank; None where it holds them as constants.
        tasks: The life of its tasks; None where they cannot change.
    """

    def __init__(
        self,
        bundle: Bundle,
        session: Session,
        *,
        all_tasks: bool = False,
        fan_out: Callable[[], Session] | None = None,
        resident: Resident | None = None,
        store: Store | None = None,
    ) -> None:
        """Join the two.

        Args:
            bundle: What is served.
            session: Its engine.
            all_tasks: Answer every task for every row; then `session` is the engine that does so.
            fan_out: Opens that engine, for a service of one task per row that offers `every` beside it.
                Needless where `session` is that engine.
            resident: The rows of the session's bank, which it reserved; None where it holds all tasks.
            store: Keeps the tasks that come while running; None where none can.

        Raises:
            UsageError: The bundle has no engine of all tasks.
            IncompatibleArtefact: See `Registry` and `Tasks`.
        """
        self.registry = Registry(bundle, all_tasks=all_tasks)
        self.session = session
        self.resident = resident
        self.tasks: Tasks | None = None
        if resident is not None and store is not None:
            self.tasks = Tasks(self.registry, resident, store)
        self.counters = Counters(self.registry.names)
        self._open_fan_out = (lambda: session) if self.registry.fans_out else fan_out

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        device: Device = CPU,
        *,
        all_tasks: bool = False,
        rows: int | None = None,
        keep: Path | None = None,
    ) -> Service:
        """The service over a bundle whose engine is opened here.

        Args:
            bundle: What is served.
            device: Where the engine runs.
            all_tasks: Answer every task for every row.
            rows: Tasks that stand in the engine's memory at once, where the bank is an input; the others are read
                when they are asked for. None: see `default_rows`.
            keep: Folder of the tasks that come while running; None forgets them at the end.

        Raises:
            UsageError: The bundle has no engine of all tasks.
            MissingDependency: The provider cannot be loaded.
            IncompatibleArtefact: The engine cannot be loaded or served.
        """

        def fan_out() -> Session:
            return bundle.open_fan_out(device)

        if all_tasks:
            return cls(bundle, fan_out(), all_tasks=True)
        every = fan_out if bundle.engine_of_all is not None else None
        require_fitting_rows(bundle, rows)
        if bundle.bank != "inputs" or not bundle.engine.takes_rows:
            return cls(bundle, bundle.open_session(device), fan_out=every)
        count = default_rows(bundle, device) if rows is None else rows
        _require_rows(bundle, count)
        session = bundle.open_session(device, rows=count)
        resident = Resident(session, count, row_bytes(bundle), largest_call=bundle.engine.max_batch)
        store = None if fixed(bundle) else Store(keep, bundle.identity)
        return cls(bundle, session, fan_out=every, resident=resident, store=store)

    def close(self) -> None:
        """Forget the tasks that were not to be kept."""
        if self.tasks is not None:
            self.tasks.store.close()

    def warm(self) -> None:
        """Read the tasks into the engine's memory, as many as it has rows for."""
        if self.resident is None:
            return
        for version in list(self.registry.versions.values())[: self.resident.rows]:
            self.resident.fetch(version)

    def add(self, data: bytes, *, update: bool = False) -> Version:
        """Answer a further task, or a new version of one, from now on; in the calling thread.

        Args:
            data: A packed task.
            update: Whether it is to replace one that is there.

        Raises:
            UsageError: The bundle's tasks cannot change; or see `Tasks.stage`.
            IncompatibleArtefact: See `Tasks.stage`.
            EngineFailed: The engine does not answer with finite numbers.
            CheckFailed: It does not answer as torch does.
        """
        tasks = self.require_tasks()
        staged = tasks.stage(data, update=update)
        try:
            (result,) = self.run([tasks.probe(staged)])
            if not isinstance(result, Answers):
                raise result
            tasks.require_right(staged, result)
            tasks.publish(staged, update=update)
        except BaseException:
            tasks.discard(staged)
            raise
        self.counters.know(staged.version.name)
        return staged.version

    def entries(self, name: str | None = None) -> list[dict[str, Any]]:
        """What there is to say of every task, or of one, as JSON values; see `tasks.entry`.

        Raises:
            UsageError: There is no such task.
        """
        if self.tasks is not None:
            return self.tasks.entries(name)
        versions = self.registry.versions
        if name is not None and name not in versions:
            raise UsageError("unknown task", wanted=self.registry.some_names, found=name)
        shown = versions.values() if name is None else [versions[name]]
        return [entry(version, [version.number]) for version in shown]

    def description(self) -> dict[str, Any]:
        """See `tasks.life.description`."""
        return description(self.registry.bundle)

    def require_tasks(self) -> Tasks:
        """The life of the tasks.

        Raises:
            UsageError: They cannot change.
        """
        if self.tasks is None:
            raise refusal_to_change(self.registry.bundle)
        return self.tasks

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
            with self._rows(requests) as rows:
                logits = self.session.run(
                    {
                        name: _joined([r.inputs[name] for r in requests])
                        for name in self.registry.inputs
                    },
                    rows,
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

    @contextmanager
    def _rows(self, requests: Sequence[Request]) -> Iterator[NDArray[np.int64] | None]:
        """The bank row of each row, kept inside the block; None for an engine that takes none."""
        versions = [version for request in requests for version in request.versions]
        if not self.registry.takes_rows:
            yield None
        elif self.resident is None:
            yield np.array([version.place for version in versions], dtype=np.int64)
        else:
            with self.resident.hold(versions) as rows:
                yield rows

    def _answers(
        self, request: Request, logits: NDArray[np.float32], engine_ns: int
    ) -> Answers | UtuneError:
        """The answers to one request, from what the engine said to its rows."""
        if self.registry.all_tasks:  # [n, T, ...] -> [n * T, ...]
            logits = logits.reshape(-1, *logits.shape[2:])
        elif self.registry.fans_out:  # [n, T, ...] -> [n, ...], of each row its own task
            logits = logits[np.arange(len(request)), [v.place for v in request.versions]]
        if not np.isfinite(logits).all():
            return EngineFailed(
                "the engine answered with a value that is not finite",
                where=LOGITS,
                found=f"tasks {', '.join(sorted(set(request.tasks)))}",
            )
        labels: tuple[str, ...] = ()
        scores = np.empty(0, dtype=np.float32)
        if self.registry.labelled:
            labels, scores = _best(request.versions, logits)
        return Answers(
            logits=logits,
            labels=labels,
            scores=scores,
            versions=request.versions,
            engine_ns=engine_ns,
        )


def require_fitting_rows(bundle: Bundle, rows: int | None) -> None:
    """Refuse a number of rows for a bundle whose tasks are constants, and one that a batch could exceed.

    Raises:
        UsageError: It does not fit.
    """
    if rows is None:
        return
    if why := fixed(bundle):
        raise UsageError(
            "--rows is for a bank that is an input of the engine", where=bundle.path, found=why
        )
    _require_rows(bundle, rows)


def _require_rows(bundle: Bundle, rows: int) -> None:
    if rows < bundle.engine.max_batch:
        raise UsageError(
            "a batch could ask for more tasks than the bank has rows",
            wanted=f"--rows of at least {bundle.engine.max_batch}, the largest batch",
            found=rows,
        )


def _best(
    versions: Sequence[Version], logits: NDArray[np.float32]
) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """Top-1 and its softmax over each answer's own classes, computed in float64."""
    labels = [version.labels for version in versions]
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
