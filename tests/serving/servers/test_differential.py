"""The same request to the embedded server and to real Triton, over one bundle: what is told back is the same.

Where it is not, `ON_PURPOSE` says why.
"""

from __future__ import annotations

import gzip
import http.client
import json
import re
import zlib
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from utune_deploy.export.engine import Device
from utune_deploy.serving.servers import triton

LENGTH = "Inference-Header-Content-Length"
INFER = "/v2/models/tiny/infer"
PIXELS = np.random.default_rng(3).random((2, 3, 8, 8), np.float32)
IMAGES: dict[str, Any] = {
    "name": "images",
    "datatype": "FP32",
    "shape": [2, 3, 8, 8],
    "data": PIXELS.ravel().tolist(),
}
TASK: dict[str, Any] = {
    "name": "task",
    "datatype": "BYTES",
    "shape": [2, 1],
    "data": ["pets", "cars"],
}
GOOD = {"inputs": [IMAGES, TASK]}
RAW = {
    "images": PIXELS.tobytes(),
    "task": b"".join(len(name).to_bytes(4, "little") + name for name in (b"pets", b"cars")),
}


@dataclass(frozen=True)
class Ask:
    """One HTTP request."""

    body: Any = b""
    path: str = INFER
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)

    def to(self, address: str) -> tuple[int, dict[str, str], bytes]:
        body = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        with closing(http.client.HTTPConnection(address, timeout=30)) as connection:
            connection.request(self.method, self.path, body, self.headers)
            reply = connection.getresponse()
            headers = {name.lower(): value for name, value in reply.getheaders()}
            return reply.status, headers, reply.read()


def _images(**changes: Any) -> Ask:
    return Ask({"inputs": [{**IMAGES, **changes}, TASK]})


def _task(**changes: Any) -> Ask:
    return Ask({"inputs": [IMAGES, {**TASK, **changes}]})


def _without(entry: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != key}


def _in_tail(parameters: Any, **head: Any) -> dict[str, Any]:
    images = {**_without(IMAGES, "data"), "parameters": parameters}
    return {"inputs": [images, TASK], **head}


def _binary(*, length: str | None = None, cut: int = 0, behind: bytes = b"", **head: Any) -> Ask:
    """Both inputs behind the head."""
    inputs = [
        {**_without(entry, "data"), "parameters": {"binary_data_size": len(RAW[entry["name"]])}}
        for entry in (IMAGES, TASK)
    ]
    text = json.dumps({"inputs": inputs, **head}).encode()
    body = text + RAW["images"] + RAW["task"] + behind
    own = str(len(text)) if length is None else length
    return Ask(body[: len(body) - cut], headers={LENGTH: own})


def _asking(*outputs: Any) -> Ask:
    return Ask({**GOOD, "outputs": list(outputs)})


def _with(**parameters: Any) -> Ask:
    return Ask({**GOOD, "parameters": parameters})


def _get(path: str, method: str = "GET", body: bytes = b"") -> Ask:
    return Ask(body, path, method)


