"""A bundle: the folder that is shipped. Manifest, engine, labels, preprocessing, plan, verdict.

    bundle/
      manifest.json      what everything is, with the SHA-256 of every other file
      model.onnx         the engine; its metadata carries the bundle's identity
      bank.safetensors   the tasks' tensors, when the bank is an input of the engine

The manifest is the only file that a reader needs to know; `docs/bundle.md` specifies it. Opening
verifies every digest, so that an engine never runs under another bundle's labels.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..merge.errors import IncompatibleArtefact, UsageError
from ..merge.files import canonical_json, digest
from ..merge.preprocessing import Preprocessing
from .engine import Tensor
from .targets import target

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .engine import Session

FORMAT = "utune-bundle"
VERSION = 1
MANIFEST = "manifest.json"
BANK = "bank.safetensors"
IDENTITY = "utune.identity"  # metadata key inside the engine file
TASKS = (
    "utune.tasks"  # metadata key inside the bank: SHA-256 of what the manifest says of the tasks
)


@dataclass(frozen=True)
class Task:
    """One task that a bundle answers.

    Attributes:
        name: The name that requests use.
        row: Its row in the bank, the value of the engine's `task` input.
        labels: Class names in the order of the logits.
        preprocessing: How its pictures become tensors.
        delta: SHA-256 of the delta file it was exported from.
    """

    name: str
    row: int
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    delta: str


@dataclass(frozen=True)
class Engine:
    """The engine file and how to call it.

    Attributes:
        target: A key of `targets.TARGETS`.
        file: Its name inside the bundle.
        precision: Numbers that the engine computes in (`fp32`).
        opset: ONNX operator set.
        max_batch: Largest batch that was checked and may be asked for.
        inputs: Graph inputs; bank tensors among them when the bank is an input.
        outputs: Graph outputs.
    """

    target: str
    file: str
    precision: str
    opset: int
    max_batch: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        path: Its folder.
        name: The name that it is served under.
        mode: `merged`, `parallel` (one task each) or `multi`.
        bank: `none`, `constants` or `inputs`.
        engine: The engine file.
        tasks: Its tasks in row order.
        backbone: `architecture`, `arguments` and `fingerprint` of the frozen model.
        plan: What was folded, kept parallel or rewritten, and why.
        check: The verdict of the parity check that let it ship.
        versions: Versions of the libraries that made it.
        identity: SHA-256 over everything that decides its answers; also inside the engine file.
    """

    path: Path
    name: str
    mode: str
    bank: str
    engine: Engine
    tasks: tuple[Task, ...]
    backbone: Mapping[str, Any]
    plan: Mapping[str, Any]
    check: Mapping[str, Any]
    versions: Mapping[str, str]
    identity: str

    def task(self, name: str) -> Task:
        """The task of that name.

        Raises:
            UsageError: The bundle has no such task.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        raise UsageError(
            "unknown task",
            where=self.path,
            wanted=f"one of {', '.join(task.name for task in self.tasks)}",
            found=name,
        )

    def open_session(self, *, provider: str = "cpu", threads: int | None = None) -> Session:
        """The engine, open on a provider.

        Raises:
            MissingDependency: The provider cannot be loaded.
            IncompatibleArtefact: The engine cannot be loaded, or is another bundle's.
        """
        session = target(self.engine.target).open_session(
            self.path / self.engine.file,
            provider=provider,
            threads=threads,
            bank=self.read_bank(),
        )
        if session.metadata.get(IDENTITY) != self.identity:
            raise IncompatibleArtefact(
                "the engine belongs to another bundle",
                where=self.path / self.engine.file,
                wanted=f"identity {self.identity}",
                found=f"identity {session.metadata.get(IDENTITY, 'none')}",
                do="copy the bundle again, or export it again",
            )
        return session

    def read_engine(self) -> bytes:
        """The engine file."""
        return (self.path / self.engine.file).read_bytes()

    def read_bank(self) -> dict[str, Any]:
        """The bank's tensors by engine input name; empty unless the bank is an input."""
        if self.bank != "inputs":
            return {}
        from safetensors.numpy import load_file

        return dict(load_file(self.path / BANK))


def identity_of(
    backbone: Mapping[str, Any],
    mode: str,
    bank: str,
    tasks: tuple[Task, ...],
    precision: str,
    inputs: tuple[Tensor, ...] = (),
) -> str:
    """One digest over what decides an engine's answers.

    That is the backbone, the form, and the tasks with their deltas; or, when the bank is an input, the
    engine's `inputs` instead of the tasks, which can then be added without a rebuild.
    """
    facts = {
        "backbone": dict(backbone),
        "mode": mode,
        "bank": bank,
        "precision": precision,
    }
    if bank == "inputs":
        facts["inputs"] = [[t.name, t.dtype, list(t.shape)] for t in inputs]
    else:
        facts["tasks"] = [_task_json(task) for task in tasks]
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()


