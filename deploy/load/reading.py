"""A written report back as the record that it was; `schema.json` says what a file holds."""

from __future__ import annotations

import math
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from ..bench.latency import Latency, latency_of
from ..bench.machine import Load, Machine
from ..records import read_record
from .changes import Changes
from .numbers import Errors, StepResult, Window
from .report import FORMAT, VERSION, Asked, Changing, Input, Report
from .saturation import Saturation
from .statistics import PARTS, ServerCounts, Spent
from .step import LOOPS, Settings

if TYPE_CHECKING:
    from pathlib import Path


def read_report(path: Path) -> Report:
    """The report of a file, or of a folder that holds `report.json`.

    Raises:
        UsageError: There is no such file.
        IncompatibleArtefact: It is no report of a load, of an unknown version, or damaged.
    """
    return read_record(
        path, report_from, what="a load", verb="load", formats=(FORMAT,), versions=(VERSION,)
    )


def report_from(value: dict[str, Any]) -> Report:
    """The record of a JSON value that keeps to the schema; the inverse of `Report.to_json`."""
    fields = {key: item for key, item in value.items() if key not in ("format", "version")}
    if value["loop"] not in LOOPS or not value["steps"]:
        raise ValueError("a load is of a known loop and has steps")
    asked = value["asked"]
    inputs = tuple(Input(**{**given, "shape": tuple(given["shape"])}) for given in asked["inputs"])
    return Report(
        **{
            **fields,
            "asked": Asked(**{**asked, "inputs": inputs}),
            "steps": tuple(_step(step) for step in value["steps"]),
            "saturation": value["saturation"] and Saturation(**value["saturation"]),
            "settings": Settings(**value["settings"]),
            "changing": value["changing"] and Changing(**value["changing"]),
            "machine": Machine(**{**value["machine"], "gpus": tuple(value["machine"]["gpus"])}),
            "load": Load(**value["load"]),
            "warnings": tuple(value["warnings"]),
        }
    )


def _step(value: dict[str, Any]) -> StepResult:
    step = StepResult(
        **{
            **value,
            "latency": _latency(value["latency"]),
            "lag": _latency(value["lag"]),
            "errors": tuple(Errors(**kind) for kind in value["errors"]),
            "windows": tuple(Window(**window) for window in value["windows"]),
            "server": value["server"] and _server(value["server"]),
            "changes": value["changes"] and _changes(value["changes"]),
            **{name: tuple(map(float, value[name])) for name in ("at_ms", "samples_ms", "lags_ms")},
        }
    )
    if not len(step.at_ms) == len(step.samples_ms) == len(step.lags_ms):
        raise ValueError("a step's samples, their times and lags are not equally many")
    if not _same(latency_of(step.samples_ms), step.latency):
        raise ValueError("a step's latency is not that of its samples")
    return step


def _same(a: Latency | None, b: Latency | None) -> bool:
    """Whether two are alike but for the order in which a machine sums."""
    if a is None or b is None:
        return a is b
    return all(
        math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-9)
        for x, y in zip(astuple(a), astuple(b), strict=True)
    )


def _latency(value: dict[str, Any] | None) -> Latency | None:
    return None if value is None else Latency(**value)


def _server(value: dict[str, Any]) -> ServerCounts:
    times = {name: Spent(**value[name]) for name in ("success", "fail", *PARTS)}
    return ServerCounts(**{**value, **times})


def _changes(value: dict[str, Any]) -> Changes:
    latencies = {name: _latency(value[name]) for name in ("during", "apart")}
    return Changes(**{**value, **latencies})
