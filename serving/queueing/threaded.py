"""A batcher for callers that have no event loop: it runs in a thread of its own and calls back."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, TypeVar

from ...merge.errors import UtuneError
from ..rejections import EngineFailed, ServerFailed, Stopping
from .batcher import Batcher

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from ..answers import Answers
    from ..registry import Request
    from ..service import Service

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class ThreadedBatcher:
    """A running `Batcher`; `close` drains it. May be used from several threads.

    Attributes:
        batcher: The batcher, to read its numbers.
    """

    def __init__(self, service: Service, **settings: Any) -> None:
        """Start the thread, and return when requests are taken.

        Args:
            service: What answers.
            **settings: Those of `Batcher`.

        Raises:
            UsageError: See `Batcher`.
            ServerFailed: The thread could not start an event loop.
        """
        self._service = service
        # Built here, so that a wrong setting is raised where it was written; entered in the thread.
        self.batcher = Batcher(service, **settings)
        self._lock = threading.Lock()
        self._closed = False
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._main, name="utune-batcher", daemon=True)
        self._thread.start()
        self._started.wait()
        if not self.batcher.ready:
            raise ServerFailed("the batcher's thread did not start")

    def __enter__(self) -> ThreadedBatcher:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def submit(
        self,
        request: Request,
        on_done: Callable[[Answers | UtuneError], None],
        *,
        priority: int = 0,
        timeout_us: int = 0,
        gone: Callable[[], bool] | None = None,
    ) -> None:
        """Answer one checked request in company, without waiting for it.

        Args:
            request: As of `Batcher.submit`.
            on_done: Called exactly once, with the answers or with why there are none: in the batcher's
                thread, which it must not hold up, or in the caller's when the batcher is closed.
            priority: As of `Batcher.submit`.
            timeout_us: As of `Batcher.submit`.
            gone: As of `Batcher.enqueue`; asked in the batcher's thread.
        """
        with self._lock:  # between the look and the call nobody may close the loop
            closed = self._closed
            if not closed:
                self._loop.call_soon_threadsafe(
                    self._enqueue, request, on_done, priority, timeout_us, gone
                )
        if closed:
            refusal = Stopping("the server is stopping and takes no new request")
            self._service.counters.failure(refusal, tasks=request.tasks)
            on_done(refusal)

    def run(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Run something else on the batcher's event loop, beside the requests, and wait for what it gives.

        Args:
            work: Makes the coroutine; called in the batcher's thread. `close` waits for it.

        Raises:
            Stopping: The batcher is closed.
            BaseException: What the coroutine raises.
        """
        with self._lock:
            if self._closed:
                raise Stopping("the server is stopping and takes no new request")
            future = asyncio.run_coroutine_threadsafe(self._tracked(work), self._loop)
        try:
            return future.result()
        except CancelledError as cause:
            raise Stopping("the server stopped before this was done") from cause

    def close(self) -> None:
        """Take nothing new, answer what was taken, and end the thread; not to be called in `on_done`."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _main(self) -> None:
        try:
            asyncio.run(self._run())
        finally:
            self._started.set()  # also when it never did: who waits must hear of it

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._works: set[asyncio.Task[Any]] = set()
        async with self.batcher:
            self._started.set()
            await self._stop.wait()
            await asyncio.gather(*self._works, return_exceptions=True)
        await asyncio.sleep(0)  # the callbacks of the last batch

    async def _tracked(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        task = asyncio.current_task()
        assert task is not None
        self._works.add(task)
        try:
            return await work()
        finally:
            self._works.discard(task)

    def _enqueue(
        self,
        request: Request,
        on_done: Callable[[Answers | UtuneError], None],
        priority: int,
        timeout_us: int,
        gone: Callable[[], bool] | None,
    ) -> None:
        try:
            ticket = self.batcher.enqueue(
                request, priority=priority, timeout_us=timeout_us, gone=gone
            )
        except UtuneError as refusal:
            _call(on_done, refusal)
            return
        ticket.item.answer.add_done_callback(lambda answer: _call(on_done, _outcome(answer)))


def _outcome(answer: asyncio.Future[Answers]) -> Answers | UtuneError:
    error = answer.exception()
    return answer.result() if error is None else as_ours(error)


def as_ours(error: BaseException) -> UtuneError:
    """An error as a caller is told it: a mistake of the server's own becomes `EngineFailed`, and is written down."""
    if isinstance(error, UtuneError):
        return error
    log.error("a request failed", exc_info=error)
    mistake = EngineFailed("the server failed by a mistake of its own", found=repr(error))
    mistake.__cause__ = error
    return mistake


def _call(on_done: Callable[[Answers | UtuneError], None], result: Answers | UtuneError) -> None:
    try:
        on_done(result)
    except Exception:  # the caller's mistake: the other requests' answers still go out
        log.exception("a caller's callback failed")
