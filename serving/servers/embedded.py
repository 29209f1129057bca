"""The embedded server: HTTP and gRPC in this process, on every system, over one batcher per model."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import threading
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING, Any

import numpy as np
import uvicorn

from ...export.engine import CPU
from ..batcher import Batcher
from ..bundle_models import BundleModel, BundleRepository
from ..metrics import Model
from ..protocol import SERVER
from ..registry import MAX_DELAY_MS
from ..rejections import ServerFailed
from ..service import Service
from ..shared_memory import Regions
from .grpc import grpc_server
from .http import http_app
from .metrics import metrics_app
from .ports import Addresses, host_port, listen

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from starlette.applications import Starlette

    from ...export.bundle import Bundle
    from ...export.engine import Device
    from ..models import Repository
    from ..registry import Registry

MIN_BODY = 64 << 20  # bytes; a small model still hears its oversized request out and says why
JSON_GROWTH = (
    16  # as JSON a float32 takes up to about 25 bytes instead of 4, an int64 21 instead of 8
)
PACKED_GROWTH = 2  # base64 takes four bytes for three
DRAIN_SECONDS = 30
KEEP_ALIVE_SECONDS = 75  # longer than a person's pause; many clients do not try again by themselves


def serve_embedded(
    bundle: Bundle,
    *,
    host: str = "127.0.0.1",
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int | None = None,
    device: Device = CPU,
    rows: int | None = None,
    keep: Path | None = None,
    task_control: bool = True,
    shared_memory: bool = False,
    on_ready: Callable[[Addresses], None] | None = None,
    **queueing: Any,
) -> None:
    """Serve a bundle until Ctrl-C or SIGTERM, then answer what was taken and return.

    Args:
        bundle: What to serve.
        host: Address to listen on.
        http_port: Port of HTTP; 0 picks a free one.
        grpc_port: Port of gRPC; 0 picks a free one.
        metrics_port: Port of Prometheus metrics; 0 picks a free one, None has none.
        device: Where the engine runs.
        rows: See `Service.open`.
        keep: See `Service.open`.
        task_control: Whether clients may add, change and remove tasks.
        shared_memory: Whether clients may name regions of this machine's shared memory.
        on_ready: Called once, when requests are answered.
        **queueing: Settings of `Batcher`.

    Raises:
        UsageError: A port cannot be had.
        MissingDependency: The provider cannot be loaded.
        IncompatibleArtefact: The engine cannot be loaded or served.
    """
    service = Service.open(bundle, device, rows=rows, keep=keep)

    async def until_signalled() -> None:
        with _stop_signals() as stop:
            async with running(
                service,
                host=host,
                http_port=http_port,
                grpc_port=grpc_port,
                metrics_port=metrics_port,
                task_control=task_control,
                shared_memory=shared_memory,
                **queueing,
            ) as addresses:
                if on_ready is not None:
                    on_ready(addresses)
                await stop.wait()

    try:
        asyncio.run(until_signalled())
    finally:
        service.close()


@contextlib.asynccontextmanager
async def running(
    service: Service,
    *,
    host: str = "127.0.0.1",
    http_port: int = 0,
    grpc_port: int = 0,
    metrics_port: int | None = None,
    task_control: bool = True,
    shared_memory: bool = False,
    max_delay_ms: float = MAX_DELAY_MS,
    **queueing: Any,
) -> AsyncIterator[Addresses]:
    """Both servers over a service; leaving the block drains them.

    Args:
        service: What answers; where its bundle has an engine of all tasks, with the model of all tasks
            beside it.
        host: Address to listen on.
        http_port: Port of HTTP; 0 picks a free one.
        grpc_port: Port of gRPC; 0 picks a free one.
        metrics_port: Port of Prometheus metrics; 0 picks a free one, None has none.
        task_control: Whether clients may add, change and remove tasks.
        shared_memory: Whether clients may name regions of this machine's shared memory.
        max_delay_ms: Longest that a request waits for company.
        **queueing: Further settings of `Batcher`.

    Raises:
        UsageError: A port cannot be had, or a setting makes no sense.
    """
    services = [service]
    if service.every not in (None, service):
        services.append(service.every)
    batchers = [Batcher(each, max_delay_ms=max_delay_ms, **queueing) for each in services]
    models = [BundleModel(batcher, max_delay_ms=max_delay_ms) for batcher in batchers]
    repository = BundleRepository(models, control=task_control)
    limit = max(MIN_BODY, *(JSON_GROWTH * _largest_request(each.registry) for each in services))
    if service.tasks is not None and service.resident is not None:
        limit += PACKED_GROWTH * service.resident.row_bytes
    metrics = metrics_app([Model.of(batcher) for batcher in batchers])
    await asyncio.to_thread(service.warm)
    async with contextlib.AsyncExitStack() as stack:
        for batcher in batchers:
            await stack.enter_async_context(batcher)
        addresses = await stack.enter_async_context(
            carrying(
                repository,
                host=host,
                http_port=http_port,
                grpc_port=grpc_port,
                metrics=None if metrics_port is None else (metrics, metrics_port),
                max_body=limit,
                shared_memory=shared_memory,
            )
        )
        try:
            yield addresses
        finally:
            for batcher in batchers:
                batcher.stop()  # not ready from here on; what was taken is answered


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
def _stop_signals() -> Iterator[asyncio.Event]:
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
