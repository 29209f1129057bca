"""The model that Triton's Python backend calls, with a stand-in for the backend and an engine that waits."""

from __future__ import annotations

import importlib
import json
import sys
import threading
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from utune_deploy.serving.repository import write_repository
from utune_deploy.serving.repository.config import parse
from utune_deploy.serving.repository.options import ModelOptions


@dataclass
class Response:
    output_tensors: list = field(default_factory=list)
    error: object = None


class TritonError(Exception):
    INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED, NOT_FOUND = range(5)

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class Metric:
    def __init__(self) -> None:
        self.value = 0.0

    def increment(self, more: float) -> None:
        assert more > 0
        self.value += more

    def set(self, value: float) -> None:
        self.value = value


class MetricFamily:
    COUNTER, GAUGE = "counter", "gauge"
    all: ClassVar[dict] = {}

    def __init__(self, name: str, description: str, kind: str) -> None:
        assert name not in self.all
        assert description
        self.kind, self.series = kind, {}
        self.all[name] = self

    def Metric(self, labels: dict) -> Metric:
        return self.series.setdefault(json.dumps(labels), Metric())


class Sender:
    """Keeps what is sent, in the order of all senders."""

    def __init__(self, name: str, sent: list, cancelled: bool) -> None:
        self.name, self.sent, self.cancelled = name, sent, cancelled
        self.response: Response | None = None
        self.done = threading.Event()

    def is_cancelled(self) -> bool:
        return self.cancelled

    def send(self, response: Response, flags: int) -> None:
        assert flags == 1
        assert self.response is None, "answered twice"
        self.response = response
        self.sent.append(self.name)
        self.done.set()

    def answer(self) -> Response:
        assert self.done.wait(30)
        return self.response

    def refused(self) -> tuple[int, str]:
        error = self.answer().error
        return error.code, str(error)


class Gated:
    """An engine that waits, and notes which tasks' rows its calls hold."""

    provider = "gated"

    def __init__(self, inner) -> None:
        self.inner, self.calls = inner, []
        self.entered, self.gate = threading.Event(), threading.Event()

    def run(self, inputs, task=None):
        self.calls.append(task.tolist())
        self.entered.set()
        self.gate.wait()
        return self.inner.run(inputs, task)


@pytest.fixture
def triton_model(monkeypatch):
    """The module, over a backend that is this file."""
    backend = ModuleType("triton_python_backend_utils")
    MetricFamily.all = {}
    backend.__dict__.update(
        InferenceResponse=Response,
        TritonError=TritonError,
        MetricFamily=MetricFamily,
        Tensor=lambda name, array: SimpleNamespace(name=name, array=array),
        Logger=SimpleNamespace(log_error=print, log_info=print),
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        get_input_tensor_by_name=lambda request, name: request.inputs.get(name),
    )
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    name = "utune_deploy.serving.triton.model"
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "_log_to_triton", lambda: None)
    yield module
    monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def start(triton_model, bundle, tmp_path):
    """`start(**options)` -> the loaded model, whose engine waits."""
    started = []

    def begin(**options):
        options = ModelOptions(sockets=tmp_path / "sockets", **options)
        folder = write_repository(bundle, tmp_path / "models", options=options)
        fields = parse((folder / "config.pbtxt").read_text()).parameters
        parameters = {name: {"string_value": each.string_value} for name, each in fields.items()}
        model = triton_model.TritonPythonModel()
        model.initialize(
            {
                "model_repository": str(folder),
                "model_version": "1",
                "model_name": "tiny",
                "model_instance_name": "tiny_0_0",
                "model_config": json.dumps({"parameters": parameters}),
            }
        )
        model.engine = model._service.session = Gated(model._service.session)
        started.append(model)
        return model

    yield begin
    for model in started:
        model.engine.gate.set()
        model.finalize()


class Asker:
    """Requests as the backend hands them over."""

    def __init__(self, model) -> None:
        self.model, self.sent = model, []

    def __call__(
        self, task: str, /, *, name: str = "", priority: int = 0, timeout: int = 0, cancelled=False, **inputs
    ) -> Sender:  # fmt: skip
        sender = Sender(name or task, self.sent, cancelled)
        given = {
            "images": np.ones((1, 3, 8, 8), np.float32),
            "task": np.array([[task.encode()]], dtype=object),
            **inputs,
        }
        request = SimpleNamespace(
            inputs={
                key: SimpleNamespace(as_numpy=lambda value=value: value)
                for key, value in given.items()
                if value is not None
            },
            get_response_sender=lambda: sender,
            requested_output_names=lambda: ["label", "score"],
            parameters=lambda: json.dumps({"utune_priority": priority} if priority else {}),
            timeout=lambda: timeout,
        )
        assert self.model.execute([request]) is None
        return sender


