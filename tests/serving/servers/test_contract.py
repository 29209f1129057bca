"""What every server answers, whichever carries the service; real Triton is the oracle."""

from __future__ import annotations

import threading
from contextlib import closing, contextmanager

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from utune_deploy.export.engine import Device
from utune_deploy.serving.client import Client as UtuneClient
from utune_deploy.serving.rejections import InvalidRequest
from utune_deploy.serving.servers import SERVERS
from utune_deploy.serving.service import Service

CLASSES = {"pets": 5, "cars": 3, "flowers": 2}


# Ray's own code warns of what Python and its libraries will no longer have.
ALL = [
    pytest.param(name, marks=pytest.mark.filterwarnings("ignore")) if name == "ray" else name
    for name in sorted(SERVERS)
]


@pytest.fixture(scope="module")
def ray_here():
    """A Ray cluster of this machine alone."""
    pytest.importorskip("ray.serve", reason="needs the extra `ray`")
    from utune_deploy.serving.servers.ray import connected

    with connected(None):
        yield


@contextmanager
def _serving(request, bundle):
    if request.param == "embedded":
        with request.getfixturevalue("embed")(Service.open(bundle, Device(threads=1))) as running:
            yield running
    elif request.param == "ray":
        request.getfixturevalue("ray_here")
        from utune_deploy.serving.servers.ray import running

        server = running(bundle, device=Device(threads=1))
        with request.getfixturevalue("threaded")(server) as addresses:
            yield addresses
    else:
        from utune_deploy.serving.servers.triton import running

        environment = request.getfixturevalue("triton_environment")
        with running(bundle, environment=environment, device=Device(threads=1)) as process:
            yield process.addresses


@pytest.fixture(scope="module", params=ALL)
def addresses(request, bundle):
    with _serving(request, bundle) as running:
        yield running


@pytest.fixture(scope="module", params=ALL)
def two_models(request, two_engines):
    """Two engines: one model of one task per row, one of all tasks."""
    with _serving(request, two_engines) as running:
        yield running


@pytest.fixture(scope="module", params=ALL)
def arrays_of_text(request, everything):
    """Two models over one engine of named inputs, whose answers are arrays without labels."""
    with _serving(request, everything) as running:
        yield running


class Client:
    """tritonclient over one of its fronts."""

    def __init__(self, front: str, addresses) -> None:
        self.front = front
        self.module = tritonclient.grpc if front == "grpc" else tritonclient.http
        url = addresses.grpc if front == "grpc" else addresses.http
        self.client = self.module.InferenceServerClient(url)
        self.binary = {} if front == "grpc" else {"binary_data": front != "json"}

    def infer(self, images, tasks, *, outputs=("logits", "label", "score"), **options):
        inputs = []
        if images is not None:
            datatype = {"float32": "FP32", "float64": "FP64"}[str(images.dtype)]
            tensor = self.module.InferInput("images", list(images.shape), datatype)
            inputs.append(tensor.set_data_from_numpy(images, **self.binary))
        if tasks is not None:
            names = np.array([[task.encode()] for task in tasks], dtype=object)
            if self.front == "json":
                names = np.array([[task] for task in tasks], dtype=object)
            tensor = self.module.InferInput("task", list(names.shape), "BYTES")
            inputs.append(tensor.set_data_from_numpy(names, **self.binary))
        wanted = [self.module.InferRequestedOutput(name, **self.binary) for name in outputs]
        return self.client.infer("tiny", inputs, outputs=wanted, **options)

    def refusal(self, images, tasks) -> tuple[str, str]:
        with pytest.raises(tritonclient.http.InferenceServerException) as refused:
            self.infer(images, tasks)
        return refused.value.status(), refused.value.message()


@pytest.fixture(params=["grpc", "binary", "json"])
def client(request, addresses):
    made = Client(request.param, addresses)
    yield made
    made.client.close()


def _texts(array) -> list[str]:
    return [item.decode() if isinstance(item, bytes) else item for item in array[:, 0]]


def test_one_mixed_request_answers_as_in_this_process_byte_for_byte(client, service, rows):
    images, tasks = rows(6, seed=1)
    answer = client.infer(images, tasks)
    reference = service.answer(images, tasks)
    assert answer.as_numpy("logits").tobytes() == reference.logits.tobytes()
    assert answer.as_numpy("score").tobytes() == reference.scores[:, None].tobytes()
    assert _texts(answer.as_numpy("label")) == list(reference.labels)


