"""What a server says when it is ready: what is served, where, and how to ask."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..export.engine import row_inputs
from .perf_analyzer import command
from .registry import ALL

if TYPE_CHECKING:
    from pathlib import Path

    from ..export.bundle import Bundle
    from .servers.ports import Addresses

SHOWN_TASKS = 8
_FILL = {"float32": "zeros", "int64": "ones"}  # a mask of zeros would leave nothing to answer


def greeting(
    bundle: Bundle,
    addresses: Addresses,
    *,
    server: str,
    provider: str,
    perf_input: Path | None = None,
) -> str:
    """The start-up message.

    Args:
        bundle: What is served.
        addresses: Where it answers.
        server: A key of `servers.SERVERS`.
        provider: The execution provider that runs the engine.
        perf_input: The file of `perf_analyzer.write`, where there is one.
    """
    names = [
        f"{task.name} ({f'{len(task.labels)} classes' if task.labels else f'{task.width} numbers'})"
        for task in bundle.tasks
    ]
    if len(names) > SHOWN_TASKS:
        names = [*names[:SHOWN_TASKS], f"and {len(names) - SHOWN_TASKS} more"]
    rows = [
        f'"{tensor.name}": np.{_FILL[tensor.dtype]}({list(tensor.shape[1:])}, np.{tensor.dtype})'
        for tensor in row_inputs(bundle.engine.inputs)
    ]
    task = bundle.tasks[0]
    if task.preprocessing is not None:
        picture = f'\n      # or a picture: client.ask("cat.jpg", task={task.name!r})'
    else:
        picture = ""
    hint = "" if perf_input else "\n  # serve --perf-input FILE writes its requests"
    every = f", {bundle.name}{ALL} with every task for each row" if bundle.engine_of_all else ""
    metrics = f"metrics  http://{addresses.metrics}/metrics\n" if addresses.metrics else ""
    return f"""\
serving  {bundle.name}{every} from {bundle.path}
tasks    {", ".join(names)}
engine   {bundle.engine.target} on {provider}, {bundle.engine.precision}, batch up to {bundle.engine.max_batch}
server   {server}
http     http://{addresses.http}
grpc     {addresses.grpc}
{metrics}
  curl -s http://{addresses.http}/v2/models/{bundle.name}

  python - <<'END'
  import numpy as np
  from utune_deploy.serving.client import Client
  with Client("http://{addresses.http}", model="{bundle.name}") as client:
      print(client.ask({{{", ".join(rows)}}}, task={task.name!r})){picture}
  END

  {command(bundle, addresses.grpc, perf_input)}{hint}

Ctrl-C stops it."""
