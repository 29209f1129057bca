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

from ..protocol import SERVER
from ..rejections import ServerFailed
from ..shared_memory import Regions
from ..tasks.life import fixed
from ..tasks.resident import row_bytes
from .framing import Framing, framed
from .grpc import grpc_server
from .http import http_app
from .metrics import metrics_app
from .ports import Addresses, host_port, listen

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from starlette.applications import Starlette

    from ..answering import Answerer
    from ..models import Repository
    from ..registry import Registry
    from ..watching.metrics import Model

MIN_BODY = 64 << 20  # bytes; a small model still hears its oversized request out and says why
JSON_GROWTH = (
    16  # as JSON a float32 takes up to about 25 bytes instead of 4, an int64 21 instead of 8
)
PACKED_GROWTH = 2  # base64 takes four bytes for three
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
    shared_memory: bool = False,
) -> AsyncIterator[Addresses]:
    """Both servers over a bundle's models; leaving the block drains them.

    Args:
        repository: What answers.
        workers: What stands behind it.
        metrics: What the port of metrics shows.
        host: Address to listen on.
        http_port: Port of HTTP; 0 picks a free one.
        grpc_port: Port of gRPC; 0 picks a free one.
        metrics_port: Port of Prometheus metrics; 0 picks a free one, None has none.
        shared_memory: Whether clients may name regions of this machine's shared memory.

    Raises:
        UsageError: A port cannot be had.
        ServerFailed: A server did not start.
    """
    async with contextlib.AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker)
        addresses = await stack.enter_async_context(
            carrying(
                repository,
                host=host,
                http_port=http_port,
                grpc_port=grpc_port,
                metrics=None if metrics_port is None else (metrics_app(metrics), metrics_port),
                max_body=max(_largest_body(worker.service.registry) for worker in workers),
                shared_memory=shared_memory,
            )
        )
        try:
            yield addresses
        finally:
            for worker in workers:
                worker.stop()  # not ready from here on; what was taken is answered


@contextlib.asynccontextmanager
async def carrying(
    repository: Repository,
    *,
    host: str = "127.0.0.1",
    http_port: int = 0,
    grpc_port: int = 0,
    metrics: tuple[Starlette, int] | None = None,
    max_body: int = MIN_BODY,
    name: str = SERVER,
    shared_memory: bool = False,
) -> AsyncIterator[Addresses]:
    """HTTP and gRPC over any models; leaving the block drains them.

    Args:
        repository: What answers.
        host: Address to listen on.
        http_port: Port of HTTP; 0 picks a free one.
        grpc_port: Port of gRPC; 0 picks a free one.
        metrics: What answers on a port of its own, and that port.
        max_body: Largest request in bytes.
        name: What the server calls itself.
        shared_memory: Whether clients may name regions of this machine's shared memory.

    Raises:
        UsageError: A port cannot be had.
        ServerFailed: A server did not start.
    """
    version = _version()
    regions = Regions(offered=shared_memory)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(regions.unregister)
        socket = stack.enter_context(listen(host, http_port))
        app = http_app(repository, version=version, max_body=max_body, name=name, regions=regions)
        webs = [(_web(app), socket)]
        if metrics is not None:
            webs.append((_web(metrics[0]), stack.enter_context(listen(host, metrics[1]))))
        rpc, grpc_port = grpc_server(
            repository,
            version=version,
            max_message=max_body,
            host=host,
            port=grpc_port,
            name=name,
            regions=regions,
        )
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
            for web, _ in webs:
                web.should_exit = True
            await asyncio.gather(rpc.stop(DRAIN_SECONDS), *serving)


def _web(app: Starlette) -> _Uvicorn:
    return _Uvicorn(
        uvicorn.Config(
            framed(app),
            http=Framing,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
    )


def _largest_body(registry: Registry) -> int:
    """Bytes of a full batch as JSON, and of a packed task where one may come."""
    row = sum(
        np.dtype(tensor.dtype).itemsize * math.prod(int(size) for size in tensor.shape[1:])
        for tensor in registry.inputs.values()
    )
    packed = 0 if fixed(registry.bundle) else PACKED_GROWTH * row_bytes(registry.bundle)
    return max(MIN_BODY, JSON_GROWTH * registry.max_batch * row) + packed


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
