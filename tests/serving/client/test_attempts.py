"""Servers that fail on purpose: what is asked again, when, and for how long."""

from __future__ import annotations

import shlex
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from utune_deploy.merge.errors import UsageError
from utune_deploy.serving.client import Retry
from utune_deploy.serving.rejections import (
    BadReply,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    Unreachable,
)

ROW = np.zeros(2, np.float32)
QUICK = Retry(attempts=4, first_s=0.01, longest_s=0.02)
BUSY = {"error": "the queue is full (wanted: at most 8 rows; found: 9)"}


@pytest.fixture
def client(client_kind, stage):
    with client_kind(stage.url, retry=QUICK) as made:
        yield made


def test_a_busy_server_is_asked_again(client, stage):
    stage.script = [stage.say(503, BUSY)] * 3
    assert client.ask(ROW, task="pets").label == "dog"
    assert len(stage.bodies) == 4


def test_a_server_that_stays_busy_is_overloaded(client, stage):
    stage.script = [stage.say(503, BUSY)] * 9
    with pytest.raises(Overloaded, match="the queue is full") as refused:
        client.ask(ROW, task="pets")
    assert refused.value.details["wanted"] == "at most 8 rows"
    assert len(stage.bodies) == 4


@pytest.mark.parametrize("attempt", ["reset", "cut"])
def test_a_connection_that_breaks_is_asked_again(client, stage, attempt):
    stage.script = [getattr(stage, attempt)] * 2
    assert client.ask(ROW, task="pets").label == "dog"
    assert len(stage.bodies) == 3


def test_a_connection_that_keeps_breaking_is_unreachable(client, stage):
    stage.script = [stage.reset] * 9
    with pytest.raises(Unreachable, match="broke"):
        client.ask(ROW, task="pets")


@pytest.mark.parametrize(
    ("status", "kind"), [(400, InvalidRequest), (413, InvalidRequest), (500, EngineFailed)]
)
def test_an_answer_is_not_asked_again(client, stage, status, kind):
    stage.script = [stage.say(status, {"error": "no"})]
    with pytest.raises(kind, match="no"):
        client.ask(ROW, task="pets")
    assert len(stage.bodies) == 1


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"outputs": [{"name": "logits"}]}', b"[]"])
def test_a_reply_of_something_else_is_said(client, stage, body):
    stage.script = [stage.say(200, body)]
    with pytest.raises(BadReply):
        client.ask(ROW, task="pets")


def test_a_command_that_may_have_been_carried_out_is_not_asked_again(client, stage):
    stage.script = [stage.reset]
    with pytest.raises(Unreachable):
        client.add(b"file")
    assert len(stage.bodies) == 1


def test_a_command_that_was_turned_away_is_asked_again(client, stage):
    stage.script = [stage.say(503, BUSY)]
    with pytest.raises(BadReply):  # the stage answers it as an inference
        client.add(b"file")
    assert len(stage.bodies) == 2


def test_retry_after_is_waited_for(client, stage):
    stage.script = [stage.say(503, BUSY, Retry_After="1")]
    start = time.monotonic()
    client.ask(ROW, task="pets")
    assert time.monotonic() - start >= 1.0


def test_a_wait_past_the_deadline_is_not_begun(client, stage):
    stage.script = [stage.say(503, BUSY, Retry_After="30")]
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded) as late:
        client.ask(ROW, task="pets", deadline_s=2.0)
    assert time.monotonic() - start < 1.5
    assert late.value.details["found"] == "the queue is full"


def test_a_server_that_never_answers_meets_the_deadline(client, stage):
    client.ask(ROW, task="pets")
    stage.script = [stage.hang] * 3
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="within the deadline"):
        client.ask(ROW, task="pets", deadline_s=0.3)
    assert 0.29 <= time.monotonic() - start < 2