PACKED = gzip.compress(json.dumps(GOOD).encode())
_BODY = json.dumps(GOOD).encode()
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(_BODY), _BODY)
CASES: dict[str, Ask] = {
    # Requests that are answered.
    "flat": Ask(GOOD),
    "id": Ask({**GOOD, "id": "seven"}),
    "nested pixels": _images(data=PIXELS.tolist()),
    "nested names": _task(data=[["pets"], ["cars"]]),
    "whole numbers as floats": _images(data=[1] * 384),
    "binary in": _binary(),
    "binary in and out": _binary(parameters={"binary_data_output": True}),
    "some outputs, some binary": _binary(
        outputs=[{"name": "score", "parameters": {"binary_data": True}}, {"name": "label"}]
    ),
    "binary by default but one": _binary(
        parameters={"binary_data_output": True},
        outputs=[{"name": "score"}, {"name": "label", "parameters": {"binary_data": False}}],
    ),
    "one output": _asking({"name": "score"}),
    "an output twice": _asking({"name": "score"}, {"name": "score"}),
    "no outputs named": _asking(),
    "no classes": _asking({"name": "logits", "parameters": {"classification": 0}}),
    "the version": Ask(GOOD, "/v2/models/tiny/versions/1/infer"),
    "gzip in": Ask(PACKED, headers={"Content-Encoding": "gzip"}),
    "deflate in": Ask(
        zlib.compress(json.dumps(GOOD).encode()), headers={"Content-Encoding": "deflate"}
    ),
    "gzip out": Ask(GOOD, headers={"Accept-Encoding": "gzip"}),
    "deflate out": Ask(GOOD, headers={"Accept-Encoding": "deflate"}),
    "chunks and their length": Ask(
        CHUNKS,
        headers={
            "Transfer-Encoding": "chunked",
            "Content-Length": str(len(CHUNKS)),
            LENGTH: str(len(_BODY)),
        },
    ),
    "a wish for HTTP/2": Ask(
        GOOD,
        headers={
            "Connection": "Upgrade, HTTP2-Settings",
            "Upgrade": "h2c",
            "HTTP2-Settings": "AAA",
        },
    ),
    "a byte-order mark": Ask(b"\xef\xbb\xbf" + _BODY),
    "priority": _with(priority=0),
    "timeout": _with(timeout=10_000_000),
    "parameters of one's own": _with(mine=1, text="x", flag=True),
    "a sequence that is none": _with(sequence_id=5, sequence_start=True, sequence_end=True),
    "a query": Ask(GOOD, INFER + "?x=1"),
    "an input's parameters null": _images(parameters=None),
    # Bodies that are no request.
    "empty": Ask(),
    "a brace": Ask(b"{"),
    "not UTF-8": Ask(b"\xff\xfe"),
    "UTF-16": Ask(json.dumps(GOOD).encode("utf-16")),
    "half a character": Ask({**GOOD, "id": "\ud800"}),
    "a list": Ask(b"[null,null]"),
    "null": Ask(b"null"),
    "deep": Ask(b"[" * 1000),
    "no inputs": Ask({}),
    "inputs null": Ask({"inputs": None}),
    "inputs an object": Ask({"inputs": {}}),
    "inputs of null": Ask({"inputs": [None]}),
    "inputs none": Ask({"inputs": []}),
    "id a number": Ask({**GOOD, "id": 7}),
    "parameters a list": Ask({**GOOD, "parameters": []}),
    "a parameter an object": _with(mine={}),
    "timeout a text": _with(timeout="x"),
    "timeout negative": _with(timeout=-1),
    "timeout beyond uint64": _with(timeout=2**64),
    "priority beyond uint64": _with(priority=2**64),
    "priority a text": _with(priority="x"),
    "priority negative": _with(priority=-1),
    "binary_data_output a text": _with(binary_data_output="yes"),
    "outputs null": Ask({**GOOD, "outputs": None}),
    "outputs of null": _asking(None),
    "an output without name": _asking({}),
    "an unknown output": _asking({"name": "x"}),
    "classes a text": _asking({"name": "logits", "parameters": {"classification": "2"}}),
    "classes negative": _asking({"name": "logits", "parameters": {"classification": -1}}),
    "binary_data a text": _asking({"name": "logits", "parameters": {"binary_data": "x"}}),
    # Inputs that do not fit.
    **{f"images without {key}": Ask({"inputs": [_without(IMAGES, key), TASK]}) for key in IMAGES},
    "no images": Ask({"inputs": [TASK]}),
    "no task": Ask({"inputs": [IMAGES]}),
    "a third input": Ask({"inputs": [IMAGES, TASK, {**IMAGES, "name": "x"}]}),
    "an input twice": Ask({"inputs": [IMAGES, IMAGES, TASK]}),
    "name null": _images(name=None),
    "datatype null": _images(datatype=None),
    "datatype unknown": _images(datatype="FP31"),
    "datatype of another": _images(datatype="FP64"),
    "shape negative": _images(shape=[-2, 3, 8, 8]),
    "shape of floats": _images(shape=[2, 3, 8, 8.0]),
    "shape a text": _images(shape="2388"),
    "shape empty": _images(shape=[]),
    "shape beyond int64": _images(shape=[10**30, 3, 8, 8]),
    "shape that overflows": _images(shape=[2**62, 4, 1, 1]),
    "shape of another picture": _images(shape=[2, 3, 4, 16]),
    "no rows": Ask(
        {"inputs": [{**IMAGES, "shape": [0, 3, 8, 8], "data": []}, {**TASK, "shape": [0, 1]}]}
    ),
    "too many rows": Ask(
        {
            "inputs": [
                {**IMAGES, "shape": [9, 3, 8, 8], "data": [0.0] * 9 * 192},
                {**TASK, "shape": [9, 1], "data": ["pets"] * 9},
            ]
        }
    ),
    "data a text": _images(data="x"),
    "data too short": _images(data=[1.0]),
    "data too long": _images(data=[1.0] * 400),
    "data of nulls": _images(data=[None] * 384),
    "data of strings": _images(data=["1"] * 384),
    "data of truth values": _images(data=[True] * 384),
    "data not a number": _images(data=[float("nan")] * 384),
    "data beyond float32": _images(data=[1e39] * 384),
    "data beyond float64": Ask(json.dumps(_images().body).replace("[", "[1e999, ", 2).encode()),
    "data nested otherwise": _images(data=PIXELS.reshape(2, -1).tolist()),
    "data ragged": _images(data=[[1.0] * 383, 1.0]),
    "names numbers": _task(data=[1, 2]),
    "an unknown task": _task(data=["pets", "dogs"]),
    "a name too few": _task(shape=[1, 1], data=["pets"]),
    "names without their axis": _task(shape=[2]),
    # Tails that do not fit.
    "a tail that is not there": Ask(_in_tail({"binary_data_size": 1536})),
    "a tail of negative size": Ask(_in_tail({"binary_data_size": -1})),
    "a tail's size a text": Ask(_in_tail({"binary_data_size": "1536"})),
    "data and a tail": _images(parameters={"binary_data_size": 1536}),
    "a region unknown": Ask(
        _in_tail({"shared_memory_region": "x", "shared_memory_byte_size": 1536})
    ),
    "bytes behind the tail": _binary(behind=b"more"),
    "a cut tail": _binary(cut=4),
    "a head of no length": _binary(length="0"),
    "a head's length a text": _binary(length="x"),
    "a head's length negative": _binary(length="-1"),
    "a head longer than all": _binary(length="9999999"),
    "a head cut short": _binary(length="5"),
    "not gzip": Ask(GOOD, headers={"Content-Encoding": "gzip"}),
    "gzip cut": Ask(PACKED[:-20], headers={"Content-Encoding": "gzip"}),
    "an unknown packing": Ask(GOOD, headers={"Content-Encoding": "br"}),
    # Addresses.
    "another model": Ask(GOOD, "/v2/models/other/infer"),
    "another version": Ask(GOOD, "/v2/models/tiny/versions/2/infer"),
    "a version in words": Ask(GOOD, "/v2/models/tiny/versions/x/infer"),
    "version 0": Ask(GOOD, "/v2/models/tiny/versions/0/infer"),
    "version -1": Ask(GOOD, "/v2/models/tiny/versions/-1/infer"),
    "version 01": Ask(GOOD, "/v2/models/tiny/versions/01/infer"),
    **{
        f"{method} {path}": _get(path, method)
        for method, path in (
            ("GET", "/"),
            ("GET", "/v2"),
            ("GET", "/v2/"),
            ("POST", "/v2"),
            ("TRACE", "/v2"),
            ("OPTIONS", "/v2"),
            ("GET", "/v2/health/live"),
            ("GET", "/v2/health/ready"),
            ("HEAD", "/v2/health/live"),
            ("POST", "/v2/health/live"),
            ("DELETE", "/v2/health/live"),
            ("GET", "/v2/models"),
            ("GET", "/v2/models/tiny"),
            ("GET", "/v2/models/tiny/"),
            ("POST", "/v2/models/tiny"),
            ("GET", "/v2/models/tiny/versions/1"),
            ("GET", "/v2/models/tiny/versions/2"),
            ("GET", "/v2/models/tiny/ready"),
            ("POST", "/v2/models/tiny/ready"),
            ("GET", "/v2/models/tiny/versions/1/ready"),
            ("GET", "/v2/models/tiny/versions/2/ready"),
            ("GET", "/v2/models/tiny/config"),
            ("GET", "/v2/models/tiny/stats"),
            ("GET", "/v2/models/stats"),
            ("GET", "/v2/models/other"),
            ("GET", "/v2/models/other/ready"),
            ("GET", "/v2/models/other/config"),
            ("GET", "/v2/models/other/stats"),
            ("GET", INFER),
            ("PUT", INFER),
            ("GET", "/v2/repository/index"),
            ("POST", "/v2/repository/index"),
            ("GET", "/v2/systemsharedmemory/status"),
            ("GET", "/v2/systemsharedmemory/region/x/status"),
            ("POST", "/v2/systemsharedmemory/unregister"),
            ("POST", "/v2/systemsharedmemory/region/x/unregister"),
            ("GET", "/v2/cudasharedmemory/status"),
            ("POST", "/v2/cudasharedmemory/unregister"),
            ("GET", "/v2/cudasharedmemory/region/x/status"),
            ("GET", "/v2/trace/setting"),
            ("GET", "/v2/models/tiny/trace/setting"),
            ("GET", "/v2/logging"),
            ("GET", "/v2/nothing"),
            ("GET", "//v2"),
            ("GET", "/v2/models/ti%6Ey"),
            ("POST", "/v2/models/tiny%2Finfer"),
            ("POST", "/v2/repository%2findex"),
        )
    },
    "index of the ready": _get("/v2/repository/index", "POST", b'{"ready": true}'),
    "index a text": _get("/v2/repository/index", "POST", b'{"ready": "x"}'),
    "index a list": _get("/v2/repository/index", "POST", b"[]"),
    "index a brace": _get("/v2/repository/index", "POST", b"{"),
    **{
        f"a region of {name}": _get("/v2/systemsharedmemory/region/x/register", "POST", body)
        for name, body in (
            ("nothing", b""),
            ("no key", b'{"byte_size": 4}'),
            ("no size", b'{"key": "/x"}'),
            ("no object", b'{"key": "/utune-no-such", "byte_size": 4}'),
            ("no name", b'{"key": "", "byte_size": 0}'),
            ("a path", b'{"key": "/../etc/passwd", "byte_size": 4}'),
        )
    },
}

