"""The exposition, read back by the library's parsers and recounted from what was asked."""

from __future__ import annotations

import re

import pytest
from prometheus_client import openmetrics
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from utune_deploy.export.engine import Device
from utune_deploy.serving.queueing.batcher import Batcher
from utune_deploy.serving.rejections import EngineFailed, InvalidRequest, Overloaded
from utune_deploy.serving.service import Service
from utune_deploy.serving.watching.counters import Counters
from utune_deploy.serving.watching.metrics import METRICS, SUFFIXES, BankFacts, Model, exposition

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
TRITON = {
    "nv_inference_request_success",
    "nv_inference_request_failure",
    "nv_inference_count",
    "nv_inference_exec_count",
    "nv_inference_request_duration_us",
    "nv_inference_queue_duration_us",
    "nv_inference_compute_input_duration_us",
    "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_output_duration_us",
}
BANK = BankFacts(
    used_rows=3, free_rows=5, bytes=4096, tasks=7, loads=9, evictions=2, changes={"add": 4}
)


def _model(counters: Counters, name: str = "tiny", bank=lambda: BANK) -> Model:
    return Model(name, counters, lambda: 2, lambda: 6, bank)


def _busy() -> Counters:
    counters = Counters(["a", 'odd "task"\n\\ untyped'])
    counters.answer(3, ["a", "a", "stranger"], request_ns=2_500_000, queue_ns=1999, engine_ns=5000)
    counters.answer(1, ["a"], request_ns=700_000_000, queue_ns=1, engine_ns=6000)
    counters.failure(Overloaded("full"), 1, ["a"])
    counters.failure(EngineFailed("broken"), 1, ["a", "stranger"])
    counters.failure(InvalidRequest("wrong"))
    counters.batch(4, 2)
    return counters


def _series(models, accept=""):
    """Sample name and labels -> value."""
    body, content_type = exposition(models, accept)
    text = body.decode()
    if "openmetrics" in content_type:
        families = openmetrics_parser.text_string_to_metric_families(text)
    else:  # this parser gives a counter the ending that Triton's lack
        text = re.sub("(?m)^(# TYPE nv_.*) counter$", r"\1 untyped", text)
        families = text_string_to_metric_families(text)
    found = {}
    for family in families:
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found
            found[key] = sample.value
    return found


def _at(series, name, **labels):
    return series[name, tuple(sorted(labels.items()))]


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_names_and_labels_are_those_of_the_table_in_both_formats(accept):
    series = _series([_model(_busy())], accept)
    wanted = {
        name + suffix: family
        for name, family in METRICS.items()
        for suffix in SUFFIXES[family.kind]
    }
    assert {name for name, _ in series} == set(wanted)
    for name, labels in series:
        assert {label for label, _ in labels} - {"le"} == set(wanted[name].labels)


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_values_are_a_recount(accept):
    series = _series([_model(_busy())], accept)
    triton = {"model": "tiny", "version": "1"}
    assert _at(series, "nv_inference_request_success", **triton) == 2
    assert _at(series, "nv_inference_count", **triton) == 4
    assert _at(series, "nv_inference_exec_count", **triton) == 1
    assert _at(series, "nv_inference_request_duration_us", **triton) == 702_500
    assert _at(series, "nv_inference_queue_duration_us", **triton) == 2
    assert _at(series, "nv_inference_compute_infer_duration_us", **triton) == 11
    assert _at(series, "nv_inference_pending_request_count", **triton) == 2
    for reason, count in {"REJECTED": 1, "CANCELED": 0, "BACKEND": 1, "OTHER": 1}.items():
        assert _at(series, "nv_inference_request_failure", **triton, reason=reason) == count
    task = {"model": "tiny", "task": "a"}
    assert _at(series, "utune_task_rows_total", **task) == 3
    for outcome, count in {"answered": 2, "refused": 1, "failed": 1}.items():
        assert _at(series, "utune_task_requests_total", **task, outcome=outcome) == count
    assert _at(series, "utune_task_request_seconds_count", **task) == 2
    assert _at(series, "utune_task_request_seconds_sum", **task) == pytest.approx(0.7025)
    for le, count in {"0.001": 0, "0.0025": 1, "0.5": 1, "1.0": 2, "30.0": 2, "+Inf": 2}.items():
        assert _at(series, "utune_request_seconds_bucket", model="tiny", le=le) == count
    assert _at(series, "utune_batch_rows_bucket", model="tiny", le="2.0") == 0
    assert _at(series, "utune_batch_rows_bucket", model="tiny", le="4.0") == 1
    assert _at(series, "utune_batch_tasks_sum", model="tiny") == 2
    assert _at(series, "utune_queue_rows", model="tiny") == 6
    assert _at(series, "utune_bank_rows", model="tiny", state="used") == 3
    assert _at(series, "utune_bank_rows", model="tiny", state="free") == 5
    assert _at(series, "utune_bank_bytes", model="tiny") == 4096
    assert _at(series, "utune_tasks", model="tiny") == 7
    assert _at(series, "utune_task_loads_total", model="tiny") == 9
    assert _at(series, "utune_task_evictions_total", model="tiny") == 2
    assert _at(series, "utune_task_changes_total", model="tiny", action="add") == 4


def test_triton_counters_are_counters_under_their_own_names():
    body, content_type = exposition([_model(_busy())])
    assert content_type.startswith("text/plain")
    types = dict(
        line.split()[2:] for line in body.decode().splitlines() if line.startswith("# TYPE")
    )
    assert {name: types[name] for name in TRITON} == dict.fromkeys(TRITON, "counter")
    assert types["nv_inference_pending_request_count"] == "gauge"
    assert "untyped" not in types.values()
    assert 'untyped"' in body.decode()  # a task's name stays as it is


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        ("text/plain;version=zz, */*", "text/plain; version=0.0.4"),
        ("application/openmetrics-text;version=latest", "text/plain; version=0.0.4"),
        (OPENMETRICS + ",text/plain;version=0.0.4;q=0.5", "application/openmetrics-text"),
    ],
)
def test_the_format_is_what_the_client_asks_for(accept, wanted):
    body, content_type = exposition([_model(_busy())], accept)
    assert content_type.startswith(wanted)
    assert body.endswith(b"# EOF\n") == (wanted == openmetrics.exposition.CONTENT_TYPE_LATEST[:28])


def test_models_stand_beside_each_other_and_one_without_a_bank_has_no_bank_series():
    series = _series([_model(_busy()), _model(Counters(["a"]), "tiny.all", bank=None)])
    assert _at(series, "utune_task_rows_total", model="tiny.all", task="a") == 0
    with_bank = {labels for name, labels in series if name == "utune_bank_bytes"}
    assert with_bank == {(("model", "tiny"),)}
    assert exposition([])[0] == b""


def test_a_made_up_task_is_no_series_and_a_forgotten_one_none_any_more(bundle, rows):
    service = Service.open(bundle, Device(threads=1))
    model = Model.of(Batcher(service))
    before = len(_series([model]))
    images, tasks = rows(3)
    service.answer(images, tasks)
    for number in range(50):
        with pytest.raises(InvalidRequest):
            service.answer(images, [f"made up {number}"] * 3)
    series = _series([model])
    assert len(series) == before
    triton = {"model": "tiny", "version": "1"}
    assert _at(series, "nv_inference_request_failure", **triton, reason="OTHER") == 50
    assert _at(series, "utune_task_rows_total", model="tiny", task="cars") == 1
    service.counters.forget("cars")
    assert not any(("task", "cars") in labels for _, labels in _series([model]))
    assert len(_series([model])) == before - 6