def test_one_deadline_holds_for_all_attempts_and_is_told_to_the_server(client_kind, stage):
    stage.script = [stage.say(503, BUSY)] * 3
    with client_kind(stage.url, retry=Retry(4, 0.05, 0.05)) as client:
        client.ask(ROW, task="pets", deadline_s=5.0, priority=2)
    told = [body["parameters"]["timeout"] for body in stage.bodies]
    assert told == sorted(told, reverse=True)
    assert len(set(told)) == 4
    assert 0 < told[-1] < told[0] <= 5_000_000
    assert {body["parameters"]["priority"] for body in stage.bodies} == {2}


def test_without_a_deadline_the_server_is_told_of_none(client_kind, stage):
    with client_kind(stage.url, deadline_s=None) as client:
        client.ask(ROW, task="pets")
    assert "timeout" not in stage.bodies[0].get("parameters", {})


def test_the_clients_own_deadline_holds_for_each_request(client_kind, stage):
    with client_kind(stage.url, deadline_s=0.6, retry=QUICK) as client:

        def slow(handler) -> None:
            time.sleep(0.25)
            stage.say(503, BUSY)(handler)

        stage.script = [slow, stage.answer]
        client.ask(ROW, task="pets")
        stage.script = [slow] * 9
        with pytest.raises(DeadlineExceeded):
            client.ask(ROW, task="pets")


def _no_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_nobody_there_is_unreachable(client_kind, scheme):
    url = f"{scheme}://127.0.0.1:{_no_port()}"
    with (
        client_kind(url, model="tiny", retry=QUICK) as client,
        pytest.raises(Unreachable, match="cannot be reached") as lost,
    ):
        client.ask(ROW, task="pets")
    assert lost.value.details["where"] == url


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_comes_up_late_is_found(client_kind, scheme, embed, service, rows):
    port = _no_port()
    images, names = rows(1)
    with client_kind(
        f"{scheme}://127.0.0.1:{port}", retry=Retry(attempts=100, first_s=0.1, longest_s=0.1)
    ) as client:
        done = threading.Event()

        def serve() -> None:
            time.sleep(0.5)
            with embed(service, **{f"{scheme}_port": port}):
                done.wait()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            assert client.ask(images[0], task=names[0]).task == names[0]
        finally:
            done.set()
            thread.join()


def test_an_idle_connection_that_the_server_closed_is_replaced(client_kind, embed, service, rows):
    """Also for a command that is not asked again: nothing was lost."""
    images, names = rows(1)
    port = _no_port()
    once = Retry(attempts=1)
    with client_kind(f"http://127.0.0.1:{port}", retry=once) as client:
        for _ in range(2):
            with embed(service, http_port=port):
                client.ask(images[0], task=names[0])


class Scripted(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self) -> None:
        self.codes: list[tuple[grpc.StatusCode, str]] = []
        self.hang = threading.Event()
        self.hangs = False
        self.requests: list = []
        self.left: list[float] = []

    def ModelConfig(self, request, context):
        answer = service_pb2.ModelConfigResponse()
        answer.config.max_batch_size = 8
        answer.config.input.add(name="images", data_type=11, dims=[2])
        return answer

    def ModelInfer(self, request, context):
        self.requests.append(request)
        self.left.append(context.time_remaining())
        if self.hangs:
            self.hang.wait(5)
        if self.codes:
            context.abort(*self.codes.pop(0))
        answer = service_pb2.ModelInferResponse(model_name="tiny")
        answer.outputs.add(name="logits", datatype="FP32", shape=[1, 2])
        answer.raw_output_contents.append(np.array([[0, 1]], np.float32).tobytes())
        return answer


