"""Both fronts over a repository of models: HTTP and gRPC in this process, and a port for metrics.

Whoever answers may sit here or elsewhere; what is taken is answered before the fronts close.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import threading
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING, Protocol

import numpy as np
import uvicorn

from ..rejections import ServerFailed
from .grpc import grpc_server
from .http import http_app
from .metrics import metrics_app
from .ports import Addresses, host_port, listen

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from starlette.applications import Starlette

    from ..answering import Answerer
    from ..metrics import Model
    from ..models import Repository
    from ..registry import Registry

MIN_BODY = 64 << 20  # bytes; a small model still hears its oversized request out and says why
JSON_GROWTH = (
    16  # as JSON a float32 takes up to about 25 bytes instead of 4, an int64 21 instead of 8
)
DRAIN_SECONDS = 30
KEEP_ALIVE_SECONDS = 75  # longer than a person's pause; many clients do not try again by themselves


class Worker(Protocol):
    """What stands behind the models: entered before the first request comes, left when it has drained."""

    @property
    def service(self) -> Answerer:
        """What it answers."""
        ...

    def stop(self) -> None:
        """Take nothing new; what waits is still answered."""
        ...

    async def __aenter__(self) -> object: ...

    async def __aexit__(self, *exc: object) -> None: ...


@contextlib.asynccontextmanager
async def fronts(
    repository: Repository,
    workers: Sequence[Worker],
    *,
    metrics: Sequence[Model],
    host: str = "127.0.0.1",
    http_port: int = 0,
    grpc_port: int = 0,
    metrics_port: int | None = None,
) -> AsyncIterator[Addresses]:
    """Both servers; leaving the block drains them.

    Args:
        repository: What answers.
        workers: What stands behind it.
        metrics: What the port of metrics shows.
        host: Address to listen on.
        http_port: Port of HTTP; 0 picks a free one.
        grpc_port: Port of gRPC; 0 picks a free one.
        metrics_port: Port of Prometheus metrics; 0 picks a free one, None has none.

    Raises:
        UsageError: A port cannot be had.
        ServerFailed: A server did not start.
    """
    largest = max(_largest_request(worker.service.registry) for worker in workers)
    limit = max(MIN_BODY, JSON_GROWTH * largest)
    version = _version()
    async with contextlib.AsyncExitStack() as stack:
        socket = stack.enter_context(listen(host, http_port))
        webs = [(_web(http_app(repository, version=version, max_body=limit)), socket)]
        if metrics_port is not None:
            claimed = stack.enter_context(listen(host, metrics_port))
            webs.append((_web(metrics_app(metrics)), claimed))
        rpc, grpc_port = grpc_server(
            repository, version=version, max_message=limit, host=host, port=grpc_port
        )
        for worker in workers:
            await stack.enter_async_context(worker)
        await rpc.start()
        serving = [asyncio.create_task(web.serve(sockets=[claimed])) for web, claimed in webs]
        try:
            for (web, _), task in zip(webs, serving, strict=True):
                while not web.started:
                    if task.done():
                        raise ServerFailed("an HTTP server did not start") from task.exception()
                    await asyncio.sleep(0.005)
            ports = [claimed.getsockname()[1] for _, claimed in webs]
            yield Addresses(
                http=host_port(host, ports[0]),
                grpc=host_port(host, grpc_port),
                metrics=host_port(host, ports[1]) if len(ports) > 1 else None,
            )
        finally:
            for worker in workers:
                worker.stop()  # not ready from here on; what was taken is answered
            for web, _ in webs:
                web.should_exit = True
            await asyncio.gather(rpc.stop(DRAIN_SECONDS), *serving)


def _web(app: Starlette) -> _Uvicorn:
    return _Uvicorn(
        uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
    )


def _largest_request(registry: Registry) -> int:
    """Bytes of a full batch."""
    row = sum(
        np.dtype(tensor.dtype).itemsize * math.prod(int(size) for size in tensor.shape[1:])
        for tensor in registry.inputs.values()
    )
    return registry.max_batch * row


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: it would end the process by the signal it caught."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def stop_signals() -> Iterator[asyncio.Event]:
    """An event that Ctrl-C and SIGTERM set, in the running loop's main thread."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(_number: int, _frame: object) -> None:
        loop.call_soon_threadsafe(stop.set)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _version() -> str:
    try:
        return installed_version("utune-deploy")
    except PackageNotFoundError:  # a copy that was carried, not installed
        return "unknown"
