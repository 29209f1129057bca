"""A task laid out for one bank: one row of it in one file, which a running server can take.

A safetensors file:

    bank/...       the row's tensors by engine input name, in the engine's types, without the axis of tasks
    probe/NAME     optional: rows to ask, `[n, ...]` by row input name
    probe/logits   what torch answers to them, `[n, K]` float64, columns past the task's own classes left out

    metadata `utune.task`: JSON with `format`, `version`, `identity` (of the bundle that it was laid out for),
    `fingerprint` (of the backbone), `task` (as in a bundle's manifest, `row` 0), and with a probe `budget`,
    the largest error that passes (see `export.parity`)

The identity covers the backbone, the engine's precision and the shape of every slot: a row that bears it fits.
Packing needs torch and is `deploy.pack`'s; reading needs NumPy alone.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...export.bundle import Task, task_from_json, task_json
from ...export.engine import BANK_PREFIX, LOGITS
from ...export.mapped import map_file, read_views
from ...merge.errors import IncompatibleArtefact
from ...merge.files import canonical_json

if TYPE_CHECKING:
    import mmap
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from ...export.bundle import Bundle

FORMAT = "utune-task"
VERSION = 1
METADATA = "utune.task"
PROBE = "probe/"


@dataclass(frozen=True)
class Probe:
    """Rows whose answers are known.

    Attributes:
        inputs: `[n, ...]` by row input name.
        logits: `[n, K]` float64, the task's own columns; `[n, Q, K]` with more axes.
        budget: The largest relative error that passes.
    """

    inputs: Mapping[str, NDArray[Any]]
    logits: NDArray[np.float64]
    budget: float


@dataclass(frozen=True)
class Packed:
    """One task for one bank.

    Attributes:
        task: What a manifest says of it.
        identity: Of the bundle that it was laid out for.
        fingerprint: Of the backbone that it was trained on.
        tensors: Its row, `[...]` by engine input name.
        probe: Rows to hold an engine to; None where the sender could not compute them.
    """

    task: Task
    identity: str
    fingerprint: str
    tensors: Mapping[str, NDArray[Any]]
    probe: Probe | None = None


def write_packed(packed: Packed) -> bytes:
    """The file."""
    from safetensors.numpy import save

    tensors = dict(packed.tensors)
    facts: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "identity": packed.identity,
        "fingerprint": packed.fingerprint,
        "task": task_json(packed.task),
    }
    if packed.probe is not None:
        facts["budget"] = packed.probe.budget
        tensors |= {PROBE + name: rows for name, rows in packed.probe.inputs.items()}
        tensors[PROBE + LOGITS] = packed.probe.logits
    whole = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    return save(whole, metadata={METADATA: canonical_json(facts)})


def is_packed(path: Path) -> bool:
    """Whether a file says of itself that it is a packed task; a delta does not.

    Raises:
        IncompatibleArtefact: It is no safetensors file.
    """
    return METADATA in map_file(path)[0]


def read_packed(data: bytes | mmap.mmap, *, where: object = "the packed task") -> Packed:
    """The task of a file's bytes; its tensors are views of them.

    Raises:
        IncompatibleArtefact: It is no packed task, of another version, or malformed.
    """
    metadata, tensors = read_views(data, where=where)
    if METADATA not in metadata:
        raise IncompatibleArtefact(
            "the file is no packed task",
            where=where,
            wanted=f"safetensors with {METADATA} in its metadata",
            found=", ".join(sorted(metadata)) or "no metadata",
            do="pack the delta for this server: utune-deploy task pack, or task add",
        )
    try:
        facts = json.loads(metadata[METADATA])
        if (facts["format"], facts["version"]) != (FORMAT, VERSION):
            raise IncompatibleArtefact(
                "the packed task has an unknown format or version",
                where=where,
                wanted=f"{FORMAT} version {VERSION}",
                found=f"{facts['format']} version {facts['version']}",
                do="pack it again with this version of utune-deploy",
            )
        task = task_from_json(facts["task"], where=where)
        if not "".join((task.name, *task.labels)).encode() or not task.name:  # text, all of it
            raise ValueError("a task without a name")
        return Packed(
            task=task,
            identity=str(facts["identity"]),
            fingerprint=str(facts["fingerprint"]),
            tensors={n: t for n, t in tensors.items() if n.startswith(BANK_PREFIX)},
            probe=_probe(facts, tensors),
        )
    except (
        ArithmeticError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as cause:
        raise IncompatibleArtefact(
            "the packed task lacks a field", where=where, found=str(cause)
        ) from cause


def layout_json(bundle: Bundle) -> dict[str, Any]:
    """What a sender must know of a bundle to lay a task out for it, as JSON values."""
    return {
        "identity": bundle.identity,
        "fingerprint": bundle.backbone.get("fingerprint"),
        "precision": bundle.engine.precision,
        "slots": bundle.plan.get("slots", []),
    }


def _probe(facts: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Probe | None:
    given = {n.removeprefix(PROBE): t for n, t in tensors.items() if n.startswith(PROBE)}
    if not given:
        return None
    logits = given.pop(LOGITS)
    if logits.ndim < 2:
        raise ValueError(f"{PROBE}{LOGITS} without rows and columns")
    budget = float(facts["budget"])
    if not math.isfinite(budget):
        raise ValueError("a budget that is no number")
    return Probe(logits=logits, inputs=given, budget=budget)
