"""What a server says when it is ready: what is served, where, and how to ask."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..export.engine import row_inputs
from .registry import ALL

if TYPE_CHECKING:
    from ..export.bundle import Bundle
    from .servers.ports import Addresses

SHOWN_TASKS = 8
_FILL = {"float32": "zeros", "int64": "ones"}  # a mask of zeros would leave nothing to answer


def greeting(bundle: Bundle, addresses: Addresses, *, server: str, provider: str) -> str:
    """The start-up message.

    Args:
        bundle: What is served.
        addresses: Where it answers.
        server: A key of `servers.SERVERS`.
        provider: The execution provider that runs the engine.
    """
    names = [
        f"{task.name} ({f'{len(task.labels)} classes' if task.labels else f'{task.width} numbers'})"
        for task in bundle.tasks
    ]
    if len(names) > SHOWN_TASKS:
        names = [*names[:SHOWN_TASKS], f"and {len(names) - SHOWN_TASKS} more"]
    rows = [
        f'"{tensor.name}": np.{_FILL[tensor.dtype]}({[1, *tensor.shape[1:]]}, np.{tensor.dtype})'
        for tensor in row_inputs(bundle.engine.inputs)
    ]
    rows.append(f'"task": np.array([[{bundle.tasks[0].name!r}]], object)')
    said = ["label", "score"] if bundle.tasks[0].labels else ["logits"]
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
  import numpy as np, tritonclient.http as http, tritonclient.utils as utils
  rows = {{{", ".join(rows)}}}
  inputs = [http.InferInput(k, v.shape, utils.np_to_triton_dtype(v.dtype)).set_data_from_numpy(v) for k, v in rows.items()]
  answer = http.InferenceServerClient("{addresses.http}").infer("{bundle.name}", inputs)
  print({", ".join(f'answer.as_numpy("{name}")' for name in said)})
  END

Ctrl-C stops it."""
