"""gRPC of the Open Inference Protocol v2, with the messages that tritonclient publishes.

Messages of the same package may be loaded once per process; taking tritonclient's own lets its
client live in the same one. What is not written here is answered UNIMPLEMENTED by gRPC.
"""
# Generated protobuf modules build their classes at import, where a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.json_format import ParseDict
from tritonclient.grpc import service_pb2, service_pb2_grpc

from ...merge.errors import CheckFailed, IncompatibleArtefact, UsageError, UtuneError
from .. import protocol
from ..models import Asked, Decoupled, index, require_model
from ..rejections import Expired, InvalidRequest, Overloaded, Stopping, UnknownModel, one_line
from ..shared_memory import EXTENSION, Place, Regions, UnknownRegion, UnopenedRegion
from ..tensors import InputTensor, OutputRequest, OutputTensor
from .ports import free_port, host_port

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from ..models import Model, Repository

log = logging.getLogger(__name__)

FINAL, EMPTY_FINAL = "triton_final_response", "triton_enable_empty_final_response"

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
    repository: Repository,
    *,
    version: str,
    max_message: int,
    host: str,
    port: int,
    name: str = protocol.SERVER,
    regions: Regions | None = None,
) -> tuple[grpc.aio.Server, int]:
    """A server that is bound but not started, and its port.

    Args:
        repository: What answers; ready for requests when the first one comes.
        version: The server's version, for its metadata.
        max_message: Largest request in bytes.
        host: Address to listen on.
        port: 0 picks a free one.
        name: What the server calls itself.
        regions: Shared memory; None does not offer it.

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
    servicer = _Servicer(repository, version, name, regions or Regions(offered=False))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    try:
        server.add_insecure_port(host_port(host, port))
    except RuntimeError as cause:
        raise UsageError("the port is in use", where=host_port(host, port)) from cause
    return server, port


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, repository: Repository, version: str, name: str, regions: Regions) -> None:
        self._repository = repository
        self._regions = regions
        extensions = [EXTENSION] if regions.offered else []
        self._metadata = protocol.server_metadata(version, name=name, extensions=extensions)

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
        return ParseDict(self._metadata, service_pb2.ServerMetadataResponse())

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

    async def SystemSharedMemoryStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            regions = self._regions.status(request.name)
        except UtuneError as error:
            return await _abort(context, error)
        return ParseDict(
            {"regions": {region["name"]: region for region in regions}},
            service_pb2.SystemSharedMemoryStatusResponse(),
        )

    async def SystemSharedMemoryRegister(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            self._regions.register(request.name, request.key, request.offset, request.byte_size)
        except UtuneError as error:
            return await _abort(context, error)
        return service_pb2.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._regions.unregister(request.name)
        return service_pb2.SystemSharedMemoryUnregisterResponse()

    # Regions of a CUDA device are not offered; Triton's clients ask for both kinds whatever they use.

    async def CudaSharedMemoryStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.name:
            what = f"Unable to find cuda shared memory region: '{request.name}'"
            return await _abort(context, UnknownRegion(what))
        return service_pb2.CudaSharedMemoryStatusResponse()

    async def CudaSharedMemoryRegister(self, request: Any, context: Any) -> Any:  # noqa: N802
        what = "failed to register shared memory region: invalid args"  # Triton's words
        return await _abort(context, InvalidRequest(what, where=f"CUDA region {request.name}"))

    async def CudaSharedMemoryUnregister(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.CudaSharedMemoryUnregisterResponse()

    # Left to the base class, these would be answered with the name of a Python exception.

    async def TraceSetting(self, request: Any, context: Any) -> Any:  # noqa: N802
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, protocol.NO_TRACES)

    async def LogSettings(self, request: Any, context: Any) -> Any:  # noqa: N802
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, protocol.NO_LOGS)

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            return await self._infer(request)
        except UtuneError as error:
            return await _abort(context, error)

    async def ModelStreamInfer(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        """Answers in the order of the requests, which are under way together.

        Those of a decoupled model are made as they are taken.
        """
        under_way: asyncio.Queue[asyncio.Task[Any] | AsyncGenerator[Any] | None] = asyncio.Queue()

        async def read() -> None:
            try:
                async for request in request_iterator:
                    if isinstance(self._repository.find(request.model_name), Decoupled):
                        under_way.put_nowait(self._decoupled(request))
                    else:
                        under_way.put_nowait(asyncio.create_task(self._streamed(request)))
            finally:
                under_way.put_nowait(None)

        reading = asyncio.create_task(read())
        try:
            while (answer := await under_way.get()) is not None:
                if isinstance(answer, asyncio.Task):
                    yield await answer
                else:
                    async with contextlib.aclosing(answer):
                        async for part in answer:
                            yield part
        finally:
            reading.cancel()
            while not under_way.empty():
                if isinstance(answer := under_way.get_nowait(), asyncio.Task):
                    answer.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _streamed(self, request: Any) -> Any:
        try:
            return _part(await self._infer(request), final=True)
        except UtuneError as error:
            return _failed_part(request, error)

    async def _decoupled(self, request: Any) -> AsyncGenerator[Any]:
        try:
            model, asked, places = self._read(request)
            assert isinstance(model, Decoupled)
            async with contextlib.aclosing(model.stream(asked)) as answers:
                async for tensors in answers:
                    yield _part(self._write(request, model, tensors, places), final=False)
            # Which answer was the last is known only now; who wants to know it asks for one more.
            if asked.parameters.get(EMPTY_FINAL) is True:
                yield _part(self._write(request, model, (), {}), final=True)
        except UtuneError as error:
            yield _failed_part(request, error)

    async def _infer(self, request: Any) -> Any:
        model, asked, places = self._read(request)
        return self._write(request, model, await model.infer(asked), places)

    def _read(self, request: Any) -> tuple[Model, Asked, dict[str, Place]]:
        """The model, what it is asked, and the outputs that go to shared memory."""
        model = require_model(self._repository, request.model_name, request.model_version)
        parameters = {key: _value(value) for key, value in request.parameters.items()}
        places = {
            output.name: place
            for output in request.outputs
            if (place := _place(output, self._regions))
        }
        asked = Asked(
            _read_inputs(request, self._regions),
            [OutputRequest(output.name, _classes(output)) for output in request.outputs],
            request.model_version,
            priority=_count(parameters, "priority"),
            timeout_us=_count(parameters, "timeout"),
            parameters=parameters,
        )
        return model, asked, places

    def _write(
        self,
        request: Any,
        model: Model,
        tensors: Sequence[OutputTensor],
        places: dict[str, Place],
    ) -> Any:
        response = service_pb2.ModelInferResponse(
            model_name=request.model_name,
            model_version=request.model_version or model.versions[-1],
            id=request.id,
        )
        for tensor in tensors:
            output = response.outputs.add(
                name=tensor.name, datatype=tensor.datatype, shape=tensor.array.shape
            )
            content = tensor.raw()
            if place := places.get(tensor.name):
                self._regions.write(place, content)
                for key, value in place.parameters(len(content)).items():
                    kind = "string_param" if isinstance(value, str) else "int64_param"
                    setattr(output.parameters[key], kind, value)
                content = b""
            response.raw_output_contents.append(content)
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


def _place(tensor: Any, regions: Regions) -> Place | None:
    """Where an input or output lies in shared memory."""
    if not tensor.parameters:
        return None
    parameters = {key: _value(value) for key, value in tensor.parameters.items()}
    return regions.place(parameters, tensor.name)


def _read_inputs(request: Any, regions: Regions) -> list[InputTensor]:
    """Inputs from shared memory; the others from raw contents, all or none, or from the typed fields."""
    places = [_place(tensor, regions) for tensor in request.inputs]
    raw = iter(request.raw_input_contents)
    wanted = places.count(None)
    is_raw = len(request.raw_input_contents) > 0
    if is_raw and len(request.raw_input_contents) != wanted:
        raise InvalidRequest(
            "the raw contents are not one per input",
            where="raw_input_contents",
            wanted=wanted,
            found=len(request.raw_input_contents),
        )
    tensors = []
    for tensor, place in zip(request.inputs, places, strict=True):
        if any(size < 0 for size in tensor.shape):
            raise InvalidRequest(
                "an input's shape is not a list of sizes",
                where=tensor.name,
                found=list(tensor.shape),
            )
        if is_raw and tensor.HasField("contents"):
            raise InvalidRequest(  # Triton's words
                f"contents field must not be specified when using raw_input_contents for '{tensor.name}' for "
                f"model '{request.model_name}'"
            )
        if place and tensor.HasField("contents"):
            raise InvalidRequest("an input has its data twice", where=tensor.name)
        if place:
            content = regions.read(place)
        elif is_raw:
            content = next(raw)
        else:
            content = list(getattr(tensor.contents, _TYPED.get(tensor.datatype, "fp32_contents")))
        shape = tuple(tensor.shape)
        tensors.append(
            InputTensor(tensor.name, tensor.datatype, shape, content, request.model_name)
        )
    return tensors


def _part(answer: Any, *, final: bool) -> Any:
    """An answer in a stream; Triton's clients read there whether it is a request's last."""
    answer.parameters[FINAL].bool_param = final
    return service_pb2.ModelStreamInferResponse(infer_response=answer)


def _failed_part(request: Any, error: UtuneError) -> Any:
    return service_pb2.ModelStreamInferResponse(
        error_message=one_line(error),
        infer_response=service_pb2.ModelInferResponse(id=request.id),
    )


def _classes(output: Any) -> int:
    if "classification" not in output.parameters:
        return 0
    return output.parameters["classification"].int64_param


async def _abort(context: Any, error: UtuneError) -> Any:
    if isinstance(error, UnknownModel):
        code = grpc.StatusCode.NOT_FOUND
    elif isinstance(error, UnopenedRegion):
        code = grpc.StatusCode.INTERNAL
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
