"""A written report back as the record that it was; `schema.json` says what a file holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...export.engine import Tensor
from ..records import read_record
from .case import Case
from .ceilings import Ceilings
from .footprint import Footprint
from .machine import Load, Machine, Memory
from .nodes import NodeTime, NodeTimes
from .report import (
    FORMAT,
    SWEEP_FORMAT,
    VERSION,
    About,
    CaseResult,
    Report,
    Result,
    Settings,
    SubjectFacts,
    TaskFacts,
)
from .state import DeviceState, State, States
from .summary import Ratio, Summary
from .work import GraphFacts, Work

if TYPE_CHECKING:
    from pathlib import Path


def read_reports(path: Path) -> dict[str, Report]:
    """The reports of a file by the name of their comparison: one named "" of `bench`, several of a sweep.

    Args:
        path: A report, or a folder that holds `report.json`.

    Raises:
        UsageError: There is no such file.
        IncompatibleArtefact: It is no report, of an unknown version, or damaged.
    """
    return read_record(
        path,
        _by_name,
        what="the benchmark",
        verb="bench",
        formats=(FORMAT, SWEEP_FORMAT),
        versions=range(1, VERSION + 1),
    )


def _by_name(value: dict[str, Any]) -> dict[str, Report]:
    if value["format"] == FORMAT:
        return {"": report_from(value)}
    return {name: report_from(report) for name, report in value["reports"].items()}


def report_from(value: dict[str, Any]) -> Report:
    """The record of a JSON value that keeps to the schema; the inverse of `Report.to_json`."""
    subjects = tuple(_subject(subject) for subject in value["subjects"])
    ceilings = value.get("ceilings")
    return Report(
        about=_about(value["about"]),
        timed=value["timed"],
        subjects=subjects,
        cases=tuple(_case(case, subjects) for case in value["cases"]),
        settings=Settings(**value["settings"]),
        threads=value["threads"],
        machine=Machine(**{**value["machine"], "gpus": tuple(value["machine"]["gpus"])}),
        load=Load(**value["load"]),
        memory=Memory(**value["memory"]),
        date=value["date"],
        command=value["command"],
        warnings=tuple(value["warnings"]),
        ceilings=Ceilings(**{**ceilings, "product": tuple(ceilings["product"])})
        if ceilings
        else None,
        states=_states(value.get("states")),
    )


def _subject(value: dict[str, Any]) -> SubjectFacts:
    """Of any version: what came later is None."""
    graph, footprint, nodes = (value.get(name) for name in ("graph", "footprint", "nodes"))
    later = {
        "graph": GraphFacts(**graph) if graph else None,
        "footprint": Footprint(**footprint) if footprint else None,
        "nodes": _nodes(nodes) if nodes else None,
    }
    return SubjectFacts(**{**value, **later})


def _nodes(value: dict[str, Any]) -> NodeTimes:
    times = {
        name: tuple(NodeTime(**time) for time in value[name]) for name in ("groups", "operators")
    }
    return NodeTimes(**{**value, **times, "case": Case(**value["case"])})


def _states(value: dict[str, Any] | None) -> States | None:
    if value is None:
        return None
    before, after = (
        State(
            value[when]["cpu_mhz"],
            tuple(
                DeviceState(**{**device, "limits": tuple(device["limits"])})
                for device in value[when]["devices"]
            ),
        )
        for when in ("before", "after")
    )
    return States(before, after)


def _about(value: dict[str, Any]) -> About:
    shape = value["image_shape"]
    return About(
        name=value["name"],
        tasks=tuple(TaskFacts(**task) for task in value["tasks"]),
        image_shape=None if shape is None else tuple(shape),
        max_batch=value["max_batch"],
        facts=tuple((label, text) for label, text in value["facts"]),
        inputs=tuple(
            Tensor(**{**tensor, "shape": tuple(tensor["shape"])})
            for tensor in value.get("inputs", ())  # came after the first reports
        ),
    )


def _case(value: dict[str, Any], subjects: tuple[SubjectFacts, ...]) -> CaseResult:
    results = tuple(
        Result(
            subject=result["subject"],
            samples_ms=tuple(map(float, result["samples_ms"])),
            summary=Summary(**result["summary"]),
            ratio=None if result["ratio"] is None else Ratio(**result["ratio"]),
            work=Work(**result["work"]) if result.get("work") else None,
        )
        for result in value["results"]
    )
    case = Case(**value["case"])
    if [result.subject for result in results] != [subject.name for subject in subjects]:
        raise ValueError(f"the results of {case.label} are not those of the subjects in order")
    counts = {len(result.samples_ms) for result in results}
    samples = np.array([sample for result in results for sample in result.samples_ms])
    if len(counts) != 1 or min(counts) < 2 or not (np.isfinite(samples) & (samples > 0)).all():
        raise ValueError(
            f"the samples of {case.label} are not positive and equally many, two at least"
        )
    return CaseResult(case=case, task_rows=tuple(value["task_rows"]), results=results)