MALFORMED = (
    "what the client wrote wrongly is a 4xx here: a 500 would ring at whoever runs the server"
)
STRICT = "the protocol wants data flat or nested as the shape; what contradicts it is a mistake"
ON_PURPOSE: dict[str, tuple[int, int, str]] = {
    # case: Triton's status, ours, why
    **dict.fromkeys(
        (
            *("UTF-16", "half a character", "timeout beyond uint64", "priority beyond uint64"),
            *("a brace", "not UTF-8", "a list", "null", "deep", "no inputs", "inputs null"),
            *("inputs an object", "id a number", "parameters a list", "timeout a text"),
            *("timeout negative", "priority a text", "priority negative"),
            *("binary_data_output a text", "outputs null", "outputs of null"),
            *("an output without name", "classes a text", "classes negative"),
            *("binary_data a text", "images without name", "images without datatype"),
            *("images without shape", "name null", "datatype null", "shape negative"),
            *("shape of floats", "shape a text", "shape beyond int64", "data a text"),
            *("data too short", "data too long", "data of nulls", "data of strings"),
            *("data of truth values", "data beyond float64", "names numbers"),
            *("a tail of negative size", "a tail's size a text", "a head cut short", "gzip cut"),
            *("index a text", "index a brace", "a region of nothing", "a region of no object"),
            *("a region of a path", "a region of no name"),
        ),
        (500, 400, MALFORMED),
    ),
    "index a list": (200, 400, MALFORMED),
    "POST /v2/models/tiny%2Finfer": (
        405,
        404,
        "it takes this for a model's name, which has no POST",
    ),
    "data nested otherwise": (200, 400, STRICT),
    "data ragged": (200, 400, STRICT),
    "names without their axis": (400, 200, "one name per row is clear without an axis of 1"),
    "an unknown packing": (501, 415, "HTTP has a status for an encoding that is not taken"),
    "version 01": (200, 404, "a version is its name, not a number that reads the same"),
    "GET /v2/": (404, 200, "the protocol's OpenAPI has the slash, its text has not"),
    "HEAD /v2/health/live": (405, 200, "HTTP: what answers GET answers HEAD; probes use it"),
    "GET /v2/models/tiny/versions/2/ready": (400, 404, "there is no such version"),
    "GET /v2/models/other/ready": (400, 404, "there is no such model"),
    "GET /v2/models/other/stats": (400, 404, "there is no such model"),
    **dict.fromkeys(
        ("GET /v2/trace/setting", "GET /v2/models/tiny/trace/setting", "GET /v2/logging"),
        (200, 404, "settings of traces and of logs are not offered, and this is said"),
    ),
    "GET /v2/models/ti%6Ey": (404, 200, "a path's letters may be escaped"),
}
BODIES = {
    # The reply's keys differ, with the same status.
    **dict.fromkeys(
        (
            "GET /v2/health/live",
            "GET /v2/health/ready",
            "GET /v2/models/tiny/ready",
            "GET /v2/models/tiny/versions/1/ready",
        ),
        "health answers in JSON here, which KServe's client reads; Triton's is empty",
    ),
    "binary by default but one": "the extension's text has binary_data_output hold for named outputs too",
    "GET /v2/models/tiny/config": "Triton shows every field, we show those that say something",
}


