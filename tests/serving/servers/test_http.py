"""HTTP as it comes off the wire: every body has an answer, and no body brings a 500."""

from __future__ import annotations

import gzip
import http.client
import json
import zlib
from contextlib import closing
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

INFER = "/v2/models/tiny/infer"
PIXELS = np.zeros((1, 3, 8, 8), np.float32)
IMAGES = {"name": "images", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": PIXELS.tolist()}
TASK = {"name": "task", "datatype": "BYTES", "shape": [1], "data": ["pets"]}
GOOD = {"inputs": [IMAGES, TASK]}


@pytest.fixture(scope="module")
def address(embed, service):
    with embed(service) as addresses:
        yield addresses.http


def _call(address, method, path, body=b"", headers=None):
    with closing(http.client.HTTPConnection(address, timeout=30)) as connection:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()


def _infer(address, message, **headers):
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    status, _, reply = _call(address, "POST", INFER, body, headers)
    return status, json.loads(reply)


def test_json_in_and_out(address, service):
    status, reply = _infer(address, {**GOOD, "id": "seven"})
    assert status == 200
    assert (reply["model_name"], reply["model_version"], reply["id"]) == ("tiny", "1", "seven")
    logits, label, score = reply["outputs"]
    reference = service.answer(PIXELS, ["pets"])
    assert np.array(logits["data"], np.float32).tobytes() == reference.logits.tobytes()
    assert label == {
        "name": "label",
        "datatype": "BYTES",
        "shape": [1, 1],
        "data": list(reference.labels),
    }
    assert score["shape"] == [1, 1]


def test_a_version_may_be_named(address):
    body = json.dumps(GOOD).encode()
    assert _call(address, "POST", "/v2/models/tiny/versions/1/infer", body)[0] == 200
    assert _call(address, "POST", "/v2/models/tiny/versions/2/infer", body)[0] == 404


def test_health_answers_in_json(address):
    assert _call(address, "GET", "/v2/health/live")[2] == b'{"live":true}'
    assert _call(address, "GET", "/v2/health/ready")[2] == b'{"ready":true}'


def _without(entry, key):
    return {name: value for name, value in entry.items() if name != key}


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[null,null]",
        b"null",
        b"1e999",
        b"[" * 100_000,
        b'{"inputs": ' + b"[" * 500 + b"]" * 500 + b"}",
        {},
        {"inputs": None},
        {"inputs": {}},
        {"inputs": [None]},
        {"inputs": []},
        {"inputs": [IMAGES, TASK], "outputs": None},
        {"inputs": [IMAGES, TASK], "outputs": [None]},
        {"inputs": [IMAGES, TASK], "outputs": [{}]},
        {"inputs": [IMAGES, TASK], "outputs": [{"name": "x"}]},
        {"inputs": [IMAGES, TASK], "parameters": []},
        {"inputs": [IMAGES, TASK], "parameters": {"binary_data_output": "yes"}},
        {"inputs": [IMAGES, TASK], "id": 7},
        *({"inputs": [_without(IMAGES, key), TASK]} for key in IMAGES),
        {"inputs": [{**IMAGES, "shape": [1, 3, 8, -8]}, TASK]},
        {"inputs": [{**IMAGES, "shape": [1, 3, 8, 8.0]}, TASK]},
        {"inputs": [{**IMAGES, "shape": [True, 3, 8, 8]}, TASK]},
        {"inputs": [{**IMAGES, "shape": []}, TASK]},
        {"inputs": [{**IMAGES, "shape": [10**30, 3, 8, 8]}, TASK]},
        {"inputs": [{**IMAGES, "data": "x"}, TASK]},
        {"inputs": [{**IMAGES, "data": [float("nan")] * 192}, TASK]},
        {"inputs": [{**IMAGES, "parameters": 7}, TASK]},
        {"inputs": [{**IMAGES, "parameters": {"binary_data_size": 0}}, TASK]},
        {"inputs": [{**IMAGES, "parameters": {"shared_memory_region": "x"}}, TASK]},
        {"inputs": [IMAGES, TASK], "parameters": {"mine": {}}},
        {"inputs": [IMAGES, TASK], "parameters": {"mine": None}},
        {"inputs": [{**IMAGES, "parameters": {"binary_data_size": 768}}, TASK]},
        {"inputs": [{**IMAGES, "parameters": {"binary_data_size": -1}}, TASK]},
        {"inputs": [IMAGES, {**TASK, "data": [["pets"]], "shape": [1, 1, 1]}]},
        {"inputs": [IMAGES, {**TASK, "data": [{}]}]},
        {"inputs": [IMAGES, {**TASK, "data": [7]}]},
    ],
)
def test_a_malformed_body_is_a_400_with_a_sentence(address, message):
    status, reply = _infer(address, message)
    assert status == 400, reply
    assert reply["error"]


