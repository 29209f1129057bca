"""The engine `ray`: one service on several replicas, each with a resident backbone, on one machine or a Ray cluster.

    clients -> front, HTTP and gRPC in the process of `serve`     ring of homes, retries
                 | checked requests, through a handle of Ray Serve
               replica, replica, ...   one engine and one batcher each; Ray Serve starts, checks and drains them
                 | new tasks
               keeper, one actor       the table of tasks

The front is the process that was asked to serve, because a front on every node would be one more hop for a client that
has one address. A second `serve` of the same bundle on the same cluster joins as a further front; the last one
to leave takes the replicas with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ....export.engine import CPU
from ....merge.errors import IncompatibleArtefact, UsageError
from ...bundle_models import BundleModel
from ...bundle_repository import BundleRepository
from ...queueing.batcher import QUEUED_BATCHES
from ...registry import MAX_DELAY_MS
from ...rejections import ServerFailed
from ...service import require_fitting_rows
from ...watching import logs
from ...watching.metrics import Model
from ..fronts import DRAIN_SECONDS, fronts, stop_signals
from . import library
from .front import Cluster, ClusterCommands, Front
from .keeper import DEPLOYMENT, Keeper, last_line
from .replica import HEALTH_SECONDS, ServedReplica

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from ....export.bundle import Bundle
    from ....export.engine import Device
    from ..ports import Addresses

log = logging.getLogger(__name__)

NAMESPACE = "utune-deploy"
HEALTH_PERIOD_SECONDS = 5


@dataclass(frozen=True)
class Scale:
    """How many replicas there are.

    Attributes:
        replicas: At least, and in the beginning.
        most: At most; None for no more than at least.
        target: Requests under way per replica that Ray Serve's autoscaling aims at; None for two full batches.
        cpus: Processors that each takes, and threads of its engine unless the device says otherwise.
    """

    replicas: int = 1
    most: int | None = None
    target: float | None = None
    cpus: float = 1


def serve_ray(
    bundle: Bundle,
    *,
    address: str | None = None,
    on_ready: Callable[[Addresses], None] | None = None,
    **settings: Any,
) -> None:
    """Serve a bundle until Ctrl-C or SIGTERM, then answer what was taken and return.

    Args:
        bundle: What to serve; the same folder is on every machine, under the same path.
        address: Of a Ray cluster, `auto` for the one that this machine is part of; None starts one of this machine
            alone, which ends with the server.
        on_ready: Called once, when requests are answered.
        **settings: Of `running`.

    Raises:
        UtuneError: See `running`.
    """

    async def until_signalled() -> None:
        with stop_signals() as stop:
            async with running(bundle, **settings) as addresses:
                if on_ready is not None:
                    on_ready(addresses)
                await stop.wait()
                logs.stopping()

    with connected(address):
        asyncio.run(until_signalled())
    logs.stopped()


@contextlib.asynccontextmanager
async def running(
    bundle: Bundle,
    *,
    host: str = "127.0.0.1",
    http_port: int = 0,
    grpc_port: int = 0,
    metrics_port: int | None = None,
    device: Device = CPU,
    rows: int | None = None,
    keep: Path | None = None,
    task_control: bool = True,
    max_delay_ms: float = MAX_DELAY_MS,
    scale: Scale = Scale(),
    **queueing: Any,
) -> AsyncIterator[Addresses]:
    """A front in this process over replicas in the cluster that it is connected to; leaving the block drains it.

    The first front of a bundle starts the replicas, and its settings hold for all; the last one ends them.

    Args:
        bundle: What to serve.
        host: Address to listen on.
        http_port: Port of HTTP; 0 picks a free one.
        grpc_port: Port of gRPC; 0 picks a free one.
        metrics_port: Port of Prometheus metrics of this front; 0 picks a free one, None has none.
        device: Where the engines run.
        rows: See `Service.open`, for each replica.
        keep: Folder of the tasks that come while running, on this machine.
        task_control: Whether clients may add, change and remove tasks.
        max_delay_ms: Longest that a request waits for company at its replica.
        scale: How many replicas.
        **queueing: Further settings of each replica's `Batcher`.

    Raises:
        UsageError: A port cannot be had, a setting makes no sense, or the cluster is too small.
        IncompatibleArtefact: Another bundle of this name is served there.
        MissingDependency: Ray is not installed.
        ServerFailed: The replicas do not start.
    """
    serve = library.serve()
    require_fitting_rows(bundle, rows)
    application = f"utune-{bundle.name}"
    if device.threads is None:
        device = replace(device, threads=max(1, int(scale.cpus)))
    replica = {"device": device, "rows": rows, "max_delay_ms": max_delay_ms, **queueing}
    keeper = await asyncio.to_thread(_deploy, bundle, application, keep, scale, replica)
    front: Front | None = None
    try:
        handle = serve.get_deployment_handle(DEPLOYMENT, application)
        services = [Cluster(bundle)]
        if bundle.engine_of_all is not None and not services[0].registry.all_tasks:
            services.append(Cluster(bundle, all_tasks=True))
        workers = [Front(service, handle.answer, keeper) for service in services]
        front = workers[0]
        models = [BundleModel(worker, max_delay_ms=max_delay_ms) for worker in workers]
        repository = BundleRepository(models, ClusterCommands(front, control=task_control))
        async with fronts(
            repository,
            workers,
            metrics=[_metrics(worker) for worker in workers],
            host=host,
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
        ) as addresses:
            yield addresses
    finally:
        with contextlib.suppress(library.ray().exceptions.RayActorError):
            left = await keeper.leave.remote(front.name if front is not None else "")
            if not left:
                await asyncio.to_thread(serve.delete, application)
                await keeper.close.remote()
                library.ray().kill(keeper)


def _metrics(front: Front) -> Model:
    return Model(
        name=front.service.registry.name,
        counters=front.service.counters,
        queued_requests=lambda: front.under_way_requests,
        queued_rows=lambda: front.under_way_rows,
    )


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """This process is part of a cluster inside the block; one that was started for it ends with it.

    Args:
        address: See `serve_ray`.

    Raises:
        UsageError: None answers there.
        MissingDependency: Ray is not installed.
    """
    ray = library.ray()
    if not address:
        # Ray's workers give way to every other process by default, which a server should not.
        os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        ray.init(
            address=address or "local",
            namespace=NAMESPACE,
            configure_logging=False,
            log_to_driver=False,
            **({} if address else {"include_dashboard": False}),
        )
    except (ConnectionError, ValueError, RuntimeError) as cause:
        raise UsageError(
            "no Ray cluster answers" if address else "Ray does not start",
            where=address,
            found=last_line(cause),
            do="start one on each machine: ray start --head, ray start --address HEAD:6379"
            if address
            else None,
        ) from cause
    library.serve()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


def _deploy(
    bundle: Bundle, application: str, keep: Path | None, scale: Scale, replica: dict[str, Any]
) -> Any:
    """Start the replicas and their keeper, or join those that are there; the keeper's handle."""
    ray, serve = library.ray(), library.serve()
    try:
        keeper = ray.get_actor(application, namespace=NAMESPACE)
    except ValueError:
        pass
    else:
        there = ray.get(keeper.identity.remote())
        if there != bundle.identity:
            raise IncompatibleArtefact(
                "the cluster serves another bundle of this name",
                where=application,
                wanted=f"identity {bundle.identity[:16]}",
                found=f"identity {there[:16]}",
                do="stop it there, or give this one another name",
            )
        log.info("joining the replicas that are there; their settings hold")
        return keeper
    _require_room(scale)
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    keeper = (
        ray.remote(Keeper)
        .options(
            name=application,
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            scheduling_strategy=here,
            # Without a folder it would forget what the replicas were given: what it showed last holds instead.
            max_restarts=-1 if keep is not None else 0,
        )
        .remote(
            str(bundle.path.resolve()),
            bundle.identity,
            None if keep is None else str(keep.resolve()),
            application,
        )
    )
    try:
        ray.get(keeper.identity.remote())
        serve.start(proxy_location="Disabled")  # Ray's own front has no job here
        serve.run(
            _deployment(bundle, scale, replica["device"]).bind(
                str(bundle.path.resolve()), bundle.identity, keeper, **replica
            ),
            name=application,
            route_prefix=None,
        )
    except Exception as cause:
        with contextlib.suppress(Exception):
            serve.delete(application)
        ray.kill(keeper)
        raise ServerFailed(
            "the replicas do not start",
            found=last_line(cause),
            do="see the logs of Ray, in /tmp/ray/session_latest/logs/serve",
        ) from cause
    return keeper


