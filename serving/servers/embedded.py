"""The embedded server: HTTP and gRPC in this process, on every system, over one batcher per model."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from ...export.engine import CPU
from ..bundle_models import BundleModel
from ..bundle_repository import BundleRepository
from ..queueing.batcher import Batcher
from ..registry import MAX_DELAY_MS
from ..service import Service
from ..tasks.claim import claim
from ..tasks.commands import TaskCommands
from ..tasks.life import fixed
from ..watching import logs
from ..watching.metrics import Model
from .fronts import fronts, stop_signals

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from ...export.bundle import Bundle
    from ...export.engine import Device
    from .ports import Addresses


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
        UsageError: A port cannot be had, or another server has the folder of tasks.
        MissingDependency: The provider cannot be loaded.
        IncompatibleArtefact: The engine cannot be loaded or served.
    """
    if fixed(bundle) is not None:
        keep = None  # nothing comes that could be kept
    with contextlib.nullcontext() if keep is None else claim(keep):
        service = Service.open(bundle, device, rows=rows, keep=keep)

        async def until_signalled() -> None:
            with stop_signals() as stop:
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
                    logs.stopping()
            logs.stopped()

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
    repository = BundleRepository(models, TaskCommands(batchers[0], control=task_control))
    await asyncio.to_thread(service.warm)
    async with fronts(
        repository,
        batchers,
        metrics=[Model.of(batcher) for batcher in batchers],
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        shared_memory=shared_memory,
    ) as addresses:
        yield addresses
