"""Where a request ends: chunks before `Content-Length`, upgrades not taken, long heads, what is no HTTP."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from http.client import HTTPConnection, HTTPResponse

import pytest

from utune_deploy.serving.servers import framing

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


UPGRADE = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")


def _codes(answers: list[bytes]) -> list[bytes]:
    return [answer[:4].strip() for answer in answers]


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
@pytest.mark.parametrize("length", [f"Content-Length: {len(BODY)}", "Transfer-Encoding: chunked"])
def test_a_wish_for_another_protocol_is_passed_over(address, length, version):
    body = CHUNKED if "chunked" in length else BODY
    request = _request(*UPGRADE, length, body=body).replace(b"HTTP/1.1", version.encode(), 1)
    lasts = version == "HTTP/1.1"
    for sent in ([request + request + PROBE], [request, PROBE], [request]):
        first, *others = _tell(address, *sent)
        assert first.startswith(b"200")
        assert b'"name":"tiny"' in first
        if lasts:
            more = len(sent) - 1 + 2 * (len(sent[0]) > len(request))
            assert _codes(others) == [b"200"] * more + [b"open"]


def test_such_a_request_may_come_in_pieces(address):
    request = _request(*UPGRADE, "Transfer-Encoding: chunked")
    host, port = address.rsplit(":", 1)
    for cut in range(len(request) - len(CHUNKED) - 3, len(request)):
        with contextlib.closing(socket.create_connection((host, int(port)), timeout=10)) as one:
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for part in (request[:cut], request[cut:]):
                one.sendall(part)
                time.sleep(0.02)
            assert one.recv(1 << 16).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("later", [True, False])
def test_a_body_behind_such_a_wish_is_no_request(address, later):
    head = _request(*UPGRADE, f"Content-Length: {len(PROBE)}", body=b"")
    host, port = address.rsplit(":", 1)
    with contextlib.closing(socket.create_connection((host, int(port)), timeout=10)) as one:
        if later:
            one.sendall(head)
            time.sleep(0.2)
            one.sendall(PROBE)
        else:
            one.sendall(head + PROBE)
        said = one.recv(1 << 16)
        one.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            said += one.recv(1 << 16)
    assert said.startswith(b"HTTP/1.1 400")
    assert said.count(b"HTTP/1.1") == 1


def test_a_tunnel_is_refused_and_the_connection_lasts(address):
    answers = _tell(address, b"CONNECT /v2 HTTP/1.1\r\nHost: a\r\n\r\n" + PROBE)
    assert _codes(answers) == [b"405", b"200", b"open"]


def test_fields_behind_the_chunks_are_none_of_the_request(address):
    fields = b"Content-Encoding: gzip\r\nX-Other: 1\r\n"
    body = CHUNKED[:-2] + fields + b"\r\n"
    answers = _tell(address, _request("Transfer-Encoding: chunked", body=body) + PROBE)
    assert _codes(answers) == [b"200", b"200", b"open"]


LONG = b"a" * (16 << 20)


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /v2 HTTP/1.1\r\nX: " + LONG,
        b"GET /v2/" + LONG,
        b"GET /v2 HTTP/1.1\r\n" + b"X: 1\r\n" * (1 << 20),
        _request("Transfer-Encoding: chunked", body=b"1;" + LONG),
        _request("Transfer-Encoding: chunked", body=CHUNKED[:-2] + b"X: " + LONG),
        PROBE + b"GET /v2 HTTP/1.1\r\nX: " + LONG,
    ],
    ids=["field", "path", "fields", "extension", "trailer", "second"],
)
def test_a_head_without_end_is_refused_before_it_is_read(address, request_):
    host, port = address.rsplit(":", 1)
    with (
        contextlib.closing(socket.create_connection((host, int(port)), timeout=10)) as one,
        pytest.raises(ConnectionError),
    ):
        one.sendall(request_)  # the server has hung up: it keeps none of this


def test_a_head_of_some_size_is_read(address):
    request = b"GET /v2 HTTP/1.1\r\nHost: a\r\nX: " + LONG[: 48 << 10] + b"\r\n\r\n"
    assert _codes(_tell(address, request + PROBE)) == [b"200", b"200", b"open"]


def test_what_is_no_http_is_told_so_in_json_behind_the_answers_that_are_owed(address):
    good = _request(f"Content-Length: {len(BODY)}", body=BODY)
    broken = _request("Transfer-Encoding: chunked", body=b"zz\r\n")
    for bad in (b"nonsense\r\n\r\n", broken):
        for count in (0, 1, 3):
            answers = _tell(address, good * count + bad + PROBE)
            assert _codes(answers) == [b"200"] * count + [b"400"]
            head, _, body = answers[-1].partition(b"\r\n\r\n")
            assert b"content-type: application/json" in head
            assert list(json.loads(body)) == ["error"]


def test_a_body_that_breaks_off_leaves_no_trace_in_the_log(address, caplog):
    for path in ("/v2/repository/index", "/v2/models/tiny/infer", "/v2/repository/models/x/load"):
        for body in (b"zz\r\n", b"5\r\nab"):
            _tell(address, _request("Transfer-Encoding: chunked", body=body, path=path), end=True)
    host, port = address.rsplit(":", 1)
    for path in ("/v2/repository/index", "/v2/models/tiny/infer"):
        with contextlib.closing(socket.create_connection((host, int(port)))) as one:
            one.sendall(_request("Content-Length: 9", body=b"{", path=path))
            time.sleep(0.1)
    assert _codes(_tell(address, PROBE)) == [b"200", b"open"]
    assert not [record for record in caplog.records if record.exc_info]


HALVES = {
    "nothing": b"",
    "half a head": PROBE[:-3],
    "half a body": _request("Content-Length: 9", body=b"{"),
    "half a chunk": _request("Transfer-Encoding: chunked", body=b"5\r\nab"),
    "a tunnel's": _request("Upgrade: h2c", "Connection: Upgrade", "Content-Length: 9", body=b"{"),
}


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
def test_a_request_that_never_ends_is_given_up(address, monkeypatch, half, count):
    monkeypatch.setattr(framing, "SILENCE_SECONDS", 0.2)
    answers = _codes(_tell(address, PROBE * count + half))
    if half:
        assert answers == [b"200"] * count + [b"408"]
    else:  # one that never asked is told nothing; between requests it may be silent
        assert answers == [b"200"] * count + [b"open"] * bool(count)


def test_a_slow_client_is_waited_for(address, monkeypatch):
    monkeypatch.setattr(framing, "SILENCE_SECONDS", 0.3)
    host, port = address.rsplit(":", 1)
    slow = HTTPConnection(host, int(port), timeout=10)
    slow.connect()
    request = _request(f"Content-Length: {len(BODY)}", body=BODY)
    for start in range(0, len(request), 16):
        time.sleep(0.1)
        slow.sock.sendall(request[start : start + 16])
    answer = HTTPResponse(slow.sock, method="POST")
    answer.begin()
    assert answer.status == 200
    assert json.loads(answer.read())
    time.sleep(0.6)  # between requests it may be silent
    slow.sock.sendall(PROBE)
    assert slow.sock.recv(1 << 10).startswith(b"HTTP/1.1 200")
    slow.close()
