"""Calls over HTTP: tritonclient writes and reads the bodies, `http.client` and aiohttp carry them.

tritonclient's own HTTP client may be used by one thread only, keeps one timeout for its whole life, and drops
the headers of a refusal. This one keeps idle connections in a pool that threads share.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import select
import ssl
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from .calls import Config, Index, model_facts, ready_models
from .failures import LOST, REFUSED, Failure, of_status, unreachable, unreadable
from .tensors import infer_inputs, infer_parameters, microseconds, outputs

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping
    from pathlib import Path

    import aiohttp

    from .address import Address
    from .calls import Call, Reply

HEADER_LENGTH = "Inference-Header-Content-Length"
CHUNK = 1 << 20  # bytes read at once; the deadline is looked at between two


@dataclass(frozen=True)
class Message:
    """A request, but for its server.

    Attributes:
        method: `GET` or `POST`.
        path: With the address's own path in front.
        headers: By name.
        body: Its content.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


def write(call: Call, address: Address, limit_s: float | None) -> Message:
    """The request that asks a call; the limit travels as the protocol's `timeout`."""
    if isinstance(call, Index):
        headers = {"Content-Type": "application/json"}
        return Message("POST", f"{address.path}/v2/repository/index", headers, b"{}")
    model = f"{address.path}/v2/models/{quote(call.model, safe='')}"
    if isinstance(call, Config):
        return Message("GET", f"{model}/config", {}, b"")
    import tritonclient.http as triton

    body, length = triton.InferenceServerClient.generate_request_body(
        infer_inputs(triton, call.inputs),
        priority=call.priority,
        timeout=microseconds(limit_s),  # type: ignore[arg-type]
        parameters=infer_parameters(call),
    )
    headers = {"Content-Type": "application/octet-stream"}
    if length is not None:
        headers[HEADER_LENGTH] = str(length)
    return Message("POST", f"{model}/infer", headers, body)


def read(
    call: Call, address: Address, status: int, headers: Mapping[str, str], body: bytes
) -> Reply:
    """The reply to a call.

    Args:
        call: What was asked.
        address: Who answered.
        status: The status.
        headers: Of the response; names in lower case.
        body: Its content.

    Raises:
        Failure: It is a refusal, or cannot be read.
    """
    if status != 200:
        raise of_status(address, status, _sentence(body), headers.get("retry-after"))
    try:
        if isinstance(call, Index):
            return ready_models(json.loads(body))
        if isinstance(call, Config):
            return model_facts(json.loads(body))
        import tritonclient.http as triton

        length = headers.get(HEADER_LENGTH.lower())
        result = triton.InferenceServerClient.parse_response_body(
            body,
            header_length=None if length is None else int(length),  # type: ignore[arg-type]
        )
        names = [output["name"] for output in result.get_response()["outputs"]]
        return outputs(result, names)
    except Exception as cause:  # whatever a foreign body makes a parser raise
        raise unreadable(address, f"{type(cause).__name__}: {cause}") from cause


class HttpTransport:
    """HTTP for several threads: one connection per request in flight, kept for the next.

    Args:
        address: The server.
        certificates: For TLS, a PEM file with the authorities to trust; None for the system's.
    """

    def __init__(self, address: Address, certificates: Path | None = None) -> None:
        self._address = address
        self._context = _context(address, certificates)
        self._idle: deque[http.client.HTTPConnection] = deque()
        self._closed = False

    def send(self, call: Call, limit_s: float | None) -> Reply:
        """See `Transport`."""
        message = write(call, self._address, limit_s)
        end = None if limit_s is None else time.monotonic() + limit_s
        connection = self._connect(end)
        try:
            status, headers, body = _exchange(connection, message, end)
        except TimeoutError as cause:
            connection.close()
            raise unreachable(self._address, "no reply in time", LOST) from cause
        except (OSError, http.client.HTTPException) as cause:
            connection.close()
            if isinstance(cause, http.client.HTTPException) and not isinstance(
                cause, (http.client.RemoteDisconnected, http.client.IncompleteRead)
            ):
                raise unreadable(self._address, repr(cause)) from cause
            raise unreachable(self._address, cause, LOST) from cause
        except BaseException:
            connection.close()
            raise
        if self._closed or headers.get("connection", "").lower() == "close":
            connection.close()
        else:
            self._idle.append(connection)
            if self._closed:  # closed meanwhile by another thread
                self._drain()
        return read(call, self._address, status, headers, body)

    def close(self) -> None:
        """See `Transport`."""
        self._closed = True
        self._drain()

    def _drain(self) -> None:
        while self._idle:
            try:
                self._idle.pop().close()
            except IndexError:  # another thread was quicker
                return

    def _connect(self, end: float | None) -> http.client.HTTPConnection:
        """A connection that is open: an idle one that still is, or a new one.

        Raises:
            Failure: There is none.
        """
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:
                break
            if connection.sock is not None and not _is_readable(connection.sock):
                return connection
            connection.close()  # the server hung up
        host, port = self._address.host, self._address.port
        if self._context is None:
            connection = http.client.HTTPConnection(host, port)
        else:
            connection = http.client.HTTPSConnection(host, port, context=self._context)
        try:
            connection.timeout = _left(end)  # type: ignore[assignment]
            connection.connect()
        except OSError as cause:
            connection.close()
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise Failure(unreachable(self._address, cause, REFUSED).error) from cause
            raise unreachable(self._address, cause, REFUSED) from cause
        return connection