WORDS = (
    # The refusal is Triton's, word for word, before what we add in brackets.
    *("an unknown output", "inputs none", "no images", "no task", "an input twice"),
    *("datatype of another", "shape of another picture", "too many rows"),
    *("a tail that is not there", "bytes behind the tail", "a cut tail"),
    *("a head of no length", "another model", "another version", "version 0"),
    *("GET /v2/models/tiny/versions/2", "GET /v2/models/other", "GET /v2/models/other/config"),
    *("a region of no object", "a region of a path", "a region of no name"),
    "GET /v2/cudasharedmemory/region/x/status",
)
WORDS_OVER_GRPC = (
    *("an unknown output", "no inputs", "an input too few", "an input twice", "contents cut"),
    *("contents too long", "names cut", "typed too few", "typed and raw", "datatype of another"),
    *("shape of another picture", "another model", "no model", "another version"),
    "a region unknown",
)


def _same_words(theirs: str, own: str) -> bool:
    """Whether a refusal of ours begins as Triton's, without its request's id and its advice on configurations."""
    sentence = re.sub(r"^\[request id: .*?\] |\. NOTE: .*$", "", theirs)
    return own == sentence or own.startswith(f"{sentence} (")


@pytest.fixture(scope="module")
def servers(embed, service, bundle, triton_environment):
    with (
        embed(service, shared_memory=True) as own,
        triton.running(bundle, environment=triton_environment, device=Device(threads=1)) as process,
    ):
        yield process.addresses, own


