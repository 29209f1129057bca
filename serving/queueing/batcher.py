"""Rows of different requests and different tasks share one engine call.

Who goes first is the `FairQueue`'s to say. A batch leaves when it is full, or when its oldest request has
waited `max_delay_ms`; while the engine runs, arrivals gather for the next batch, so that under load
the delay costs nothing. The engine has one thread of its own: the event loop stays free.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..answers import Answers
from ..registry import MAX_DELAY_MS
from ..rejections import Cancelled, Expired, InvalidRequest, Overloaded, Stopping
from .queue import DEFAULT_PRIORITY, PRIORITY_LEVELS, FairQueue
from .rates import Rates

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..registry import Request
    from ..service import Service
    from .queue import Ticket

QUEUED_BATCHES = 32
"""Full batches that may wait; at 10 ms each, the last one waits a third of a second."""

_TICK_NS = 1_000_000
"""Event loops wake at whole milliseconds (Linux' epoll), which a shorter delay cannot wait for."""

PATIENCE_NS = 10_000_000
"""How long callers are taken to be still there: asking costs more than what a shorter wait could save."""


@dataclass(eq=False)
class _Waiting:
    request: Request
    arrived: int  # perf_counter_ns
    answer: asyncio.Future[Answers] = field(repr=False)
    gone: Callable[[], bool] | None = None
    counted: bool = True


class Batcher:
    """An async context manager: inside it requests may be submitted; leaving it drains."""

    def __init__(
        self,
        service: Service,
        *,
        max_delay_ms: float = MAX_DELAY_MS,
        weights: Mapping[str, float] | None = None,
        max_queued_rows: int | None = None,
        max_task_rows: int | None = None,
        rate: float | None = None,
        rates: Mapping[str, float] | None = None,
        default_timeout_ms: float | None = None,
        priority_levels: int = PRIORITY_LEVELS,
        default_priority: int = DEFAULT_PRIORITY,
    ) -> None:
        """Set the numbers that decide how requests meet.

        Args:
            service: What answers.
            max_delay_ms: Longest that a request waits for company while the engine is idle.
            weights: See `FairQueue`.
            max_queued_rows: Rows that may wait before newcomers are refused; None allows
                `QUEUED_BATCHES` full batches.
            max_task_rows: Rows of one task that may wait; None for no limit but that of all.
            rate: Rows per second that are taken of each task that `rates` does not name; None for no limit.
            rates: The same by task.
            default_timeout_ms: Longest that a request waits which does not say so itself; None for ever.
            priority_levels: See `FairQueue`.
            default_priority: See `FairQueue`.

        Raises:
            UsageError: See `FairQueue` and `Rates`.
        """
        self.service = service
        self._max_batch = service.registry.max_batch
        self._max_delay_ns = int(max_delay_ms * 1e6)
        self._default_timeout_ns = int((default_timeout_ms or 0) * 1e6)
        self._queue: FairQueue[_Waiting] = FairQueue(
            max_rows=max_queued_rows or QUEUED_BATCHES * self._max_batch,
            max_task_rows=max_task_rows,
            weights=weights,
            priority_levels=priority_levels,
            default_priority=default_priority,
        )
        self._rates = Rates(rate, rates, least_burst=self._max_batch)
        self._changed = asyncio.Event()
        self._stopping = False
        self._engine = ThreadPoolExecutor(max_workers=1, thread_name_prefix="utune-engine")
        self._loop: asyncio.Task[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def ready(self) -> bool:
        """Whether a request would be taken."""
        return self._loop is not None and not self._loop.done() and not self._stopping

    @property
    def queued_requests(self) -> int:
        """Requests that wait for an engine call."""
        return len(self._queue)

    @property
    def queued_rows(self) -> int:
        """Their rows."""
        return self._queue.rows

    async def __aenter__(self) -> Batcher:
        self._loop = asyncio.create_task(self._serve(), name="utune-batcher")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.stop()
        if self._loop is not None:
            await self._loop
        if self._alarm is not None:
            self._alarm.cancel()
        self._engine.shutdown(wait=True)

    def stop(self) -> None:
        """Take nothing new; what waits is still answered."""
        self._stopping = True
        self._changed.set()

    async def submit(self, request: Request, *, priority: int = 0, timeout_us: int = 0) -> Answers:
        """Answer one checked request in company.

        Cancelling the call takes the request out of the queue.

        Args:
            request: What to answer.
            priority: Its level, 1 first; 0, or a level that is not there, is the default one.
            timeout_us: Longest that it waits for its engine call, in microseconds; 0 for the default.

        Raises:
            InvalidRequest: The request is larger than a batch.
            Overloaded: Too many rows wait, or one of its tasks has used up its rate.
            Expired: The request waited too long.
            Stopping: The batcher drains.
            EngineFailed: The engine could not answer this request.
        """
        return await self._answered(self.enqueue(request, priority=priority, timeout_us=timeout_us))

    async def ask(self, request: Request) -> Answers:
        """Answer a request of the server's own: before all others, past limits and rates, and in no task's counts.

        Args:
            request: What to answer; see `submit`.

        Raises:
            InvalidRequest: The request is larger than a batch.
            Stopping: The batcher drains.
            EngineFailed: The engine could not answer this request.
        """
        self._check(request)
        answer: asyncio.Future[Answers] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(request, time.perf_counter_ns(), answer, counted=False)
        ticket = self._queue.put(
            waiting, rows=len(request), tasks=(), now=waiting.arrived, priority=1
        )
        self._changed.set()
        return await self._answered(ticket)

    async def _answered(self, ticket: Ticket[_Waiting]) -> Answers:
        waiting = ticket.item
        try:
            return await waiting.answer
        except asyncio.CancelledError as cancelled:
            self._queue.remove(ticket)
            if waiting.answer.cancelled():  # else it was answered, and counted, an instant before
                self._count_failure(waiting, cancelled)
            raise

    def enqueue(
        self,
        request: Request,
        *,
        priority: int = 0,
        timeout_us: int = 0,
        gone: Callable[[], bool] | None = None,
    ) -> Ticket[_Waiting]:
        """Let a request wait, for callers on this event loop that do not; `.item.answer` is its future.

        Args:
            request: As of `submit`.
            priority: As of `submit`.
            timeout_us: As of `submit`.
            gone: Says whether the caller left; asked before the engine call of a request that waited longer
                than `PATIENCE_NS`, which then is left out. None where callers cancel the future.

        Raises:
            InvalidRequest: The request is larger than a batch.
            Overloaded: As of `submit`.
            Stopping: The batcher drains.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(request, time.perf_counter_ns(), loop.create_future(), gone)
        timeout_ns = timeout_us * 1000 or self._default_timeout_ns
        try:
            self._check(request)
            self._rates.check(request.tasks, waiting.arrived)
            ticket = self._queue.put(
                waiting,
                rows=len(request),
                tasks=request.tasks,
                now=waiting.arrived,
                priority=priority,
                deadline=waiting.arrived + timeout_ns if timeout_ns else None,
            )
        except (InvalidRequest, Overloaded, Stopping) as refusal:
            self._count_failure(waiting, refusal)
            raise
        self._rates.count(request.tasks, waiting.arrived)
        self._changed.set()
        if timeout_ns:
            self._set_alarm()
        return ticket

    def _check(self, request: Request) -> None:
        if not self.ready:
            raise Stopping("the server is stopping and takes no new request")
        if not 1 <= len(request) <= self._max_batch:
            raise InvalidRequest(
                "the request does not fit an engine call",
                wanted=f"1 to {self._max_batch} rows",
                found=len(request),
            )

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := await self._next_batch():
            begun = time.perf_counter_ns()
            batch = [waiting for waiting in batch if not self._left(waiting, begun)]
            if not batch:
                continue
            requests = [waiting.request for waiting in batch]
            try:
                results = await loop.run_in_executor(self._engine, self.service.run, requests)
            except Exception as mistake:  # our own: its callers learn of it, the others live on
                for waiting in batch:
                    self._fail(waiting, mistake)
                continue
            ended = time.perf_counter_ns()
            for waiting, result in zip(batch, results, strict=True):
                if not isinstance(result, Answers):
                    self._fail(waiting, result)
                elif not waiting.answer.done():  # else it was cancelled while the engine ran
                    waiting.answer.set_result(result)
                    if waiting.counted:
                        self._count_answer(waiting, result, begun, ended)

    async def _next_batch(self) -> list[_Waiting]:
        """The next requests that fit one engine call; empty when drained."""
        while True:
            self._changed.clear()
            self._refuse_expired()
            oldest = self._queue.oldest
            if oldest is not None:
                due = oldest + self._max_delay_ns - time.perf_counter_ns()
                if self._stopping or due <= 0 or self._queue.rows >= self._max_batch:
                    return [ticket.item for ticket in self._queue.take(self._max_batch)]
                if due < _TICK_NS:
                    await asyncio.sleep(
                        0
                    )  # others run meanwhile; the processor has nothing else to do
                    continue
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), due / 1e9)
            elif self._stopping:
                return []
            else:
                await self._changed.wait()

    def _left(self, waiting: _Waiting, now: int) -> bool:
        """Whether a caller has left; its request fails then."""
        if waiting.gone is None or now - waiting.arrived < PATIENCE_NS or not waiting.gone():
            return False
        self._fail(waiting, Cancelled("the caller left before the engine was called"))
        return True

    def _set_alarm(self) -> None:
        """Be woken at the next deadline, also while the engine runs: a caller hears in time."""
        deadline = self._queue.next_deadline
        if deadline is None:
            return
        loop = asyncio.get_running_loop()
        when = loop.time() + (deadline - time.perf_counter_ns()) / 1e9
        if self._alarm is not None:
            if self._alarm.when() <= when:
                return
            self._alarm.cancel()
        self._alarm = loop.call_at(when, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self._refuse_expired()
        self._set_alarm()

    def _refuse_expired(self) -> None:
        now = time.perf_counter_ns()
        for ticket in self._queue.expire(now):
            waited = (now - ticket.arrived) / 1e6
            error = Expired(
                "the request waited longer than it allowed",
                found=f"{waited:.1f} ms in the queue",
                do="allow more time, or try again later",
            )
            self._fail(ticket.item, error)

    def _fail(self, waiting: _Waiting, error: BaseException) -> None:
        if not waiting.answer.done():
            waiting.answer.set_exception(error)
            self._count_failure(waiting, error)

    def _count_answer(self, waiting: _Waiting, result: Answers, begun: int, ended: int) -> None:
        self.service.counters.answer(
            len(waiting.request),
            result.tasks,
            request_ns=ended - waiting.arrived,
            queue_ns=begun - waiting.arrived,
            engine_ns=result.engine_ns,
            output_ns=max(0, ended - begun - result.engine_ns),
        )

    def _count_failure(self, waiting: _Waiting, error: BaseException) -> None:
        if not waiting.counted:
            return
        spent = time.perf_counter_ns() - waiting.arrived
        self.service.counters.failure(error, spent, waiting.request.tasks)
