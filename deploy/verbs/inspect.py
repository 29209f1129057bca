"""`utune-deploy inspect`: what a delta or a bundle holds, without a backbone."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from ..options import PATH, json_option

if TYPE_CHECKING:
    from pathlib import Path

    from ..console import Console


@click.command("inspect")
@click.argument("path", type=PATH)
@json_option
@click.pass_obj
def command(console: Console, path: Path, as_json: bool) -> None:
    """Read and verify a delta or a bundle at PATH and say what is in it."""
    found = _bundle(path) if path.is_dir() else _delta(path)
    if as_json:
        console.json(found)
        return
    for key, value in found.items():
        if isinstance(value, list):
            console.result(f"{key}:")
            for entry in value:
                console.result(f"  {entry}")
        else:
            console.result(f"{key}: {value}")


def _delta(path: Path) -> dict[str, object]:
    from ...merge.delta import load_delta

    delta = load_delta(path)
    kinds = Counter(branch.tuner.kind for branch in delta.branches.values())
    return {
        "delta": delta.task,
        "labels": ", ".join(delta.labels),
        "backbone": f"{delta.backbone.architecture} {dict(delta.backbone.arguments)}",
        "fingerprint": delta.backbone.fingerprint,
        "preprocessing": delta.preprocessing.to_json() if delta.preprocessing else None,
        "parameters": delta.parameters,
        "branches": [
            f"{name}: {branch.tuner} from {branch.tap} to {branch.add}"
            for name, branch in delta.branches.items()
        ],
        "kinds": dict(kinds),
        "provenance": dict(delta.provenance),
    }


def _bundle(path: Path) -> dict[str, object]:
    from ...export.bundle import open_bundle

    bundle = open_bundle(path)
    return {
        "bundle": bundle.name,
        "mode": f"{bundle.mode}, bank {bundle.bank}",
        "engine": f"{bundle.engine.target} {bundle.engine.precision}, opset {bundle.engine.opset}, "
        f"batch up to {bundle.engine.max_batch}",
        "backbone": f"{bundle.backbone['architecture']} {bundle.backbone['arguments']}",
        "fingerprint": bundle.backbone["fingerprint"],
        "identity": bundle.identity,
        "tasks": [f"{task.row}: {task.name} ({', '.join(task.labels)})" for task in bundle.tasks],
        "check": "passed" if bundle.check.get("passed") else "FAILED",
        "versions": dict(bundle.versions),
    }