@contextmanager
def _grpc_stage():
    scripted = Scripted()
    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(scripted, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield scripted, f"grpc://127.0.0.1:{port}"
    finally:
        scripted.hang.set()
        server.stop(0).wait()


@pytest.fixture
def scripted(client_kind):
    with (
        _grpc_stage() as (made, url),
        client_kind(url, model="tiny", retry=QUICK) as client,
    ):
        made.client = client
        yield made


def test_grpc_unavailable_is_asked_again(scripted):
    scripted.codes = [(grpc.StatusCode.UNAVAILABLE, "the queue is full")] * 3
    assert scripted.client.ask(ROW).logits.tolist() == [0, 1]
    told = [request.parameters["timeout"].int64_param for request in scripted.requests]
    assert told == sorted(told, reverse=True)
    assert 0 < told[-1] < told[0] <= 60_000_000
    assert max(scripted.left) < 61  # gRPC rounds it up


def test_a_command_over_grpc_is_asked_once_if_it_arrived(scripted):
    """UNAVAILABLE may come of a server that went down over it."""
    scripted.codes = [(grpc.StatusCode.UNAVAILABLE, "gone")] * 9
    with pytest.raises(Overloaded):
        scripted.client.update(b"file")
    with pytest.raises(Overloaded):
        scripted.client.pin("pets")
    names = [(r.model_name, tuple(r.inputs[0].shape)) for r in scripted.requests]
    assert names == [("tiny.tasks", (1,))] * 5


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, Overloaded),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.INTERNAL, EngineFailed),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.UNIMPLEMENTED, BadReply),
    ],
)
def test_grpc_codes_are_errors(scripted, code, kind):
    scripted.codes = [(code, "no (found: 9)")] * 9
    with pytest.raises(kind, match="no") as refused:
        scripted.client.ask(ROW)
    assert refused.value.details["found"] == "9"
    assert len(scripted.requests) == (4 if kind is Overloaded else 1)


def test_grpc_meets_the_deadline(scripted):
    scripted.hangs = True
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        scripted.client.ask(ROW, deadline_s=0.3, priority=3)
    assert time.monotonic() - start < 2
    assert scripted.requests[0].parameters["priority"].uint64_param == 3


def test_grpc_connections_that_break_are_lost_not_refused(client_kind):
    """So that a command is not carried out twice."""
    accepted = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        stop = threading.Event()

        def serve() -> None:
            while not stop.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                accepted.append(1)
                connection.recv(1 << 16)
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            url = f"grpc://127.0.0.1:{listener.getsockname()[1]}"
            with (
                client_kind(url, model="tiny", retry=QUICK, deadline_s=5) as client,
                pytest.raises(Unreachable),
            ):
                client.ask(ROW)
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize(
    "settings",
    [
        {"deadline_s": 0},
        {"deadline_s": -1.0},
    ],
)
def test_a_deadline_lies_ahead(client_kind, stage, settings):
    with pytest.raises(UsageError, match="not in the future"):
        client_kind(stage.url, **settings)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    key, pem = folder / "key.pem", folder / "cert.pem"
    made = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    extras = ["subjectAltName=DNS:localhost", "basicConstraints=critical,CA:TRUE"]
    command = [*shlex.split(made), *(part for extra in extras for part in ("-addext", extra))]
    done = subprocess.run([*command, "-keyout", key, "-out", pem], capture_output=True)
    if done.returncode:
        pytest.skip("openssl makes no certificate here")
    return key, pem


def test_grpcs(client_kind, certificate):
    key, pem = certificate
    scripted = Scripted()
    server = grpc.server(ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(scripted, server)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), pem.read_bytes())])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    url = f"grpcs://localhost:{port}"
    try:
        with client_kind(url, model="tiny", certificates=pem, retry=QUICK) as client:
            assert client.ask(ROW).logits.tolist() == [0, 1]
    finally:
        server.stop(0).wait()


def test_https(client_kind, certificate, stage):
    import ssl

    key, pem = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, key)
    stage.server.socket = context.wrap_socket(stage.server.socket, server_side=True)
    url = stage.url.replace("http", "https").replace("127.0.0.1", "localhost")
    with client_kind(url, certificates=pem, retry=QUICK) as client:
        assert client.ask(ROW, task="pets").label == "dog"
    with client_kind(url, retry=QUICK) as client, pytest.raises(Unreachable) as lost:
        client.ask(ROW, task="pets")
    assert "certificate" in lost.value.details["found"].lower()
