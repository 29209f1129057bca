"""HTTP of the Open Inference Protocol v2 as an ASGI app: JSON, binary tensors, gzip and deflate.

A body whose head is said to have length 0 is the bytes of a model's only input, as Triton takes them.

A body that cannot be answered is told so with a 4xx and `{"error": ...}`; a 5xx is our mistake, a
full queue (503) or a server that drains (503).
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import math
import re
import zlib
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...merge.errors import CheckFailed, IncompatibleArtefact, UsageError, UtuneError
from .. import protocol
from ..models import Asked, index, require_model
from ..rejections import Expired, InvalidRequest, Overloaded, Stopping, UnknownModel, one_line
from ..shared_memory import EXTENSION, REGION, Place, Regions, UnknownRegion
from ..tensors import BYTES, DATATYPES, InputTensor, OutputRequest, OutputTensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import TypeAlias

    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from ..models import Model, Repository

    Form: TypeAlias = bool | Place  # of an output: JSON, bytes behind it, or in shared memory

HEADER_LENGTH = "Inference-Header-Content-Length"
COMPRESSION_LEVEL = 1  # pixels and logits barely shrink: the cheapest level loses nothing
CLIENT_GONE = 499  # nobody reads this status; it is what proxies log
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""Half a character, which is none unless its other half stands beside it."""
_AUTOMATIC = zlib.MAX_WBITS | 32  # gzip and zlib by their first bytes

log = logging.getLogger(__name__)


def http_app(
    repository: Repository,
    *,
    version: str,
    max_body: int,
    name: str = protocol.SERVER,
    regions: Regions | None = None,
) -> Starlette:
    """The app over a repository of models.

    Args:
        repository: What answers; ready for requests when the first one comes.
        version: The server's version, for its metadata.
        max_body: Largest request body in bytes, packed or unpacked.
        name: What the server calls itself.
        regions: Shared memory; None does not offer it.
    """
    regions = regions or Regions(offered=False)
    endpoints = _Endpoints(repository, version, max_body, name, regions)
    memory = _SharedMemory(regions, max_body)
    change = "/v2/repository/models/{model}"
    routes = [
        Route("/v2", endpoints.server),
        Route("/v2/", endpoints.server),  # the protocol's OpenAPI writes it so, its text without
        Route("/v2/health/live", endpoints.live),
        Route("/v2/health/ready", endpoints.ready),
        Route("/v2/models/stats", endpoints.statistics),
        Route("/v2/repository/index", endpoints.index, methods=["POST"]),
        Route(f"{change}/load", endpoints.load, methods=["POST"]),
        Route(f"{change}/unload", endpoints.unload, methods=["POST"]),
        *memory.routes(),
        Route("/v2/logging", _no_logs, methods=["GET", "POST"]),
        Route("/v2/trace/setting", _no_traces, methods=["GET", "POST"]),
    ]
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        routes += [
            Route(model, endpoints.metadata),
            Route(f"{model}/ready", endpoints.model_ready),
            Route(f"{model}/config", endpoints.config),
            Route(f"{model}/stats", endpoints.statistics),
            Route(f"{model}/infer", endpoints.infer, methods=["POST"]),
            Route(f"{model}/trace/setting", _no_traces, methods=["GET", "POST"]),
        ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(_escaped_slashes_are_no_steps)],
        exception_handlers={
            UtuneError: _on_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_gone,
            Exception: _on_mistake,
        },
    )
    app.router.redirect_slashes = False  # few clients send a body again where a redirect says so
    return app


