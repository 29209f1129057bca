"""Regions of shared memory: what lies in them, and what reaches out of them."""

from __future__ import annotations

import contextlib
import os
import sys
import uuid

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from utune_deploy.serving.rejections import InvalidRequest
from utune_deploy.serving.shared_memory import FOLDER, Place, Regions, UnknownRegion

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no /dev/shm")


@pytest.fixture
def memory():
    """`memory(content)`: the key of an object that holds it."""
    made = []

    def make(content: bytes) -> str:
        path = FOLDER / f"utune-{uuid.uuid4().hex}"
        path.write_bytes(content)
        made.append(path)
        return f"/{path.name}"

    yield make
    for path in made:
        path.unlink()


@pytest.fixture
def regions():
    made = Regions()
    yield made
    made.unregister()


def test_read_and_write_within_a_region(memory, regions):
    key = memory(b"0123456789")
    regions.register("x", key, 2, 6)
    assert regions.status() == [{"name": "x", "key": key, "offset": 2, "byte_size": 6}]
    parameters = {"shared_memory_region": "x", "shared_memory_byte_size": 3}
    place = regions.place({**parameters, "shared_memory_offset": 1}, "images")
    assert place == Place("x", 1, 3)
    assert regions.read(place) == b"345"
    regions.write(place, b"ab")
    assert (FOLDER / key[1:]).read_bytes() == b"012ab56789"
    assert place.parameters(2) == {
        "shared_memory_region": "x",
        "shared_memory_offset": 1,
        "shared_memory_byte_size": 2,
    }
    regions.unregister("x")
    with pytest.raises(UnknownRegion):
        regions.read(place)
    assert regions.place({}, "images") is None


@pytest.mark.parametrize(
    ("name", "key", "offset", "size"),
    [
        ("", None, 0, 4),
        ("x", None, 0, 0),
        ("x", None, -1, 4),
        ("x", None, 8, 4),
        ("x", None, 0, 11),
        ("x", "", 0, 4),
        ("x", "/", 0, 4),
        ("x", "/.", 0, 4),
        ("x", "/..", 0, 4),
        ("x", "/../etc/passwd", 0, 4),
        ("x", "//etc/passwd", 0, 4),
        ("x", "/a/b", 0, 4),
        ("x", "/utune-no-such-object", 0, 4),
        ("x", "/a\0b", 0, 4),
        ("x", "/" + "a" * 300, 0, 4),
    ],
)
def test_what_is_no_region_is_refused(memory, regions, name, key, offset, size):
    with pytest.raises(InvalidRequest):
        regions.register(name, memory(b"0123456789") if key is None else key, offset, size)
    assert not regions.status()


def test_a_link_out_of_the_folder_is_refused(memory, regions, tmp_path):
    (tmp_path / "secret").write_bytes(b"0123456789")
    key = memory(b"")
    (FOLDER / key[1:]).unlink()
    os.symlink(tmp_path / "secret", FOLDER / key[1:])
    with pytest.raises(InvalidRequest, match="Unable to open"):
        regions.register("x", key, 0, 4)


def test_a_name_is_given_once(memory, regions):
    regions.register("x", memory(b"0123"), 0, 4)
    with pytest.raises(InvalidRequest, match="'x' already in manager"):
        regions.register("x", memory(b"0123"), 0, 4)


@pytest.mark.parametrize(
    "place",
    [
        {"shared_memory_byte_size": 5},
        {"shared_memory_byte_size": 4, "shared_memory_offset": 1},
        {"shared_memory_byte_size": -1},
        {"shared_memory_byte_size": "4"},
        {"shared_memory_byte_size": True},
        {"shared_memory_byte_size": 4, "shared_memory_offset": -1},
        {"shared_memory_byte_size": 1 << 70},
        {},
    ],
)
def test_a_place_outside_its_region_is_refused(memory, regions, place):
    regions.register("x", memory(b"01234567"), 0, 4)
    with pytest.raises(InvalidRequest):
        regions.place({"shared_memory_region": "x", **place}, "images")