@pytest.mark.parametrize("length", ["x", "-1", "999999", "5", ""])
def test_a_wrong_head_length_is_a_400(address, length):
    status, reply = _infer(address, GOOD, **{"Inference-Header-Content-Length": length})
    assert status == 400, reply


def test_bytes_behind_the_last_input_are_refused(address):
    head = json.dumps(GOOD).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    status, reply = _infer(address, head + b"more", **headers)
    assert status == 400
    assert "4 bytes" in reply["error"]


@pytest.mark.parametrize(
    ("body", "encoding", "status"),
    [
        (gzip.compress(json.dumps(GOOD).encode()), "gzip", 200),
        (zlib.compress(json.dumps(GOOD).encode()), "deflate", 200),
        (json.dumps(GOOD).encode(), "gzip", 400),
        (gzip.compress(json.dumps(GOOD).encode())[:-20], "gzip", 400),
        (json.dumps(GOOD).encode(), "br", 415),
        (gzip.compress(b" " * (65 << 20), 1), "gzip", 413),
    ],
    ids=["gzip", "deflate", "not gzip", "cut", "unknown", "bomb"],
)
def test_packed_bodies(address, body, encoding, status):
    found, reply = _infer(address, body, **{"Content-Encoding": encoding})
    assert found == status, reply


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/other/ready", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("GET", INFER, 405),
        ("DELETE", "/v2/health/live", 405),
        ("TRACE", "/v2", 405),
    ],
)
def test_an_address_that_is_not_there(address, method, path, status):
    found, headers, reply = _call(address, method, path)
    assert found == status
    assert json.loads(reply)["error"]
    assert status != 405 or "allow" in {name.lower() for name in headers}


_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["images", "task", "FP32", "BYTES", "pets", "logits"])
)
_KEYS = st.sampled_from(
    ["inputs", "outputs", "parameters", "name", "datatype", "shape", "data", "binary_data_size"]
)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(
    value=_VALUES | st.fixed_dictionaries({"inputs": st.lists(_VALUES, max_size=3)}),
    key=_KEYS,
    entry=st.sampled_from([IMAGES, TASK]),
)
def test_no_json_brings_a_500(address, value, key, entry):
    for message in (value, {"inputs": [IMAGES, {**entry, key: value}]}, {**GOOD, key: value}):
        status, reply = _infer(address, message)
        assert status in (200, 400), reply


@pytest.mark.parametrize(
    "message",
    [
        {"inputs": [IMAGES, {**TASK, "data": ["\ud800"]}]},
        {"inputs": [{**IMAGES, "name": "\ud800"}, TASK]},
        {**GOOD, "outputs": [{"name": "\ud800"}]},
        {**GOOD, "id": "\ud800"},
        {"inputs": [{**IMAGES, "shape": [0, 2**70], "data": []}, TASK]},
        *({**GOOD, "parameters": {key: 2**64}} for key in ("timeout", "priority")),
        {**GOOD, "parameters": {"timeout": 10**400}},
        {**GOOD, "outputs": [{"name": "logits", "parameters": {"classification": 2**64}}]},
    ],
    ids=["task", "input", "output", "id", "shape", "timeout", "priority", "long", "classes"],
)
def test_half_a_character_or_a_size_beyond_64_bits_is_refused(address, message):
    status, reply = _infer(address, message)
    assert status == 400, reply


def test_a_character_of_two_halves_is_one(address):
    for identity in ("\U0001f600", "\\ud800"):
        assert _infer(address, {**GOOD, "id": identity})[1]["id"] == identity


def test_json_is_utf_8(address):
    text = json.dumps(GOOD)
    assert _infer(address, text.encode("utf-8-sig"))[0] == 200
    for encoding in ("utf-16", "utf-16-be", "utf-32"):
        assert _infer(address, text.encode(encoding))[0] == 400
    assert _infer(address, text[:-1].encode() + b', "id": "\xed\xa0\x80"}')[0] == 400


