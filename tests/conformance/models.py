"""The embedded server's side of `behaviour.py`: plain models in a repository that loads and unloads them."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.json_format import ParseDict, ParseError
from tritonclient.grpc import model_config_pb2

from utune_deploy.merge.errors import UsageError
from utune_deploy.serving.protocol import missing_inputs
from utune_deploy.serving.rejections import (
    InvalidRequest,
    Overloaded,
    ServerFailed,
    Stopping,
    UnknownModel,
)
from utune_deploy.serving.tensors import BYTES, OutputTensor, numbers, texts

from .behaviour import Behaviour

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Mapping

    from utune_deploy.serving.models import Asked, Model


class Plain:
    """A model that answers at once. See `utune_deploy.serving.models.Model`."""

    versions = ("1",)
    ready = True

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self.name = name
        self._config = {"name": name, "platform": "plain", **config}
        self._does = Behaviour(self._config)
        self._answered = self._waiting = 0
        policy = config.get("dynamic_batching", {})
        self._delay = policy.get("max_queue_delay_microseconds", 0) / 1e6
        self._room = policy.get("default_queue_policy", {}).get("max_queue_size", 0)

    def metadata(self, version: str) -> dict[str, Any]:
        batch = [-1] if self._config["max_batch_size"] else []

        def shown(tensor: Mapping[str, Any]) -> dict[str, Any]:
            return {
                "name": tensor["name"],
                "datatype": _datatype(tensor),
                "shape": [*batch, *tensor["dims"]],
            }

        return {
            "name": self.name,
            "versions": list(self.versions),
            "platform": "plain",
            "inputs": [shown(tensor) for tensor in self._config["input"]],
            "outputs": [shown(tensor) for tensor in self._config["output"]],
        }

    def config(self, version: str) -> dict[str, Any]:
        return self._config

    def statistics(self) -> list[dict[str, Any]]:
        return [{"name": self.name, "version": "1", "inference_count": self._answered}]

    async def infer(self, asked: Asked) -> list[OutputTensor]:
        if self._room and self._waiting >= self._room:
            raise Overloaded("Exceeds maximum queue size", where=self.name)
        arrays = self._check(asked)
        self._waiting += 1
        try:
            await asyncio.sleep(self._delay)
        finally:
            self._waiting -= 1
        try:
            outputs = self._does.answer(
                arrays,
                asked.parameters.get("sequence_id", 0),
                bool(asked.parameters.get("sequence_start")),
                bool(asked.parameters.get("sequence_end")),
            )
        except ValueError as cause:
            raise InvalidRequest(str(cause)) from cause
        self._answered += 1
        return self._write(outputs, asked)

    def _check(self, asked: Asked) -> dict[str, Any]:
        known = {tensor["name"]: tensor for tensor in self._config["input"]}
        needed = [name for name, tensor in known.items() if not tensor.get("optional")]
        given = [tensor.name for tensor in asked.inputs]
        if not set(needed) <= set(given):
            raise missing_inputs(self.name, known, needed, given)
        arrays = {}
        for tensor in reversed(asked.inputs):  # of two that are wrong Triton names the last
            if tensor.name not in known or tensor.datatype != _datatype(known[tensor.name]):
                raise InvalidRequest("unexpected inference input", where=tensor.name)
            if tensor.datatype == BYTES:
                elements = [e.encode() if isinstance(e, str) else e for e in texts(tensor)]
                array = np.empty(len(elements), dtype=object)
                array[:] = elements
                arrays[tensor.name] = array.reshape(tensor.shape)
            else:
                arrays[tensor.name] = numbers(tensor)
        return arrays

    def _write(self, outputs: Mapping[str, Any], asked: Asked) -> list[OutputTensor]:
        wanted = {output.name: output.classes for output in asked.outputs}
        types = {tensor["name"]: _datatype(tensor) for tensor in self._config["output"]}
        if not wanted.keys() <= types.keys():
            raise InvalidRequest("unexpected inference output", found=sorted(wanted))
        return [
            OutputTensor(name, types[name], array)
            for name, array in outputs.items()
            if not wanted or name in wanted
        ]


class Repeat(Plain):
    """As many answers as its input has elements."""

    async def infer(self, asked: Asked) -> list[OutputTensor]:
        raise InvalidRequest("ModelInfer RPC doesn't support decoupled models", where=self.name)

    async def stream(self, asked: Asked) -> AsyncGenerator[list[OutputTensor]]:
        for pause, outputs in self._does.repeat(self._check(asked)):
            await asyncio.sleep(pause)
            yield self._write(outputs, asked)


class Models:
    """A repository over configurations. See `utune_deploy.serving.models.Repository`."""

    def __init__(self, configs: Mapping[str, Mapping[str, Any]], *, control: bool) -> None:
        self._configs = configs
        self._control = control
        self._loaded = {name: _plain(name, config) for name, config in configs.items()}

    def find(self, name: str) -> Model | None:
        return self._loaded.get(name)

    def models(self) -> Iterable[Model]:
        return self._loaded.values()

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        self._require_control()
        if name not in self._configs:
            raise UnknownModel(f"failed to load '{name}', no such model")
        if any(key.startswith("file:") and len(key) > 255 for key in parameters):
            raise ServerFailed("failed to poll from model repository", found="a name too long")
        override: dict[str, Any] = {}
        if "config" in parameters:
            try:
                override = json.loads(parameters["config"])
                ParseDict(override, model_config_pb2.ModelConfig())
            except (TypeError, ValueError, ParseError) as cause:
                raise UsageError(f"failed to load '{name}', invalid config override") from cause
        if "max_batch_size" in override:
            override["max_batch_size"] = int(override["max_batch_size"])
        self._loaded[name] = _plain(name, {**self._configs[name], **override})

    async def unload(self, name: str) -> None:
        self._require_control()
        if self._loaded.pop(name, None) is None:
            raise UnknownModel(f"failed to unload '{name}'")

    def _require_control(self) -> None:
        if not self._control:
            raise Stopping("explicit model load / unload is not allowed if polling is enabled")


def _plain(name: str, config: Mapping[str, Any]) -> Plain:
    decoupled = config.get("model_transaction_policy", {}).get("decoupled")
    return (Repeat if decoupled else Plain)(name, config)


def _datatype(tensor: Mapping[str, Any]) -> str:
    return tensor["data_type"].removeprefix("TYPE_").replace("STRING", BYTES)