@pytest.mark.parametrize("case", CASES)
def test_both_say_the_same_over_http(servers, case):
    (status, headers, body), (own_status, own_headers, own_body) = (
        CASES[case].to(addresses.http) for addresses in servers
    )
    wanted = ON_PURPOSE.get(case, (status, status, ""))[:2]
    assert (status, own_status) == wanted, (body, own_body)
    if own_status >= 400:
        assert own_headers["content-type"] == "application/json"  # Triton's is sometimes text/plain
        if CASES[case].method != "HEAD":
            assert isinstance(json.loads(own_body)["error"], str)
        if case in WORDS:
            assert _same_words(*(json.loads(told)["error"] for told in (body, own_body)))
        return
    if case in ON_PURPOSE or case in BODIES:
        return
    for name in ("content-encoding", LENGTH.lower()):
        assert own_headers.get(name) is None or name in headers
        assert headers.get(name) is None or name in own_headers
    if body or own_body:
        assert own_headers["content-type"] == headers["content-type"]
    replies = [_read(*reply) for reply in ((headers, body), (own_headers, own_body))]
    if CASES[case].path.split("?")[0].endswith("/infer"):
        _same_answer(*replies)
    else:
        assert _keys(replies[0][0]) <= _keys(replies[1][0]) | _MORE


def _read(headers: dict[str, str], body: bytes) -> tuple[Any, bytes]:
    if encoding := headers.get("content-encoding"):
        body = gzip.decompress(body) if encoding == "gzip" else zlib.decompress(body)
    length = int(headers.get(LENGTH.lower(), len(body)))
    return json.loads(body[:length] or b"null"), body[length:]


def _same_answer(theirs: tuple[Any, bytes], own: tuple[Any, bytes]) -> None:
    """Head and tensors; numbers in JSON are compared as the float32 that they stand for."""
    (head, tail), (own_head, own_tail) = theirs, own
    assert own_tail == tail

    def plain(message: Any) -> Any:
        outputs = [
            {
                **output,
                **(
                    {"data": np.array(output["data"], np.float32).tobytes()}
                    if output["datatype"] == "FP32" and "data" in output
                    else {}
                ),
            }
            for output in message["outputs"]
        ]
        return {**message, "outputs": outputs}

    assert plain(own_head) == plain(head)


_MORE = frozenset(
    {
        # Triton's statistics also have these, of a cache, of a decoupled model and of each batch size.
        *("cache_hit", "cache_miss", "batch_stats", "response_stats", "memory_usage", "batch_size"),
        *("cancel", "empty_response", "success", "fail"),
    }
)