def test_a_light_task_waits_for_one_call_of_a_busy_one(start):
    model = start()
    ask = Asker(model)
    busy = [ask("pets")]
    assert model.engine.entered.wait(30)
    busy += [ask("pets") for _ in range(60)]
    light = ask("cars")
    model.engine.gate.set()
    for sender in (*busy, light):
        assert sender.answer().error is None
    assert 1 in model.engine.calls[1]  # cars' row, in the call after the one that was running
    assert ask.sent.index("cars") <= 1 + 8


def test_priorities_and_timeouts_of_requests_are_heard(start):
    model = start(priority_levels=3)
    ask = Asker(model)
    first = ask("pets")
    assert model.engine.entered.wait(30)
    late = ask("pets", timeout=1000)
    assert late.refused()[0] == TritonError.UNAVAILABLE
    others = [ask("pets", name="last") for _ in range(20)]
    urgent = ask("pets", name="urgent", priority=1)
    model.engine.gate.set()
    assert all(sender.answer().error is None for sender in (first, urgent, *others))
    assert ask.sent[2] == "urgent"  # behind the one that expired and the one that was running


def test_limits_refuse_and_the_default_timeout_holds(start):
    model = start(max_queued=3, max_task_queued=2, timeout_ms=50)
    ask = Asker(model)
    ask("pets", timeout=60_000_000)
    assert model.engine.entered.wait(30)
    for _ in range(2):
        ask("pets", timeout=60_000_000)
    code, text = ask("pets").refused()
    assert code == TritonError.UNAVAILABLE
    assert "the task's part of the queue" in text
    code, text = ask("cars").refused()
    assert (code, "longer than it allowed" in text) == (TritonError.UNAVAILABLE, True)


def test_a_bad_request_fails_alone_and_at_once(start):
    model = start()
    model.engine.gate.set()
    ask = Asker(model)
    wrong = [
        ask("dogs"),
        ask("pets", images=np.full((1, 3, 8, 8), np.nan, np.float32)),
        ask("pets", images=np.ones((9, 3, 8, 8), np.float32)),
        ask("pets", task=None),
    ]
    assert [sender.refused()[0] for sender in wrong] == [TritonError.INVALID_ARG] * 4
    reply = ask("pets").answer()
    assert [tensor.name for tensor in reply.output_tensors] == ["label", "score"]  # those asked for
    code, text = ask("pets", images=None).refused()
    assert (code, "by a mistake" in text) == (TritonError.INTERNAL, True)


def test_callers_that_left_cost_no_engine_call(start):
    model = start()
    ask = Asker(model)
    ask("pets")
    assert model.engine.entered.wait(30)
    gone = [ask("cars", cancelled=True) for _ in range(3)]
    stays = ask("flowers")
    threading.Event().wait(0.02)  # longer than callers are taken to be there
    model.engine.gate.set()
    assert stays.answer().error is None
    assert [sender.refused()[0] for sender in gone] == [TritonError.CANCELLED] * 3
    assert model.engine.calls == [[0], [2]]
    assert model._service.counters.read().failures["CANCELED"] == 3


def test_the_end_answers_what_was_taken_and_refuses_the_rest(start):
    model = start()
    ask = Asker(model)
    taken = [ask("pets") for _ in range(20)]
    assert model.engine.entered.wait(30)
    ending = threading.Thread(target=model.finalize)
    ending.start()
    model.engine.gate.set()
    ending.join()
    assert all(sender.answer().error is None for sender in taken)
    assert ask("pets").refused()[0] == TritonError.UNAVAILABLE


def test_a_mistake_of_ours_is_an_answer_too(start, monkeypatch, triton_model):
    model = start()
    model.engine.gate.set()
    monkeypatch.setattr(triton_model, "write_answers", lambda *_: 1 / 0)
    assert Asker(model)("pets").refused()[0] == TritonError.INTERNAL


def test_metrics_grow_with_the_counters(start):
    model = start()
    model.engine.gate.set()
    ask = Asker(model)
    for _ in range(3):
        ask("pets").answer()
    ask("dogs").refused()
    model._metrics.push()
    model._metrics.push()  # nothing new: nothing is counted twice
    assert not [name for name in MetricFamily.all if name.startswith("nv_")]

    def read(name: str, **labels) -> float:
        return MetricFamily.all[name].series[json.dumps({"model": "tiny", **labels})].value

    assert read("utune_task_rows_total", task="pets") == 3
    assert read("utune_task_requests_total", task="pets", outcome="answered") == 3
    assert read("utune_task_request_seconds_count", task="pets") == 3
    assert read("utune_task_rows_total", task="cars") == 0  # an idle task shows as 0
    assert read("utune_request_seconds_bucket", le="+Inf") == 3
    assert read("utune_queue_seconds_total") < read("utune_task_request_seconds_sum", task="pets")
    assert MetricFamily.all["utune_queue_rows"].kind == "gauge"
    counters = model._service.counters
    counters.forget("pets")
    model._metrics.push()
    counters.know("pets")
    ask("pets").answer()
    model._metrics.push()
    assert read("utune_task_rows_total", task="pets") == 4  # a counter never falls