def write_manifest(folder: Path, bundle: Bundle) -> None:
    """Write `manifest.json` over the files that already stand in `folder`."""
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": digest(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "name": bundle.name,
        "mode": bundle.mode,
        "bank": bundle.bank,
        "engine": asdict(bundle.engine),
        "tasks": [_task_json(task) for task in bundle.tasks],
        "backbone": dict(bundle.backbone),
        "plan": dict(bundle.plan),
        "check": dict(bundle.check),
        "versions": dict(bundle.versions),
        "identity": bundle.identity,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def open_bundle(path: Path) -> Bundle:
    """Read and verify a bundle.

    Raises:
        UsageError: There is no bundle at `path`.
        IncompatibleArtefact: The manifest is malformed or of another version, or a file is missing
            or differs from its digest.
    """
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise UsageError("there is no bundle", where=path, wanted=f"a folder with {MANIFEST}")
    try:
        manifest = json.loads(manifest_path.read_text())
        kind, version = manifest["format"], manifest["version"]
    except (ValueError, KeyError, TypeError) as cause:
        raise IncompatibleArtefact("the manifest is malformed", where=manifest_path) from cause
    if kind != FORMAT or version != VERSION:
        raise IncompatibleArtefact(
            "the bundle has an unknown format or version",
            where=manifest_path,
            wanted=f"{FORMAT} version {VERSION}",
            found=f"{kind} version {version}",
            do="export it again with this version of utune-deploy",
        )
    try:
        files = {str(name): str(facts["sha256"]) for name, facts in manifest["files"].items()}
        bundle = _read(path, manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as cause:
        raise IncompatibleArtefact(
            "the manifest lacks a field", where=manifest_path, found=str(cause)
        ) from cause
    for name in (bundle.engine.file, *files):
        if Path(name).name != name:
            raise IncompatibleArtefact(
                "the manifest names a file outside the bundle", where=manifest_path, found=name
            )
    needed = {bundle.engine.file} | ({BANK} if bundle.bank == "inputs" else set())
    if not needed <= set(files):
        raise IncompatibleArtefact(
            "the manifest does not list every file of the bundle",
            where=manifest_path,
            wanted=sorted(needed),
            found=sorted(files),
        )
    for name, wanted in files.items():
        file = path / name
        if not file.is_file():
            raise IncompatibleArtefact("a file of the bundle is missing", where=file)
        if (found := digest(file)) != wanted:
            raise IncompatibleArtefact(
                "a file of the bundle is not the one that was shipped",
                where=file,
                wanted=f"sha256 {wanted}",
                found=f"sha256 {found}",
                do="copy the bundle again, or export it again",
            )
    stated = identity_of(
        bundle.backbone,
        bundle.mode,
        bundle.bank,
        bundle.tasks,
        bundle.engine.precision,
        bundle.engine.inputs,
    )
    if stated != bundle.identity:
        raise IncompatibleArtefact(
            "the manifest was edited: its identity is not that of its tasks and backbone",
            where=manifest_path,
            wanted=stated,
            found=bundle.identity,
        )
    if bundle.bank == "inputs":
        _require_bank_of(bundle)
    return bundle


def tasks_digest(tasks: tuple[Task, ...]) -> str:
    """SHA-256 over rows, names, labels, preprocessing and deltas."""
    return hashlib.sha256(canonical_json([_task_json(task) for task in tasks]).encode()).hexdigest()


def _require_bank_of(bundle: Bundle) -> None:
    from safetensors import SafetensorError, safe_open

    path = bundle.path / BANK
    try:
        with safe_open(path, framework="np") as file:
            found = (file.metadata() or {}).get(TASKS)
    except (SafetensorError, OSError) as cause:
        raise IncompatibleArtefact("the bank cannot be read", where=path) from cause
    if found != tasks_digest(bundle.tasks):
        raise IncompatibleArtefact(
            "the bank does not hold the tasks that the manifest names",
            where=path,
            wanted=f"tasks {tasks_digest(bundle.tasks)}",
            found=f"tasks {found}",
            do="copy the bundle again, or export it again",
        )


def _read(path: Path, manifest: Mapping[str, Any]) -> Bundle:
    engine = manifest["engine"]
    return Bundle(
        path=path,
        name=manifest["name"],
        mode=manifest["mode"],
        bank=manifest["bank"],
        engine=Engine(
            target=engine["target"],
            file=engine["file"],
            precision=engine["precision"],
            opset=engine["opset"],
            max_batch=engine["max_batch"],
            inputs=_tensors(engine["inputs"]),
            outputs=_tensors(engine["outputs"]),
        ),
        tasks=tuple(
            Task(
                name=task["name"],
                row=task["row"],
                labels=tuple(task["labels"]),
                preprocessing=Preprocessing.from_json(task["preprocessing"], where=path / MANIFEST),
                delta=task["delta"],
            )
            for task in manifest["tasks"]
        ),
        backbone=manifest["backbone"],
        plan=manifest["plan"],
        check=manifest["check"],
        versions=manifest["versions"],
        identity=manifest["identity"],
    )


def _tensors(entries: list[Mapping[str, Any]]) -> tuple[Tensor, ...]:
    return tuple(Tensor(e["name"], e["dtype"], tuple(e["shape"])) for e in entries)


def _task_json(task: Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "row": task.row,
        "labels": list(task.labels),
        "preprocessing": task.preprocessing.to_json(),
        "delta": task.delta,
    }