@pytest.mark.parametrize("slash", ["%2f", "%2F"])
def test_an_escaped_slash_is_no_step(address, slash):
    for method, path in (
        ("POST", f"/v2/models/tiny{slash}infer"),
        ("POST", f"/v2{slash}repository{slash}index"),
        ("GET", f"/v2{slash}health/live"),
    ):
        status, _, reply = _call(address, method, path, json.dumps(GOOD))
        assert (status, list(json.loads(reply))) == (404, ["error"])
    assert _call(address, "GET", f"/v2/health/live?a{slash}b")[0] == 200


@pytest.fixture(scope="module")
def guarded(embed, service):
    """Where nothing that is sent by chance can change the tasks."""
    with embed(service, task_control=False, shared_memory=True) as addresses:
        yield addresses.http


def test_a_region_of_half_a_character_is_refused(guarded):
    body = b'{"key": "/\\ud800", "byte_size": 4}'
    status, _, reply = _call(guarded, "POST", "/v2/systemsharedmemory/region/x/register", body)
    assert status == 400, reply


_WORDS = st.sampled_from(
    [
        *(
            "v2",
            "models",
            "tiny",
            "pets",
            "tiny.tasks",
            "versions",
            "1",
            "infer",
            "ready",
            "config",
        ),
        *("stats", "health", "live", "repository", "index", "load", "unload", "region", "status"),
        *("systemsharedmemory", "cudasharedmemory", "register", "unregister", "", "..", "%00"),
    ]
)
_PATHS = st.lists(_WORDS | st.text(max_size=5).map(quote), max_size=6).map(
    lambda words: "/" + "/".join(words)
)
_BODIES = st.binary(max_size=40) | _VALUES.map(lambda value: json.dumps(value).encode())
_HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "Inference-Header-Content-Length": st.integers(-1, 50).map(str) | st.just("x"),
        "Content-Encoding": st.sampled_from(["gzip", "deflate", "identity", "br", ""]),
        "Accept-Encoding": st.sampled_from(["gzip", "deflate", "*", "gzip;q=0", ""]),
        "Content-Type": st.sampled_from(["application/json", "text/plain", "x"]),
    },
)


@settings(max_examples=400, deadline=None)
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "ODD"]),
    path=_PATHS,
    body=_BODIES,
    headers=_HEADERS,
)
def test_no_request_brings_a_500(guarded, method, path, body, headers):
    status, _, reply = _call(guarded, method, path, body, headers)
    assert status < 500, reply
    if status >= 400 and method != "HEAD" and reply.startswith(b"{"):
        assert json.loads(reply)["error"]


@pytest.mark.parametrize(
    ("path", "status"), [("/v2/", 200), ("/v2/models/tiny/", 404), (f"{INFER}/", 404)]
)
def test_nothing_is_redirected(address, path, status):
    assert _call(address, "GET", path)[0] == status


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "path", ["/v2/trace/setting", "/v2/models/tiny/versions/1/trace/setting", "/v2/logging"]
)
def test_what_is_not_offered_is_said(address, method, path):
    status, _, reply = _call(address, method, path)
    assert status == 404
    assert "are not offered here" in json.loads(reply)["error"]


def test_parameters_that_are_null_are_none(address):
    message = {"inputs": [{**IMAGES, "parameters": None}, TASK], "parameters": None}
    assert _infer(address, message)[0] == 200


def test_a_body_without_a_head_is_the_only_input(address, service):
    """The task's own model has one input, whose shape follows."""
    status, headers, reply = _call(
        address,
        "POST",
        "/v2/models/pets/infer",
        PIXELS.tobytes(),
        {"Inference-Header-Content-Length": "0"},
    )
    assert status == 200, reply
    tail = reply[int(headers["inference-header-content-length"]) :]
    assert tail.startswith(service.answer(PIXELS, ["pets"]).logits[:, :5].tobytes())


def test_a_body_without_a_head_needs_one_input(address):
    headers = {"Inference-Header-Content-Length": "0"}
    status, _, reply = _call(address, "POST", INFER, PIXELS.tobytes(), headers)
    assert status == 400
    assert "got 2 inputs in 'tiny' model configuration" in json.loads(reply)["error"]
