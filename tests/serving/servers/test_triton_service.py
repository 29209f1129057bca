"""Our service inside a real tritonserver: its tasks change while it answers, and are there again afterwards."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc

from utune_deploy.export.engine import Device
from utune_deploy.merge.errors import UsageError
from utune_deploy.serving.client import Client
from utune_deploy.serving.rejections import InvalidRequest
from utune_deploy.serving.repository.options import ModelOptions
from utune_deploy.serving.servers import triton
from utune_deploy.serving.watching.series import LATE, METRICS, SUFFIXES

FRONTS = ("http", "grpc")
SHIPPED = ("pets", "cars", "flowers")
IMAGES = np.random.default_rng(3).standard_normal((64, 3, 8, 8)).astype(np.float32)
ONE = Device(threads=1)


@pytest.fixture(scope="module")
def collector():
    """Its URL, and the traces that were posted to it, as `(path, spans)`."""
    posted: list[tuple[str, list[dict]]] = []

    class Sink(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            scopes = [scope for each in body["resourceSpans"] for scope in each["scopeSpans"]]
            posted.append((self.path, [span for scope in scopes for span in scope["spans"]]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_) -> None:
            pass

    sink = ThreadingHTTPServer(("127.0.0.1", 0), Sink)
    thread = threading.Thread(target=sink.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{sink.server_port}", posted
    sink.shutdown()
    thread.join()
    sink.server_close()


@pytest.fixture(scope="module")
def server(inputs_bundle, triton_environment, collector):
    with triton.running(
        inputs_bundle, environment=triton_environment, device=ONE, otlp=collector[0]
    ) as process:
        yield process


@pytest.fixture(params=FRONTS)
def client(request, server):
    with Client(_url(server, request.param), deadline_s=30) as made:
        yield made


def _url(server, front: str) -> str:
    return f"{front}://{getattr(server.addresses, front)}"


def _asker(server, make_task, number: int):
    """For `under_load`: requests of all shipped tasks, mixed."""
    known = {name: make_task(name) for name in SHIPPED}

    def wrong(answer, name: str, row: int) -> bool:
        right = known[name].logits(IMAGES[row : row + 1])[0]
        return (
            not np.allclose(answer.logits[: len(right)], right, rtol=1e-5, atol=1e-3)
            or answer.label != known[name].labels[int(right.argmax())]
        )

    @contextmanager
    def opened():
        with Client(_url(server, FRONTS[number % 2]), deadline_s=30) as client:

            def once(turn: int) -> object:
                at = (turn * 5 + number) % 60
                names = [SHIPPED[(at + row) % 3] for row in range(1 + at % 4)]
                answers = client.ask_many(IMAGES[at : at + len(names)], tasks=names)
                found = zip(answers, names, range(at, at + len(names)), strict=True)
                return next((each for each in found if wrong(*each)), None)

            yield once

    return opened


def test_tasks_change_while_mixed_requests_are_answered(client, server, make_task, under_load):
    first, second = make_task("birds", seed=1, probe=True), make_task("birds", 2, seed=2)

    def right(made) -> bool:
        answers = client.ask_many(IMAGES[:3], tasks="birds")
        wanted = made.logits(IMAGES[:3])
        return [a.label for a in answers] == [made.labels[k] for k in wanted.argmax(axis=1)]

    with under_load(*(_asker(server, make_task, number) for number in range(3))):
        for _ in range(3):
            assert client.add(first.data).version % 2 == 1
            assert right(first)
            assert client.update(second.data).labels == second.labels
            assert right(second)
            old = min(client.tasks(), key=lambda task: task.name != "birds").versions[0]
            assert client.use("birds", old).version == old
            assert right(first)
            assert client.pin("birds").pinned
            client.remove("birds")
            with pytest.raises(InvalidRequest, match="unknown task"):
                client.ask(IMAGES[0], task="birds")
    assert [task.name for task in client.tasks()] == list(SHIPPED)


def test_a_change_that_cannot_be_is_refused_with_its_reason(client, make_task):
    for change, reason in (
        (lambda: client.add(b"no packed task"), "safetensors"),
        (lambda: client.add(make_task("pets", seed=4).data), "there already"),
        (lambda: client.add(make_task("owls").changed(identity="f" * 64).data), "another bundle"),
        (lambda: client.update(make_task("owls").data), "no task of that name"),
        (lambda: client.use("pets", 9), "no such version"),
        (lambda: client.remove("owls"), "unknown task"),
    ):
        with pytest.raises(InvalidRequest, match=reason):
            change()
    assert [task.name for task in client.tasks()] == list(SHIPPED)
    assert client.describe()["fixed"] is None


def test_our_metrics_stand_beside_tritons(server):
    with Client(_url(server, "http")) as client:
        for _ in range(3):
            client.ask_many(IMAGES[:2], tasks=["pets", "cars"])

    def read() -> dict[str, float]:
        address = f"http://{server.addresses.metrics}/metrics"
        text = urllib.request.urlopen(address, timeout=10).read().decode()
        lines = [line for line in text.splitlines() if line.startswith(("utune_", "nv_inf"))]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    def settled(found: dict[str, float]) -> bool:
        """Whether what was asked and changed has been pushed."""
        known = {re.sub(r"{.*", "", series) for series in found}
        return (
            {n + s for n, f in {**METRICS, **LATE}.items() for s in SUFFIXES[f.kind]} <= known
            and found['utune_task_requests_total{model="tiny",outcome="answered",task="pets"}'] >= 3
            and found['utune_task_requests_total{model="tiny",outcome="failed",task="pets"}'] == 0
            and found['utune_request_seconds_count{model="tiny"}']
            == found['utune_request_seconds_bucket{le="+Inf",model="tiny"}']
            == found['utune_request_seconds_bucket{le="30.0",model="tiny"}']
            and found['utune_tasks{model="tiny"}'] == 3
            and found['utune_bank_rows{model="tiny",state="used"}'] >= 3
        )

    deadline = time.monotonic() + 8
    while not settled(found := read()):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def test_a_timeout_of_a_request_is_our_queues(server):
    """Under a load that fills the queue, a request that allows no wait is refused, or is answered in time."""
    images = tritonclient.grpc.InferInput("images", [1, 3, 8, 8], "FP32")
    images.set_data_from_numpy(IMAGES[:1])
    task = tritonclient.grpc.InferInput("task", [1, 1], "BYTES")
    task.set_data_from_numpy(np.array([[b"pets"]], dtype=object))
    statuses: list[str] = []
    with tritonclient.grpc.InferenceServerClient(server.addresses.grpc) as client:
        for _ in range(20):
            try:
                client.infer("tiny", [images, task], timeout=1)
            except tritonclient.grpc.InferenceServerException as error:
                statuses.append(f"{error.status()}: {error.message()}")
    assert statuses
    assert all(s.startswith("StatusCode.UNAVAILABLE") and "longer than it" in s for s in statuses)


def test_traces_go_to_the_collector(server, collector):
    with Client(_url(server, "grpc")) as client:
        client.ask(IMAGES[0], task="pets")
    deadline = time.monotonic() + 30
    while not collector[1]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    path, spans = collector[1][0]
    assert path == "/v1/traces"
    assert "tiny" in {span["name"] for span in spans}


@pytest.mark.parametrize("url", ["collector:4318", "ftp://host", "http://", "http://h:1/?q=1"])
def test_what_is_no_collector_is_refused(inputs_bundle, url):
    with (
        pytest.raises(UsageError, match="OTLP"),
        triton.running(inputs_bundle, environment=Path("none"), otlp=url),
    ):
        pass
    assert triton.traces_url("http://host:4318") == "http://host:4318/v1/traces"
    assert triton.traces_url("https://host/own/path") == "https://host/own/path"


def test_tasks_that_are_kept_are_there_again(
    inputs_bundle, triton_environment, make_task, tmp_path
):
    made = make_task("birds", seed=1)
    options = ModelOptions(task_control=True, keep=tmp_path / "kept", rows=8)
    with triton.running(
        inputs_bundle, environment=triton_environment, device=ONE, options=options
    ) as process, Client(_url(process, "http")) as client:  # fmt: skip
        client.add(made.data)
        client.remove("cars")
    options = ModelOptions(keep=tmp_path / "kept", rows=8)
    with triton.running(
        inputs_bundle, environment=triton_environment, device=ONE, options=options
    ) as process, Client(_url(process, "grpc")) as client:  # fmt: skip
        assert [task.name for task in client.tasks()] == ["pets", "flowers", "birds"]
        answer = client.ask(IMAGES[0], task="birds")
        assert answer.label == made.labels[int(made.logits(IMAGES[:1]).argmax())]
        with pytest.raises(InvalidRequest, match="does not let clients change"):
            client.remove("birds")
        sockets = list((process.log.parent / "sockets").iterdir())
        assert sockets
    assert not any(path.exists() for path in sockets)