def test_an_object_that_is_cut_is_an_error_and_no_end_of_the_process(memory, regions):
    key = memory(b"01234567")
    regions.register("x", key, 0, 8)
    os.truncate(FOLDER / key[1:], 2)
    with pytest.raises(InvalidRequest, match="was cut"):
        regions.read(Place("x", 0, 8))
    with pytest.raises(InvalidRequest, match="was cut"):
        regions.write(Place("x", 0, 8), b"abcdefgh")
    assert (FOLDER / key[1:]).stat().st_size == 2


def test_an_output_that_does_not_fit_is_refused(memory, regions):
    regions.register("x", memory(b"01234567"), 0, 8)
    with pytest.raises(InvalidRequest, match="larger"):
        regions.write(Place("x", 0, 4), b"abcde")


def test_nothing_is_offered_unless_told(memory):
    regions = Regions(offered=False)
    with pytest.raises(InvalidRequest, match="not offered"):
        regions.register("x", memory(b"0123"), 0, 4)
    with pytest.raises(InvalidRequest, match="not offered"):
        regions.place({"shared_memory_region": "x"}, "images")
    assert not regions.status()


@pytest.mark.parametrize("front", ["http", "grpc"])
def test_tensors_in_shared_memory_answer_as_on_the_wire(embed, service, rows, memory, front):
    module = getattr(tritonclient, front)
    images, tasks = rows(3, seed=5)
    reference = service.answer(images, tasks)
    width = reference.logits.nbytes
    inputs_key, outputs_key = memory(b"????" + images.tobytes()), memory(bytes(width + 64))
    with embed(service, shared_memory=True) as addresses, contextlib.ExitStack() as stack:
        client = stack.enter_context(module.InferenceServerClient(getattr(addresses, front)))
        assert "system_shared_memory" in str(client.get_server_metadata())
        client.register_system_shared_memory("given", inputs_key, images.nbytes, 4)
        client.register_system_shared_memory("told", outputs_key, width + 64)
        assert "given" in str(client.get_system_shared_memory_status())
        pixels = module.InferInput("images", list(images.shape), "FP32")
        pixels.set_shared_memory("given", images.nbytes)
        names = module.InferInput("task", [3, 1], "BYTES")
        names.set_data_from_numpy(np.array([[task.encode()] for task in tasks], dtype=object))
        logits = module.InferRequestedOutput("logits")
        logits.set_shared_memory("told", width, 64)
        outputs = [logits, module.InferRequestedOutput("score")]
        answer = client.infer("tiny", [pixels, names], outputs=outputs)
        assert (FOLDER / outputs_key[1:]).read_bytes()[64:] == reference.logits.tobytes()
        assert answer.as_numpy("score").tobytes() == reference.scores[:, None].tobytes()
        logits.set_shared_memory("told", width, 65)
        with pytest.raises(tritonclient.http.InferenceServerException, match="leaves its shared"):
            client.infer("tiny", [pixels, names], outputs=outputs)
        client.unregister_system_shared_memory()
        with pytest.raises(tritonclient.http.InferenceServerException, match="Unable to find"):
            client.infer("tiny", [pixels, names])


@pytest.mark.parametrize("front", ["http", "grpc"])
def test_a_server_does_not_offer_it_by_default(embed, service, memory, front):
    module = getattr(tritonclient, front)
    with (
        embed(service) as addresses,
        module.InferenceServerClient(getattr(addresses, front)) as client,
    ):
        assert "system_shared_memory" not in str(client.get_server_metadata())
        with pytest.raises(tritonclient.http.InferenceServerException, match="not offered"):
            client.register_system_shared_memory("x", memory(b"0123"), 4)
        client.unregister_system_shared_memory()
        client.unregister_cuda_shared_memory()
        with pytest.raises(tritonclient.http.InferenceServerException, match="CUDA"):
            client.register_cuda_shared_memory("x", b"", 0, 4)
