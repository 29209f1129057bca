"""One task's file: what was trained, where it joins, and which backbone it belongs to.

A delta is a safetensors file. Its tensors are named `BRANCH/TENSOR`; its one metadata key holds
canonical JSON, because safetensors writes several keys in random order. `docs/delta.md` specifies it.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .backbone import Backbone, Identity
from .errors import IncompatibleArtefact
from .files import atomic_file, canonical_json, digest, refuse_existing, require_file
from .preprocessing import Preprocessing
from .stored import StoredTensors
from .tuner import Branch, Point, bind
from .tuners import TUNERS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from .sites import Sites

FORMAT = "utune-delta"
VERSION = 1
KEY = "utune"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIDES_OF = {
    "add": ("input", "output"),
    "replace": ("input", "output"),
    "extend": ("keys",),
    "tokens": ("tokens",),
    "weights": ("weights",),
}


@dataclass(frozen=True)
class Delta:
    """What one task adds to a frozen backbone.

    Attributes:
        task: The task's name.
        labels: Class names in the order of the logits; none for a task that answers with a vector or with
            several.
        preprocessing: How its pictures become tensors; None for a backbone that reads none.
        backbone: The backbone it was trained on.
        branches: Its branches by name, in the order in which they join; one is the head, or one for
            each classifier of the backbone.
        tensors: Each branch's stored tensors by name.
        provenance: Free text by key: method, command, seed, numbers.
    """

    task: str
    labels: tuple[str, ...]
    preprocessing: Preprocessing | None
    backbone: Identity
    branches: Mapping[str, Branch]
    tensors: Mapping[str, Mapping[str, Tensor]]
    provenance: Mapping[str, str] = field(default_factory=dict)

    @property
    def heads(self) -> list[str]:
        """The names of the heads' branches."""
        return [n for n, b in self.branches.items() if b.tuner.answers]

    @property
    def head(self) -> str:
        """The name of the first head's branch."""
        return self.heads[0]

    def answer_width(self, head: str) -> int:
        """How many numbers a head answers with."""
        tuner = self.branches[head].tuner
        return tuner.answer_width(bind(tuner.shapes, self.tensors[head], where=head))

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of its tensors."""
        own = [t.dtype for tensors in self.tensors.values() for t in tensors.values()]
        return widest(own) if own else torch.float32

    @property
    def parameters(self) -> int:
        """Number of stored values."""
        return sum(t.numel() for tensors in self.tensors.values() for t in tensors.values())

    @functools.cached_property
    def layout(self) -> tuple[object, ...]:
        """Equal for two tasks that differ in nothing but values: branches, names and shapes."""
        return tuple(
            (name, branch, tuple((key, tuple(t.shape)) for key, t in self.tensors[name].items()))
            for name, branch in self.branches.items()
        )

    def weighted(self) -> list[tuple[Branch, Mapping[str, Tensor]]]:
        """The branches with their stored tensors, in the order in which they join."""
        return [(branch, self.tensors[name]) for name, branch in self.branches.items()]


def widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds every value of these exactly."""
    return functools.reduce(torch.promote_types, dtypes)


def save_delta(path: Path, delta: Delta, *, force: bool = False) -> str:
    """Write a delta, whole or not at all; the same delta gives the same bytes.

    Returns:
        SHA-256 of the file, in hex.

    Raises:
        UsageError: The file exists and `force` is not set.
        IncompatibleArtefact: The delta would not be readable.
    """
    path = Path(path)
    refuse_existing(path, force=force)
    validate(delta, where=path)
    tensors = {
        f"{branch}/{name}": tensor.detach().cpu().contiguous().clone()
        for branch, named in delta.tensors.items()
        for name, tensor in named.items()
    }
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={KEY: canonical_json(_header(delta))})
    return digest(path)


def load_delta(path: Path, *, keep: bool = True) -> Delta:
    """Read and validate a delta.

    Args:
        path: Its file.
        keep: Hold its tensors; otherwise each is read from the file whenever it is asked for.

    Raises:
        UsageError: There is no such file.
        IncompatibleArtefact: The file is truncated or malformed, of an unknown version, has an
            unknown kind, missing or surplus tensors, wrong shapes, or NaN or Inf.
    """
    path = Path(path)
    require_file(path, "a delta (.safetensors)")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as cause:
        raise IncompatibleArtefact(
            "the file is truncated or not safetensors", where=path, found=str(cause)
        ) from cause
    if set(metadata) != {KEY}:
        raise IncompatibleArtefact(
            "the file is not a delta",
            where=path,
            wanted=f"the metadata key {KEY!r} and no other",
            found=sorted(metadata) or "no metadata",
            do="write deltas with utune-deploy",
        )
    try:
        header = json.loads(metadata[KEY])
        kind, version = header["format"], header["version"]
    except (ValueError, KeyError, TypeError) as cause:
        raise IncompatibleArtefact("the header of the delta is malformed", where=path) from cause
    if kind != FORMAT or version != VERSION:
        raise IncompatibleArtefact(
            "the delta has an unknown format or version",
            where=path,
            wanted=f"{FORMAT} version {VERSION}",
            found=f"{kind} version {version}",
            do="use the version of utune-deploy that wrote it, or a newer one",
        )
    delta = _parse(path, header, flat)
    validate(delta, where=path)
    if not _says(delta, header):
        raise IncompatibleArtefact(
            "the header of the delta has a field that is surplus or of another type",
            where=path,
            wanted="what version 1 of the format specifies and nothing else",
            do="write deltas with utune-deploy",
        )
    if keep:
        return delta
    names = {branch: tuple(named) for branch, named in delta.tensors.items()}
    return replace(delta, tensors=StoredTensors(path, names))


