"""A served bundle as models: NAME, NAME.all, and every task by its own name."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..export.engine import LOGITS
from ..merge.errors import UsageError
from . import protocol
from .rejections import UnknownModel
from .watching import logs

if TYPE_CHECKING:
    from collections.abc import Callable

    from .answering import Answering
    from .answers import Answers
    from .models import Asked
    from .registry import Request
    from .tasks.versions import Version
    from .tensors import OutputTensor


class BundleModel:
    """NAME, whose rows name their tasks, or NAME.all."""

    def __init__(self, batcher: Answering, *, max_delay_ms: float) -> None:
        """Over a batcher that is entered before the first request comes."""
        self.batcher = batcher
        self.registry = batcher.service.registry
        self.max_delay_ms = max_delay_ms
        self.name = self.registry.name
        self.versions = (protocol.VERSION,)

    @property
    def ready(self) -> bool:
        """See `Model.ready`."""
        return self.batcher.ready

    def metadata(self, version: str) -> dict[str, Any]:
        """See `Model.metadata`."""
        return protocol.model_metadata(self.registry)

    def config(self, version: str) -> dict[str, Any]:
        """See `Model.config`."""
        return protocol.model_config(self.registry, max_delay_ms=self.max_delay_ms)

    def statistics(self) -> list[dict[str, Any]]:
        """See `Model.statistics`."""
        return [protocol.statistics(self.batcher.service)]

    async def infer(self, asked: Asked) -> list[OutputTensor]:
        """See `Model.infer`."""

        def read() -> Request:
            protocol.check_outputs(self.registry, asked.outputs)
            return protocol.read_request(self.registry, asked.inputs)

        answers = await self.answer(asked, read)
        return protocol.write_answers(self.registry, answers, asked.outputs)

    async def answer(self, asked: Asked, read: Callable[[], Request]) -> Answers:
        """Answer the request that `read` gives, and count it, however it ends."""
        start = time.perf_counter_ns()
        try:
            request = read()
        except Exception as refusal:
            spent = time.perf_counter_ns() - start
            self.batcher.service.counters.failure(refusal, spent)
            logs.inference(self.name, (), seconds=spent / 1e9, error=refusal)
            raise
        failure: BaseException | None = None
        try:
            return await self.batcher.submit(
                request, priority=asked.priority, timeout_us=asked.timeout_us
            )
        except BaseException as error:
            failure = error
            raise
        finally:
            spent = time.perf_counter_ns() - start
            logs.inference(self.name, request.tasks, seconds=spent / 1e9, error=failure)


class TaskModel:
    """One task by its own name: NAME with the task filled in, in the same queue."""

    def __init__(self, bundle: BundleModel, version: Version) -> None:
        """Of a task's version in use."""
        self._bundle = bundle
        self._version = version
        self.name = version.name

    @property
    def versions(self) -> tuple[str, ...]:
        """See `Model.versions`."""
        tasks = self._bundle.batcher.service.tasks
        if tasks is None:
            return (protocol.VERSION,)
        current = self._version.number
        others = [n for n in tasks.numbers(self.name) if n != current]
        return tuple(map(str, (*others, current)))

    @property
    def ready(self) -> bool:
        """See `Model.ready`."""
        return self._bundle.ready

    def metadata(self, version: str) -> dict[str, Any]:
        """See `Model.metadata`."""
        return protocol.alias_metadata(
            self._bundle.registry, self._of(version), map(int, self.versions)
        )

    def config(self, version: str) -> dict[str, Any]:
        """See `Model.config`."""
        return protocol.alias_config(
            self._bundle.registry, self._of(version), max_delay_ms=self._bundle.max_delay_ms
        )

    def statistics(self) -> list[dict[str, Any]]:
        """See `Model.statistics`."""
        return [protocol.task_statistics(self._bundle.batcher.service, self._version)]

    async def infer(self, asked: Asked) -> list[OutputTensor]:
        """See `Model.infer`."""
        registry, version = self._bundle.registry, self._of(asked.version)

        def read() -> Request:
            protocol.check_outputs(registry, asked.outputs)
            rows = protocol.read_rows(self.name, protocol.alias_inputs(registry), asked.inputs)
            return registry.check_version(rows, version)

        answers = await self._bundle.answer(asked, read)
        own = protocol.alias_outputs(registry, version)[0].dims[-1]
        return [
            replace(tensor, array=tensor.array[..., :own])
            if tensor.name == LOGITS and tensor.datatype == "FP32"
            else tensor
            for tensor in protocol.write_answers(registry, answers, asked.outputs)
        ]

    def _of(self, version: str) -> Version:
        tasks = self._bundle.batcher.service.tasks
        if not version or tasks is None or version == str(self._version.number):
            return self._version
        try:
            return tasks.version(self.name, int(version))
        except (UsageError, ValueError) as cause:
            raise UnknownModel(
                "unknown version of a task", where=self.name, found=version
            ) from cause
