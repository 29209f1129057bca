"""`utune-deploy serve`: the embedded server, or a real Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..options import PATH, device_options, triton_env_option

if TYPE_CHECKING:
    from pathlib import Path

    from ...export.engine import Device
    from ..console import Console


@click.command("serve")
@click.argument("bundle", type=PATH)
@click.option(
    "--engine",
    type=click.Choice(["embedded", "triton"]),
    default="embedded",
    show_default=True,
    help="embedded: in this process. triton: tritonserver in an environment of its own.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--http-port", type=int, default=8000, show_default=True, help="0 picks a free one.")
@click.option("--grpc-port", type=int, default=8001, show_default=True, help="0 picks a free one.")
@click.option("--metrics-port", type=int, default=8002, show_default=True, help="Triton's metrics.")
@click.option(
    "--max-delay-ms", type=click.FloatRange(0), help="Longest that a request waits for company."
)
@click.option(
    "--perf-input",
    type=PATH,
    metavar="FILE",
    help="Write requests for perf_analyzer to this new file.",
)
@triton_env_option
@device_options
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
    perf_input: Path | None,
    triton_env: Path,
    device: Device,
) -> None:
    """Serve every task of BUNDLE until Ctrl-C; requests of different tasks share batches."""
    from ...export.bundle import open_bundle
    from ...serving import perf_analyzer
    from ...serving.greeting import greeting
    from ...serving.registry import MAX_DELAY_MS
    from ...serving.servers import server

    opened = open_bundle(bundle)
    if perf_input is not None:
        perf_analyzer.write(perf_input, opened)

    def on_ready(addresses) -> None:
        said = greeting(
            opened, addresses, server=engine, provider=device.provider, perf_input=perf_input
        )
        console.result(said)

    options = {
        "host": host,
        "http_port": http_port,
        "grpc_port": grpc_port,
        "device": device,
        "on_ready": on_ready,
        "max_delay_ms": MAX_DELAY_MS if max_delay_ms is None else max_delay_ms,
    }
    if engine == "embedded":
        server("embedded").serve_embedded(opened, **options)
        return
    server("triton").serve_triton(
        opened, environment=triton_env, metrics_port=metrics_port, **options
    )
