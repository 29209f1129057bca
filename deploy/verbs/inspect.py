"""`utune-deploy inspect`: what a delta or a bundle holds, without a backbone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..options import PATH, json_option

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ...export.bundle import Bundle, Engine
    from ...merge.delta import Delta
    from ...merge.preprocessing import Preprocessing
    from ...merge.tuner import Branch
    from ..console import Console

SHOWN_LABELS = 8
LONG = 3

Lines = dict[str, "str | list[str]"]
"""What a person reads: a line, or lines under a heading."""


@click.command("inspect")
@click.argument("path", type=PATH)
@json_option
@click.pass_obj
def command(console: Console, path: Path, as_json: bool) -> None:
    """Read and verify a delta or a bundle at PATH and say what is in it."""
    if path.is_dir():
        from ...export.bundle import open_bundle

        bundle = open_bundle(path)
        found, lines = _bundle_json(bundle), _bundle_lines(bundle)
    else:
        from ...merge.delta import load_delta

        delta = load_delta(path)
        found, lines = _delta_json(delta), _delta_lines(delta)
    if as_json:
        console.json(found)
        return
    for key, value in lines.items():
        if isinstance(value, str):
            console.result(f"{key}: {value}")
            continue
        console.result(f"{key}:")
        for entry in value:
            console.result(f"  {entry}")


# a delta


def _delta_json(delta: Delta) -> dict[str, Any]:
    from ...merge.delta import branch_to_json

    return {
        "delta": delta.task,
        "labels": list(delta.labels),
        "backbone": delta.backbone.to_json(),
        "preprocessing": delta.preprocessing.to_json() if delta.preprocessing else None,
        "parameters": delta.parameters,
        "kinds": dict(Counter(branch.tuner.kind for branch in delta.branches.values())),
        "branches": [branch_to_json(name, branch) for name, branch in delta.branches.items()],
        "provenance": dict(delta.provenance),
    }


def _delta_lines(delta: Delta) -> Lines:
    same = Counter(_tuner(branch) for branch in delta.branches.values())
    lines: Lines = {
        "delta": delta.task,
        "labels": _labels(delta.labels) or "none: the answer is not a class",
        "backbone": _backbone(delta.backbone.to_json()),
        "fingerprint": delta.backbone.fingerprint,
        "preprocessing": _preprocessing(delta.preprocessing),
        "parameters": f"{delta.parameters:,}",
        "kinds": [f"{count} x {tuner}" for tuner, count in same.items()],
        "branches": [f"{name}: {_place(branch)}" for name, branch in delta.branches.items()],
    }
    if delta.provenance:
        lines["provenance"] = [f"{key}: {text}" for key, text in delta.provenance.items()]
    return lines


def _tuner(branch: Branch) -> str:
    """Kind and settings of a branch, and how many places it reads where it reads several."""
    taps = {"taps": len(branch.taps)} if branch.others else {}
    return " ".join([branch.tuner.kind, _settings({**branch.tuner.settings(), **taps})]).rstrip()


def _place(branch: Branch) -> str:
    """The way from where a branch reads to where it joins."""
    if branch.serial:
        return f"{branch.tuner.kind} at {branch.add}"
    more = f" and {len(branch.others)} more" if branch.others else ""
    return f"{branch.tuner.kind} from {branch.tap}{more} to {branch.add}"


# a bundle


def _bundle_json(bundle: Bundle) -> dict[str, Any]:
    return {
        "bundle": bundle.name,
        "mode": bundle.mode,
        "bank": bundle.bank,
        "engine": asdict(bundle.engine),
        "fan_out": None if bundle.fan_out is None else asdict(bundle.fan_out),
        "backbone": dict(bundle.backbone),
        "identity": bundle.identity,
        "tasks": [
            {
                "name": task.name,
                "row": task.row,
                "labels": list(task.labels),
                "width": task.width,
                "preprocessing": task.preprocessing.to_json() if task.preprocessing else None,
                "delta": task.delta,
            }
            for task in bundle.tasks
        ],
        "shared": list(bundle.plan.get("shared", [])),
        "macs": bundle.plan.get("macs"),
        "check": _check(bundle),
        "versions": dict(bundle.versions),
    }


def _bundle_lines(bundle: Bundle) -> Lines:
    from ...export.engine import row_inputs

    several = len({task.preprocessing for task in bundle.tasks}) > 1
    lines: Lines = {
        "bundle": bundle.name,
        "mode": f"{bundle.mode}, bank {bundle.bank}",
        "engine": _engine(bundle.engine),
    }
    if bundle.fan_out is not None:
        lines["every task at once"] = _engine(bundle.fan_out)
    elif bundle.engine_of_all is not None:
        lines["every task at once"] = "by this engine alone"
    lines["inputs"] = [
        f"{tensor.name} [{', '.join(map(str, tensor.shape))}] {tensor.dtype}"
        + ("" if tensor.high is None else f" below {tensor.high}")
        for tensor in row_inputs(bundle.engine.inputs)
    ]
    lines["preprocessing"] = (
        [f"{task.name}: {_preprocessing(task.preprocessing)}" for task in bundle.tasks]
        if several
        else _preprocessing(bundle.tasks[0].preprocessing)
    )
    lines["tasks"] = [
        f"{task.row}: {task.name} ({_labels(task.labels) or f'no labels, width {task.width}'})"
        for task in bundle.tasks
    ]
    if shared := bundle.plan.get("shared"):
        lines["shared"] = [f"{', '.join(part['tasks'])}: {part['why']}" for part in shared]
    if counted := bundle.plan.get("macs"):
        every, alone = counted["every task"], counted["tasks one by one"]
        lines["multiply-accumulates"] = (
            f"{every:,} for every task of one example, {every / alone:.3f} of {alone:,} one by one"
        )
    return {
        **lines,
        "backbone": _backbone(bundle.backbone),
        "fingerprint": bundle.backbone["fingerprint"],
        "identity": bundle.identity,
        "check": _check(bundle),
        "versions": ", ".join(f"{name} {version}" for name, version in bundle.versions.items()),
    }


def _engine(engine: Engine) -> str:
    outputs = ", ".join(f"{o.name} [{', '.join(map(str, o.shape))}]" for o in engine.outputs)
    return (
        f"{engine.file}, {engine.target} {engine.precision}, opset {engine.opset}, "
        f"batch up to {engine.max_batch}, {outputs}"
    )


def _check(bundle: Bundle) -> str:
    """The verdict on all its engines."""
    verdicts = [bundle.check, *([bundle.check.get("fan_out", {})] if bundle.fan_out else [])]
    return "passed" if all(verdict.get("passed") for verdict in verdicts) else "FAILED"


# both


def _backbone(backbone: Mapping[str, Any]) -> str:
    return f"{backbone['architecture']} {_settings(backbone['arguments'])}".rstrip()


def _preprocessing(preprocessing: Preprocessing | None) -> str:
    return "no pictures" if preprocessing is None else _settings(preprocessing.to_json())


def _labels(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - SHOWN_LABELS} more" if len(labels) > SHOWN_LABELS else ""
    return ", ".join(labels[:SHOWN_LABELS]) + more


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in values.items())


def _value(value: Any) -> str:
    """A list in brackets, a long one of the same value counted."""
    if isinstance(value, dict):
        return f"({_settings(value)})"
    if not isinstance(value, list):
        return str(value)
    if len(value) > LONG and all(entry == value[0] for entry in value):
        return f"[{len(value)} x {_value(value[0])}]"
    return f"[{', '.join(map(_value, value))}]"
