"""The embedded server's life: its ports, its clients that go away, and its end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from contextlib import closing

import numpy as np
import psutil
import pytest
import tritonclient.grpc
import tritonclient.http

from utune_deploy.export.engine import Device
from utune_deploy.merge.errors import UsageError
from utune_deploy.serving.greeting import greeting
from utune_deploy.serving.queueing.batcher import Batcher
from utune_deploy.serving.servers.ports import Addresses, host_port, listen
from utune_deploy.serving.service import Service

PIXELS = np.zeros((1, 3, 8, 8), np.float32)


class GatedSession:
    provider = "gated"

    def __init__(self, inner) -> None:
        self.inner = inner
        self.entered = threading.Event()
        self.gate = threading.Event()

    def run(self, inputs, task=None):
        self.entered.set()
        self.gate.wait()
        return self.inner.run(inputs, task)


def _body() -> bytes:
    images = {"name": "images", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": PIXELS.tolist()}
    task = {"name": "task", "datatype": "BYTES", "shape": [1], "data": ["pets"]}
    return json.dumps({"inputs": [images, task]}).encode()


def _grpc_inputs():
    images = tritonclient.grpc.InferInput("images", [1, 3, 8, 8], "FP32")
    task = tritonclient.grpc.InferInput("task", [1, 1], "BYTES")
    return [
        images.set_data_from_numpy(PIXELS),
        task.set_data_from_numpy(np.array([[b"pets"]], dtype=object)),
    ]


@pytest.mark.parametrize("port", ["http_port", "grpc_port"])
def test_a_port_in_use_is_one_sentence(embed, service, port):
    with listen("127.0.0.1", 0) as taken:
        number = taken.getsockname()[1]
        with (
            pytest.raises(UsageError, match="the port is in use") as refused,
            embed(service, **{port: number}),
        ):
            pass
    assert refused.value.details["where"] == f"127.0.0.1:{number}"


def test_two_servers_never_share_a_port(embed, service):
    with embed(service) as first:
        number = int(first.grpc.rpartition(":")[2])
        with pytest.raises(UsageError, match="in use"), embed(service, grpc_port=number):
            pass


@pytest.mark.parametrize(
    ("host", "port"), [("192.0.2.1", 0), ("127.0.0.1", 70000), ("no.such.host.invalid", 0)]
)
def test_an_address_that_cannot_be_had_is_one_sentence(host, port):
    with pytest.raises(UsageError):
        listen(host, port)


def test_a_listening_socket_spells_its_protocol():
    """Or asyncio leaves Nagle's delay on, and every reply in two writes waits 40 ms."""
    with listen("127.0.0.1", 0) as claimed:
        assert claimed.proto == socket.IPPROTO_TCP


def test_addresses_of_ipv6_stand_in_brackets():
    assert host_port("::1", 80) == "[::1]:80"


@pytest.mark.parametrize("front", ["http", "grpc"])
def test_a_client_that_goes_away_is_dropped_from_the_queue(
    embed, bundle, service, monkeypatch, front
):
    gated = Service(bundle, GatedSession(service.session))
    dropped = threading.Event()
    taken = threading.Semaphore(0)
    submit = Batcher.submit

    async def watched(self, request, **settings):
        taken.release()
        try:
            return await submit(self, request, **settings)
        except BaseException:
            dropped.set()
            raise

    monkeypatch.setattr(Batcher, "submit", watched)
    with embed(gated) as addresses:
        stays = tritonclient.grpc.InferenceServerClient(addresses.grpc)
        answered: list = []
        arrived = threading.Event()

        def on_answer(result, error) -> None:
            answered.append((result, error))
            arrived.set()

        stays.async_infer("tiny", _grpc_inputs(), on_answer)
        taken.acquire()
        gated.session.entered.wait()
        if front == "http":
            leaves = http.client.HTTPConnection(addresses.http)
            leaves.request("POST", "/v2/models/tiny/infer", _body())
            taken.acquire()
            leaves.close()
        else:
            leaves = tritonclient.grpc.InferenceServerClient(addresses.grpc)
            call = leaves.async_infer("tiny", _grpc_inputs(), lambda result, error: None)
            taken.acquire()
            call.cancel()
        dropped.wait()
        gated.session.gate.set()
        arrived.wait()
        assert answered[0][1] is None
        stays.close()
        leaves.close()
    assert gated.counters.read().rows == 1


