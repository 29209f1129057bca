"""One server until a signal: `python -m tests.conformance.serve SET|BUNDLE [--engine ...] [--control]`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from utune_deploy.export.bundle import open_bundle
from utune_deploy.export.engine import Device
from utune_deploy.serving.models import Fixed
from utune_deploy.serving.servers import embedded, fronts, triton
from utune_deploy.serving.servers.metrics import metrics_app
from utune_deploy.serving.watching.metrics import Model

from .behaviour import SETS
from .models import Models
from .queues import queues
from .servers import GRPC, HTTP, METRICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from utune_deploy.serving.models import Repository
    from utune_deploy.serving.queueing.batcher import Batcher


async def _carry(models: Repository, batchers: Sequence[Batcher] = ()) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    metrics = metrics_app([Model.of(batcher) for batcher in batchers])
    async with contextlib.AsyncExitStack() as stack:
        for batcher in batchers:
            await stack.enter_async_context(batcher)
        # Suites ask whether the server calls itself what Triton does.
        await stack.enter_async_context(
            fronts.carrying(
                models,
                http_port=HTTP,
                grpc_port=GRPC,
                metrics=(metrics, METRICS),
                name="triton",
                shared_memory=True,
            )
        )
        await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models")
    parser.add_argument("--engine", default="embedded")
    parser.add_argument("--triton-env", type=Path)
    parser.add_argument("--control", action="store_true")
    asked = parser.parse_args()
    if asked.models == "queues":
        made = queues()
        asyncio.run(_carry(Fixed(*made), [model.batcher for model in made]))
        return
    if asked.models in SETS:
        asyncio.run(_carry(Models(SETS[asked.models], control=asked.control)))
        return
    bundle = open_bundle(Path(asked.models))
    device = Device(threads=1)
    if asked.engine == "embedded":
        embedded.serve_embedded(bundle, metrics_port=METRICS, device=device, shared_memory=True)
    else:
        triton.serve_triton(bundle, environment=asked.triton_env, device=device)


if __name__ == "__main__":
    main()