def validate(delta: Delta, *, where: object) -> None:
    """Hold a delta to itself.

    Raises:
        IncompatibleArtefact: See `load_delta`.
    """
    if not delta.task or not delta.task.isprintable() or "/" in delta.task:
        raise IncompatibleArtefact(
            "the task has no usable name",
            where=where,
            wanted="printable text without a slash",
            found=repr(delta.task),
        )
    heads = delta.heads
    places = {delta.branches[name].add for name in heads}
    if not heads or len(places) != len(heads):
        raise IncompatibleArtefact(
            "a delta has one head per classifier", where=where, found=", ".join(heads) or "none"
        )
    if surplus := sorted(set(delta.tensors) - set(delta.branches)):
        raise IncompatibleArtefact(
            "the file holds tensors of branches that its header does not declare",
            where=where,
            wanted=", ".join(delta.branches),
            found=", ".join(surplus),
        )
    listed = list(delta.branches)
    for name, branch in delta.branches.items():
        _require_side(branch, where=f"{where}: {name}")
        for head in heads:
            at = delta.branches[head].add
            early = (
                branch.add == at
                and not branch.tuner.answers
                and listed.index(name) < listed.index(head)
            )
            if early or (branch.tuner.join == "weights" and branch.add.module == at.module):
                raise IncompatibleArtefact(
                    "a branch stands at what the head replaces, so it would never act",
                    where=f"{where}: {name}",
                    found=f"{branch.add} in front of {head}",
                )
        bind(branch.tuner.shapes, delta.tensors.get(name, {}), where=f"{where}: {name}")
        for key, tensor in delta.tensors[name].items():
            if tensor.dtype not in DTYPES:
                raise IncompatibleArtefact(
                    "a tensor does not hold floating-point numbers",
                    where=f"{where}: {name}/{key}",
                    wanted="float16, bfloat16, float32 or float64",
                    found=tensor.dtype,
                )
            require_finite(tensor, where=f"{where}: {name}/{key}")
    if not delta.labels and any(delta.branches[name].tuner.kind != "head" for name in heads):
        return
    counts = {name: delta.answer_width(name) for name in heads}
    classes = counts[heads[0]]
    if classes < 1:
        raise IncompatibleArtefact("the head has no class", where=f"{where}: {heads[0]}")
    if len(set(counts.values())) > 1:
        raise IncompatibleArtefact(
            "the heads do not have the same classes", where=where, found=str(counts)
        )
    if len(delta.labels) != classes or len(set(delta.labels)) != classes:
        raise IncompatibleArtefact(
            "the labels do not name the head's classes one by one",
            where=where,
            wanted=f"{classes} different labels",
            found=f"{len(delta.labels)} labels, {len(set(delta.labels))} different",
        )


def require_finite(tensor: Tensor, *, where: object) -> None:
    """No value is NaN or Inf.

    Raises:
        IncompatibleArtefact: One is.
    """
    if not torch.isfinite(tensor).all():
        raise IncompatibleArtefact(
            "a tensor holds NaN or Inf",
            where=where,
            found=f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values",
            do="train again, or save an earlier step",
        )


def require_backbone(
    delta: Delta, backbone: Backbone, sites: Sites, *, where: object = None
) -> None:
    """Hold a delta to a backbone.

    Raises:
        IncompatibleArtefact: Another backbone's fingerprint, or a place that cannot carry a branch.
    """
    where = where or f"task {delta.task}"
    if delta.backbone.fingerprint != backbone.identity.fingerprint:
        raise IncompatibleArtefact(
            "the delta belongs to another backbone",
            where=where,
            wanted=f"{delta.backbone.architecture} {delta.backbone.fingerprint[:16]}",
            found=f"{backbone.identity.architecture} {backbone.identity.fingerprint[:16]}",
            do="load the weights that it was trained on, in the same dtype",
        )
    at = [delta.branches[name].add.module for name in delta.heads]
    if sorted(at) != sorted(backbone.classifiers):
        raise IncompatibleArtefact(
            "the head does not stand in the place of the classifier",
            where=f"{where}: {delta.head}",
            wanted=", ".join(backbone.classifiers),
            found=", ".join(at),
        )
    named = [_named(identity) for identity in (delta.backbone, backbone.identity)]
    if named[0] != named[1]:  # heads, activations and the like leave no trace in the tensors
        raise IncompatibleArtefact(
            "the delta's backbone was created in another way, with the same tensors",
            where=where,
            wanted=named[0],
            found=named[1],
            do="name the architecture and its arguments as in training",
        )
    wanted = backbone.input_size if backbone.pictures else None
    found = delta.preprocessing.input_size if delta.preprocessing else None
    if found != wanted:
        raise IncompatibleArtefact(
            "the task's preprocessing does not make what the backbone reads",
            where=where,
            wanted=f"{list(wanted)}, channels first" if wanted else "none: it reads no pictures",
            found=list(found) if found else "none",
        )
    replaced: dict[Point, int] = {}
    for name, branch in delta.branches.items():
        sites.check(branch, delta.tensors[name], where=f"{where}: {name}", replaced=replaced)


