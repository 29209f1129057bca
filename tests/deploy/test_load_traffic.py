"""What a load sends and what it takes for an answer: rows, tasks, whole requests; shapes and finite numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from loads import GOOD, target_at, traffic_of

from utune_deploy.deploy.load.answers import NUMBERS, ROWS, UNREADABLE, fault
from utune_deploy.deploy.load.rows import draw_rows, read_rows
from utune_deploy.deploy.load.wire import OK, Reply
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError

# answers


def reply_of(value, tail=b"", head=None):
    body = (value if isinstance(value, bytes) else json.dumps(value).encode()) + tail
    return Reply(0, 0, 0, 0, OK, body, head)


def output(**changes):
    return {"outputs": [{**GOOD["outputs"][0], **changes}]}


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (GOOD, None),
        (output(shape=[2, 1]), ROWS),
        (output(data=[0.5, None]), NUMBERS),
        (output(data=[0.5]), UNREADABLE),
        (output(datatype="BYTES", data=["pets"], shape=[1, 1]), None),
        ({"outputs": []}, UNREADABLE),
        ({}, UNREADABLE),
        (b"", UNREADABLE),
    ],
)
def test_an_answer_has_all_rows_and_finite_numbers(value, wanted):
    assert fault(reply_of(value), 1, over_grpc=False) == wanted


@pytest.mark.parametrize(
    ("numbers_", "wanted"), [([1, 2], None), ([1, np.inf], NUMBERS), ([1], UNREADABLE)]
)
def test_binary_answers_are_read_too(numbers_, wanted):
    from tritonclient.grpc import service_pb2

    tail = np.array(numbers_, "<f4").tobytes()
    value = {"outputs": [
        {"name": "label", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": 5}},
        {"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": len(tail)}},
    ]}  # fmt: skip
    label = b"\1\0\0\0a"
    reply = reply_of(value, label + tail, len(json.dumps(value)))
    assert fault(reply, 1, over_grpc=False) == wanted
    message = service_pb2.ModelInferResponse(raw_output_contents=[label, tail])
    message.outputs.add(name="label", datatype="BYTES", shape=[1, 1])
    message.outputs.add(name="x", datatype="FP32", shape=[1, 2])
    assert fault(reply_of(message.SerializeToString()), 1, over_grpc=True) == wanted
    assert fault(reply_of(b"\xff"), 1, over_grpc=True) == UNREADABLE


# what is sent


@pytest.mark.parametrize(
    ("mix", "shares"),
    [
        ("one", (1, 0, 0)), ("uniform", (1 / 3, 1 / 3, 1 / 3)),
        ("zipf", (6 / 11, 3 / 11, 2 / 11)), ("hot", (3 / 4, 1 / 8, 1 / 8)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("batch", [1, 2])
def test_the_mix_holds_over_all_requests(mix, shares, batch):
    inputs = {"images": ("FP32", (3,)), "task": ("BYTES", (1,))}
    target = target_at("grpc://127.0.0.1:1", ("a", "b", "c"), **inputs)
    traffic = traffic_of(target, mix=mix, batch=batch)
    found = np.array([traffic.task_rows[name] for name in "abc"]) / (len(traffic.messages) * batch)
    assert np.abs(found - shares).max() < 0.05
    if mix == "uniform":
        assert len(set(traffic.task_rows.values())) == 1


def test_every_kind_of_input_is_drawn_or_read(tmp_path):
    target = target_at(
        "http://127.0.0.1:1",
        pixels=("UINT8", (4, 4)), ids=("INT64", (6,)), noise=("FP16", (2,)), seen=("BOOL", (2,)),
    )  # fmt: skip
    drawn = draw_rows(target, 0)
    assert {name: (rows.dtype.name, rows.shape[1:]) for name, rows in drawn.items()} == {
        "pixels": ("uint8", (4, 4)), "ids": ("int64", (6,)), "noise": ("float16", (2,)), "seen": ("bool", (2,))
    }  # fmt: skip
    assert drawn["pixels"].max() > 100
    np.savez(tmp_path / "rows.npz", **drawn)
    read = read_rows(target, tmp_path / "rows.npz")
    assert all((read[name] == rows).all() for name, rows in drawn.items())
    odd = target_at("http://127.0.0.1:1", photo=("BYTES", (1,)))
    with pytest.raises(UsageError, match="cannot be drawn"):
        draw_rows(odd, 0)
    np.savez(tmp_path / "files.npz", photo=np.array([["a"], ["bc"]]))
    assert read_rows(odd, tmp_path / "files.npz")["photo"].tolist() == [[b"a"], [b"bc"]]


@pytest.mark.parametrize(
    "arrays",
    [
        {"other": np.zeros((2, 3), np.float32)},
        {"images": np.zeros((2, 4), np.float32)},
        {"images": np.zeros((2, 3), np.float64)},
        {"images": np.zeros((0, 3), np.float32)},
        {"images": np.float32(1)},
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, arrays):
    np.savez(tmp_path / "rows.npz", **arrays)
    with pytest.raises(IncompatibleArtefact):
        read_rows(target_at("http://127.0.0.1:1"), tmp_path / "rows.npz")


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    target = target_at("http://127.0.0.1:1")
    with pytest.raises(UsageError, match="no such file"):
        read_rows(target, tmp_path / "rows.npz")
    (tmp_path / "rows.npz").write_bytes(b"no")
    with pytest.raises(IncompatibleArtefact, match="cannot be read"):
        read_rows(target, tmp_path / "rows.npz")
    np.save(tmp_path / "rows.npy", np.zeros(3))
    with pytest.raises(IncompatibleArtefact, match="cannot be read"):
        read_rows(target, tmp_path / "rows.npy")


@pytest.mark.parametrize(
    ("url", "encoding"), [("http", "binary"), ("http", "json"), ("grpc", "binary")]
)
def test_a_request_is_what_the_protocols_own_client_would_send(url, encoding):
    from tritonclient.grpc import service_pb2
    from tritonclient.utils import deserialize_bytes_tensor

    inputs = {"images": ("FP32", (3,)), "task": ("BYTES", (1,))}
    target = target_at(f"{url}://127.0.0.1:1", ("a", "bc"), **inputs)
    rows = draw_rows(target, 0)["images"][2:4]
    message = traffic_of(target, batch=2, encoding=encoding).messages[1]
    if url == "grpc":
        request = service_pb2.ModelInferRequest.FromString(message)
        entries = [(i.name, i.datatype, list(i.shape)) for i in request.inputs]
        raw = list(request.raw_input_contents)
        assert request.model_name == "fake"
    else:
        head, _, body = message.partition(b"\r\n\r\n")
        lines = dict(line.split(": ") for line in head.decode().split("\r\n")[1:])
        assert head.startswith(b"POST /v2/models/fake/infer HTTP/1.1\r\n")
        assert int(lines["Content-Length"]) == len(body)
        length = int(lines.get("Inference-Header-Content-Length", len(body)))
        given = json.loads(body[:length])["inputs"]
        entries = [(i["name"], i["datatype"], i["shape"]) for i in given]
        raw, at = [], length
        for entry in given if encoding == "binary" else ():
            size = entry["parameters"]["binary_data_size"]
            raw.append(body[at : at + size])
            at += size
        if encoding == "json":
            assert np.array(given[0]["data"], np.float32).tolist() == rows.ravel().tolist()
            assert given[1]["data"] == ["a", "bc"]
    assert entries == [("images", "FP32", [2, 3]), ("task", "BYTES", [2, 1])]
    if encoding == "binary":
        assert raw[0] == rows.tobytes()
        assert deserialize_bytes_tensor(raw[1]).tolist() == [b"a", b"bc"]