def _keys(value: Any) -> frozenset[str]:
    """All keys at any depth."""
    if isinstance(value, dict):
        return frozenset(value).union(*map(_keys, value.values()))
    if isinstance(value, list):
        return frozenset().union(*map(_keys, value))
    return frozenset()


def test_every_difference_is_one_of_a_case():
    assert {*ON_PURPOSE, *BODIES, *WORDS} <= CASES.keys()
    assert {*CODES_ON_PURPOSE, *WORDS_OVER_GRPC} <= MESSAGES.keys()


def _message(**changes: Any) -> Any:
    """A good request of gRPC, raw, with fields set."""
    asked = service_pb2.ModelInferRequest(model_name="tiny")
    asked.inputs.add(name="images", datatype="FP32", shape=[2, 3, 8, 8])
    asked.inputs.add(name="task", datatype="BYTES", shape=[2, 1])
    asked.raw_input_contents.extend(RAW.values())
    for name, value in changes.items():
        setattr(asked, name, value)
    return asked


def _typed() -> Any:
    asked = _message()
    del asked.raw_input_contents[:]
    asked.inputs[0].contents.fp32_contents.extend(PIXELS.ravel().tolist())
    asked.inputs[1].contents.bytes_contents.extend([b"pets", b"cars"])
    return asked


def _changed(change: Any, asked: Any = None) -> Any:
    asked = _message() if asked is None else asked
    change(asked)
    return asked


