"""A bundle: the folder that is shipped. Manifest, engine, labels, preprocessing, plan, verdict.

    bundle/
      manifest.json      what everything is, with the SHA-256 of every other file
      model.onnx         the engine; its metadata carries the bundle's identity
      fan_out.onnx       a second engine that answers every task for every row, where there is one
      bank.safetensors   the tasks' tensors, when the bank is an input of the engine

The manifest is the only file that a reader needs to know; `docs/bundle.md` specifies it. Opening
verifies every digest, so that an engine never runs under another bundle's labels.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..merge.errors import IncompatibleArtefact, UsageError
from ..merge.files import canonical_json, digest
from ..merge.preprocessing import Preprocessing
from .engine import BANK_PREFIX, CPU, TASK, Tensor
from .mapped import map_file
from .targets import target

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .engine import Device, Session

FORMAT = "utune-bundle"
VERSION = 1
MANIFEST = "manifest.json"
BANK = "bank.safetensors"
FAN_OUT = "fan-out"  # the mode of a bundle whose only engine answers every task for every row
FAN_OUT_FILE = "fan_out.onnx"
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
        labels: Class names in the order of the logits; none where the answer is not a class.
        preprocessing: How its pictures become tensors; None where the engine reads none.
        delta: SHA-256 of the delta file it was exported from.
        width: Without labels, the number of values on the last axis of its answer; None with labels.
    """

    name: str
    row: int
    labels: tuple[str, ...]
    preprocessing: Preprocessing | None
    delta: str
    width: int | None = None


@dataclass(frozen=True)
class Engine:
    """The engine file and how to call it.

    Attributes:
        target: A key of `targets.TARGETS`.
        file: Its name inside the bundle.
        precision: Numbers that the engine computes in, a key of `precision.PRECISIONS`.
        opset: ONNX operator set.
        max_batch: Largest batch that was checked and may be asked for.
        inputs: Graph inputs: what a request brings, the task rows, and the bank's tensors when the bank
            is an input.
        outputs: Graph outputs.
    """

    target: str
    file: str
    precision: str
    opset: int
    max_batch: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def reads_bank(self) -> bool:
        """Whether the bank is among its inputs."""
        return any(tensor.name.startswith(BANK_PREFIX) for tensor in self.inputs)

    @property
    def takes_rows(self) -> bool:
        """Whether it wants a bank row for every row."""
        return any(tensor.name == TASK for tensor in self.inputs)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        path: Its folder.
        name: The name that it is served under.
        mode: `merged`, `parallel` (one task each), `multi` or `fan-out`.
        bank: `none`, `constants` or `inputs`.
        engine: The engine file.
        tasks: Its tasks in row order.
        backbone: `architecture`, `arguments` and `fingerprint` of the frozen model.
        plan: What was folded, kept parallel or rewritten, and why.
        check: The verdict of the parity check that let it ship.
        versions: Versions of the libraries that made it.
        identity: SHA-256 over everything that decides its answers; also inside the engine files.
        fan_out: A second engine, which answers every task for every row; None where there is none, and
            in mode `fan-out`, whose `engine` does so.
        digests: SHA-256 of its files by name, which opening it has verified.
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
    fan_out: Engine | None = None
    digests: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def engine_of_all(self) -> Engine | None:
        """The engine that answers every task for every row, if there is one."""
        return self.engine if self.mode == FAN_OUT else self.fan_out

    def require_fan_out(self) -> Engine:
        """The engine that answers every task for every row.

        Raises:
            UsageError: The bundle has none.
        """
        if self.engine_of_all is None:
            raise UsageError(
                "the bundle has no engine that answers every task at once",
                where=self.path,
                wanted="a fan-out engine",
                found=f"mode {self.mode}",
                do="export it again with --fan-out",
            )
        return self.engine_of_all

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

    def open_session(
        self, device: Device = CPU, *, cuda_graph: bool = False, rows: int | None = None
    ) -> Session:
        """The engine, open on a device.

        Args:
            device: Where it runs.
            cuda_graph: See the target.
            rows: Make its bank so many rows long and leave them to be written, instead of reading it all.

        Raises:
            UsageError: The provider does not have what is asked of it.
            MissingDependency: The provider cannot be loaded.
            IncompatibleArtefact: The engine cannot be loaded, or is another bundle's.
        """
        return self._open(self.engine, device, cuda_graph, rows)

    def open_fan_out(self, device: Device = CPU, *, cuda_graph: bool = False) -> Session:
        """The engine that answers every task for every row, open on a device.

        Raises:
            UsageError: The bundle has none, or the provider does not have what is asked of it.
            MissingDependency: The provider cannot be loaded.
            IncompatibleArtefact: The engine cannot be loaded, or is another bundle's.
        """
        return self._open(self.require_fan_out(), device, cuda_graph)

    def _open(
        self, engine: Engine, device: Device, cuda_graph: bool, rows: int | None = None
    ) -> Session:
        bank = None if rows is not None else self.read_bank() if engine.reads_bank else {}
        session = target(engine.target).open_session(
            self.path / engine.file,
            device,
            bank=bank,
            tf32=engine.precision == "tf32",
            cuda_graph=cuda_graph,
            digest=self.digests.get(engine.file),
        )
        if session.metadata.get(IDENTITY) != self.identity:
            raise IncompatibleArtefact(
                "the engine belongs to another bundle",
                where=self.path / engine.file,
                wanted=f"identity {self.identity}",
                found=f"identity {session.metadata.get(IDENTITY, 'none')}",
                do="copy the bundle again, or export it again",
            )
        if rows is not None:
            session.reserve(rows)
        return session

    def read_engine(self) -> bytes:
        """The engine file."""
        return (self.path / self.engine.file).read_bytes()

    def read_bank(self) -> dict[str, Any]:
        """The bank's tensors by engine input name, mapped from its file; empty unless the bank is an input."""
        return map_file(self.path / BANK)[1] if self.bank == "inputs" else {}