class AsyncHttpTransport:
    """HTTP for the coroutines of one event loop.

    Args:
        address: The server.
        certificates: As of `HttpTransport`.
    """

    def __init__(self, address: Address, certificates: Path | None = None) -> None:
        self._address = address
        self._context = _context(address, certificates)
        self._session: aiohttp.ClientSession | None = None

    async def send(self, call: Call, limit_s: float | None) -> Reply:
        """See `AsyncTransport`."""
        import aiohttp

        if self._session is None:  # a session belongs to the running loop
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ssl=self._context or True),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        message = write(call, self._address, limit_s)
        try:
            async with self._session.request(
                message.method,
                f"{'https' if self._context else 'http'}://{self._address.authority}{message.path}",
                headers=message.headers,
                data=message.body,
                timeout=aiohttp.ClientTimeout(total=limit_s),
                allow_redirects=False,
            ) as response:
                body = await response.read()
                headers = {name.lower(): value for name, value in response.headers.items()}
        except (TimeoutError, asyncio.TimeoutError) as cause:
            raise unreachable(self._address, "no reply in time", LOST) from cause
        except aiohttp.ClientConnectorCertificateError as cause:
            raise Failure(unreachable(self._address, cause, REFUSED).error) from cause
        except aiohttp.ClientConnectorError as cause:
            raise unreachable(self._address, cause, REFUSED) from cause
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as cause:
            raise unreachable(self._address, cause, LOST) from cause
        except aiohttp.ClientError as cause:
            raise unreadable(self._address, repr(cause)) from cause
        return read(call, self._address, response.status, headers, body)

    async def close(self) -> None:
        """See `AsyncTransport`."""
        if self._session is not None:
            await self._session.close()


def _exchange(
    connection: http.client.HTTPConnection, message: Message, end: float | None
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers with names in lower case, and body of one request."""
    sock = connection.sock
    sock.settimeout(_left(end))
    connection.request(message.method, message.path, body=message.body, headers=message.headers)
    sock.settimeout(_left(end))
    with connection.getresponse() as response:
        wanted, parts = response.length, []
        while not response.isclosed():
            sock.settimeout(_left(end))
            parts.append(response.read(CHUNK))
        body = b"".join(parts)
        if wanted is not None and len(body) < wanted:
            raise http.client.IncompleteRead(body, wanted - len(body))
        headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, headers, body


def _left(end: float | None) -> float | None:
    """Seconds until then, for a socket.

    Raises:
        TimeoutError: None are.
    """
    if end is None:
        return None
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _is_readable(sock: socket.socket) -> bool:
    """Whether an idle connection has something to say, which can only be its end."""
    if hasattr(select, "poll"):  # select itself knows no descriptors above 1023
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([sock], [], [], 0)[0])


def _context(address: Address, certificates: Path | None) -> ssl.SSLContext | None:
    if not address.is_secure:
        return None
    return ssl.create_default_context(cafile=certificates)


def _sentence(body: bytes) -> str:
    """What a refusal says, be it the protocol's JSON or a proxy's page."""
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return " ".join(body.decode(errors="replace").split())[:200]
