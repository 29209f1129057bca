"""gRPC of the Open Inference Protocol v2, with the messages that tritonclient publishes.

Messages of the same package may be loaded once per process; taking tritonclient's own lets its
client live in the same one. What is not written here is answered UNIMPLEMENTED by gRPC.
"""
# Generated protobuf modules build their classes at import, where a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.json_format import ParseDict
from tritonclient.grpc import service_pb2, service_pb2_grpc

from ...merge.errors import CheckFailed, IncompatibleArtefact, UsageError, UtuneError
from .. import protocol
from ..models import Asked, index, require_model
from ..rejections import Expired, InvalidRequest, Overloaded, Stopping, UnknownModel, one_line
from ..tensors import InputTensor, OutputRequest
from .ports import free_port, host_port

if TYPE_CHECKING:
    from ..models import Model, Repository

log = logging.getLogger(__name__)

_TYPED = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def grpc_server(
    repository: Repository, *, version: str, max_message: int, host: str, port: int
) -> tuple[grpc.aio.Server, int]:
    """A server that is bound but not started, and its port.

    Args:
        repository: What answers; ready for requests when the first one comes.
        version: The server's version, for its metadata.
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
    servicer = _Servicer(repository, version)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    try:
        server.add_insecure_port(host_port(host, port))
    except RuntimeError as cause:
        raise UsageError("the port is in use", where=host_port(host, port)) from cause
    return server, port


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, repository: Repository, version: str) -> None:
        self._repository = repository
        self._version = version

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802  gRPC's names
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        ready = all(model.ready for model in self._repository.models())
        return service_pb2.ServerReadyResponse(ready=ready)

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            model = require_model(self._repository, request.name, request.version)
        except UnknownModel:  # as Triton: not ready is an answer, not an error
            return service_pb2.ModelReadyResponse(ready=False)
        return service_pb2.ModelReadyResponse(ready=model.ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return ParseDict(
            protocol.server_metadata(self._version), service_pb2.ServerMetadataResponse()
        )

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        model = await self._find(request, context)
        return ParseDict(
            model.metadata(request.version),
            service_pb2.ModelMetadataResponse(),
            ignore_unknown_fields=True,  # JSON says which inputs are optional, protobuf cannot
        )

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        model = await self._find(request, context)
        return ParseDict(
            {"config": model.config(request.version)}, service_pb2.ModelConfigResponse()
        )

    async def ModelStatistics(self, request: Any, context: Any) -> Any:  # noqa: N802
        asked = [await self._find(request, context)] if request.name else None
        shown = asked or self._repository.models()
        stats = [entry for model in shown for entry in model.statistics()]
        return ParseDict({"model_stats": stats}, service_pb2.ModelStatisticsResponse())

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        entries = index(self._repository, only_ready=request.ready)
        return ParseDict({"models": entries}, service_pb2.RepositoryIndexResponse())

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            parameters = {key: _value(value) for key, value in request.parameters.items()}
            await self._repository.load(request.model_name, parameters)
        except UtuneError as error:
            return await _abort(context, error)
        return service_pb2.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            await self._repository.unload(request.model_name)
        except UtuneError as error:
            return await _abort(context, error)
        return service_pb2.RepositoryModelUnloadResponse()

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            return await self._infer(request)
        except UtuneError as error:
            return await _abort(context, error)

    async def ModelStreamInfer(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        """Answers in the order of the requests, which are under way together."""
        under_way: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue()

        async def read() -> None:
            try:
                async for request in request_iterator:
                    under_way.put_nowait(asyncio.create_task(self._streamed(request)))
            finally:
                under_way.put_nowait(None)

        reading = asyncio.create_task(read())
        try:
            while (answer := await under_way.get()) is not None:
                yield await answer
        finally:
            reading.cancel()
            while not under_way.empty():
                if answer := under_way.get_nowait():
                    answer.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _streamed(self, request: Any) -> Any:
        try:
            return service_pb2.ModelStreamInferResponse(infer_response=await self._infer(request))
        except UtuneError as error:
            return service_pb2.ModelStreamInferResponse(
                error_message=one_line(error),
                infer_response=service_pb2.ModelInferResponse(id=request.id),
            )

    async def _infer(self, request: Any) -> Any:
        model = require_model(self._repository, request.model_name, request.model_version)
        parameters = {key: _value(value) for key, value in request.parameters.items()}
        asked = Asked(
            _read_inputs(request),
            [OutputRequest(output.name, _classes(output)) for output in request.outputs],
            request.model_version,
            priority=_count(parameters, "priority"),
            timeout_us=_count(parameters, "timeout"),
            parameters=parameters,
        )
        tensors = await model.infer(asked)
        response = service_pb2.ModelInferResponse(
            model_name=request.model_name,
            model_version=request.model_version or model.versions[-1],
            id=request.id,
        )
        for tensor in tensors:
            response.outputs.add(
                name=tensor.name, datatype=tensor.datatype, shape=tensor.array.shape
            )
            response.raw_output_contents.append(tensor.raw())
        return response

    async def _find(self, request: Any, context: Any) -> Model:
        try:
            return require_model(self._repository, request.name, request.version)
        except UtuneError as error:
            return await _abort(context, error)


def _value(parameter: Any) -> Any:
    """What a parameter of either message holds."""
    return getattr(parameter, parameter.WhichOneof("parameter_choice") or "string_param")


def _count(parameters: dict[str, Any], key: str) -> int:
    value = parameters.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidRequest("a parameter is not a whole number", where=key, found=value)
    return value


def _read_inputs(request: Any) -> list[InputTensor]:
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
    for place, tensor in enumerate(request.inputs):
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
            InputTensor(
                tensor.name,
                tensor.datatype,
                tuple(tensor.shape),
                raw[place] if raw else list(typed),
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
    elif isinstance(error, UsageError):
        code = grpc.StatusCode.INVALID_ARGUMENT
    elif isinstance(error, CheckFailed):
        code = grpc.StatusCode.ABORTED
    elif isinstance(error, IncompatibleArtefact):
        code = grpc.StatusCode.FAILED_PRECONDITION
    elif isinstance(error, (Overloaded, Expired, Stopping)):
        code = grpc.StatusCode.UNAVAILABLE
    else:
        log.error("a request failed", exc_info=error)
        code = grpc.StatusCode.INTERNAL
    await context.abort(code, one_line(error))