def test_only_the_outputs_asked_for_come_back(client, rows):
    answer = client.infer(*rows(2), outputs=["score"])
    assert answer.as_numpy("score").shape == (2, 1)
    assert answer.as_numpy("logits") is None


def test_concurrent_mixed_requests_are_each_answered_rightly(addresses, service, rows):
    wrong: list[object] = []

    def ask(front: str, first: int) -> None:
        client = Client(front, addresses)
        try:
            for seed in range(first, first + 40):
                images, tasks = rows(1 + seed % 4, seed=seed)
                answer = client.infer(images, tasks)
                reference = service.answer(images, tasks)
                np.testing.assert_allclose(
                    answer.as_numpy("logits"), reference.logits, rtol=1e-5, atol=1e-4
                )
                assert _texts(answer.as_numpy("label")) == list(reference.labels)
        except BaseException as error:
            wrong.append(error)
        finally:
            client.client.close()

    fronts = ["grpc", "grpc", "binary", "json"]
    threads = [threading.Thread(target=ask, args=(f, 100 * i)) for i, f in enumerate(fronts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


GOOD = np.zeros((2, 3, 8, 8), np.float32)
NAN = np.full((2, 3, 8, 8), np.nan, np.float32)
BAD = {
    "unknown task": (GOOD, ["pets", "dogs"], "unknown task"),
    "empty name": (GOOD, ["pets", ""], "unknown task"),
    "wrong shape": (GOOD[:, :, :7], ["pets", "pets"], None),
    "no batch axis": (GOOD[0], ["pets"], None),
    "wrong dtype": (GOOD.astype(np.float64), ["pets", "pets"], None),
    "a name too few": (GOOD, ["pets"], None),
    "no task": (GOOD, None, None),
    "no images": (None, ["pets"], None),
    "too many rows": (np.zeros((9, 3, 8, 8), np.float32), ["pets"] * 9, None),
    "NaN": (NAN, ["pets", "pets"], "not finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_refused_with_a_sentence(client, case):
    images, tasks, ours = BAD[case]
    if case == "NaN" and client.front == "json":
        pytest.skip("tritonclient's JSON has no spelling of NaN")
    status, sentence = client.refusal(images, tasks)
    assert status in ("400", "StatusCode.INVALID_ARGUMENT")
    assert sentence
    if ours:  # shapes and types are refused by Triton itself, in its own words
        assert ours in sentence


def test_a_bad_request_never_spoils_its_neighbours(addresses, service, rows):
    failures: list[BaseException] = []
    done = threading.Event()

    def disturb() -> None:
        client = Client("grpc", addresses)
        while not done.is_set():
            client.refusal(GOOD, ["pets", "dogs"])
        client.client.close()

    def ask() -> None:
        client = Client("grpc", addresses)
        try:
            for seed in range(60):
                images, tasks = rows(2, seed=seed)
                labels = _texts(client.infer(images, tasks).as_numpy("label"))
                assert labels == list(service.answer(images, tasks).labels)
        except BaseException as error:
            failures.append(error)
        finally:
            client.client.close()

    disturber = threading.Thread(target=disturb)
    askers = [threading.Thread(target=ask) for _ in range(3)]
    for thread in (disturber, *askers):
        thread.start()
    for thread in askers:
        thread.join()
    done.set()
    disturber.join()
    assert not failures


@pytest.mark.parametrize("packed", ["gzip", "deflate"])
def test_packed_bodies_both_ways(addresses, service, rows, packed):
    client = Client("binary", addresses)
    images, tasks = rows(3)
    answer = client.infer(
        images,
        tasks,
        request_compression_algorithm=packed,
        response_compression_algorithm=packed,
    )
    assert answer.as_numpy("logits").tobytes() == service.answer(images, tasks).logits.tobytes()
    client.client.close()


def test_the_best_classes_can_be_asked_for(addresses, service, rows):
    images, tasks = rows(1)
    reference = service.answer(images, tasks)
    for module, url in (
        (tritonclient.grpc, addresses.grpc),
        (tritonclient.http, addresses.http),
    ):
        client = module.InferenceServerClient(url)
        inputs = [
            module.InferInput("images", list(images.shape), "FP32").set_data_from_numpy(images),
            module.InferInput("task", [1, 1], "BYTES").set_data_from_numpy(
                np.array([[tasks[0]]], dtype=object)
            ),
        ]
        asked = [module.InferRequestedOutput("logits", class_count=2)]
        cells = client.infer("tiny", inputs, outputs=asked).as_numpy("logits")
        best = np.argsort(-reference.logits[0])[:2]
        assert [int(cell.split(b":")[1]) for cell in cells.ravel()] == best.tolist()
        client.close()


def test_what_a_client_asks_before_it_infers(addresses):
    web = tritonclient.http.InferenceServerClient(addresses.http)
    rpc = tritonclient.grpc.InferenceServerClient(addresses.grpc)
    for client in (web, rpc):
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("tiny")
        assert client.is_model_ready("tiny", "1")
        assert not client.is_model_ready("other")
        assert not client.is_model_ready("tiny", "2")
    with pytest.raises(tritonclient.http.InferenceServerException):
        rpc.get_model_metadata("other")
    metadata = web.get_model_metadata("tiny")
    assert metadata["inputs"] == [
        {"name": "images", "datatype": "FP32", "shape": [-1, 3, 8, 8]},
        {"name": "task", "datatype": "BYTES", "shape": [-1, 1]},
    ]
    assert metadata["outputs"] == [
        {"name": "logits", "datatype": "FP32", "shape": [-1, 5]},
        {"name": "label", "datatype": "BYTES", "shape": [-1, 1]},
        {"name": "score", "datatype": "FP32", "shape": [-1, 1]},
    ]
    message = rpc.get_model_metadata("tiny")
    assert [list(entry.shape) for entry in message.inputs] == [[-1, 3, 8, 8], [-1, 1]]
    for config in (
        web.get_model_config("tiny"),
        rpc.get_model_config("tiny", as_json=True)["config"],
    ):
        assert config["max_batch_size"] == 8
        assert [tensor["name"] for tensor in config["input"]] == ["images", "task"]
    assert {"name": "tiny", "version": "1", "state": "READY"}.items() <= (
        web.get_model_repository_index()[0].items()
    )
    assert rpc.get_model_repository_index().models[0].state == "READY"
    assert rpc.get_server_metadata().name
    web.close()
    rpc.close()


@pytest.mark.parametrize("front", ["http", "grpc"])
def test_tasks_that_are_fixed_are_told_and_stay(addresses, bundle, front):
    with UtuneClient(f"{front}://{getattr(addresses, front)}", deadline_s=30) as client:
        assert [task.name for task in client.tasks()] == [task.name for task in bundle.tasks]
        assert client.describe()["fixed"] == "its tasks are constants of the engine"
        for change in (lambda: client.remove("pets"), lambda: client.add(b"anything")):
            with pytest.raises(InvalidRequest, match="cannot change while it is served"):
                change()


def test_statistics_count_requests_rows_and_engine_calls(addresses, rows):
    web = tritonclient.http.InferenceServerClient(addresses.http)
    rpc = tritonclient.grpc.InferenceServerClient(addresses.grpc)

    def read() -> tuple[int, int]:
        (entry,) = web.get_inference_statistics("tiny")["model_stats"]
        return entry["inference_stats"]["success"]["count"], entry["inference_count"]

    requests, inferences = read()
    Client("grpc", addresses).infer(*rows(3))
    assert read() == (requests + 1, inferences + 3)
    (message,) = rpc.get_inference_statistics("tiny").model_stats
    assert message.inference_count == inferences + 3
    assert message.execution_count > 0
    assert message.inference_stats.compute_infer.ns > 0
    web.close()
    rpc.close()


def test_an_unknown_model_is_not_found(addresses, rows):
    images, _ = rows(1)
    for module, url, status in (
        (tritonclient.grpc, addresses.grpc, "StatusCode.NOT_FOUND"),
        (tritonclient.http, addresses.http, "404"),
    ):
        client = module.InferenceServerClient(url)
        inputs = [module.InferInput("images", [1, 3, 8, 8], "FP32").set_data_from_numpy(images)]
        with pytest.raises(tritonclient.http.InferenceServerException) as refused:
            client.infer("other", inputs)
        assert refused.value.status() == status
        client.close()


FRONTS = ["grpc", "binary", "json"]


def _ask(front: str, addresses, model: str, rows: dict, tasks=None, **options):
    """One request of named rows; the reply's tensors by name."""
    client = Client(front, addresses)
    kinds = {"float32": "FP32", "int64": "INT64"}
    inputs = [
        client.module.InferInput(name, list(array.shape), kinds[str(array.dtype)])
        .set_data_from_numpy(array, **client.binary)
        for name, array in rows.items()
    ]  # fmt: skip
    if tasks is not None:
        names = np.array([[task] for task in tasks], dtype=object)
        tensor = client.module.InferInput("task", list(names.shape), "BYTES")
        inputs.append(tensor.set_data_from_numpy(names, **client.binary))
    with closing(client.client):
        answer = client.client.infer(model, inputs, **options)
        head = answer.get_response()
        named = head["outputs"] if isinstance(head, dict) else head.outputs
        names = [entry["name"] if isinstance(entry, dict) else entry.name for entry in named]
        return {name: answer.as_numpy(name) for name in names}


def _decoded(array) -> list[list[str]]:
    return [[cell.decode() if isinstance(cell, bytes) else cell for cell in row] for row in array]


@pytest.mark.parametrize("front", FRONTS)
def test_the_model_of_all_tasks_answers_each_row_with_every_task(
    two_models, two_engines, rows, front
):
    images, _ = rows(4, seed=1)
    reply = _ask(front, two_models, "tiny.all", {"images": images})
    wanted = Service.open(two_engines, Device(threads=1)).answer_all(images)
    assert list(reply) == ["logits", "task", "label", "score"]
    assert reply["logits"].tobytes() == np.stack([a.logits for a in wanted]).tobytes()
    assert reply["score"].tobytes() == np.stack([a.scores for a in wanted]).tobytes()
    assert _decoded(reply["task"]) == [list(CLASSES)] * 4
    assert _decoded(reply["label"]) == [list(a.labels) for a in wanted]


@pytest.mark.parametrize("front", FRONTS)
def test_the_model_of_one_task_per_row_stands_beside_it(two_models, service, rows, front):
    images, tasks = rows(4, seed=1)
    reply = _ask(front, two_models, "tiny", {"images": images}, tasks)
    wanted = service.answer(images, tasks)
    assert reply["logits"].tobytes() == wanted.logits.tobytes()
    assert [cell for (cell,) in _decoded(reply["label"])] == list(wanted.labels)


def test_what_a_client_asks_about_both_models(two_models):
    web = tritonclient.http.InferenceServerClient(two_models.http)
    rpc = tritonclient.grpc.InferenceServerClient(two_models.grpc)
    for client in (web, rpc):
        assert client.is_server_ready()
        assert client.is_model_ready("tiny")
        assert client.is_model_ready("tiny.all", "1")
        assert not client.is_model_ready("tiny.some")
    metadata = web.get_model_metadata("tiny.all")
    assert metadata["name"] == "tiny.all"
    assert metadata["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 8, 8]}]
    assert metadata["outputs"] == [
        {"name": "logits", "datatype": "FP32", "shape": [-1, 3, 5]},
        {"name": "task", "datatype": "BYTES", "shape": [-1, 3]},
        {"name": "label", "datatype": "BYTES", "shape": [-1, 3]},
        {"name": "score", "datatype": "FP32", "shape": [-1, 3]},
    ]
    assert rpc.get_model_metadata("tiny.all").outputs[0].shape == [-1, 3, 5]
    assert web.get_model_config("tiny.all")["max_batch_size"] == 8
    assert rpc.get_model_config("tiny.all").config.name == "tiny.all"
    both = {"tiny": "READY", "tiny.all": "READY"}
    index = {entry["name"]: entry["state"] for entry in web.get_model_repository_index()}
    assert both.items() <= index.items()
    states = {model.name: model.state for model in rpc.get_model_repository_index().models}
    assert both.items() <= states.items()
    web.close()
    rpc.close()


def test_statistics_are_per_model(two_models, rows):
    web = tritonclient.http.InferenceServerClient(two_models.http)
    rpc = tritonclient.grpc.InferenceServerClient(two_models.grpc)

    def read(model: str) -> tuple[int, int]:
        (entry,) = web.get_inference_statistics(model)["model_stats"]
        assert entry["name"] == model
        return entry["inference_stats"]["success"]["count"], entry["inference_count"]

    before = {model: read(model) for model in ("tiny", "tiny.all")}
    images, _ = rows(3)
    _ask("grpc", two_models, "tiny.all", {"images": images})
    requests, inferences = before["tiny.all"]
    assert read("tiny.all") == (requests + 1, inferences + 3)
    assert read("tiny") == before["tiny"]
    named = {entry.name for entry in rpc.get_inference_statistics().model_stats}
    assert {"tiny", "tiny.all"} <= named
    web.close()
    rpc.close()


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize(
    ("rows", "tasks"),
    [
        ({"images": GOOD}, ["pets", "pets"]),
        ({"images": GOOD[:, :, :7]}, None),
        ({"images": np.zeros((9, 3, 8, 8), np.float32)}, None),
        ({}, ["pets"]),
    ],
    ids=["tasks are named", "wrong shape", "too many rows", "no images"],
)
def test_a_bad_request_of_all_tasks_is_refused_with_a_sentence(two_models, front, rows, tasks):
    with pytest.raises(tritonclient.http.InferenceServerException) as refused:
        _ask(front, two_models, "tiny.all", rows, tasks)
    assert refused.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert refused.value.message()


def test_both_models_answer_rightly_at_once(two_models, two_engines, rows):
    wrong: list[BaseException] = []
    reference = Service.open(two_engines, Device(threads=1))

    def ask(front: str, model: str, first: int) -> None:
        try:
            for seed in range(first, first + 15):
                images, tasks = rows(1 + seed % 4, seed=seed)
                if model == "tiny":
                    reply = _ask(front, two_models, model, {"images": images}, tasks)
                    wanted = reference.answer(images, tasks).logits
                else:
                    reply = _ask(front, two_models, model, {"images": images})
                    wanted = np.stack([a.logits for a in reference.answer_all(images)])
                np.testing.assert_allclose(reply["logits"], wanted, rtol=1e-5, atol=1e-4)
        except BaseException as error:
            wrong.append(error)

    cases = [("grpc", "tiny"), ("grpc", "tiny.all"), ("binary", "tiny.all"), ("json", "tiny.all")]
    threads = [threading.Thread(target=ask, args=(*c, 100 * i)) for i, c in enumerate(cases)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("front", FRONTS)
def test_named_inputs_are_read_and_arrays_answered(arrays_of_text, everything, sentences, front):
    reference = Service.open(everything, Device(threads=1))
    given, tasks = sentences(3), ["flowers", "cars", "flowers"]
    reply = _ask(front, arrays_of_text, "tiny", given, tasks)
    assert list(reply) == ["logits"]
    assert reply["logits"].tobytes() == reference.answer(given, tasks).logits.tobytes()
    every = _ask(front, arrays_of_text, "tiny.all", given)
    assert list(every) == ["logits", "task"]
    wanted = np.stack([answers.logits for answers in reference.answer_all(given)])
    assert wanted.shape == (3, 2, 2, 3)
    assert every["logits"].tobytes() == wanted.tobytes()
    assert _decoded(every["task"]) == [["cars", "flowers"]] * 3


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize(
    ("change", "ours"),
    [
        (lambda g: {**g, "input_ids": g["input_ids"] + 11}, "out of range"),
        (lambda g: {**g, "visual_feats": g["visual_feats"][:1]}, None),
        (lambda g: {k: v for k, v in g.items() if k != "attention_mask"}, None),
        (lambda g: {**g, "input_ids": g["input_ids"].astype(np.float32)}, None),
    ],
    ids=["an id out of range", "a row too few", "an input is missing", "wrong dtype"],
)
def test_a_bad_named_input_is_refused_with_a_sentence(
    arrays_of_text, sentences, front, change, ours
):
    with pytest.raises(tritonclient.http.InferenceServerException) as refused:
        _ask(front, arrays_of_text, "tiny", change(sentences(2)), ["cars", "cars"])
    assert refused.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert refused.value.message()
    if ours:
        assert ours in refused.value.message()