def _require_side(branch: Branch, *, where: object) -> None:
    join = branch.tuner.join
    sides_of = ("output",) if branch.tuner.answers else SIDES_OF[join]
    if join in ("add", "replace"):
        taps = ("input", "output") if branch.tuner.reads_map else ("input", "output", "patches")
    else:
        taps = (branch.add.side,)
    if len(branch.taps) != branch.tuner.reads:
        raise IncompatibleArtefact(
            f"a {branch.tuner.kind} branch reads another number of places",
            where=where,
            wanted=branch.tuner.reads,
            found=len(branch.taps),
        )
    sides = {point.side for point in branch.taps}
    beside = join in ("extend", "weights") and not branch.serial
    if branch.add.side not in sides_of or not sides <= set(taps) or beside:
        raise IncompatibleArtefact(
            f"a {branch.tuner.kind} branch cannot stand here",
            where=where,
            wanted=f"added at MODULE:SIDE with SIDE one of {', '.join(sides_of)}"
            + (", and tapped at the same point" if join in ("extend", "weights") else ""),
            found=f"from {', '.join(map(str, branch.taps))} to {branch.add}",
        )


def _header(delta: Delta) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "task": delta.task,
        "labels": list(delta.labels),
        "preprocessing": delta.preprocessing.to_json() if delta.preprocessing else None,
        "backbone": delta.backbone.to_json(),
        "branches": [branch_to_json(name, branch) for name, branch in delta.branches.items()],
        "provenance": dict(delta.provenance),
    }


def _says(delta: Delta, header: Mapping[str, Any]) -> bool:
    """The header, read and written again, is the header: nothing was dropped or converted."""
    try:
        return json.loads(canonical_json(_header(delta))) == header
    except ValueError:  # NaN or Infinity
        return False


def _parse(path: Path, header: Mapping[str, Any], flat: Mapping[str, Tensor]) -> Delta:
    tensors: dict[str, dict[str, Tensor]] = {}
    for full, tensor in flat.items():
        branch, _, name = full.rpartition("/")
        tensors.setdefault(branch, {})[name] = tensor
    try:
        branches = {str(e["name"]): branch_from_json(path, e) for e in header["branches"]}
        if len(branches) != len(header["branches"]):
            raise ValueError("two branches have one name")
        backbone = header["backbone"]
        delta = Delta(
            task=str(header["task"]),
            labels=tuple(str(label) for label in header["labels"]),
            preprocessing=Preprocessing.from_json(header["preprocessing"], where=path)
            if header["preprocessing"] is not None
            else None,
            backbone=Identity(
                str(backbone["architecture"]),
                dict(backbone["arguments"]),
                str(backbone["fingerprint"]),
            ),
            branches=branches,
            tensors={**{name: {} for name in branches}, **tensors},
            provenance={str(k): str(v) for k, v in header["provenance"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        raise IncompatibleArtefact(
            "the header of the delta lacks a field", where=path, found=repr(cause)
        ) from cause
    return delta


def _named(identity: Identity) -> str:
    return f"{identity.architecture} {canonical_json(dict(identity.arguments))}"


def branch_to_json(name: str, branch: Branch) -> dict[str, Any]:
    """A branch as JSON values; see `docs/delta.md`."""
    return {
        "name": name,
        "kind": branch.tuner.kind,
        "tap": [str(point) for point in branch.taps] if branch.others else str(branch.tap),
        "add": str(branch.add),
        "settings": branch.tuner.settings(),
    }


def branch_from_json(path: Path, entry: Mapping[str, Any]) -> Branch:
    """The branch that `branch_to_json` wrote into the file at `path`.

    Raises:
        IncompatibleArtefact: An unknown kind, settings that are out of range, or an unreadable point.
    """
    kind = TUNERS.get(entry["kind"])
    if kind is None:
        raise IncompatibleArtefact(
            "the delta has a branch of an unknown kind",
            where=f"{path}: {entry['name']}",
            wanted=f"one of {', '.join(TUNERS)}",
            found=entry["kind"],
            do="use a newer version of utune-deploy",
        )
    where = f"{path}: {entry['name']}"
    taps = entry["tap"] if isinstance(entry["tap"], list) else [entry["tap"]]
    tap, *others = (Point.parse(text, where=where) for text in taps)
    return Branch(
        tuner=kind.from_settings(entry["settings"], where=where),
        tap=tap,
        add=Point.parse(entry["add"], where=where),
        others=tuple(others),
    )