def _escaped_slashes_are_no_steps(app: ASGIApp) -> ASGIApp:
    """The app without the addresses that have `/` as `%2F`: it would take it for a step, a proxy in front does not."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if b"%2f" in scope.get("raw_path", b"").lower():
            refusal = _refuse(404, f"there is nothing at {scope['raw_path'].decode('ascii')}")
            await refusal(scope, receive, send)
        else:
            await app(scope, receive, send)

    return answer


class _Endpoints:
    def __init__(
        self, repository: Repository, version: str, max_body: int, name: str, regions: Regions
    ) -> None:
        self._repository = repository
        self._max_body = max_body
        self._regions = regions
        extensions = [EXTENSION] if regions.offered else []
        self._metadata = protocol.server_metadata(version, name=name, extensions=extensions)

    async def server(self, _request: Request) -> Response:
        return JSONResponse(self._metadata)

    async def live(self, _request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, _request: Request) -> Response:
        ready = all(model.ready for model in self._repository.models())
        return JSONResponse({"ready": ready}, status_code=200 if ready else 503)

    async def model_ready(self, request: Request) -> Response:
        model, _ = self._find(request)
        body = {"name": model.name, "ready": model.ready}
        return JSONResponse(body, status_code=200 if model.ready else 503)

    async def metadata(self, request: Request) -> Response:
        model, version = self._find(request)
        return JSONResponse(model.metadata(version))

    async def config(self, request: Request) -> Response:
        model, version = self._find(request)
        return JSONResponse(model.config(version))

    async def statistics(self, request: Request) -> Response:
        if "model" in request.path_params:
            shown = [self._find(request)[0]]
        else:
            shown = self._repository.models()
        return JSONResponse({"model_stats": [entry for m in shown for entry in m.statistics()]})

    async def index(self, request: Request) -> Response:
        asked = await _read_object(request, self._max_body)
        only_ready = _flag(asked, "ready", False)
        return JSONResponse(index(self._repository, only_ready=only_ready))

    async def load(self, request: Request) -> Response:
        asked = await _read_object(request, self._max_body)
        parameters = _parameters(asked, "parameters")
        await self._repository.load(request.path_params["model"], parameters)
        return Response(status_code=200)

    async def unload(self, request: Request) -> Response:
        await self._repository.unload(request.path_params["model"])
        return Response(status_code=200)

    async def infer(self, request: Request) -> Response:
        model, version = self._find(request)
        body = await _read_body(request, self._max_body)
        head, tail = _split(body, request.headers.get(HEADER_LENGTH))
        outputs: list[OutputRequest] = []
        forms: dict[str, Form] = {"": True}
        if len(head) or not len(tail):
            message = _read_json(head)
            inputs = _read_inputs(message, tail, model.name, self._regions)
            outputs, forms = _read_outputs(message, self._regions)
        else:
            message = {}
            inputs = [_raw_input(model, version, tail)]
        parameters = _parameters(message, "parameters")
        for key, value in parameters.items():
            if value is None or isinstance(value, (dict, list)):
                raise InvalidRequest(
                    "a parameter is neither a number, true, false nor a string",
                    where=key,
                    found=_kind(value),
                )
        identity = message.get("id", "")
        if not isinstance(identity, str):
            raise InvalidRequest("the request's id is not a string", where="id")
        asked = Asked(
            inputs,
            outputs,
            version,
            priority=_count(parameters, "priority"),
            timeout_us=_count(parameters, "timeout"),
            parameters=parameters,
        )
        answered = await _unless_gone(request, model.infer(asked))
        if answered is None:
            return Response(status_code=CLIENT_GONE)
        return _write(
            {
                "model_name": model.name,
                "model_version": version or model.versions[-1],
                **({"id": identity} if identity else {}),
            },
            answered,
            forms,
            request.headers.get("Accept-Encoding", ""),
            self._regions,
        )

    def _find(self, request: Request) -> tuple[Model, str]:
        """The model that a path names, and its version, empty for the one in use."""
        version = request.path_params.get("version", "")
        return require_model(self._repository, request.path_params["model"], version), version


class _SharedMemory:
    """The endpoints of the shared-memory extensions.

    Regions of a CUDA device are not offered: there are never any, to forget them is done already, and to
    register one is refused. Triton's clients ask for both kinds whatever they use.
    """

    def __init__(self, regions: Regions, max_body: int) -> None:
        self._regions = regions
        self._max_body = max_body

    def routes(self) -> list[Route]:
        routes = []
        for kind, status, register, unregister in (
            ("system", self._status, self._register, self._unregister),
            ("cuda", self._no_status, self._no_register, self._no_unregister),
        ):
            for path in (f"/v2/{kind}sharedmemory", f"/v2/{kind}sharedmemory/region/{{region}}"):
                routes += [
                    Route(f"{path}/status", status),
                    Route(f"{path}/unregister", unregister, methods=["POST"]),
                ]
            routes.append(Route(f"{path}/register", register, methods=["POST"]))
        return routes

    async def _status(self, request: Request) -> Response:
        return JSONResponse(self._regions.status(request.path_params.get("region", "")))

    async def _register(self, request: Request) -> Response:
        asked = await _read_object(request, self._max_body)
        key = asked.get("key")
        if not isinstance(key, str):
            raise InvalidRequest("the request is malformed", where="key", wanted="a string")
        self._regions.register(
            request.path_params["region"], key, _count(asked, "offset"), _count(asked, "byte_size")
        )
        return Response(status_code=200)

    async def _unregister(self, request: Request) -> Response:
        self._regions.unregister(request.path_params.get("region", ""))
        return Response(status_code=200)

    async def _no_status(self, request: Request) -> Response:
        if name := request.path_params.get("region", ""):
            raise UnknownRegion(f"Unable to find cuda shared memory region: '{name}'")
        return JSONResponse([])

    async def _no_register(self, request: Request) -> Response:
        raise InvalidRequest(
            "failed to register CUDA shared memory region: invalid args",  # Triton's words
            where=request.path_params["region"],
            do="send the tensor, or use system shared memory",
        )

    async def _no_unregister(self, request: Request) -> Response:
        return Response(status_code=200)


async def _no_traces(_request: Request) -> Response:
    raise UnknownModel(protocol.NO_TRACES)


async def _no_logs(_request: Request) -> Response:
    raise UnknownModel(protocol.NO_LOGS)


async def _read_object(request: Request, limit: int) -> dict[str, Any]:
    """The JSON object in a request's body; none is an empty one."""
    body = await _read_body(request, limit)
    return _read_json(memoryview(body)) if body.strip() else {}


