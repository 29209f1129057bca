"""What Triton's Python backend calls for NAME.tasks: a process without an engine that passes commands on.

See `tasks/commands.py` for what they are, and `tasks/link.py` for the way they take.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton  # pyright: ignore[reportMissingImports]

from ..rejections import InvalidRequest, one_line
from ..tasks import link as task_link
from ..tasks.commands import COMMAND, FILE, REPLY, TASKS, read_command
from ..tensors import BYTES, InputTensor
from .errors import code_of

AT_ONCE = 8  # commands; a list need not wait for a task that is being added


class TritonPythonModel:
    """The one instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Find the way to the model; it may come up later than this one."""
        config = json.loads(args["model_config"])
        settings = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        self._where = task_link.address(
            Path(settings["sockets"]) if "sockets" in settings else None,
            args["model_name"].removesuffix(TASKS),
            args["model_version"],
        )
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="utune-command")

    def execute(self, requests: list[Any]) -> None:
        """Take the commands; each is answered when it has been carried out."""
        for request in requests:
            given = {
                name: tensor.as_numpy()
                for name in (COMMAND, FILE)
                if (tensor := triton.get_input_tensor_by_name(request, name)) is not None
            }
            self._pool.submit(self._answer, given, request.get_response_sender())

    def finalize(self) -> None:
        """Let the commands end that were taken."""
        self._pool.shutdown(wait=True)

    def _answer(self, given: dict[str, Any], sender: Any) -> None:
        response = triton.InferenceResponse
        try:
            command, file = read_command(
                {
                    name: InputTensor(name, BYTES, array.shape, array.ravel().tolist())
                    for name, array in given.items()
                }
            )
            text = json.dumps(task_link.ask(self._where, command, file)).encode()
            reply = response([triton.Tensor(REPLY, np.array([text], dtype=object))])
        except task_link.Refused as refusal:
            reply = response(error=_error(refusal.code, str(refusal)))
        except InvalidRequest as refusal:
            reply = response(error=_error(code_of(refusal), one_line(refusal)))
        except Exception as mistake:
            reply = response(error=_error("INTERNAL", f"the command failed: {mistake!r}"))
        sender.send(reply, flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _error(code: str, line: str) -> Any:
    return triton.TritonError(line, getattr(triton.TritonError, code))