def identity_of(
    backbone: Mapping[str, Any],
    mode: str,
    bank: str,
    tasks: tuple[Task, ...],
    precision: str,
    inputs: tuple[Tensor, ...] = (),
    fan_out: Engine | None = None,
    numerics: Mapping[str, Any] | None = None,
) -> str:
    """One digest over what decides an engine's answers.

    That is the backbone, the form, and the tasks with their deltas; or, when the bank is an input, the
    engine's `inputs` instead of the tasks, which can then be added without a rebuild. A second engine
    adds its precision, inputs and outputs; the tasks too, unless it reads the bank as well. Nodes that were kept
    in float32 and the calibration of a quantised engine (`numerics`, from the plan) count where there are any.
    """
    facts: dict[str, Any] = {
        "backbone": dict(backbone),
        "mode": mode,
        "bank": bank,
        "precision": precision,
    }
    if bank == "inputs":
        facts["inputs"] = _shapes(inputs)
    if bank != "inputs" or (fan_out is not None and not fan_out.reads_bank):
        facts["tasks"] = [task_json(task) for task in tasks]
    if fan_out is not None:
        facts["fan_out"] = {
            "precision": fan_out.precision,
            "inputs": _shapes(fan_out.inputs),
            "outputs": _shapes(fan_out.outputs),
        }
    if numerics:
        facts["numerics"] = dict(numerics)
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
        "engine": _engine_json(bundle.engine),
        **({} if bundle.fan_out is None else {"fan_out": _engine_json(bundle.fan_out)}),
        "tasks": [task_json(task) for task in bundle.tasks],
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
        bundle = _read(path, manifest, files)
    except (ValueError, KeyError, TypeError, AttributeError) as cause:
        raise IncompatibleArtefact(
            "the manifest lacks a field", where=manifest_path, found=str(cause)
        ) from cause
    engines = {engine.file for engine in (bundle.engine, bundle.fan_out) if engine is not None}
    for name in (*engines, *files):
        if Path(name).name != name:
            raise IncompatibleArtefact(
                "the manifest names a file outside the bundle", where=manifest_path, found=name
            )
    needed = engines | ({BANK} if bundle.bank == "inputs" else set())
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
        bundle.fan_out,
        bundle.plan.get("numerics"),
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
    _require_one_kind(bundle)
    return bundle