def _deployment(bundle: Bundle, scale: Scale, device: Device) -> Any:
    """The replicas as Ray Serve is told of them."""
    serve = library.serve()
    batch = bundle.engine.max_batch
    most = scale.most or scale.replicas
    if most > scale.replicas:
        count = {
            "autoscaling_config": {
                "min_replicas": scale.replicas,
                "initial_replicas": scale.replicas,
                "max_replicas": most,
                "target_ongoing_requests": scale.target or 2 * batch,
            }
        }
    else:
        count = {"num_replicas": scale.replicas}
    return serve.deployment(
        ServedReplica,
        name=DEPLOYMENT,
        # The batcher refuses what is too much, with a sentence; Ray's own limit lies behind that.
        max_ongoing_requests=(QUEUED_BATCHES + 2) * batch,
        ray_actor_options={
            "num_cpus": scale.cpus,
            **({"num_gpus": 1} if device.provider == "cuda" else {}),
        },
        logging_config={"log_level": "WARNING", "enable_access_log": False},
        health_check_period_s=HEALTH_PERIOD_SECONDS,
        health_check_timeout_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        request_router_config=serve.config.RequestRouterConfig(
            request_router_class=f"{__name__}.router.TaskRouter",
            request_router_kwargs={
                "by_task": bundle.bank == "inputs",
                "rows_per_home": max(1, batch // 2),
            },
        ),
        **count,
    )


def _require_room(scale: Scale) -> None:
    """Refuse to wait for machines that are not there.

    Raises:
        UsageError: The cluster has fewer processors than the replicas want.
    """
    there = library.ray().cluster_resources().get("CPU", 0)
    if scale.most is not None and scale.most < scale.replicas:
        raise UsageError(
            "there cannot be fewer replicas at most than at least",
            wanted=f"--max-replicas of at least {scale.replicas}",
            found=scale.most,
        )
    if there < scale.replicas * scale.cpus:
        raise UsageError(
            "the cluster has too few processors for the replicas",
            wanted=f"{scale.replicas} replicas of {scale.cpus:g}",
            found=f"{there:g}",
            do="start fewer (--replicas) or smaller ones (--replica-cpus), or add machines",
        )
