"""Tasks, backbone and output held to what can be built, and a plan: all that is decided before a trace."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..export import bundle as bundles
from ..export.bundle import FAN_OUT
from ..merge.attach import answer_shapes
from ..merge.delta import require_backbone
from ..merge.errors import IncompatibleArtefact, UsageError
from ..merge.fan_out import share
from ..merge.files import refuse_existing
from ..merge.lower import in_double, lower
from ..merge.sites import measure
from .plan import make_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ..merge.backbone import Backbone
    from ..merge.delta import Delta
    from ..merge.fan_out import Group
    from ..merge.sites import Sites
    from .plan import Plan
    from .task import Task

SERVABLE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # what Triton takes as a model's name


class Begun(NamedTuple):
    """What is decided before anything is traced."""

    name: str
    deltas: list[Delta]
    sites: Sites
    entries: tuple[bundles.Task, ...]
    plan: Plan
    groups: tuple[Group, ...]


def begin(
    output: Path,
    backbone: Backbone,
    tasks: Sequence[Task],
    name: str | None,
    *,
    mode: str,
    bank: str,
    fan_out: bool,
    force: bool,
    progress: Callable[[str], None],
) -> Begun:
    """Hold tasks, backbone and output to what can be built, and plan it; arguments of `export_bundle`.

    Raises:
        UsageError: The output exists, or the mode does not fit the tasks.
        IncompatibleArtefact: A delta does not belong to the backbone.
    """
    refuse_existing(output, force=force)
    given, name = name, name or output.name
    if not SERVABLE.fullmatch(name):
        raise UsageError(
            "a bundle of this name could not be served",
            wanted="letters, digits, '_', '.' and '-', beginning with a letter, digit or '_'",
            found=name,
            do="choose another --name" if given else "add --name, or choose another --output",
        )
    deltas = [task.delta for task in tasks]
    dtype = backbone.dtype
    if dtype != torch.float32:
        raise UsageError(
            "an engine is built from a float32 backbone",
            found=dtype,
            do="load the float32 weights that the tasks were trained on",
        )
    progress("measure")
    sites = measure(backbone)
    for delta in deltas:
        require_backbone(delta, backbone, sites)
    require_one_kind_of_answer([delta.labels for delta in deltas])
    entries = manifest_tasks(tasks, backbone, sites)
    every = fan_out or mode == FAN_OUT
    if every:
        require_one_preprocessing(deltas)
    groups = fan_out_groups(backbone, deltas, sites) if every else ()
    plan = make_plan(deltas, backbone, sites, mode=mode, bank=bank, groups=groups)
    return Begun(name, deltas, sites, entries, plan, groups)


def require_one_kind_of_answer(labels: Sequence[tuple[str, ...]]) -> None:
    """Tasks of one bundle all name classes, or none does.

    Raises:
        UsageError: Some do.
    """
    without = sum(not names for names in labels)
    if 0 < without < len(labels):
        raise UsageError(
            "some tasks have labels and others answer with vectors",
            wanted="labels for all tasks of a bundle, or for none",
            found=f"none for {without} of {len(labels)}",
            do="export them into two bundles",
        )


def _width(delta: Delta, answer: tuple[int, ...]) -> int | None:
    """How many values a task without labels answers with; None with labels, which say it.

    Raises:
        IncompatibleArtefact: A task with labels answers with several vectors per row.
    """
    if not delta.labels:
        return answer[-1]
    if len(answer) != 1:
        raise IncompatibleArtefact(
            "a task with labels answers with several vectors per row",
            where=f"task {delta.task}",
            wanted="[B, K], K labels",
            found=["B", *answer],
            do="train it without labels: attach(..., classes=None)",
        )
    return None


def require_one_preprocessing(deltas: Sequence[Delta]) -> None:
    """Tasks that answer the same row must read the same pixels.

    Raises:
        IncompatibleArtefact: Two tasks prepare their pictures differently.
    """
    first = deltas[0]
    for delta in deltas[1:]:
        if delta.preprocessing != first.preprocessing:
            raise IncompatibleArtefact(
                "tasks that answer the same row must prepare their pictures alike",
                where=f"tasks {first.task} and {delta.task}",
                wanted=_differing(first, delta),
                found=_differing(delta, first),
                do="export those that do into one bundle each, or leave out --fan-out",
            )


def _differing(delta: Delta, other: Delta) -> dict[str, object]:
    """What a task's preprocessing says that the other's does not."""
    own, others = (d.preprocessing.to_json() if d.preprocessing else {} for d in (delta, other))
    return {name: value for name, value in own.items() if others.get(name) != value}


def fan_out_groups(backbone: Backbone, deltas: Sequence[Delta], sites: Sites) -> tuple[Group, ...]:
    """What tasks share when every row is answered for all of them."""
    double = in_double(backbone)
    return share(
        backbone, [lower(backbone, delta, sites, double) for delta in deltas], sites, torch.float32
    )


def manifest_tasks(
    tasks: Sequence[Task], backbone: Backbone, sites: Sites, first: int = 0
) -> tuple[bundles.Task, ...]:
    """What a manifest says of tasks whose rows begin at `first`.

    Raises:
        IncompatibleArtefact: A task with labels answers with several vectors per row.
    """
    answers = answer_shapes(backbone, [t.delta for t in tasks], sites)
    return tuple(
        bundles.Task(
            t.delta.task,
            row,
            t.delta.labels,
            t.delta.preprocessing,
            t.digest,
            _width(t.delta, answer),
        )
        for row, (t, answer) in enumerate(zip(tasks, answers, strict=True), start=first)
    )
