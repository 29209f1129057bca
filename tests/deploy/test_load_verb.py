"""`load` from the command line, against the embedded server over HTTP and gRPC; its file, page and refusals."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from utune_deploy.deploy.load.page import render_html
from utune_deploy.deploy.load.reading import read_report, report_from
from utune_deploy.deploy.load.report import write_json
from utune_deploy.deploy.load.step import CLOSED, CONSTANT, POISSON
from utune_deploy.deploy.load.table import print_table
from utune_deploy.export.engine import Device
from utune_deploy.merge import methods
from utune_deploy.merge.backbone import save
from utune_deploy.merge.delta import save_delta
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.serving.service import Service

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "deploy" / "load" / "schema.json").read_text())
QUICK = ("--seconds", "0.3", "--warmup", "0.1")


@pytest.fixture(scope="module")
def server(bundles, served):
    """Addresses of the six tasks, whose bank is an input."""
    with (
        closing(Service.open(bundles("inputs"), Device(threads=1))) as service,
        served(service) as addresses,
    ):
        yield {"http": f"http://{addresses.http}", "grpc": f"grpc://{addresses.grpc}"}


def held(value):
    """The value, which keeps to the schema, and whose numbers are those of its samples."""
    jsonschema.Draft202012Validator(SCHEMA).validate(value)
    for step in value["steps"]:
        samples = step["samples_ms"]
        assert step["latency"]["samples"] == len(samples) > 0
        assert step["latency"]["p99_ms"] == pytest.approx(np.percentile(samples, 99))
    return value


@pytest.mark.parametrize("front", ["http", "grpc"])
def test_callers_that_wait(server, cli, tmp_path, front):
    said = cli(
        "load", server[front], "--concurrency", "1,3", "-b", 2, "-m", "zipf", *QUICK,
        "-o", tmp_path / "out", "--csv", tmp_path / "out.csv", "--json",
    )  # fmt: skip
    assert said.code == 0, said.err
    value = held(said.json)
    assert value == json.loads((tmp_path / "out" / "report.json").read_text())
    assert [step["level"] for step in value["steps"]] == [1, 3]
    assert all(step["errors"] == [] for step in value["steps"])
    assert all(step["server"]["inference_count"] > 0 for step in value["steps"])
    assert value["asked"]["rows"] == 2
    assert value["server"]["name"] == "utune-deploy"
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(
        "Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,"
    )


@pytest.mark.parametrize("more", [(), ("--constant",), ("--encoding", "json")])
def test_requests_at_a_rate(server, cli, more):
    said = cli("load", server["http"], "--rate", "20,60", *more, *QUICK, "--task", "lora", "--json")
    assert said.code == 0, said.err
    value = held(said.json)
    assert value["loop"] == (CONSTANT if "--constant" in more else POISSON)
    assert value["asked"]["task_rows"].keys() == {"lora"}
    assert set(value["saturation"]) == {"holds", "fails"}
    if "--constant" in more:
        assert [step["offered_per_second"] for step in value["steps"]] == pytest.approx(
            [20, 60], rel=0.2
        )


def test_rows_of_a_file_and_the_table(server, cli, tmp_path, images):
    np.savez(tmp_path / "rows.npz", images=images(3))
    said = cli("load", server["grpc"], "--concurrency", 1, "--input", tmp_path / "rows.npz", *QUICK)
    assert said.code == 0, said.err
    assert "requests/s at most, with 1 caller" in said.out
    assert "6 tasks, uniform" in said.out
    assert "1 caller:" in said.err


def test_a_task_comes_and_goes_meanwhile(server, cli, tmp_path, vit, random_delta):
    save(tmp_path / "vit", vit)
    save_delta(
        tmp_path / "later.safetensors",
        random_delta(vit, methods.lora(2), task="later", classes=4, seed=5),
    )
    packed = tmp_path / "later.task"
    made = cli("task", "pack", tmp_path / "later.safetensors", "-o", packed, "--server", server["http"], "--weights", tmp_path / "vit")  # fmt: skip
    assert made.code == 0, made.err
    said = cli(
        "load", server["http"], "--concurrency", 2, "--add", packed, "--every", 0.1,
        "--seconds", 1.5, "--warmup", 0, "--json", "-o", tmp_path / "out",
    )  # fmt: skip
    assert said.code == 0, said.err
    value = held(said.json)
    assert value["changing"] == {"task": "later", "every_s": 0.1}
    (step,) = value["steps"]
    assert step["errors"] == []
    assert step["changes"]["added"] >= 1
    assert step["changes"]["failed"] == 0
    parts = [step["changes"][part] or {"samples": 0} for part in ("during", "apart")]
    assert sum(part["samples"] for part in parts) == step["latency"]["samples"]
    assert "While a task comes and goes" in (tmp_path / "out" / "report.html").read_text()
    assert "later" not in cli("task", "list", "--server", server["http"]).out
    cli("task", "add", packed, "--server", server["http"])
    there = cli("load", server["http"], "--concurrency", 1, "--add", packed, *QUICK)
    cli("task", "remove", "later", "--server", server["http"])
    assert there.code == 2
    assert "has a task of that name already" in there.err


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (("--concurrency", "1", "--rate", "5"), 2, "callers that wait or requests at a rate"),
        (("--concurrency", "1", "--constant"), 2, "have no arrivals"),
        (("--concurrency", "1,x"), 2, "numbers with commas between"),
        (("--concurrency", "0"), 2, "out of range"),
        (("--rate", "nan"), 2, "out of range"),
        (("--task", "nobody"), 2, "there is no such task"),
        (("-b", "7"), 2, "more rows than the model takes"),
        (("-m", "some"), 2, "unknown task mix"),
        (("--every", "1"), 2, "--every belongs to --add"),
        (("--input", "nowhere.npz"), 2, "there is no such file of rows"),
        (("--model", "nobody"), 2, "nobody"),
        (("--add", "nowhere.task"), 4, "nowhere.task"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(server, cli, arguments, code, what):
    said = cli("load", server["http"], *arguments)
    assert said.code == code, said.err
    assert what in said.err
    assert "Traceback" not in said.err


def test_other_refusals(server, cli, tmp_path):
    assert "gRPC carries" in cli("load", server["grpc"], "--encoding", "json").err
    away = cli("load", "http://127.0.0.1:9")
    assert away.code == 1
    assert "the server cannot be reached" in away.err
    assert cli("load", "127.0.0.1:8000").code == 2
    (tmp_path / "report.json").write_text("{}")
    assert "already exists" in cli("load", server["http"], "-o", tmp_path).err


# the file


@pytest.mark.parametrize(
    ("loop", "levels"), [(CLOSED, (1, 2, 8)), (POISSON, (10, 60)), (CONSTANT, (5,))]
)
def test_a_file_is_read_as_it_was_written(load_report, tmp_path, loop, levels):
    report = load_report(loop, levels)
    write_json(report, tmp_path / "report.json")
    jsonschema.validate(json.loads((tmp_path / "report.json").read_text()), SCHEMA)
    assert read_report(tmp_path) == report


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"format": "utune-bench"}, "no report of a load"),
        ({"version": 2}, "not known here"),
        ({"loop": "open"}, "does not keep"),
        ({"steps": []}, "does not keep"),
        ({"more": 1}, "does not keep"),
        ({"settings": {"seconds": 0}}, "does not keep"),
    ],
)
def test_a_file_that_is_wrong_is_refused(load_report, tmp_path, change, what):
    (tmp_path / "report.json").write_text(json.dumps({**load_report().to_json(), **change}))
    with pytest.raises(IncompatibleArtefact, match=what):
        read_report(tmp_path)


def test_samples_that_were_changed_are_noticed(load_report, tmp_path):
    value = load_report().to_json()
    value["steps"][0]["samples_ms"][0] += 1
    with pytest.raises(ValueError, match="not that of its samples"):
        report_from(value)
    value["steps"][0]["lags_ms"].pop()
    with pytest.raises(ValueError, match="not equally many"):
        report_from(value)
    (tmp_path / "report.json").write_text("no")
    with pytest.raises(IncompatibleArtefact, match="not JSON"):
        read_report(tmp_path)
    with pytest.raises(UsageError, match="no such report"):
        read_report(tmp_path / "nowhere")


# the page and the table


@pytest.mark.parametrize(("loop", "levels"), [(CLOSED, (1, 2, 8)), (POISSON, (10, 60))])
def test_the_page_stands_alone(load_report, loop, levels):
    report = load_report(loop, levels, model="<b>&", command="utune-deploy load 'a & b'")
    html = render_html(report)
    assert html.count("<svg") == 2
    assert "<b>&" not in html
    assert "&lt;b&gt;&amp;" in html
    assert html.count("utune-deploy load &#39;a &amp; b&#39;") == 2
    assert "<script" not in html
    assert 'http-equiv="Content-Security-Policy"' in html
    assert ("offered/s" in html) == (loop == POISSON)


def test_a_page_of_one_step_has_no_chart(load_report):
    assert "<svg" not in render_html(load_report(CLOSED, (4,)))


def test_the_table_fits_a_terminal(load_report):
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    print_table(load_report(POISSON, (10, 60)), Console(file=out, width=80))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "30 errors" in out.getvalue()