MESSAGES: dict[str, Any] = {
    "raw": _message(),
    "typed": _typed(),
    "id": _message(id="seven"),
    "the version": _message(model_version="1"),
    "one output": _changed(lambda m: m.outputs.add(name="score")),
    "parameters": _changed(lambda m: setattr(m.parameters["mine"], "string_param", "x")),
    "timeout": _changed(lambda m: setattr(m.parameters["timeout"], "int64_param", 10_000_000)),
    "another model": _message(model_name="other"),
    "no model": _message(model_name=""),
    "another version": _message(model_version="2"),
    "a version in words": _message(model_version="x"),
    "an unknown output": _changed(lambda m: m.outputs.add(name="x")),
    "no inputs": _changed(lambda m: (m.ClearField("inputs"), m.ClearField("raw_input_contents"))),
    "an input too few": _changed(lambda m: (m.inputs.pop(), m.raw_input_contents.pop())),
    "an input twice": _changed(
        lambda m: (m.inputs.append(m.inputs[0]), m.raw_input_contents.append(RAW["images"]))
    ),
    "contents too few": _changed(lambda m: m.raw_input_contents.pop()),
    "contents too many": _changed(lambda m: m.raw_input_contents.append(b"")),
    "contents cut": _changed(lambda m: m.raw_input_contents.__setitem__(0, RAW["images"][:-4])),
    "contents too long": _changed(
        lambda m: m.raw_input_contents.__setitem__(0, RAW["images"] + b"more")
    ),
    "names cut": _changed(lambda m: m.raw_input_contents.__setitem__(1, RAW["task"][:-1])),
    "typed too few": _changed(lambda m: m.inputs[0].contents.fp32_contents.pop(), _typed()),
    "typed and raw": _changed(lambda m: m.raw_input_contents.extend(RAW.values()), _typed()),
    "datatype unknown": _changed(lambda m: setattr(m.inputs[0], "datatype", "FP31")),
    "datatype of another": _changed(lambda m: setattr(m.inputs[0], "datatype", "FP64")),
    "shape negative": _changed(lambda m: m.inputs[0].shape.__setitem__(0, -2)),
    "shape that overflows": _changed(lambda m: m.inputs[0].shape.__setitem__(0, 2**62)),
    "shape of another picture": _changed(lambda m: m.inputs[0].shape.__setitem__(3, 9)),
    "no shape": _changed(lambda m: m.inputs[0].ClearField("shape")),
    "an unknown task": _changed(
        lambda m: m.raw_input_contents.__setitem__(1, RAW["task"].replace(b"cars", b"dogs"))
    ),
    "a region unknown": _changed(
        lambda m: (
            setattr(m.inputs[0].parameters["shared_memory_region"], "string_param", "x"),
            setattr(m.inputs[0].parameters["shared_memory_byte_size"], "int64_param", 1536),
            m.raw_input_contents.pop(0),
        )
    ),
    "timeout a text": _changed(lambda m: setattr(m.parameters["timeout"], "string_param", "x")),
}
CODES_ON_PURPOSE: dict[str, tuple[str, str, str]] = {
    "a version in words": (
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "as over HTTP: there is no such version",
    ),
    "contents too many": ("OK", "INVALID_ARGUMENT", "contents without an input are a mistake"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_both_say_the_same_over_grpc(servers, case):
    codes, answers, words = [], [], []
    for addresses in servers:
        with grpc.insecure_channel(addresses.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            try:
                answers.append(stub.ModelInfer(MESSAGES[case], timeout=30))
                codes.append("OK")
            except grpc.RpcError as error:
                codes.append(error.code().name)
                words.append(error.details())
    wanted = CODES_ON_PURPOSE.get(case, (codes[0], codes[0], ""))[:2]
    assert tuple(codes) == wanted
    if case in WORDS_OVER_GRPC:
        assert _same_words(*words), words
    if codes == ["OK", "OK"]:
        theirs, own = answers
        assert own.raw_output_contents == theirs.raw_output_contents
        assert list(own.outputs) == list(theirs.outputs)
        assert (own.id, own.model_name, own.model_version) == (
            theirs.id,
            theirs.model_name,
            theirs.model_version,
        )


_CALLS: dict[str, tuple[str, Any]] = {
    "live": ("ServerLive", service_pb2.ServerLiveRequest()),
    "ready": ("ServerReady", service_pb2.ServerReadyRequest()),
    "model ready": ("ModelReady", service_pb2.ModelReadyRequest(name="tiny")),
    "other ready": ("ModelReady", service_pb2.ModelReadyRequest(name="other")),
    "version 2 ready": ("ModelReady", service_pb2.ModelReadyRequest(name="tiny", version="2")),
    "metadata of another": ("ModelMetadata", service_pb2.ModelMetadataRequest(name="other")),
    "metadata of nobody": ("ModelMetadata", service_pb2.ModelMetadataRequest()),
    "config of another": ("ModelConfig", service_pb2.ModelConfigRequest(name="other")),
    "config of version 2": (
        "ModelConfig",
        service_pb2.ModelConfigRequest(name="tiny", version="2"),
    ),
    "regions": ("SystemSharedMemoryStatus", service_pb2.SystemSharedMemoryStatusRequest()),
    "a region": ("SystemSharedMemoryStatus", service_pb2.SystemSharedMemoryStatusRequest(name="x")),
    "a region without a name": (
        "SystemSharedMemoryRegister",
        service_pb2.SystemSharedMemoryRegisterRequest(),
    ),
    "a region of no object": (
        "SystemSharedMemoryRegister",
        service_pb2.SystemSharedMemoryRegisterRequest(name="x", key="/utune-no-such", byte_size=4),
    ),
    "forget": ("SystemSharedMemoryUnregister", service_pb2.SystemSharedMemoryUnregisterRequest()),
    "CUDA regions": ("CudaSharedMemoryStatus", service_pb2.CudaSharedMemoryStatusRequest()),
    "a CUDA region": (
        "CudaSharedMemoryStatus",
        service_pb2.CudaSharedMemoryStatusRequest(name="x"),
    ),
    "a new CUDA region": (
        "CudaSharedMemoryRegister",
        service_pb2.CudaSharedMemoryRegisterRequest(name="x"),
    ),
    "forget CUDA": ("CudaSharedMemoryUnregister", service_pb2.CudaSharedMemoryUnregisterRequest()),
}


@pytest.mark.parametrize("case", _CALLS)
def test_both_say_the_same_of_themselves_over_grpc(servers, case):
    method, message = _CALLS[case]
    found = []
    for addresses in servers:
        with grpc.insecure_channel(addresses.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            try:
                found.append(getattr(stub, method)(message, timeout=30))
            except grpc.RpcError as error:
                found.append(error.code())
    assert found[0] == found[1]


def test_both_stream_the_same(servers):
    last = _message(id="last")
    last.parameters["triton_enable_empty_final_response"].bool_param = True
    messages = [_message(id="first"), _message(id="bad", model_name="other"), last]
    found = []
    for addresses in servers:
        with grpc.insecure_channel(addresses.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            parts = list(stub.ModelStreamInfer(iter(messages), timeout=30))
        found.append([part.infer_response for part in parts])
        assert [bool(part.error_message) for part in parts] == [False, True, False]
    assert found[0] == found[1]
