"""What Triton's Python backend calls: a thin shell over the service.

Triton hands over the requests that its dynamic batcher joined. Each is checked alone; a bad one is
answered with its own error, and the good ones share one engine call. Only a process of Triton's can
import this: the module that it needs is not on any index.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as triton  # pyright: ignore[reportMissingImports]

from ..export.bundle import open_bundle
from ..export.engine import TASK, Device
from ..merge.errors import UtuneError
from .protocol import ALL_TASKS, task_names, write_answers
from .registry import Request
from .rejections import InvalidRequest, one_line
from .service import Answers, Service


class TritonPythonModel:
    """One instance: one engine, one copy of the backbone."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle of this version and its engine."""
        folder = Path(args["model_repository"]) / args["model_version"]
        settings = {
            name: entry["string_value"]
            for name, entry in json.loads(args["model_config"])["parameters"].items()
        }
        self._service = Service.open(
            open_bundle(folder / "bundle"),
            Device(
                settings["provider"],
                int(settings["threads"]) or None,
                Path(settings["kernels"]) if "kernels" in settings else None,
            ),
            all_tasks=ALL_TASKS in settings,
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request, in their order."""
        checked: list[Request | UtuneError] = []
        for request in requests:
            try:
                checked.append(self._check(request))
            except InvalidRequest as error:
                checked.append(error)
        good = [item for item in checked if isinstance(item, Request)]
        results = iter(self._service.run(good) if good else [])
        return [
            self._response(next(results) if isinstance(item, Request) else item) for item in checked
        ]

    def _check(self, request: Any) -> Request:
        registry = self._service.registry
        rows = {
            name: triton.get_input_tensor_by_name(request, name).as_numpy()
            for name in registry.inputs
        }
        task = None if registry.all_tasks else triton.get_input_tensor_by_name(request, TASK)
        return registry.check(rows, None if task is None else task_names(task.as_numpy().ravel()))

    def _response(self, result: Answers | UtuneError) -> Any:
        if isinstance(result, UtuneError):
            wrong = isinstance(result, InvalidRequest)
            code = triton.TritonError.INVALID_ARG if wrong else triton.TritonError.INTERNAL
            return triton.InferenceResponse(error=triton.TritonError(one_line(result), code))
        return triton.InferenceResponse(
            output_tensors=[
                triton.Tensor(tensor.name, tensor.array)
                for tensor in write_answers(self._service.registry, result)
            ]
        )
