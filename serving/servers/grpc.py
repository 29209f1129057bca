"""gRPC of the Open Inference Protocol v2, with the messages that tritonclient publishes.

Messages of the same package may be loaded once per process; taking tritonclient's own lets its
client live in the same one. What is not written here is answered UNIMPLEMENTED by gRPC.
"""
# Generated protobuf modules build their classes at import, where a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.json_format import ParseDict
from tritonclient.grpc import service_pb2, service_pb2_grpc

from ...merge.errors import UsageError, UtuneError
from .. import protocol
from ..rejections import InvalidRequest, Overloaded, Stopping, UnknownModel, one_line
from .ports import free_port, host_port

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..batcher import Batcher

log = logging.getLogger(__name__)

_TYPED = {"FP32": "fp32_contents", "INT64": "int64_contents", "BYTES": "bytes_contents"}


def grpc_server(
    batchers: Sequence[Batcher],
    *,
    version: str,
    max_delay_ms: float,
    max_message: int,
    host: str,
    port: int,
) -> tuple[grpc.aio.Server, int]:
    """A server that is bound but not started, and its port.

    Args:
        batchers: What answers, one per model; already entered when the first request comes.
        version: The server's version, for its metadata.
        max_delay_ms: The batching delay, for the model's configuration.
        max_message: Largest request in bytes.
        host: Address to listen on.
        port: 0 picks a free one.

    Raises:
        UsageError: The port cannot be had.
    """
    port = free_port(host, port)
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", max_message),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # two servers on one port would share its clients silently
        ]
    )
    servicer = _Servicer(batchers, version, max_delay_ms)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    try:
        server.add_insecure_port(host_port(host, port))
    except RuntimeError as cause:
        raise UsageError("the port is in use", where=host_port(host, port)) from cause
    return server, port


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, batchers: Sequence[Batcher], version: str, max_delay_ms: float) -> None:
        self._batchers = batchers
        self._version = version
        self._max_delay_ms = max_delay_ms

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802  gRPC's names
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerReadyResponse(ready=all(b.ready for b in self._batchers))

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            batcher = protocol.find_model(self._batchers, request.name, request.version)
        except UnknownModel:  # as Triton: not ready is an answer, not an error
            return service_pb2.ModelReadyResponse(ready=False)
        return service_pb2.ModelReadyResponse(ready=batcher.ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return ParseDict(
            protocol.server_metadata(self._version), service_pb2.ServerMetadataResponse()
        )

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        service = (await self._find(request, context)).service
        return ParseDict(
            protocol.model_metadata(service.registry), service_pb2.ModelMetadataResponse()
        )

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        service = (await self._find(request, context)).service
        config = protocol.model_config(service.registry, max_delay_ms=self._max_delay_ms)
        return ParseDict({"config": config}, service_pb2.ModelConfigResponse())

    async def ModelStatistics(self, request: Any, context: Any) -> Any:  # noqa: N802
        asked = [await self._find(request, context)] if request.name else self._batchers
        return ParseDict(
            protocol.model_statistics(batcher.service for batcher in asked),
            service_pb2.ModelStatisticsResponse(),
        )

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        index = protocol.repository_index(self._batchers)
        return ParseDict({"models": index}, service_pb2.RepositoryIndexResponse())

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            batcher = protocol.find_model(self._batchers, request.model_name, request.model_version)
            outputs = [
                protocol.OutputRequest(output.name, _classes(output)) for output in request.outputs
            ]
            tensors = await protocol.infer(batcher, _read_inputs(request), outputs)
        except UtuneError as error:
            return await _abort(context, error)
        response = service_pb2.ModelInferResponse(
            model_name=request.model_name, model_version=protocol.VERSION, id=request.id
        )
        for tensor in tensors:
            response.outputs.add(
                name=tensor.name, datatype=tensor.datatype, shape=tensor.array.shape
            )
            response.raw_output_contents.append(tensor.raw())
        return response

    async def _find(self, request: Any, context: Any) -> Batcher:
        try:
            return protocol.find_model(self._batchers, request.name, request.version)
        except UtuneError as error:
            return await _abort(context, error)


def _read_inputs(request: Any) -> list[protocol.InputTensor]:
    """Inputs from raw contents, all of them or none, or from the typed fields."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(
            "the raw contents are not one per input",
            where="raw_input_contents",
            wanted=len(request.inputs),
            found=len(raw),
        )
    tensors = []
    for index, tensor in enumerate(request.inputs):
        if any(size < 0 for size in tensor.shape):
            raise InvalidRequest(
                "an input's shape is not a list of sizes",
                where=tensor.name,
                found=list(tensor.shape),
            )
        if raw and tensor.HasField("contents"):
            raise InvalidRequest("an input has raw and typed contents", where=tensor.name)
        typed = getattr(tensor.contents, _TYPED.get(tensor.datatype, "fp32_contents"))
        tensors.append(
            protocol.InputTensor(
                tensor.name,
                tensor.datatype,
                tuple(tensor.shape),
                raw[index] if raw else list(typed),
            )
        )
    return tensors


def _classes(output: Any) -> int:
    if "classification" not in output.parameters:
        return 0
    return output.parameters["classification"].int64_param


async def _abort(context: Any, error: UtuneError) -> Any:
    if isinstance(error, UnknownModel):
        code = grpc.StatusCode.NOT_FOUND
    elif isinstance(error, InvalidRequest):
        code = grpc.StatusCode.INVALID_ARGUMENT
    elif isinstance(error, (Overloaded, Stopping)):
        code = grpc.StatusCode.UNAVAILABLE
    else:
        log.error("a request failed", exc_info=error)
        code = grpc.StatusCode.INTERNAL
    await context.abort(code, one_line(error))
