"""Calls over gRPC, with tritonclient's clients."""
# Generated protobuf modules build their classes at import, where a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .calls import Config, Index, model_facts, ready_models
from .failures import Failure, of_code, unreadable
from .tensors import infer_inputs, infer_parameters, microseconds, outputs

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .address import Address
    from .calls import Call, Reply

_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A channel that could not connect fails every call until it tries again: no later than we do.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.use_local_subchannel_pool", 1),  # not another client's back-off
]


def write(call: Call, limit_s: float | None) -> tuple[str, dict[str, Any]]:
    """The method of tritonclient's client that asks a call, and its arguments."""
    if isinstance(call, Index):
        return "get_model_repository_index", {"client_timeout": limit_s}
    if isinstance(call, Config):
        return "get_model_config", {"model_name": call.model, "client_timeout": limit_s}
    import tritonclient.grpc as triton

    return "infer", {
        "model_name": call.model,
        "inputs": infer_inputs(triton, call.inputs),
        "priority": call.priority,
        "timeout": microseconds(limit_s),
        "parameters": infer_parameters(call),
        "client_timeout": limit_s,
    }


def read(call: Call, address: Address, result: Any) -> Reply:
    """The reply to a call.

    Raises:
        Failure: It cannot be read.
    """
    try:
        if isinstance(call, Index):
            return ready_models(
                {"name": model.name, "state": model.state} for model in result.models
            )
        if isinstance(call, Config):
            return model_facts(_config(result.config))
        return outputs(result, [output.name for output in result.get_response().outputs])
    except Exception as cause:  # whatever a foreign reply makes a parser raise
        raise unreadable(address, f"{type(cause).__name__}: {cause}") from cause


class GrpcTransport:
    """gRPC for several threads, over one channel.

    Args:
        address: The server.
        certificates: For TLS, a PEM file with the authorities to trust; None for gRPC's own.
    """

    def __init__(self, address: Address, certificates: Path | None = None) -> None:
        import tritonclient.grpc as triton

        self._address = address
        self._error = triton.InferenceServerException
        self._client = triton.InferenceServerClient(**_settings(address, certificates))

    def send(self, call: Call, limit_s: float | None) -> Reply:
        """See `Transport`."""
        method, arguments = write(call, limit_s)
        try:
            result = getattr(self._client, method)(**arguments)
        except self._error as cause:
            raise _failure(self._address, cause) from cause
        return read(call, self._address, result)

    def close(self) -> None:
        """See `Transport`."""
        self._client.close()


class AsyncGrpcTransport:
    """gRPC for the coroutines of one event loop, over one channel.

    Args:
        address: The server.
        certificates: As of `GrpcTransport`.
    """

    def __init__(self, address: Address, certificates: Path | None = None) -> None:
        self._address = address
        self._settings = _settings(address, certificates)
        self._client: Any = None

    async def send(self, call: Call, limit_s: float | None) -> Reply:
        """See `AsyncTransport`."""
        import tritonclient.grpc.aio as triton

        if self._client is None:  # a channel belongs to the running loop
            self._client = triton.InferenceServerClient(**self._settings)
        method, arguments = write(call, limit_s)
        try:
            result = await getattr(self._client, method)(**arguments)
        except triton.InferenceServerException as cause:
            raise _failure(self._address, cause) from cause
        return read(call, self._address, result)

    async def close(self) -> None:
        """See `AsyncTransport`."""
        if self._client is not None:
            await self._client.close()


def _settings(address: Address, certificates: Path | None) -> Mapping[str, Any]:
    return {
        "url": address.authority,
        "ssl": address.is_secure,
        "root_certificates": certificates,
        "channel_args": _CHANNEL,
    }


def _failure(address: Address, cause: Any) -> Failure:
    """The failure that an `InferenceServerException` is; its status is `StatusCode.NAME`."""
    code = (cause.status() or "").removeprefix("StatusCode.")
    return of_code(address, code, cause.message() or "")


def _config(config: Any) -> dict[str, Any]:
    """The fields that matter of a `ModelConfig` message."""
    from tritonclient.grpc import model_config_pb2

    return {
        "max_batch_size": config.max_batch_size,
        "input": [
            {
                "name": entry.name,
                "data_type": model_config_pb2.DataType.Name(entry.data_type),
                "dims": entry.dims,
            }
            for entry in config.input
        ],
    }