def tasks_digest(tasks: tuple[Task, ...]) -> str:
    """SHA-256 over rows, names, labels, preprocessing and deltas."""
    return hashlib.sha256(canonical_json([task_json(task) for task in tasks]).encode()).hexdigest()


def _require_bank_of(bundle: Bundle) -> None:
    path = bundle.path / BANK
    found = map_file(path)[0].get(TASKS)
    if found != tasks_digest(bundle.tasks):
        raise IncompatibleArtefact(
            "the bank does not hold the tasks that the manifest names",
            where=path,
            wanted=f"tasks {tasks_digest(bundle.tasks)}",
            found=f"tasks {found}",
            do="copy the bundle again, or export it again",
        )


def _require_one_kind(bundle: Bundle) -> None:
    """Hold the tasks to labels for all of them or for none."""
    without = [task.name for task in bundle.tasks if not task.labels]
    if 0 < len(without) < len(bundle.tasks):
        raise IncompatibleArtefact(
            "some tasks of the bundle have labels and others have none",
            where=bundle.path / MANIFEST,
            wanted="labels for all of them or for none",
            found=f"none for {', '.join(without)}",
            do="export them into two bundles",
        )


def _read(path: Path, manifest: Mapping[str, Any], digests: Mapping[str, str]) -> Bundle:
    return Bundle(
        path=path,
        name=manifest["name"],
        mode=manifest["mode"],
        bank=manifest["bank"],
        engine=_engine(manifest["engine"]),
        tasks=tuple(task_from_json(task, where=path / MANIFEST) for task in manifest["tasks"]),
        backbone=manifest["backbone"],
        plan=manifest["plan"],
        check=manifest["check"],
        versions=manifest["versions"],
        identity=manifest["identity"],
        fan_out=_engine(manifest["fan_out"]) if "fan_out" in manifest else None,
        digests=digests,
    )


def _engine(entry: Mapping[str, Any]) -> Engine:
    return Engine(
        target=entry["target"],
        file=entry["file"],
        precision=entry["precision"],
        opset=entry["opset"],
        max_batch=entry["max_batch"],
        inputs=_tensors(entry["inputs"]),
        outputs=_tensors(entry["outputs"]),
    )


def _engine_json(engine: Engine) -> dict[str, Any]:
    """Its fields; a tensor that states no `high` has none."""
    entry = asdict(engine)
    for tensor in (*entry["inputs"], *entry["outputs"]):
        if tensor["high"] is None:
            del tensor["high"]
    return entry


def _tensors(entries: list[Mapping[str, Any]]) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(
            e["name"],
            e["dtype"],
            tuple(e["shape"]),
            None if e.get("high") is None else _size(e, "high"),
        )
        for e in entries
    )


def _size(entry: Mapping[str, Any], field: str) -> int:
    """A field that counts something.

    Raises:
        KeyError: It is missing.
        ValueError: It is not a whole number of at least 1.
    """
    value = entry[field]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{field} of {entry['name']}: wanted a whole number of at least 1, not {value!r}"
        )
    return value


def _shapes(tensors: tuple[Tensor, ...]) -> list[list[Any]]:
    return [[t.name, t.dtype, list(t.shape)] for t in tensors]


def task_from_json(entry: Mapping[str, Any], *, where: object) -> Task:
    """The task that `task_json` wrote.

    Raises:
        KeyError: A field is missing.
        ValueError: A field is not what it should be.
        IncompatibleArtefact: The preprocessing is not one that is known.
    """
    preprocessing = entry["preprocessing"]
    if preprocessing is not None:
        preprocessing = Preprocessing.from_json(preprocessing, where=where)
    return Task(
        name=entry["name"],
        row=entry["row"],
        labels=tuple(entry["labels"]),
        preprocessing=preprocessing,
        delta=entry["delta"],
        width=None if entry["labels"] else _size(entry, "width"),
    )


def task_json(task: Task) -> dict[str, Any]:
    """What a manifest says of a task."""
    return {
        "name": task.name,
        "row": task.row,
        "labels": list(task.labels),
        **({} if task.labels else {"width": task.width}),
        "preprocessing": None if task.preprocessing is None else task.preprocessing.to_json(),
        "delta": task.delta,
    }