async def _read_body(request: Request, limit: int) -> bytes:
    """The request's body, unpacked."""
    chunks = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise HTTPException(413, f"the body is larger than {limit} bytes")
        chunks.append(chunk)
    body = b"".join(chunks)
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise HTTPException(415, f"unknown content encoding {encoding!r}: send gzip or deflate")
    unpacker = zlib.decompressobj(wbits=_AUTOMATIC)
    try:
        unpacked = unpacker.decompress(body, limit)
    except zlib.error as cause:
        raise InvalidRequest("the body is not what its encoding says", found=encoding) from cause
    if unpacker.unconsumed_tail:
        raise HTTPException(413, f"the unpacked body is larger than {limit} bytes")
    if not unpacker.eof:
        raise InvalidRequest("the packed body is cut", found=f"{len(body)} bytes of {encoding}")
    return unpacked


def _split(body: bytes, header_length: str | None) -> tuple[memoryview, memoryview]:
    """The JSON head and the binary tail of a body."""
    view = memoryview(body)
    if header_length is None:
        return view, view[len(body) :]
    try:
        length = int(header_length)
    except ValueError:
        length = -1
    if not 0 <= length <= len(body):
        raise InvalidRequest(
            "the JSON head is not as long as its header says",
            where=HEADER_LENGTH,
            wanted=f"0 to {len(body)}",
            found=header_length,
        )
    return view[:length], view[length:]


def _read_json(head: memoryview) -> dict[str, Any]:
    try:
        text = str(head, "utf-8").removeprefix("\ufeff")
        message = json.loads(text)
        if _HALF.search(text):
            json.dumps(message, ensure_ascii=False).encode()
    except UnicodeEncodeError as cause:
        raise InvalidRequest(
            "a string of the body is not text in UTF-8", found="half of a surrogate pair"
        ) from cause
    except (ValueError, RecursionError) as cause:
        raise InvalidRequest("the body is not JSON", found=str(cause)[:200]) from cause
    return _object(message, "body")


