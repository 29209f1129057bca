"""A written report back as the record that it was; `schema.json` says what a file holds."""

from __future__ import annotations

import json
import math
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from ...merge.errors import IncompatibleArtefact, UsageError
from ..bench.machine import Load, Machine
from .changes import Changes
from .latency import Latency, summarise
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
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(
            "there is no such report", where=file, do="name a report.json of `load -o`"
        )
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise IncompatibleArtefact("the report is not JSON", where=file, found=error) from error
    found = value.get("format") if isinstance(value, dict) else type(value).__name__
    if found != FORMAT:
        raise IncompatibleArtefact(
            "the file is no report of a load", where=file, wanted=f"format {FORMAT}", found=found
        )
    if value.get("version") != VERSION:
        raise IncompatibleArtefact(
            "the report is of a version that is not known here",
            where=file,
            wanted=VERSION,
            found=value.get("version"),
            do="read it with the utune-deploy that wrote it, or a newer one",
        )
    try:
        return report_from(value)
    except (AttributeError, KeyError, TypeError, ValueError, UsageError) as error:
        raise IncompatibleArtefact(
            "the report does not keep to its schema",
            where=file,
            wanted="a file as `load` wrote it; see docs/load.md",
            found=f"{type(error).__name__}: {error}",
        ) from error


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
    if not _same(summarise(step.samples_ms), step.latency):
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
