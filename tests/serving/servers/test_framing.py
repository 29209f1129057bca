"""How long a request is: chunks before `Content-Length`, and nothing behind them is taken for a request."""

from __future__ import annotations

import contextlib
import json
import socket
import threading

import pytest

BODY = json.dumps({"ready": True}).encode()
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
PROBE = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture(scope="module")
def address(embed, service):
    with embed(service) as addresses:
        yield addresses.http


def _request(*headers: str, body: bytes = CHUNKED, path: str = "/v2/repository/index") -> bytes:
    head = "\r\n".join([f"POST {path} HTTP/1.1", "Host: a", *headers])
    return head.encode() + b"\r\n\r\n" + body


def _tell(address: str, request: bytes, later: bytes = b"", *, end: bool = False) -> list[bytes]:
    """What comes back on one connection until the server closes it, or is silent; one entry for each answer.

    Args:
        address: The server's.
        request: What is sent first.
        later: What is sent when an answer has come.
        end: Whether nothing follows the request, and the server is told so.
    """
    host, port = address.rsplit(":", 1)
    said = b""
    with (
        socket.create_connection((host, int(port)), timeout=10) as connection,
        contextlib.suppress(ConnectionError),  # it was closed, and more came
    ):
        connection.sendall(request)
        if end:
            connection.shutdown(socket.SHUT_WR)
        while more := connection.recv(1 << 16):
            if later and not said:
                connection.sendall(later)
            said += more
            connection.settimeout(1)
            with contextlib.suppress(TimeoutError):
                connection.recv(1, socket.MSG_PEEK)
                continue
            said += b"HTTP/1.1 open"  # nothing more comes, and the connection stands
            break
    return said.split(b"HTTP/1.1 ")[1:]


LENGTHS = {
    "right": len(CHUNKED),
    "the body's": len(BODY),
    "none": 0,
    "too short": 3,
    "with what follows": len(CHUNKED) + len(PROBE),
    "too long": 10**6,
}


@pytest.mark.parametrize("first", ["Content-Length", "Transfer-Encoding"])
@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("coding", ["chunked", "Chunked", "chunked "])
def test_the_chunks_count_and_nothing_behind_them_is_answered(address, first, length, coding):
    headers = [f"Content-Length: {length}", f"Transfer-Encoding: {coding}"]
    if first != "Content-Length":
        headers.reverse()
    request = _request(*headers, "Connection: keep-alive")
    for sent in ([request], [request + PROBE], [request, PROBE], [PROBE + request + PROBE]):
        *before, answer = _tell(address, *sent)
        assert len(before) == sent[0].startswith(PROBE)
        assert answer.startswith(b"200")
        assert b"connection: close" in answer
        assert b'"name":"tiny"' in answer


def test_an_answer_before_the_body_ends_ends_the_connection_too(address):
    request = _request("Content-Length: 9", "Transfer-Encoding: chunked", path="/v2/nothing")
    (answer,) = _tell(address, request[:-8], request[-8:] + PROBE)
    assert answer.startswith(b"404")


def test_chunks_alone_leave_the_connection_open(address):
    answers = _tell(address, _request("Transfer-Encoding: chunked") + PROBE)
    assert [answer[:4] for answer in answers] == [b"200 ", b"200 ", b"open"]


@pytest.mark.parametrize(
    "headers",
    [
        ["Transfer-Encoding: gzip"],
        ["Transfer-Encoding: identity", "Content-Length: 4"],
        ["Transfer-Encoding: xchunked", "Content-Length: 4"],
        ["Transfer-Encoding: \x0bchunked", "Content-Length: 4"],
        ["Transfer-Encoding: chunked, identity", "Content-Length: 4"],
        ["Transfer-Encoding: gzip, chunked"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: identity", "Content-Length: 4"],
        ["Transfer-Encoding : chunked", "Content-Length: 4"],
        ["Transfer-Encoding: chunked", "Content-Length: x"],
        ["Transfer-Encoding: chunked", "Content-Length: 4", "Content-Length: 5"],
    ],
    ids=", ".join,
)
@pytest.mark.parametrize("end", [False, True])
def test_a_request_of_unknown_length_is_a_400_and_the_last(address, headers, end):
    (answer,) = _tell(address, _request(*headers) + PROBE, end=end)
    assert answer.startswith(b"400")
    assert b"connection: close" in answer


def test_others_are_answered_meanwhile(address):
    """One who never ends a body holds his own connection alone."""
    host, port = address.rsplit(":", 1)
    with contextlib.closing(socket.create_connection((host, int(port)))) as slow:
        slow.sendall(_request("Content-Length: 9", "Transfer-Encoding: chunked", body=b"5\r\nab"))
        answers: list[bytes] = []
        other = threading.Thread(target=lambda: answers.extend(_tell(address, PROBE)))
        other.start()
        other.join(20)
    assert answers[0].startswith(b"200")
