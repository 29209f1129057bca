"""How HTTP requests follow each other on a connection: where one ends, and where the next one begins.

Two readings of one body are how requests are smuggled past a proxy. Where a request says twice how long it is,
`Content-Length` beside `Transfer-Encoding: chunked`, the chunks count and the connection ends with the answer, so
that nothing behind them is taken for a request. One that asks for another protocol (`Upgrade: h2c`, as Java's client
does by itself) is answered in this one, its body read like any other's. Fields behind the chunks are dropped. A request that never ends
is given up.
Source: RFC 9112, 6.1 and 6.3; RFC 9110, 6.5.1 and 7.8.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httptools
from starlette.responses import JSONResponse
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    import asyncio

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_HEAD = 64 << 10
"""Bytes that may come while neither a head nor a part of a body is whole. Triton takes less."""


SILENCE_SECONDS = 60.0
"""Longest that a client may send nothing before a request of its is whole: it holds a connection, and perhaps a body."""


class Framing(HttpToolsProtocol):
    """uvicorn's protocol with the rules above. Serve `framed` apps with it.

    uvicorn's own parser refuses a request of two lengths, and takes the body of one that asks for an upgrade for the
    next request. This one also reads other transfer codings, up to the connection's end: `framed` refuses them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begin()
        self._in_head = False  # of a request, whose callbacks build its scope
        self._again = False  # the head was read before, and is only there for the parser
        self._silent = 0  # bytes since the parser last told of something whole
        self._unanswered = 0
        self._refusal = b""
        self._incomplete = True  # a request, or the connection's first is awaited
        self._alarm: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the event loop."""
        super().connection_made(transport)
        self._await_more()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        super().connection_lost(exc)
        self._incomplete = False
        self._await_more()

    def _await_more(self) -> None:
        """Begin to count the seconds in which nothing comes, while something is to come."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if self._incomplete:
            self._alarm = self.loop.call_later(SILENCE_SECONDS, self._give_up)

    def _give_up(self) -> None:
        if self.flow.read_paused:  # it is we who do not read
            self._await_more()
        elif not self._in_head and self.cycle is None:  # it never asked: an answer would puzzle it
            self.transport.close()
        elif not self._refusal:
            sentence = f"nothing came of a request for {SILENCE_SECONDS:g} s"
            self._refuse(b"408 Request Timeout", sentence)

    def _begin(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_chunked_length=True)

    def data_received(self, data: bytes) -> None:
        """Read what came; refuse it behind the answers that are owed."""
        self._unset_keepalive_if_required()
        if self._refusal:
            return
        self._silent += len(data)
        try:
            self._read(data)
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self._refuse(b"400 Bad Request", "this is not an HTTP request")
            return
        if self._silent > MAX_HEAD:
            sentence = f"a request's head or trailer is larger than {MAX_HEAD} bytes"
            self._refuse(b"431 Request Header Fields Too Large", sentence)
        self._await_more()

    def _read(self, data: bytes) -> None:
        rest = memoryview(data)
        while True:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as upgrade:
                # The parser has left the body out. A new one reads it, behind the head without its wish.
                (read,) = upgrade.args
                rest = rest[read:]
                self.cycle.more_body = True
                self._again = True
                self._begin()
                self.parser.feed_data(self._head())

    def _head(self) -> bytes:
        lines = [b"POST / HTTP/" + self.scope["http_version"].encode()]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _refuse(self, status: bytes, sentence: str) -> None:
        """Answer with a refusal, behind the answers that are owed, and end the connection."""
        body = json.dumps({"error": sentence}).encode()
        self._refusal = (
            b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
            % (status, len(body), body)
        )
        if not self._in_head and self.cycle is not None and self.cycle.more_body:
            # The request itself is the broken one: nobody answers it.
            if self.pipeline and self.pipeline[0][0] is self.cycle:
                self.pipeline.popleft()
            if not self.cycle.response_complete:
                self._unanswered -= 1
                self.cycle.disconnected = True
                self.cycle.message_event.set()
        self._end_if_answered()

    def _end_if_answered(self) -> None:
        if self._refusal and not self._unanswered and not self.transport.is_closing():
            self.transport.write(self._refusal)
            self.transport.close()

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self._in_head = self._incomplete = True
        if not self._again:
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Called by the parser."""
        if not self._again:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser, also for fields behind the chunks."""
        if self._in_head and not self._again:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        if not self._again:
            super().on_headers_complete()
            self._unanswered += 1
        self._in_head = self._again = False
        self._silent = 0

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._silent = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._silent = 0
        self._incomplete = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Called behind each answer."""
        super().on_response_complete()
        self._unanswered -= 1
        self._end_if_answered()


def framed(app: ASGIApp) -> ASGIApp:
    """The app, with a connection that ends behind a request of two lengths, and behind one of unknown length."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        headers = scope["headers"]
        codings = [value.strip(b" \t").lower() for key, value in headers if key == _CODING]
        if not codings:
            await app(scope, receive, send)
        elif codings != [b"chunked"]:
            await _refusal(scope, receive, _last(send))
        elif any(key == b"content-length" for key, _ in headers):
            await app(scope, receive, _last(send))
        else:
            await app(scope, receive, send)

    return answer


_CODING = b"transfer-encoding"
_refusal = JSONResponse({"error": "unknown transfer encoding: send chunked"}, status_code=400)


def _last(send: Send) -> Send:
    """`send` of an answer that is the connection's last."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await send(message)

    return closing
