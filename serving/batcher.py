"""Rows of different requests and different tasks share one engine call.

Requests wait in the order of arrival. A batch leaves when it is full, or when its oldest request has
waited `max_delay_ms`; while the engine runs, arrivals gather for the next batch, so that under load
the delay costs nothing. The engine has one thread of its own: the event loop stays free.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .registry import MAX_DELAY_MS
from .rejections import Overloaded, Stopping
from .service import Answers

if TYPE_CHECKING:
    from .registry import Request
    from .service import Service

QUEUED_BATCHES = 32
"""Full batches that may wait; at 10 ms each, the last one waits a third of a second."""


@dataclass(eq=False)
class _Waiting:
    request: Request
    arrived: int  # perf_counter_ns
    answer: asyncio.Future[Answers] = field(repr=False)


class Batcher:
    """An async context manager: inside it requests may be submitted; leaving it drains."""

    def __init__(
        self,
        service: Service,
        *,
        max_delay_ms: float = MAX_DELAY_MS,
        max_queued_rows: int | None = None,
    ) -> None:
        """Set the two numbers that decide how requests meet.

        Args:
            service: What answers.
            max_delay_ms: Longest that a request waits for company while the engine is idle.
            max_queued_rows: Rows that may wait before newcomers are refused; None allows
                `QUEUED_BATCHES` full batches.
        """
        self.service = service
        self._max_batch = service.registry.max_batch
        self._max_delay_ns = int(max_delay_ms * 1e6)
        self._max_queued_rows = max_queued_rows or QUEUED_BATCHES * self._max_batch
        self._queue: deque[_Waiting] = deque()
        self._queued_rows = 0
        self._changed = asyncio.Event()
        self._stopping = False
        self._engine = ThreadPoolExecutor(max_workers=1, thread_name_prefix="utune-engine")
        self._loop: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether a request would be taken."""
        return self._loop is not None and not self._loop.done() and not self._stopping

    async def __aenter__(self) -> Batcher:
        self._loop = asyncio.create_task(self._serve(), name="utune-batcher")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.stop()
        if self._loop is not None:
            await self._loop
        self._engine.shutdown(wait=True)

    def stop(self) -> None:
        """Take nothing new; what waits is still answered."""
        self._stopping = True
        self._changed.set()

    async def submit(self, request: Request) -> Answers:
        """Answer one checked request in company.

        Cancelling the call takes the request out of the queue.

        Raises:
            Overloaded: Too many rows wait.
            Stopping: The batcher drains.
            EngineFailed: The engine could not answer this request.
        """
        if not self.ready:
            raise Stopping("the server is stopping and takes no new request")
        if self._queued_rows + len(request) > self._max_queued_rows:
            raise Overloaded(
                "the queue is full",
                wanted=f"at most {self._max_queued_rows} rows waiting",
                found=self._queued_rows,
                do="try again later",
            )
        waiting = _Waiting(
            request, time.perf_counter_ns(), asyncio.get_running_loop().create_future()
        )
        self._queue.append(waiting)
        self._queued_rows += len(request)
        self._changed.set()
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            if waiting in self._queue:
                self._queue.remove(waiting)
                self._queued_rows -= len(request)
            raise

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := await self._next_batch():
            begun = time.perf_counter_ns()
            requests = [waiting.request for waiting in batch]
            try:
                results = await loop.run_in_executor(self._engine, self.service.run, requests)
            except Exception as mistake:  # our own: its callers learn of it, the others live on
                for waiting in batch:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(mistake)
                continue
            ended = time.perf_counter_ns()
            for waiting, result in zip(batch, results, strict=True):
                if waiting.answer.done():  # cancelled while the engine ran
                    continue
                if not isinstance(result, Answers):
                    waiting.answer.set_exception(result)
                    continue
                waiting.answer.set_result(result)
                self.service.counters.answer(
                    len(waiting.request),
                    result.tasks,
                    request_ns=ended - waiting.arrived,
                    queue_ns=begun - waiting.arrived,
                    engine_ns=result.engine_ns,
                )

    async def _next_batch(self) -> list[_Waiting]:
        """The next requests that fit one engine call; empty when drained."""
        while True:
            self._changed.clear()
            if self._queue:
                due = self._queue[0].arrived + self._max_delay_ns - time.perf_counter_ns()
                if self._stopping or due <= 0 or self._queued_rows >= self._max_batch:
                    return self._take()
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), due / 1e9)
            elif self._stopping:
                return []
            else:
                await self._changed.wait()

    def _take(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        rows = 0
        while self._queue and rows + len(self._queue[0].request) <= self._max_batch:
            waiting = self._queue.popleft()
            rows += len(waiting.request)
            batch.append(waiting)
        self._queued_rows -= rows
        return batch
