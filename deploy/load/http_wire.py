"""Requests over HTTP/1.1: whole messages are written as they are, httptools reads the replies.

A client library would build headers and walk through its layers for every request; here one is a write and a parse.
A connection carries one request at a time and is kept for the next.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httptools

from .wire import BROKEN, OK, TIMEOUT, Reply, failed, now

if TYPE_CHECKING:
    from ...serving.client.address import Address

HEADER_LENGTH = "Inference-Header-Content-Length"

CONNECTIONS = 900
"""Most at once: `select`, which waits to the microsecond, knows no descriptor above 1023. A request that waits for
one is late, and the report says so."""

ASK_S = 10.0
"""Seconds for a question outside the load."""


def message(
    address: Address, method: str, path: str, body: bytes = b"", head: int | None = None
) -> bytes:
    """A whole request.

    Args:
        address: The server.
        method: `GET` or `POST`.
        path: Below the address's own.
        body: Its content.
        head: Bytes of the JSON in front of binary tensors.
    """
    lines = [
        f"{method} {address.path}{path} HTTP/1.1",
        f"Host: {address.authority}",
        f"Content-Length: {len(body)}",
        f"Content-Type: application/{'json' if head is None else 'octet-stream'}",
    ]
    if head is not None:
        lines.append(f"{HEADER_LENGTH}: {head}")
    return "\r\n".join([*lines, "", ""]).encode() + body


class HttpWire:
    """See `Wire`.

    Args:
        address: The server.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._context = ssl.create_default_context() if address.is_secure else None
        self._idle: list[_Connection] = []
        self._room = asyncio.Semaphore(CONNECTIONS)

    async def send(self, message: bytes, limit_s: float) -> Reply:
        """See `Wire`."""
        async with self._room:
            try:
                connection = await self._connect(limit_s)
            except OSError as error:  # what a time-out is too
                at = now()
                return failed(at, at, BROKEN, str(error))
            reply = await connection.send(message, limit_s)
            if connection.is_open:
                self._idle.append(connection)
            return reply

    async def statistics(self, model: str) -> dict[str, Any] | None:
        """See `Wire`."""
        value = await self._get(f"/v2/models/{quote(model, safe='')}/stats")
        entries = value.get("model_stats", []) if isinstance(value, dict) else []
        return entries[0] if entries else None

    async def server(self) -> dict[str, str]:
        """See `Wire`."""
        value = await self._get("/v2")
        return {key: str(value[key]) for key in ("name", "version") if key in (value or {})}

    async def close(self) -> None:
        """See `Wire`."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _get(self, path: str) -> Any:
        reply = await self.send(message(self._address, "GET", path), ASK_S)
        try:
            return json.loads(reply.answer) if reply.status == OK else None
        except ValueError:
            return None

    async def _connect(self, limit_s: float) -> _Connection:
        """A connection that is open: the one that was used last, or a new one.

        Raises:
            OSError: There is none.
        """
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        host, port = self._address.host, self._address.port
        opening = asyncio.get_running_loop().create_connection(
            _Connection, host, port, ssl=self._context
        )
        try:
            _, connection = await asyncio.wait_for(opening, limit_s)
        except asyncio.TimeoutError as cause:  # no OSError before Python 3.11
            raise TimeoutError(str(cause)) from cause
        return connection


class _Connection(asyncio.Protocol):
    """One connection, and the request on it."""

    def __init__(self) -> None:
        self.is_open = False
        self._waiter: asyncio.Future[None] | None = None
        self._status = BROKEN
        self._first_ns = self._ended_ns = 0

    async def send(self, message: bytes, limit_s: float) -> Reply:
        """One request and its reply."""
        loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._waiter = loop.create_future()
        self._parts: list[bytes] = []
        self._head: int | None = None
        self._status = BROKEN
        self._first_ns = 0
        timer = loop.call_later(limit_s, self._give_up)
        sent_ns = now()
        self._transport.write(message)
        written_ns = now()
        await self._waiter
        timer.cancel()
        if self._status in (BROKEN, TIMEOUT):
            says = "no reply in time" if self._status == TIMEOUT else "the connection broke"
            return failed(sent_ns, written_ns, self._status, says)
        return Reply(
            sent_ns, written_ns, self._first_ns, self._ended_ns,
            self._status, b"".join(self._parts), self._head,
        )  # fmt: skip

    def close(self) -> None:
        """Hang up."""
        self.is_open = False
        self._transport.close()

    def _give_up(self) -> None:
        self._status = TIMEOUT
        self._done()
        self.close()

    def _done(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is there."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        """Some of a reply."""
        if not self._first_ns:
            self._first_ns = now()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._done()
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The server hung up."""
        self.is_open = False
        self._done()

    # what httptools calls

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        if name.lower() == HEADER_LENGTH.lower().encode():
            self._head = int(value)

    def on_body(self, body: bytes) -> None:
        """Some of the content."""
        self._parts.append(body)

    def on_message_complete(self) -> None:
        """All of a reply."""
        self._ended_ns = now()
        status = self._parser.get_status_code()
        self._status = OK if status == 200 else str(status)
        if not self._parser.should_keep_alive():
            self.close()
        self._done()
