"""A delta laid out for one server's bank: what `task add` sends.

The layout is the bundle's, or what a running server says of its own: the slots of the bank, the engine's
types, the identity. Rows to hold the engine to are computed in torch where the backbone is at hand.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..export.bundle import Task as TaskFacts
from ..export.parity import budget
from ..export.precision import HALF, QUANTISED
from ..merge.attach import restore
from ..merge.bank import Slot, fill_row
from ..merge.delta import require_backbone
from ..merge.errors import IncompatibleArtefact, UsageError
from ..merge.lower import in_double, lower
from ..merge.sites import measure
from ..serving.tasks.packed import Packed, Probe, layout_json
from .bank_inputs import bank_inputs
from .begin import manifest_tasks
from .reference import in_dtype, in_torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..export.bundle import Bundle
    from ..merge.backbone import Backbone
    from ..merge.delta import Delta
    from ..merge.sites import Sites
    from .task import Task

PROBE_ROWS = 2


@dataclass(frozen=True)
class Layout:
    """What a packed task must fit.

    Attributes:
        identity: The bundle's.
        fingerprint: Of its backbone.
        precision: Numbers that its engine computes in.
        slots: The places of its bank, as its plan has them.
        source: Where this was read, for errors.
    """

    identity: str
    fingerprint: str
    precision: str
    slots: tuple[Slot, ...]
    source: str

    @classmethod
    def of(cls, bundle: Bundle) -> Layout:
        """A bundle's own.

        Raises:
            UsageError: Its tasks are constants of the engine.
        """
        if bundle.bank != "inputs":
            raise UsageError(
                "the bundle's tasks are constants of its engine, so none can be added",
                where=bundle.path,
                do="export it with --bank inputs",
            )
        return cls.from_json(layout_json(bundle), source=str(bundle.path))

    @classmethod
    def from_json(cls, facts: Mapping[str, Any], *, source: str) -> Layout:
        """What a server says of its bank.

        Raises:
            IncompatibleArtefact: It cannot be read.
        """
        try:
            slots = tuple(Slot.from_json(Path(source), entry) for entry in facts["slots"])
            identity, fingerprint, precision = (
                facts[name] for name in ("identity", "fingerprint", "precision")
            )
            if not all(isinstance(text, str) for text in (identity, fingerprint, precision)):
                raise TypeError("text in identity, fingerprint or precision")
            return cls(identity, fingerprint, precision, slots, source)
        except (KeyError, TypeError) as cause:
            raise IncompatibleArtefact(
                "what the server says of its bank cannot be read",
                where=source,
                found=f"no {cause}",
                do="use the server's own version of utune-deploy",
            ) from cause


def pack(task: Task, layout: Layout, backbone: Backbone | None = None) -> Packed:
    """A task for one bank.

    Args:
        task: The delta and its file's digest.
        layout: Of the bank.
        backbone: Adds a probe; needed for tasks whose prompts become prefixes and for tasks without labels.

    Raises:
        UsageError: The backbone is needed, or the engine is in eight bits.
        IncompatibleArtefact: The delta belongs to another backbone, or has no slot in the bank.
    """
    delta = task.delta
    if delta.backbone.fingerprint != layout.fingerprint:
        raise IncompatibleArtefact(
            "the task belongs to another backbone than the server's",
            where=f"task {delta.task}",
            wanted=f"fingerprint {layout.fingerprint[:16]}, as {layout.source} has",
            found=f"fingerprint {delta.backbone.fingerprint[:16]} ({delta.backbone.architecture})",
        )
    if layout.precision in QUANTISED:
        raise UsageError(
            f"a server cannot judge a new task of an engine in {layout.precision}, which takes pictures",
            where=layout.source,
            do="add it to the bundle with `add --images`, or serve an engine in fp32",
        )
    facts, lowered, probe = _plain(task), delta, None
    if backbone is not None:
        sites = measure(backbone)
        require_backbone(delta, backbone, sites)
        (facts,) = manifest_tasks([task], backbone, sites)
        lowered = lower(backbone, delta, sites, in_double(backbone))
        probe = _probe(backbone, delta, sites, layout.precision)
    elif why := _needs_backbone(delta):
        raise UsageError(
            f"the backbone is needed to lay this task out: {why}",
            where=f"task {delta.task}",
            do="name it with --backbone and --weights",
        )
    row = fill_row(layout.slots, lowered, torch.float32)
    tensors = bank_inputs(row, layout.precision)
    return Packed(replace(facts, row=0), layout.identity, layout.fingerprint, tensors, probe)


def _plain(task: Task) -> TaskFacts:
    delta = task.delta
    return TaskFacts(delta.task, 0, delta.labels, delta.preprocessing, task.digest)


def _needs_backbone(delta: Delta) -> str | None:
    if any(b.tuner.join == "tokens" and b.serial for b in delta.branches.values()):
        return "its deep prompts become constant prefixes, which the backbone computes"
    if not delta.labels:
        return "without labels, only a run says how wide its answer is"
    return None


def _probe(backbone: Backbone, delta: Delta, sites: Sites, precision: str) -> Probe:
    """Seeded rows, torch's answers to them in float64, and the error that torch itself shows in the precision."""
    names = [entry.name for entry in backbone.inputs]
    rows = {n: t.numpy() for n, t in zip(names, backbone.draw(batch=PROBE_ROWS), strict=True)}
    plain = restore(backbone, delta, sites).eval()
    exact = in_dtype(torch.float64, plain, in_double(backbone)())
    typed = plain
    if precision in HALF:
        half = torch.float16 if precision == "fp16" else torch.bfloat16
        typed = in_dtype(half, plain, copy.deepcopy(backbone.model).to(half))
    with torch.no_grad():
        seen, wanted = (m(*in_torch(rows, m)).double().numpy() for m in (typed, exact))
    return Probe(rows, wanted, budget(seen, wanted, precision))
