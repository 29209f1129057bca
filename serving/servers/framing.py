"""HTTP requests that say twice how long they are, `Content-Length` beside `Transfer-Encoding: chunked`.

Two readings of one body are how requests are smuggled. Here the chunks count, and the connection ends with the
answer, so that nothing behind them is taken for a request. Source: RFC 9112, 6.1 and 6.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class ChunksCount(HttpToolsProtocol):
    """uvicorn's protocol, whose parser refuses such a request unless it is told to read the chunks.

    It then also reads other transfer codings, up to the connection's end: serve `framed` apps with it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.parser is not None  # until the connection is lost
        self.parser.set_dangerous_leniencies(lenient_chunked_length=True)


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
