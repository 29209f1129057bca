"""Requests over gRPC: serialised messages are sent as they are over one channel of `grpc.aio`."""
# Generated protobuf modules build their classes at import, where a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .wire import BROKEN, OK, TIMEOUT, Reply, failed, now

if TYPE_CHECKING:
    from ...serving.client.address import Address

SERVICE = "/inference.GRPCInferenceService/"

ASK_S = 10.0
"""Seconds for a question outside the load."""

CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]


class GrpcWire:
    """See `Wire`. Belongs to the event loop that it is made in.

    Args:
        address: The server.
    """

    def __init__(self, address: Address) -> None:
        import grpc
        import grpc.aio

        if address.is_secure:
            credentials = grpc.ssl_channel_credentials()
            self._channel = grpc.aio.secure_channel(address.authority, credentials, CHANNEL)
        else:
            self._channel = grpc.aio.insecure_channel(address.authority, CHANNEL)
        self._error = grpc.aio.AioRpcError
        self._infer: Any = self._channel.unary_unary(f"{SERVICE}ModelInfer")

    async def send(self, message: bytes, limit_s: float) -> Reply:
        """See `Wire`."""
        sent_ns = now()
        call = self._infer(message, timeout=limit_s)
        written_ns = now()
        try:
            answer = await call
        except self._error as error:
            return failed(sent_ns, written_ns, _status(error), error.details() or "")
        ended_ns = now()
        return Reply(sent_ns, written_ns, ended_ns, ended_ns, OK, answer)

    async def statistics(self, model: str) -> dict[str, Any] | None:
        """See `Wire`."""
        from google.protobuf.json_format import MessageToDict
        from tritonclient.grpc import service_pb2

        asked = service_pb2.ModelStatisticsRequest(name=model)
        answer = await self._ask("ModelStatistics", asked)
        if answer is None:
            return None
        read = service_pb2.ModelStatisticsResponse.FromString(answer)
        value = MessageToDict(read, preserving_proto_field_name=True)
        return next(iter(value.get("model_stats", [])), None)

    async def server(self) -> dict[str, str]:
        """See `Wire`."""
        from tritonclient.grpc import service_pb2

        answer = await self._ask("ServerMetadata", service_pb2.ServerMetadataRequest())
        if answer is None:
            return {}
        read = service_pb2.ServerMetadataResponse.FromString(answer)
        return {"name": read.name, "version": read.version}

    async def close(self) -> None:
        """See `Wire`."""
        await self._channel.close()

    async def _ask(self, method: str, message: Any) -> bytes | None:
        call: Any = self._channel.unary_unary(f"{SERVICE}{method}")
        try:
            return await call(message.SerializeToString(), timeout=ASK_S)
        except self._error:
            return None


def _status(error: Any) -> str:
    """A refusal's code, or that there was no answer in time or no connection."""
    code = error.code().name
    if code == "DEADLINE_EXCEEDED":
        return TIMEOUT
    if code == "UNAVAILABLE" and "connect" in (error.details() or "").lower():
        return BROKEN
    return code
