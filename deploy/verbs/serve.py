"""`utune-deploy serve`: the embedded server, several of it on Ray, or a real Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..options import PATH, device_options, memory_options, rates, triton_env_option, weight

if TYPE_CHECKING:
    from pathlib import Path

    from ...export.bundle import Bundle
    from ...export.engine import Device
    from ..console import Console


@click.command("serve")
@click.argument("bundle", type=PATH)
@click.option(
    "--engine",
    type=click.Choice(["embedded", "ray", "triton"]),
    default="embedded",
    show_default=True,
    help="embedded: in this process. ray: replicas on this machine or a Ray cluster. "
    "triton: tritonserver in an environment of its own.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--http-port", type=int, default=8000, show_default=True, help="0 picks a free one.")
@click.option("--grpc-port", type=int, default=8001, show_default=True, help="0 picks a free one.")
@click.option(
    "--metrics-port",
    type=int,
    default=8002,
    show_default=True,
    help="Prometheus metrics; 0 picks a free one.",
)
@click.option(
    "--max-delay-ms", type=click.FloatRange(0), help="Longest that a request waits for company."
)
@click.option(
    "--timeout-ms",
    type=click.FloatRange(0, min_open=True),
    help="Longest that a request waits for its engine call, unless it says so itself.",
)
@click.option(
    "--max-queued", type=click.IntRange(1), help="Rows that may wait before others are refused."
)
@click.option(
    "--max-task-queued", type=click.IntRange(1), help="The same for the rows of one task."
)
@click.option(
    "--weight",
    "weights",
    metavar="TASK=NUMBER",
    multiple=True,
    help="A task's share of a busy engine, 1 unless it is said; repeatable.",
)
@click.option(
    "--rate",
    "limits",
    metavar="[TASK=]ROWS",
    multiple=True,
    help="Rows per second that are taken of every task, or of TASK; a second's worth at once. Repeatable.",
)
@click.option(
    "--tasks",
    "keep",
    type=PATH,
    metavar="FOLDER",
    help="Keep tasks that are added while running here; otherwise they are forgotten at the end.",
)
@click.option(
    "--rows",
    type=click.IntRange(1),
    help="Tasks in the engine's memory at once (bundles with --bank inputs); others are read when asked for.",
)
@click.option(
    "--task-control/--no-task-control",
    default=None,
    help="Whether clients may add, change and remove tasks. By default only where none but this machine can reach it.",
)
@click.option(
    "--shared-memory",
    is_flag=True,
    help="Let clients on this machine pass tensors in shared memory: they reach all of it that this user does.",
)
@click.option(
    "--ray-address",
    metavar="ADDRESS",
    help="ray: a running cluster, `auto` for this machine's; otherwise one of this machine alone is started.",
)
@click.option("--replicas", type=click.IntRange(1), help="ray: at least so many; 1 by default.")
@click.option(
    "--max-replicas", type=click.IntRange(1), help="ray: at most so many; as --replicas by default."
)
@click.option(
    "--target-requests",
    type=click.FloatRange(0, min_open=True),
    help="ray: requests under way per replica that the number of replicas is set for; two full batches by default.",
)
@click.option(
    "--replica-cpus",
    type=click.FloatRange(0, min_open=True),
    help="ray: processors of a replica, and threads of its engine; 1 by default.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Of the lines on standard error.",
)
@click.option("--log-requests", is_flag=True, help="A line for every inference.")
@click.option(
    "--perf-input",
    type=PATH,
    metavar="FILE",
    help="Write requests for perf_analyzer to this new file.",
)
@click.option(
    "--aliases",
    is_flag=True,
    help="A model NAME.TASK for each task too, as it comes and goes (--engine triton; the others have one anyway).",
)
@click.option(
    "--otlp",
    metavar="URL",
    help="Send traces to this OpenTelemetry collector, OTLP over HTTP (--engine triton).",
)
@triton_env_option
@device_options
@memory_options
@click.pass_obj
def command(
    console: Console,
    bundle: Path,
    engine: str,
    host: str,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    max_delay_ms: float | None,
    timeout_ms: float | None,
    max_queued: int | None,
    max_task_queued: int | None,
    weights: tuple[str, ...],
    limits: tuple[str, ...],
    keep: Path | None,
    rows: int | None,
    task_control: bool | None,
    shared_memory: bool,
    ray_address: str | None,
    replicas: int | None,
    max_replicas: int | None,
    target_requests: float | None,
    replica_cpus: float | None,
    log_format: str,
    log_requests: bool,
    perf_input: Path | None,
    aliases: bool,
    otlp: str | None,
    triton_env: Path,
    device: Device,
) -> None:
    """Serve every task of BUNDLE until Ctrl-C; requests of different tasks share batches."""
    from ...export.bundle import open_bundle
    from ...merge.errors import UsageError
    from ...merge.files import refuse_existing
    from ...serving import perf_analyzer
    from ...serving.greeting import greeting
    from ...serving.registry import MAX_DELAY_MS
    from ...serving.servers import server
    from ...serving.servers.ports import is_local
    from ...serving.watching import logs

    if engine != "triton" and otlp is not None:
        raise UsageError(
            f"--engine {engine} writes no traces",
            found=f"--otlp {otlp}",
            do="serve with --engine triton, or leave --otlp out",
        )
    if engine != "triton" and aliases:
        raise UsageError(
            f"--engine {engine} has a model for each task, by the task's own name",
            found="--aliases",
            do="leave it out",
        )
    if engine == "ray" and shared_memory:
        raise UsageError(
            "tensors in shared memory do not reach replicas of other machines",
            found="--shared-memory",
            do="serve with --engine embedded or triton, or leave it out",
        )
    of_ray = (ray_address, replicas, max_replicas, target_requests, replica_cpus)
    if engine != "ray" and any(setting is not None for setting in of_ray):
        raise UsageError("replicas are of --engine ray", found=f"--engine {engine}")
    if engine == "triton" and log_requests:
        raise UsageError(
            "tritonserver writes no line of ours for every inference",
            found="--log-requests",
            do="trace them with --otlp URL, or serve with --engine embedded",
        )
    opened = open_bundle(bundle)
    if perf_input is not None:
        refuse_existing(perf_input, force=False)
    shares, limited = dict(map(weight, weights)), rates(limits)
    named = shares.keys() | limited["rates"].keys()
    if strangers := sorted(named - {task.name for task in opened.tasks}):
        _tell_of_strangers(console, opened, strangers)

    def on_ready(addresses) -> None:
        if perf_input is not None:
            perf_analyzer.write(perf_input, opened)
        said = greeting(
            opened, addresses, server=engine, provider=device.provider, perf_input=perf_input
        )
        console.result(said)

    options = {
        "host": host,
        "http_port": http_port,
        "grpc_port": grpc_port,
        "metrics_port": metrics_port,
        "device": device,
        "on_ready": on_ready,
        "max_delay_ms": MAX_DELAY_MS if max_delay_ms is None else max_delay_ms,
        "default_timeout_ms": timeout_ms,
        "max_queued_rows": max_queued,
        "max_task_rows": max_task_queued,
        **limited,
        "weights": shares,
        "keep": keep,
        "rows": rows,
        "task_control": is_local(host) if task_control is None else task_control,
    }
    logs.configure(log_format, requests=log_requests)
    if engine == "embedded":
        server("embedded").serve_embedded(opened, shared_memory=shared_memory, **options)
    elif engine == "ray":
        ray = server("ray")
        scale = ray.Scale(
            replicas=replicas or 1,
            most=max_replicas,
            target=target_requests,
            cpus=replica_cpus or 1,
        )
        ray.serve_ray(opened, address=ray_address, scale=scale, **options)
    else:  # which offers shared memory by itself
        server("triton").serve_triton(
            opened, environment=triton_env, aliases=aliases, otlp=otlp, **options
        )


def _tell_of_strangers(console: Console, bundle: Bundle, names: list[str]) -> None:
    """Say that weights and rates are of tasks that the bundle does not have.

    Raises:
        UsageError: And none can come.
    """
    from ...merge.errors import UsageError
    from ...serving.tasks.life import fixed

    if why := fixed(bundle):
        raise UsageError(
            "a weight or rate is of a task that the bundle does not have, and none can come",
            where=bundle.path,
            wanted=f"some of {', '.join(task.name for task in bundle.tasks)}",
            found=f"{', '.join(names)}; {why}",
        )
    console.say(f"note: weights and rates of {', '.join(names)} count once there are such tasks")