def test_a_full_queue_is_a_503_and_says_so(embed, bundle, service):
    gated = Service(bundle, GatedSession(service.session))
    with embed(gated, max_queued_rows=1) as addresses:
        rpc = tritonclient.grpc.InferenceServerClient(addresses.grpc)
        done = threading.Semaphore(0)
        rpc.async_infer("tiny", _grpc_inputs(), lambda result, error: done.release())
        gated.session.entered.wait()
        statuses = []

        def ask() -> None:
            with closing(http.client.HTTPConnection(addresses.http)) as connection:
                connection.request("POST", "/v2/models/tiny/infer", _body())
                response = connection.getresponse()
                statuses.append((response.status, json.loads(response.read()).get("error", "")))
                if response.status == 503:
                    gated.session.gate.set()

        askers = [threading.Thread(target=ask) for _ in range(2)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        done.acquire()
        rpc.close()
    assert sorted(status for status, _ in statuses) == [200, 503]
    assert "the queue is full" in max(statuses)[1]


def test_stopping_answers_what_was_taken(embed, bundle, service):
    gated = Service(bundle, GatedSession(service.session))
    reply: list[int] = []

    with embed(gated) as addresses:

        def ask() -> None:
            with closing(http.client.HTTPConnection(addresses.http)) as connection:
                connection.request("POST", "/v2/models/tiny/infer", _body())
                reply.append(connection.getresponse().status)

        asker = threading.Thread(target=ask)
        asker.start()
        gated.session.entered.wait()
        # The block ends, and with it the server, while the engine holds the request.
        threading.Timer(0.2, gated.session.gate.set).start()
    asker.join()
    assert reply == [200]


def test_typed_contents_of_grpc(embed, service):
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    with embed(service) as addresses:
        import grpc

        with grpc.insecure_channel(addresses.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            request = service_pb2.ModelInferRequest(model_name="tiny", id="seven")
            images = request.inputs.add(name="images", datatype="FP32", shape=[1, 3, 8, 8])
            images.contents.fp32_contents.extend(PIXELS.ravel().tolist())
            task = request.inputs.add(name="task", datatype="BYTES", shape=[1, 1])
            task.contents.bytes_contents.append(b"pets")
            response = stub.ModelInfer(request)
            assert response.id == "seven"
            logits = service.answer(PIXELS, ["pets"]).logits
            assert response.raw_output_contents[0] == logits.tobytes()

            def refused(change, code) -> None:
                bad = service_pb2.ModelInferRequest()
                bad.CopyFrom(request)
                change(bad)
                with pytest.raises(grpc.RpcError) as error:
                    stub.ModelInfer(bad)
                assert error.value.code() == code

            invalid = grpc.StatusCode.INVALID_ARGUMENT
            refused(lambda bad: bad.raw_input_contents.append(b""), invalid)
            refused(lambda bad: bad.raw_input_contents.extend([b"", b""]), invalid)
            refused(lambda bad: bad.inputs[0].shape.__setitem__(0, -1), invalid)
            refused(lambda bad: bad.inputs[0].contents.fp32_contents.pop(), invalid)
            refused(lambda bad: bad.outputs.add(name="x"), invalid)
            refused(lambda bad: bad.ClearField("inputs"), invalid)
            refused(lambda bad: setattr(bad, "model_version", "2"), grpc.StatusCode.NOT_FOUND)
            with pytest.raises(grpc.RpcError) as unwritten:
                stub.TraceSetting(service_pb2.TraceSettingRequest())
            assert unwritten.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_typed_integers_of_grpc(embed, text, sentences):
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    service = Service.open(text, Device(threads=1))
    given = sentences(1)
    with embed(service) as addresses, grpc.insecure_channel(addresses.grpc) as channel:
        request = service_pb2.ModelInferRequest(model_name="tiny")
        for name, array in given.items():
            kind = "FP32" if name == "visual_feats" else "INT64"
            entry = request.inputs.add(name=name, datatype=kind, shape=array.shape)
            contents = entry.contents
            typed = contents.fp32_contents if kind == "FP32" else contents.int64_contents
            typed.extend(array.ravel().tolist())
        task = request.inputs.add(name="task", datatype="BYTES", shape=[1, 1])
        task.contents.bytes_contents.append(b"cars")
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        response = stub.ModelInfer(request)
    logits = service.answer(given, ["cars"]).logits
    assert response.raw_output_contents[0] == logits.tobytes()


def test_a_model_that_drains_is_unavailable_and_so_is_the_server(embed, two_engines, monkeypatch):
    monkeypatch.setattr(
        Batcher, "ready", property(lambda self: self.service.registry.name != "tiny.all")
    )
    with embed(Service.open(two_engines, Device(threads=1))) as addresses:
        for module, url in (
            (tritonclient.http, addresses.http),
            (tritonclient.grpc, addresses.grpc),
        ):
            client = module.InferenceServerClient(url)
            assert client.is_model_ready("tiny")
            assert not client.is_model_ready("tiny.all")
            assert not client.is_server_ready()
            client.close()


def test_a_single_task_bundle_is_served_without_a_name(embed, single):
    service = Service.open(single, Device(threads=1))
    with embed(service) as addresses:
        client = tritonclient.grpc.InferenceServerClient(addresses.grpc)
        answer = client.infer("tiny", _grpc_inputs()[:1])
        assert answer.as_numpy("logits").tobytes() == service.answer(PIXELS).logits.tobytes()
        client.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_0_and_leaves_nothing(child, bundle, number):
    with child("embedded", bundle, http_port=0, grpc_port=0, device=Device(threads=1)) as process:
        web, _ = process.stdout.readline().split()
        with closing(http.client.HTTPConnection(web)) as connection:
            connection.request("POST", "/v2/models/tiny/infer", _body())
            assert connection.getresponse().read()
            # The connection stays open: an idle client does not hold the server up.
            assert not psutil.Process(process.pid).children(recursive=True)
            os.kill(process.pid, number)
            assert process.wait() == 0
        stopping, stopped = process.stderr.read().splitlines()
        assert "stopping: what was taken is answered" in stopping
        assert stopped.endswith("stopped")
    host, port = web.split(":")
    with listen(host, int(port)):
        pass


def test_a_port_in_use_is_exit_code_2(child, bundle):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with child("embedded", bundle, http_port=port, grpc_port=0) as process:
            _, said = process.communicate()
    assert process.returncode == 2
    assert "the port is in use" in said
    assert "Traceback" not in said


def test_the_greetings_own_example_runs(embed, bundle, service):
    with embed(service) as addresses:
        text = greeting(bundle, addresses, server="embedded", provider="cpu")
        example = textwrap.dedent(text.split("<<'END'\n")[1].split("  END\n")[0])
        done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert service.answer(PIXELS, ["pets"]).labels[0] in done.stdout


@pytest.mark.parametrize("kind", ["text", "arrays", "single", "fan_out", "everything"])
def test_the_greetings_example_runs_whatever_is_served(embed, request, kind):
    bundle = request.getfixturevalue(kind)
    with embed(Service.open(bundle, Device(threads=1))) as addresses:
        text = greeting(bundle, addresses, server="embedded", provider="cpu")
        example = textwrap.dedent(text.split("<<'END'\n")[1].split("  END\n")[0])
        done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("tiny.all" in text) == (kind in ("fan_out", "everything"))


def test_the_greeting_says_how_to_ask(bundle):
    addresses = Addresses(http="127.0.0.1:1", grpc="127.0.0.1:2", metrics="127.0.0.1:3")
    text = greeting(bundle, addresses, server="triton", provider="cpu")
    for part in ("tiny", "pets (5 classes)", "http://127.0.0.1:1", "127.0.0.1:2", "3/metrics"):
        assert part in text
