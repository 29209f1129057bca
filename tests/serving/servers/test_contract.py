"""What every server answers, whichever carries the service; real Triton is the oracle."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from utune_deploy.serving.servers import SERVERS

CLASSES = {"pets": 5, "cars": 3, "flowers": 2}


@pytest.fixture(scope="module", params=sorted(SERVERS))
def addresses(request, bundle, service):
    if request.param == "embedded":
        with request.getfixturevalue("embed")(service) as running:
            yield running
    else:
        from utune_deploy.serving.servers.triton import running

        environment = request.getfixturevalue("triton_environment")
        with running(bundle, environment=environment, threads=1) as process:
            yield process.addresses


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
        assert int(config["dynamic_batching"]["max_queue_delay_microseconds"]) == 100
    assert {"name": "tiny", "version": "1", "state": "READY"}.items() <= (
        web.get_model_repository_index()[0].items()
    )
    assert rpc.get_model_repository_index().models[0].state == "READY"
    assert rpc.get_server_metadata().name
    web.close()
    rpc.close()


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
