"""What Triton's Python backend calls for NAME and NAME.all: the whole service, behind Triton's front ends.

Triton hands over each request at once, without a queue or batches of its own. It is checked alone and waits in
our batcher, fair between tasks; its answer is sent, from the batcher's thread, when its engine call is
done. Only a process of Triton's can import this: the module that it needs is not on any index.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as triton  # pyright: ignore[reportMissingImports]

from ...export.bundle import open_bundle
from ...export.engine import TASK
from ...merge.errors import UtuneError
from ..protocol import ALL_TASKS, task_names, write_answers
from ..queueing.threaded import ThreadedBatcher, as_ours
from ..rejections import one_line
from ..service import Service
from ..tasks import link as task_link
from ..tasks.commands import TaskCommands
from ..tensors import OutputRequest
from ..watching.series import Model
from .aliases import Aliases
from .errors import code_of
from .metrics import PushedMetrics
from .settings import PRIORITY, Settings

if TYPE_CHECKING:
    from ..answers import Answers
    from ..registry import Request

log = logging.getLogger(__name__)


class TritonPythonModel:
    """One instance: one engine, one copy of the backbone, one queue."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle of this version and its engine, and take up its tasks."""
        _log_to_triton()
        folder = Path(args["model_repository"]) / args["model_version"]
        config = json.loads(args["model_config"])
        parameters = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        settings = Settings.read(parameters)
        self._service = Service.open(
            open_bundle(settings.bundle or folder / "bundle"),
            settings.device,
            all_tasks=ALL_TASKS in parameters,
            rows=settings.rows,
            keep=settings.keep,
        )
        self._service.warm()
        self._batcher = ThreadedBatcher(self._service, **settings.queueing)
        self._metrics = PushedMetrics(triton, Model.of(self._batcher.batcher))
        self._link: task_link.TaskLink | None = None
        is_owner = not self._service.registry.all_tasks and _is_first(args)
        self._aliases: Aliases | None = None
        if settings.slots is not None and not self._service.registry.all_tasks:
            self._aliases = Aliases(
                triton,
                self._service.registry,
                Path(args["model_repository"]),
                args["model_version"],
                settings.slots,
                kept=settings.keep is not None,
            )
        if is_owner:
            commands = TaskCommands(
                self._batcher.batcher, control=settings.task_control, aliases=self._aliases
            )
            self._link = task_link.TaskLink(
                task_link.address(settings.sockets, args["model_name"], args["model_version"]),
                lambda command, file: self._batcher.run(partial(commands.run, command, file)),
            )
        if self._aliases is not None and is_owner:
            self._aliases.start()

    def execute(self, requests: list[Any]) -> None:
        """Take the requests; their answers follow."""
        for request in requests:
            sender = request.get_response_sender()
            outputs = [OutputRequest(name) for name in request.requested_output_names()]
            try:
                checked = self._check(request)
                priority = json.loads(request.parameters() or "{}").get(PRIORITY, 0)
            except Exception as refusal:
                self._service.counters.failure(refusal)
                self._send(sender, outputs, as_ours(refusal))
                continue
            self._batcher.submit(
                checked,
                partial(self._send, sender, outputs),
                priority=priority if isinstance(priority, int) else 0,
                timeout_us=request.timeout(),
                gone=sender.is_cancelled,
            )

    def finalize(self) -> None:
        """Answer what was taken."""
        if self._link is not None:
            self._link.close()
        if self._aliases is not None:
            self._aliases.close()
        self._batcher.close()
        self._metrics.close()
        self._service.close()

    def _check(self, request: Any) -> Request:
        registry = self._service.registry
        rows = {
            name: triton.get_input_tensor_by_name(request, name).as_numpy()
            for name in registry.inputs
        }
        task = None if registry.all_tasks else triton.get_input_tensor_by_name(request, TASK)
        names = None if task is None else task_names(task.as_numpy().ravel())
        if names is not None and self._aliases is not None:
            names = self._aliases.tasks_of(names)
        return registry.check(rows, names)

    def _send(
        self, sender: Any, outputs: list[OutputRequest], result: Answers | UtuneError
    ) -> None:
        """Answer one request, whatever happens: one that is never answered would never be let go."""
        try:
            response = self._response(result, outputs)
        except Exception as mistake:
            response = _refusal(as_ours(mistake))
        sender.send(response, flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _response(self, result: Answers | UtuneError, outputs: list[OutputRequest]) -> Any:
        if isinstance(result, UtuneError):
            return _refusal(result)
        return triton.InferenceResponse(
            [
                triton.Tensor(tensor.name, np.ascontiguousarray(tensor.array))
                for tensor in write_answers(self._service.registry, result, outputs)
            ]
        )


def _refusal(error: UtuneError) -> Any:
    code = getattr(triton.TritonError, code_of(error))
    return triton.InferenceResponse(error=triton.TritonError(one_line(error), code))


def _is_first(args: dict[str, str]) -> bool:
    """Whether this is the first of a model's instances, `NAME_GROUP_NUMBER`."""
    return args["model_instance_name"].endswith("_0")


def _log_to_triton() -> None:
    package = logging.getLogger(__name__.partition(".")[0])
    package.handlers = [_TritonLog()]
    package.setLevel(logging.INFO)
    package.propagate = False


class _TritonLog(logging.Handler):
    """Lines of ours in Triton's log."""

    def emit(self, record: logging.LogRecord) -> None:
        details = getattr(record, "details", {})
        line = " ".join([self.format(record), *(f"{k}={v}" for k, v in details.items())])
        write = (
            triton.Logger.log_error if record.levelno >= logging.ERROR else triton.Logger.log_info
        )
        write(line)