def _raw_input(model: Model, version: str, content: memoryview) -> InputTensor:
    """A model's only input from a body without a head: its shape follows from its size.

    Raises:
        InvalidRequest: It does not follow. The sentences begin as Triton's.
    """
    inputs = model.metadata(version)["inputs"]
    if len(inputs) != 1:
        raise InvalidRequest(
            "Raw request must only have 1 input (found 1) to be deduced but got "
            f"{len(inputs)} inputs in '{model.name}' model configuration",
            do="send a head in JSON",
        )
    name, datatype, shape = (inputs[0][key] for key in ("name", "datatype", "shape"))
    batched = model.config(version).get("max_batch_size", 0) > 0
    shape = [1, *shape[1:]] if batched else list(shape)
    open_axes = [axis for axis, size in enumerate(shape) if size < 0]
    if datatype == BYTES:
        if open_axes or math.prod(shape) != 1:
            raise InvalidRequest(
                f"For BYTE datatype raw input '{name}', the model must have input shape [1]",
                found=shape,
            )
        return InputTensor(name, datatype, tuple(shape), [bytes(content)], model.name)
    if len(open_axes) > 1:
        raise InvalidRequest(
            f"The shape of the raw input '{name}' can not be deduced because there are more than one "
            "variable-sized dimension",
            found=shape,
        )
    for axis in open_axes:
        step = DATATYPES[datatype].itemsize * math.prod(size for size in shape if size >= 0)
        shape[axis] = len(content) // max(step, 1)
    return InputTensor(name, datatype, tuple(shape), content, model.name)


def _read_inputs(
    message: Mapping[str, Any], tail: memoryview, model: str, regions: Regions
) -> list[InputTensor]:
    """The inputs; binary ones take their bytes from the tail in the order of the list."""
    tensors = []
    for entry in _list(message, "inputs"):
        entry = _object(entry, "inputs")
        name, datatype, shape = entry.get("name"), entry.get("datatype"), entry.get("shape")
        if not isinstance(name, str) or not isinstance(datatype, str):
            raise InvalidRequest("an input lacks its name or datatype", where="inputs")
        if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
            raise InvalidRequest("an input's shape is not a list of sizes", where=name)
        parameters = _parameters(entry, f"{name}, parameters")
        content: Any = entry.get("data")
        given = [key for key in ("binary_data_size", REGION) if key in parameters]
        if len(given) + ("data" in entry) > 1:
            raise InvalidRequest(
                "an input has its data twice",
                where=name,
                wanted=f"one of data, binary_data_size and {REGION}",
            )
        if place := regions.place(parameters, name):
            content = regions.read(place)
        elif given:
            size = parameters["binary_data_size"]
            if not _is_size(size):
                raise InvalidRequest(
                    "a parameter is not a size", where=f"{name}, binary_data_size", found=size
                )
            if size > len(tail):  # Triton's words
                raise InvalidRequest(
                    f"unexpected size for input '{name}', expecting {size - len(tail)} additional bytes for "
                    f"model '{model}'"
                )
            content, tail = tail[:size], tail[size:]
        elif not isinstance(content, list):
            raise InvalidRequest("an input has no data", where=name, wanted="a list")
        tensors.append(InputTensor(name, datatype, tuple(shape), content, model))
    if len(tail):  # Triton's words
        raise InvalidRequest(
            f"unexpected additional input data for model '{model}'", found=f"{len(tail)} bytes"
        )
    return tensors


def _read_outputs(
    message: Mapping[str, Any], regions: Regions
) -> tuple[list[OutputRequest], dict[str, Form]]:
    """The outputs asked for, and the form of each; `""` holds the default."""
    parameters = _parameters(message, "parameters")
    binary = _flag(parameters, "binary_data_output", False)
    forms: dict[str, Form] = {"": binary}
    outputs = []
    for entry in _list(message, "outputs") if "outputs" in message else []:
        entry = _object(entry, "outputs")
        name = entry.get("name")
        if not isinstance(name, str):
            raise InvalidRequest("an output lacks its name", where="outputs")
        settings = _parameters(entry, f"{name}, parameters")
        classes = settings.get("classification", 0)
        if not _is_size(classes):
            raise InvalidRequest("the number of classes is not a size", where=name, found=classes)
        place = regions.place(settings, name)
        forms[name] = place or _flag(settings, "binary_data", binary)
        outputs.append(OutputRequest(name, classes))
    return outputs, forms


