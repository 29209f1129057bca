from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import jsonschema
import pytest

from utune_deploy.deploy.bench.case import MIXES
from utune_deploy.deploy.bench.report import VERSION, write_json
from utune_deploy.export.engine import Tensor

PACKAGE = "utune_deploy.deploy.bench"
LATER = {  # the first reports lack them
    *("inputs", "engine", "identity", "task_count"),
    *("rank", "graph", "footprint", "nodes", "work", "cache_bytes", "ceilings", "states"),
}
RESULTS = Path(__file__).resolve().parents[3] / "bench" / "results"


@pytest.fixture(scope="module")
def schema():
    return json.loads((resources.files(PACKAGE) / "schema.json").read_text())


def objects(schema):
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for value in schema.values():
            yield from objects(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from objects(value)


def test_a_report_keeps_to_the_schema(report, schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(report.to_json(), schema)


def test_a_report_that_holds_everything_keeps_to_the_schema(full, schema):
    jsonschema.validate(full.to_json(), schema)


def test_the_bound_is_the_ratio_of_the_products(full):
    case = full.cases[0]
    assert [case.bound(result) for result in case.results] == [1.0, 1.25, 1.5, 1.75]
    uncounted = replace(case.results[1], work=None)
    assert case.bound(uncounted) is None


def test_a_report_of_named_inputs_keeps_to_the_schema(report, schema):
    inputs = (Tensor("ids", "int64", ("batch", 8), 30), Tensor("mask", "int64", ("batch", 8)))
    about = replace(report.about, image_shape=None, inputs=inputs)
    jsonschema.validate(replace(report, about=about).to_json(), schema)


def test_the_schema_is_closed_and_asks_for_every_field(schema):
    for part in objects(schema):
        if "properties" in part:
            assert part["additionalProperties"] is False
            assert sorted({*part["required"], *(LATER & {*part["properties"]})}) == sorted(
                part["properties"]
            )


def test_the_schema_knows_the_version_and_the_mixes(schema):
    assert schema["properties"]["version"]["enum"][-1] == VERSION
    assert f"version {VERSION}" in schema["title"]
    mixes = schema["$defs"]["case"]["properties"]["case"]["properties"]["mix"]["enum"]
    assert mixes == list(MIXES)


@pytest.mark.parametrize("place", [(), ("machine",), ("cases", 0, "results", 0, "summary")])
def test_the_schema_refuses_what_it_does_not_know(report, schema, place):
    value = report.to_json()
    part = value
    for step in place:
        part = part[step]
    part["surprise"] = 1
    with pytest.raises(jsonschema.ValidationError, match="surprise"):
        jsonschema.validate(value, schema)


def test_the_file_holds_every_raw_sample(report, tmp_path):
    path = tmp_path / "new" / "report.json"
    write_json(report, path)
    value = json.loads(path.read_text())
    assert value == report.to_json()
    for case, wanted in zip(value["cases"], report.cases, strict=True):
        for result, raw in zip(case["results"], wanted.results, strict=True):
            assert tuple(result["samples_ms"]) == raw.samples_ms
            assert len(raw.samples_ms) == raw.summary.samples == 30


@pytest.mark.parametrize(
    "path", sorted(RESULTS.rglob("report.json")), ids=lambda path: path.parent.name
)
def test_the_reports_of_the_repository_keep_to_the_schema(path, schema):
    value = json.loads(path.read_text())
    for report in value.get("reports", {"": value}).values():
        jsonschema.validate(report, schema)
