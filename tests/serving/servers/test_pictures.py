"""NAME.pictures: files and pixels, each prepared as its task says."""

from __future__ import annotations

import io
from contextlib import closing

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image

from utune_deploy.export.engine import Device
from utune_deploy.serving.service import Service

Refused = tritonclient.http.InferenceServerException


def pixels(seed: int, height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def file(seed: int, form: str = "PNG", **settings) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels(seed)).save(out, form, **settings)
    return out.getvalue()


@pytest.fixture(scope="module")
def addresses(bundle, embed):
    with embed(Service.open(bundle, Device(threads=1))) as running:
        yield running


@pytest.fixture(params=["http", "grpc"])
def ask(request, addresses):
    """`ask(picture, datatype, tasks) -> reply`."""
    module = tritonclient.grpc if request.param == "grpc" else tritonclient.http
    with closing(module.InferenceServerClient(getattr(addresses, request.param))) as client:

        def ask(picture, datatype, tasks):
            inputs = [module.InferInput("picture", list(picture.shape), datatype)]
            inputs[0].set_data_from_numpy(picture)
            if tasks is not None:
                names = np.array([[task.encode()] for task in tasks], dtype=object)
                inputs.append(
                    module.InferInput("task", list(names.shape), "BYTES").set_data_from_numpy(names)
                )
            return client.infer("tiny.pictures", inputs)

        yield ask


def elements(*files: bytes) -> np.ndarray:
    array = np.empty((len(files), 1), dtype=object)
    array[:, 0] = files
    return array


def wanted(service, seeds, tasks) -> np.ndarray:
    rows = [
        service.registry.versions[task].task.preprocessing.apply(Image.fromarray(pixels(seed)))
        for seed, task in zip(seeds, tasks, strict=True)
    ]
    return service.answer(np.stack(rows), tasks).logits


def test_files_are_answered_as_their_prepared_pictures(ask, service):
    tasks = ["pets", "flowers", "cars"]
    files = elements(file(0), file(1, "BMP"), file(2, "WEBP", lossless=True))
    reply = ask(files, "BYTES", tasks)
    np.testing.assert_array_equal(reply.as_numpy("logits"), wanted(service, range(3), tasks))
    assert [cell.decode().split("-")[0] for (cell,) in reply.as_numpy("label")] == tasks


def test_pixels_are_answered_as_files_are(ask, service):
    tasks = ["cars", "pets"]
    reply = ask(np.stack([pixels(3), pixels(4)]), "UINT8", tasks)
    np.testing.assert_array_equal(reply.as_numpy("logits"), wanted(service, (3, 4), tasks))


@pytest.mark.parametrize(
    ("picture", "datatype", "tasks", "sentence"),
    [
        (elements(b"no picture"), "BYTES", ["pets"], "a picture cannot be read"),
        (elements(file(0)[:100]), "BYTES", ["pets"], "a picture cannot be read"),
        (elements(b""), "BYTES", ["pets"], "a picture cannot be read"),
        (elements(file(0, "GIF")), "BYTES", ["pets"], "a picture cannot be read"),
        (elements(file(0)), "BYTES", ["dogs"], "unknown task"),
        (elements(file(0)), "BYTES", ["pets", "cars"], "one task per row"),
        (elements(file(0)), "BYTES", None, "names no task"),
        (elements(*[file(0)] * 9), "BYTES", ["pets"] * 9, "too many rows"),
        (np.zeros((1, 8, 8, 4), np.uint8), "UINT8", ["pets"], "wrong datatype or shape"),
        (np.zeros((1, 8, 8, 3), np.float32), "FP32", ["pets"], "wrong datatype or shape"),
        (np.zeros((1, 0, 8, 3), np.uint8), "UINT8", ["pets"], "no pixels or too many"),
    ],
)
def test_what_is_no_picture_is_refused_with_a_sentence(ask, picture, datatype, tasks, sentence):
    with pytest.raises(Refused, match=sentence) as refused:
        ask(picture, datatype, tasks)
    assert refused.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")


def test_a_small_file_that_unfolds_to_too_many_pixels_is_refused(ask, monkeypatch):
    monkeypatch.setattr("utune_deploy.serving.picture_model.MAX_PIXELS", 500)
    with pytest.raises(Refused, match="too many pixels"):
        ask(elements(file(0)), "BYTES", ["pets"])


def test_what_a_client_asks_before_it_sends_pictures(addresses):
    with closing(tritonclient.http.InferenceServerClient(addresses.http)) as client:
        told = client.get_model_metadata("tiny.pictures")
        assert told["inputs"] == [
            {"name": "picture", "datatype": "BYTES", "shape": [-1, 1]},
            {"name": "task", "datatype": "BYTES", "shape": [-1, 1]},
        ]
        assert [entry["name"] for entry in told["outputs"]] == ["logits", "label", "score"]
        config = client.get_model_config("tiny.pictures")
        assert config["input"][0] == {"name": "picture", "data_type": "TYPE_STRING", "dims": [1]}
        assert client.is_model_ready("tiny.pictures")


def test_a_bundle_that_reads_no_pictures_has_no_such_model(text, embed):
    with (
        embed(Service.open(text, Device(threads=1))) as addresses,
        closing(tritonclient.http.InferenceServerClient(addresses.http)) as client,
    ):
        names = [entry["name"] for entry in client.get_model_repository_index()]
        # its tasks say how pictures are prepared, and its engine reads something else
        assert "tiny.pictures" not in names