def _write(
    head: dict[str, Any],
    outputs: Sequence[OutputTensor],
    forms: Mapping[str, Form],
    accepted: str,
    regions: Regions,
) -> Response:
    entries = []
    tail = []
    for output in outputs:
        entry: dict[str, Any] = {
            "name": output.name,
            "datatype": output.datatype,
            "shape": list(output.array.shape),
        }
        form = forms.get(output.name, forms[""])
        if isinstance(form, Place):
            raw = output.raw()
            regions.write(form, raw)
            entry["parameters"] = form.parameters(len(raw))
        elif form:
            raw = output.raw()
            tail.append(raw)
            entry["parameters"] = {"binary_data_size": len(raw)}
        else:
            entry["data"] = output.values()
        entries.append(entry)
    text = json.dumps({**head, "outputs": entries}, separators=(",", ":"), allow_nan=False).encode()
    body = b"".join([text, *tail])
    headers = {HEADER_LENGTH: str(len(text))} if tail else {}
    encodings = {part.strip().lower() for part in accepted.split(",")}
    if "gzip" in encodings:
        body = gzip.compress(body, COMPRESSION_LEVEL, mtime=0)
        headers["Content-Encoding"] = "gzip"
    elif "deflate" in encodings:
        body = zlib.compress(body, COMPRESSION_LEVEL)
        headers["Content-Encoding"] = "deflate"
    kind = "application/octet-stream" if tail else "application/json"
    return Response(body, media_type=kind, headers=headers)


async def _unless_gone(request: Request, work: Any) -> list[OutputTensor] | None:
    """The result of `work`, or None when the client hangs up first: then the work is cancelled."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for future in (working, gone):
            future.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(
            "the request is malformed", where=where, wanted="a JSON object", found=_kind(value)
        )
    return value


def _parameters(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The object's parameters; null is none, as clients that write every field have it."""
    value = message.get("parameters")
    return {} if value is None else _object(value, where)


def _list(message: Mapping[str, Any], key: str) -> list[Any]:
    value = message.get(key)
    if not isinstance(value, list):
        raise InvalidRequest(
            "the request is malformed", where=key, wanted="a JSON list", found=_kind(value)
        )
    return value


def _flag(settings: Mapping[str, Any], key: str, default: bool) -> bool:
    value = settings.get(key, default)
    if not isinstance(value, bool):
        raise InvalidRequest("a parameter is not true or false", where=key, found=_kind(value))
    return value


def _count(settings: Mapping[str, Any], key: str) -> int:
    value = settings.get(key, 0)
    if not _is_size(value):
        raise InvalidRequest("a parameter is not a whole number", where=key, found=_kind(value))
    return value


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    return "nothing" if value is None else names.get(type(value), "a number")


def _refuse(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    body = json.dumps({"error": sentence})  # ASCII: the sentence may hold half a character
    return Response(body, status_code=status, headers=headers, media_type="application/json")


async def _on_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, UtuneError)
    if isinstance(error, UnknownModel):
        return _refuse(404, one_line(error))
    if isinstance(error, UsageError):
        return _refuse(400, one_line(error))
    if isinstance(error, CheckFailed):
        return _refuse(409, one_line(error))
    if isinstance(error, IncompatibleArtefact):
        return _refuse(422, one_line(error))
    if isinstance(error, (Overloaded, Expired, Stopping)):
        return _refuse(503, one_line(error), {"Retry-After": "1"})
    log.error("a request failed", exc_info=error)
    return _refuse(500, one_line(error))


async def _on_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentence = {
        404: f"there is nothing at {request.url.path}",
        405: f"{request.method} is not offered at {request.url.path}",
    }.get(error.status_code, error.detail)
    return _refuse(error.status_code, sentence, error.headers)


async def _on_mistake(_request: Request, error: Exception) -> Response:
    log.error("a request met a mistake of the server", exc_info=error)
    return _refuse(500, "internal error: see the server's log")
