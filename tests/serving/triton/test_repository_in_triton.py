"""A repository in a real tritonserver: aliases, versions, warm-up; and that it takes the native configuration.

The tritonserver of the nvidia-pytriton wheel has the Python backend alone. So the graphs of the native layout
run in a stand-in there, a Python model that hands every batch to ONNX Runtime.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tritonclient.http as http
from PIL import Image
from tritonclient.utils import np_to_triton_dtype

from utune_deploy.export import served
from utune_deploy.serving.repository import write_repository
from utune_deploy.serving.repository.options import ModelOptions
from utune_deploy.serving.servers import triton
from utune_deploy.serving.servers.ports import free_port

from .running import ONE, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STAND_IN = '''
import os, numpy as np, onnxruntime, triton_python_backend_utils as triton

class TritonPythonModel:
    def initialize(self, args):
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        """One engine call, as the real backend makes it."""
        given = [{t.name(): t.as_numpy() for t in request.inputs()} for request in requests]
        names = [i.name for i in self.session.get_inputs()]
        batch = {name: np.concatenate([rows[name] for rows in given]) for name in names}
        for name, array in batch.items():
            if array.dtype == object:  # Python's ONNX Runtime takes str
                batch[name] = np.vectorize(bytes.decode, otypes=[object])(array)
        said = self.session.run(None, batch)
        ends = np.cumsum([len(rows[names[0]]) for rows in given])[:-1]
        outputs = [o.name for o in self.session.get_outputs()]
        parts = zip(*(np.split(array, ends) for array in said))
        return [
            triton.InferenceResponse([
                triton.Tensor(name, a.astype(np.object_) if a.dtype == object else a)
                for name, a in zip(outputs, part) if name in request.requested_output_names()
            ])
            for request, part in zip(requests, parts)
        ]
'''


@contextmanager
def serving(environment: Path, folder: Path) -> Iterator[triton.TritonProcess]:
    """A tritonserver over `folder/models`; it may not have come up yet."""
    fit = triton.inspect_environment(environment)
    triton._compile(fit, folder / "models")
    ports = [free_port("127.0.0.1", 0) for _ in range(3)]
    process = triton.TritonProcess(fit, folder, "127.0.0.1", ports)
    try:
        yield process
    finally:
        process.end()


def tensor(name: str, array: np.ndarray) -> http.InferInput:
    datatype = np_to_triton_dtype(array.dtype)
    given = http.InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array)
    return given


def tasks(*names: str) -> np.ndarray:
    return np.array([[name.encode()] for name in names], dtype=object)


def test_aliases_answer_as_the_model_does(bundle, service, rows, triton_environment, tmp_path):
    options = ModelOptions(warmup=True)
    write_repository(bundle, tmp_path / "models", device=ONE, options=options, aliases=True)
    images = rows(5)[0]
    with serving(triton_environment, tmp_path) as process:
        process.wait_until_ready(60, lambda: False)
        client = http.InferenceServerClient(process.addresses.http)
        for name in service.registry.names:
            expected = service.answer(images, [name] * 5)
            reply = client.infer(f"tiny.{name}", [tensor("images", images)])
            assert reply.as_numpy("logits").tobytes() == expected.logits.tobytes()
            said = [label.decode() for label in reply.as_numpy("label").ravel()]
            assert tuple(said) == expected.labels
            assert reply.as_numpy("score").ravel().tolist() == expected.scores.tolist()
        best = http.InferRequestedOutput("logits", class_count=1)
        reply = client.infer("tiny.cars", [tensor("images", images)], outputs=[best])
        labels = [cell.decode().split(":")[2] for cell in reply.as_numpy("logits").ravel()]
        assert tuple(labels) == service.answer(images, ["cars"] * 5).labels
        client.close()
    assert "failed to load" not in process.log.read_text()


@pytest.mark.slow
def test_a_version_is_added_under_load(
    bundle, fewer, service, rows, triton_environment, tmp_path, under_load
):
    models = tmp_path / "models"
    write_repository(fewer, models, device=ONE, aliases=True)
    images = rows(1)[0]
    expected = service.answer(images, ["cars"]).labels[0].encode()

    @contextmanager
    def asker(address: str, model: str):
        inputs = [tensor("images", images)]
        if model == "tiny":
            inputs.append(tensor("task", tasks("cars")))
        with http.InferenceServerClient(address) as client:

            def once(_: int) -> object:
                label = client.infer(model, inputs).as_numpy("label")[0, 0]
                return None if label == expected else label

            yield once

    with serving(triton_environment, tmp_path) as process:
        process.wait_until_ready(60, lambda: False)
        address = process.addresses.http
        client = http.InferenceServerClient(address)
        with under_load(*(partial(asker, address, model) for model in ("tiny", "tiny.cars"))):
            write_repository(bundle, models, device=ONE, new_version=True)
            until(lambda: client.is_model_ready("tiny.flowers"), 60)
        reply = client.infer("tiny.flowers", [tensor("images", images)])
        assert reply.as_numpy("logits").tobytes() == (
            service.answer(images, ["flowers"]).logits.tobytes()
        )
        assert client.is_model_ready("tiny", "2")
        client.close()


def test_triton_takes_the_native_configuration(two_engines, triton_environment, tmp_path):
    options = ModelOptions(
        preferred_batches=(4, 8), priority_levels=3, max_queued=50, timeout_ms=500, cache=True,
        resources=(("engine", 1),), warmup=True,
    )  # fmt: skip
    write_repository(
        two_engines, tmp_path / "models", layout="native", graphs=served, device=ONE, options=options,
        aliases=True, pictures=True,
    )  # fmt: skip
    with serving(triton_environment, tmp_path) as process:
        deadline = time.monotonic() + 30
        while "failed to load 'tiny.task_names'" not in process.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(0.5)
    said = process.log.read_text().splitlines()
    failed = [line for line in said if line.startswith("E") and "failed" in line]
    assert {
        name
        for line in failed
        for name in ("tiny'", "tiny.all'", "tiny.task_names'")
        if name in line
    }
    for line in failed:
        assert "unable to find backend library for backend 'onnxruntime'" in line or (
            "timeout expired" in line
        ), line


def test_the_native_graphs_answer_through_ensembles(
    bundle, service, rows, triton_environment, tmp_path
):
    models = tmp_path / "models"
    write_repository(
        bundle, models, layout="native", graphs=served, device=ONE, aliases=True, pictures=True,
        options=ModelOptions(warmup=True),
    )  # fmt: skip
    for model in models.iterdir():
        config = (model / "config.pbtxt").read_text()
        if "ensemble" not in config:
            config = config.replace('backend: "onnxruntime"', 'backend: "python"')
            config = config.replace('platform: "onnxruntime_onnx"\n', "")
            config = config.replace('default_model_filename: "model.onnx"\n', "")
            (model / "config.pbtxt").write_text(config)
            (model / "1" / "model.py").write_text(STAND_IN)
    images, names = rows(6)
    expected = service.answer(images, names)
    with serving(triton_environment, tmp_path) as process:
        process.wait_until_ready(60, lambda: False)
        client = http.InferenceServerClient(process.addresses.http, concurrency=8)
        given = [tensor("images", images), tensor("task", tasks(*names[:5], "boats"))]
        reply = client.infer("tiny", given)
        assert reply.as_numpy("valid").ravel().tolist() == [True] * 5 + [False]
        assert reply.as_numpy("logits")[:5].tobytes() == expected.logits[:5].tobytes()
        said = [label.decode() for label in reply.as_numpy("label").ravel()]
        assert said == [*expected.labels[:5], ""]
        # rows of several requests in one batch: a bad one leaves the others alone
        waiting = [
            client.async_infer(
                "tiny",
                [
                    tensor("images", images[row : row + 1]),
                    tensor("task", tasks(names[row] if row != 3 else "boats")),
                ],
            )
            for row in range(6)
        ]
        for row, one in enumerate(waiting):
            reply = one.get_result()
            assert reply.as_numpy("valid").item() is (row != 3)
            label = reply.as_numpy("label").item().decode()
            assert label == (expected.labels[row] if row != 3 else "")
        for name in service.registry.names:
            alone = service.answer(images, [name] * 6)
            reply = client.infer(f"tiny.{name}", [tensor("images", images)])
            assert reply.as_numpy("logits").tobytes() == alone.logits.tobytes()
            assert reply.as_numpy("valid").all()
        pictures = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
        reply = client.infer(
            "tiny.pictures", [tensor("picture", pictures), tensor("task", tasks(*names))]
        )
        prepared = [
            bundle.task(name).preprocessing.apply(Image.fromarray(picture))
            for name, picture in zip(names, pictures, strict=True)
        ]
        right = service.answer(np.stack(prepared), names)
        assert reply.as_numpy("logits").tobytes() == right.logits.tobytes()
        client.close()
