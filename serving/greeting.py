"""What a server says when it is ready: what is served, where, and how to ask."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..export.bundle import Bundle
    from .servers.ports import Addresses

SHOWN_TASKS = 8


def greeting(bundle: Bundle, addresses: Addresses, *, server: str, provider: str) -> str:
    """The start-up message.

    Args:
        bundle: What is served.
        addresses: Where it answers.
        server: A key of `servers.SERVERS`.
        provider: The execution provider that runs the engine.
    """
    names = [f"{task.name} ({len(task.labels)} classes)" for task in bundle.tasks]
    if len(names) > SHOWN_TASKS:
        names = [*names[:SHOWN_TASKS], f"and {len(names) - SHOWN_TASKS} more"]
    height, width = bundle.tasks[0].preprocessing.size
    task = bundle.tasks[0].name
    metrics = f"metrics  http://{addresses.metrics}/metrics\n" if addresses.metrics else ""
    return f"""\
serving  {bundle.name} from {bundle.path}
tasks    {", ".join(names)}
engine   {bundle.engine.target} on {provider}, {bundle.engine.precision}, batch up to {bundle.engine.max_batch}
server   {server}
http     http://{addresses.http}
grpc     {addresses.grpc}
{metrics}
  curl -s http://{addresses.http}/v2/models/{bundle.name}

  python - <<'END'
  import numpy as np, tritonclient.http as http
  images, task = http.InferInput("images", [1, 3, {height}, {width}], "FP32"), http.InferInput("task", [1, 1], "BYTES")
  images.set_data_from_numpy(np.zeros([1, 3, {height}, {width}], np.float32))
  task.set_data_from_numpy(np.array([[{task!r}]], dtype=object))
  answer = http.InferenceServerClient("{addresses.http}").infer("{bundle.name}", [images, task])
  print(answer.as_numpy("label"), answer.as_numpy("score"))
  END

Ctrl-C stops it."""
