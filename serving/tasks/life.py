"""The life of a bundle's tasks while they are served: added, updated, rolled back, pinned, removed.

A change is decided in three steps, so that nothing is visible that was not held to the engine first:

    stage      a packed task becomes a version that no request can name yet
    probe      rows with known answers are asked of it, beside everything else that the engine does
    publish    the table of current versions is replaced as a whole, between two batches

Requests under way keep the version that they were checked with.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from ...export.bundle import task_json
from ...export.engine import BANK_PREFIX
from ...export.parity import compare
from ...merge.errors import CheckFailed, IncompatibleArtefact, UsageError
from .packed import Packed, layout_json, read_packed
from .store import Kept, Store
from .versions import Version

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from ...export.bundle import Bundle
    from ..answers import Answers
    from ..registry import Registry, Request

CHANGES = ("add", "update", "remove", "rollback")
KEPT_VERSIONS = 4
"""Of a task; the oldest that is not in use makes room for the next."""


@dataclass(frozen=True)
class Staged:
    """A version that is not visible yet.

    Attributes:
        version: It.
        file: Where the store keeps it.
        packed: What was sent.
    """

    version: Version
    file: str
    packed: Packed


@dataclass(frozen=True)
class Listed:
    """A task as it stands.

    Attributes:
        name: Its name.
        current: The number of the version in use.
        pinned: Whether it stays in the engine's memory.
        versions: Those that are kept, by number.
        files: The packed file of each in the store; of one that the bundle shipped there is none.
    """

    name: str
    current: int
    pinned: bool
    versions: Mapping[int, Version]
    files: Mapping[int, str]


@dataclass(frozen=True)
class _Life:
    """Every version of one task that is kept."""

    versions: Mapping[int, Version]
    files: Mapping[int, str]
    current: int  # 0: removed
    counted: int
    pinned: bool = False


class Rows(Protocol):
    """What the life of tasks wants of a bank: a `Resident`, or whoever keeps tasks for other engines."""

    def __contains__(self, version: Version) -> bool:
        """Whether the version stands in a row."""
        ...

    def pin(self, version: Version, *, pinned: bool = True) -> None:
        """See `Resident.pin`."""
        ...

    def drop(self, version: Version) -> None:
        """See `Resident.drop`."""
        ...


class Tasks:
    """Which tasks there are, in which versions. Safe to call from several threads.

    Attributes:
        store: Where those are kept that came while running.
        changes: Changes made so far, by `add`, `update`, `remove` and `rollback`.
    """

    def __init__(self, registry: Registry, resident: Rows, store: Store) -> None:
        """Take up what the store kept for the registry's bundle.

        Raises:
            IncompatibleArtefact: The store is another bundle's, or one of its files is damaged.
        """
        self.store = store
        self.changes: dict[str, int] = dict.fromkeys(CHANGES, 0)
        self._registry = registry
        self._resident = resident
        self._lock = threading.RLock()
        # Also of versions that no table names: a request under way may ask for them, a staged one will.
        self._files: WeakKeyDictionary[Version, str] = WeakKeyDictionary()
        # Replaced as a whole: who only looks waits for no change that is being written down.
        self._lives: dict[str, _Life] = {
            name: _Life({1: version}, {}, current=1, counted=1)
            for name, version in registry.versions.items()
        }
        for name, kept in store.read().items():
            self._take_up(name, kept)
        self._show()

    def entries(self, name: str | None = None) -> list[dict[str, Any]]:
        """What there is to say of every task, or of one, as JSON values.

        Raises:
            UsageError: There is no such task.
        """
        if name is not None:
            return [self._entry(self._living(name))]
        return [self._entry(life) for life in self._lives.values() if life.current]

    def numbers(self, name: str) -> list[int]:
        """The versions of a task that are kept; none of an unknown one."""
        life = self._lives.get(name)
        return sorted(life.versions) if life is not None else []

    def version(self, name: str, number: int) -> Version:
        """A version of a task, in use or not.

        Raises:
            UsageError: There is none.
        """
        life = self._living(name)
        if number not in life.versions:
            raise UsageError(
                "the task has no such version",
                where=name,
                wanted=f"one of {', '.join(map(str, life.versions))}",
                found=number,
            )
        return life.versions[number]

    def stage(self, data: bytes, *, update: bool) -> Staged:
        """Hold a packed task to what the engine takes, and keep it.

        Args:
            data: The file.
            update: Whether it is to replace a task that is there; otherwise it must be a new one.

        Raises:
            UsageError: A task of that name is there already, or is not.
            IncompatibleArtefact: It was laid out for another bundle, or its tensors are not what the engine reads.
        """
        packed = read_packed(data)
        name = packed.task.name
        self._require_fits(packed)
        with self._lock:
            self._require_name(name, update=update)
            life = self._lives.get(name)
            return self._staged(packed, data, 1 if life is None else life.counted + 1)

    def hold(self, data: bytes, number: int) -> Staged:
        """A packed task as a version that somebody else numbers and publishes: one keeper for many engines.

        Raises:
            IncompatibleArtefact: As of `stage`.
        """
        packed = read_packed(data)
        self._require_fits(packed)
        with self._lock:
            return self._staged(packed, data, number)

    def _staged(self, packed: Packed, data: bytes, number: int) -> Staged:
        file = self.store.put(data)
        return Staged(self._read_from(file, packed, number), file, packed)

    def listed(self) -> list[Listed]:
        """Every task that can be asked for, with all its versions."""
        with self._lock:
            return [
                Listed(name, life.current, life.pinned, dict(life.versions), dict(life.files))
                for name, life in self._lives.items()
                if life.current
            ]

    def probe(self, staged: Staged) -> Request:
        """The request that the version is held to."""
        probe = staged.packed.probe
        rows = self._registry.draw() if probe is None else probe.inputs
        return self._registry.check_version(rows, staged.version)

    def require_right(self, staged: Staged, answers: Answers) -> None:
        """Hold the engine's answers to what the sender's torch gave.

        Answers that are not finite are the service's to refuse.

        Raises:
            CheckFailed: They differ.
        """
        probe = staged.packed.probe
        if probe is None:
            return
        task = staged.version.task
        own = answers.logits[..., : len(task.labels) or task.width]
        result = compare("probe", own, probe.logits, probe.budget)
        if not result.passed:
            raise CheckFailed(
                "the engine does not answer as the task does in torch, so it was not added",
                where=f"task {staged.version.name}",
                wanted=f"a relative error of at most {probe.budget:.2g}",
                found=f"{result.error:.2g}, {result.flips} of {result.rows} best classes differ",
                do="pack it again from its delta; if that does not help, report this with both",
            )

    def publish(self, staged: Staged, *, update: bool) -> None:
        """Let requests name the version from now on.

        Raises:
            UsageError: Another change of this task came first.
        """
        version, name = staged.version, staged.version.name
        with self._lock:
            self._require_name(name, update=update)
            life = self._lives.get(name) or _Life({}, {}, current=0, counted=0)
            if version.number != life.counted + 1 or version not in self._files:
                raise UsageError("the task was changed by somebody else meanwhile", where=name)
            versions = {**life.versions, version.number: version}
            kept = sorted(versions)[-KEPT_VERSIONS:]  # the newest, which is in use, among them
            files = {**life.files, version.number: staged.file}
            with self._pin_moved(life, version):
                self._settle(
                    "update" if update else "add",
                    name,
                    replace(
                        life,
                        versions={number: versions[number] for number in kept},
                        files={number: files[number] for number in kept if number in files},
                        current=version.number,
                        counted=version.number,
                    ),
                )
            for number in versions.keys() - kept:
                self._resident.drop(versions[number])

    def discard(self, staged: Staged) -> None:
        """Give back what a version took that is not to be published; one that was stays."""
        version = staged.version
        with self._lock:
            life = self._lives.get(version.name)
            if life is not None and life.versions.get(version.number) is version:
                return
            self._files.pop(version, None)
            self._resident.drop(version)
            self._write(self._lives)

    def remove(self, name: str) -> None:
        """Refuse the task from now on; requests under way are answered.

        Raises:
            UsageError: There is no such task, or it is the last.
        """
        with self._lock:
            life = self._living(name)
            if len(self._registry.versions) == 1:
                raise UsageError(
                    "the last task cannot be removed", where=name, do="add another one first"
                )
            self._settle("remove", name, _Life({}, {}, current=0, counted=life.counted))
            for version in life.versions.values():
                self._resident.drop(version)

    def use(self, name: str, number: int) -> None:
        """Answer with another version of the task from now on.

        Raises:
            UsageError: There is no such task or version.
        """
        with self._lock:
            life = self._living(name)
            with self._pin_moved(life, self.version(name, number)):
                self._settle("rollback", name, replace(life, current=number))

    def pin(self, name: str, *, pinned: bool = True) -> None:
        """Keep the task's version in use in the engine's memory, or let it make room again.

        Raises:
            UsageError: There is no such task, or too many are pinned.
        """
        with self._lock:
            life = self._living(name)
            self._resident.pin(life.versions[life.current], pinned=pinned)
            lives = {**self._lives, name: replace(life, pinned=pinned)}
            self._write(lives)
            self._lives = lives

    def _settle(self, change: str, name: str, life: _Life) -> None:
        """Write the table with this life in it down, then show it to requests."""
        lives = {**self._lives, name: life}
        self._write(lives)
        self._lives = lives
        self._show()
        self.changes[change] += 1

    @contextmanager
    def _pin_moved(self, life: _Life, version: Version) -> Iterator[None]:
        """The pin of a pinned task stands on this version, unless the block fails."""
        before = life.versions.get(life.current)
        if not life.pinned or before in (None, version):
            yield
            return
        self._resident.pin(before, pinned=False)
        try:
            self._resident.pin(version)
            yield
        except BaseException:
            self._resident.pin(version, pinned=False)
            self._resident.pin(before)
            raise

    def _read_from(self, file: str, packed: Packed, number: int) -> Version:
        """The version of a kept file, which stays as long as anybody holds the version."""
        version = Version(packed.task, number, read=partial(_bank_of, self.store, file))
        self._files[version] = file
        return version

    def _show(self) -> None:
        self._registry.versions = {
            name: life.versions[life.current] for name, life in self._lives.items() if life.current
        }

    def _write(self, lives: Mapping[str, _Life]) -> None:
        """Write down what differs from the bundle alone."""
        kept = {
            name: Kept(
                life.files,
                life.current,
                life.pinned,
                life.counted,
                shipped=bool(life.versions.keys() - life.files),
            )
            for name, life in lives.items()
            if life.files or not life.current or life.pinned
        }
        self.store.write(kept, set(self._files.values()))

    def _take_up(self, name: str, kept: Kept) -> None:
        """A task as the store has it.

        Raises:
            IncompatibleArtefact: A file is damaged, or is not the task's.
        """
        shipped = self._lives.get(name)
        versions = dict(shipped.versions) if shipped is not None and kept.shipped else {}
        for number, file in sorted(kept.files.items()):
            where = self.store.folder / file
            try:
                packed = read_packed(where.read_bytes(), where=where)
            except OSError as cause:
                raise IncompatibleArtefact(
                    "a kept task is missing", where=where, do="remove the folder of kept tasks"
                ) from cause
            self._require_fits(packed, where=where)
            versions[number] = self._read_from(file, packed, number)
        if kept.current and kept.current not in versions:
            raise IncompatibleArtefact(
                "the table of tasks names a version that is not kept",
                where=self.store.folder,
                found=f"version {kept.current} of {name}",
            )
        self._lives[name] = _Life(
            versions, dict(kept.files), kept.current, kept.counted, kept.pinned
        )
        if kept.current and kept.pinned:
            self._resident.pin(versions[kept.current])

    def _require_fits(self, packed: Packed, *, where: object = None) -> None:
        """Refuse what the engine cannot take.

        Raises:
            IncompatibleArtefact: Another backbone or bundle, or tensors of other shapes, or not finite.
        """
        bundle, task = self._registry.bundle, packed.task
        where = where or f"task {task.name}"
        fingerprint = bundle.backbone.get("fingerprint")
        if packed.fingerprint != fingerprint:
            raise IncompatibleArtefact(
                "the task belongs to another backbone",
                where=where,
                wanted=f"fingerprint {str(fingerprint)[:16]}",
                found=f"fingerprint {packed.fingerprint[:16]}",
            )
        if packed.identity != bundle.identity:
            raise IncompatibleArtefact(
                "the task was laid out for another bundle of this backbone",
                where=where,
                wanted=f"identity {bundle.identity[:16]}",
                found=f"identity {packed.identity[:16]}",
                do="pack its delta for this server: utune-deploy task add does it",
            )
        self._registry.require_answers(task, where=where)
        _require_tensors(bundle, packed.tensors, where=where)

    def _require_name(self, name: str, *, update: bool) -> None:
        there = name in self._registry.versions
        if there and not update:
            raise UsageError(
                "a task of that name is there already",
                found=name,
                do="update it (utune-deploy task update), or choose another name",
            )
        if update and not there:
            raise UsageError(
                "there is no task of that name to update",
                found=name,
                do="add it (utune-deploy task add)",
            )

    def _living(self, name: str) -> _Life:
        life = self._lives.get(name)
        if life is None or not life.current:
            raise UsageError(
                "unknown task",
                wanted=f"one of {self._registry.some_names}",
                found=name,
            )
        return life

    def _entry(self, life: _Life) -> dict[str, Any]:
        version = life.versions[life.current]
        return entry(
            version,
            sorted(life.versions),
            resident=version in self._resident,
            pinned=life.pinned,
        )


def entry(
    version: Version, numbers: Sequence[int], *, resident: bool = True, pinned: bool = True
) -> dict[str, Any]:
    """What there is to say of a task, as JSON values: the version in use, and those that are kept."""
    facts = task_json(version.task)
    return {
        "name": version.name,
        "version": version.number,
        "versions": list(numbers),
        "labels": facts["labels"],
        "width": facts.get("width"),
        "preprocessing": facts["preprocessing"],
        "delta": facts["delta"],
        "resident": resident,
        "pinned": pinned,
    }


def fixed(bundle: Bundle) -> str | None:
    """Why the tasks of a bundle cannot change while it is served; None where they can."""
    if bundle.bank != "inputs":
        return "its tasks are constants of the engine"
    if bundle.engine_of_all is not None:
        return "its engine of all tasks holds them as constants"
    if bundle.engine.target != "onnxruntime":
        return f"its target, {bundle.engine.target}, writes no single rows"
    return None


def refusal_to_change(bundle: Bundle) -> UsageError:
    """What somebody is told who would change tasks that stay."""
    return UsageError(
        "the tasks of this bundle cannot change while it is served",
        where=bundle.path,
        found=fixed(bundle) or "a service that was opened without a store",
        do="export it with --bank inputs",
    )


def description(bundle: Bundle) -> dict[str, Any]:
    """What a sender must know to lay a task out for a served bundle, as JSON values.

    `fixed` says why its tasks cannot change, or is None; the others are those of `packed.layout_json`.
    """
    return {**layout_json(bundle), "fixed": fixed(bundle)}


def _bank_of(store: Store, file: str) -> dict[str, NDArray[Any]]:
    return {n: t for n, t in store.map(file).items() if n.startswith(BANK_PREFIX)}


def _require_tensors(bundle: Bundle, tensors: Mapping[str, NDArray[Any]], *, where: object) -> None:
    """Refuse a row that is not as the engine's inputs are, or holds what is not finite.

    Raises:
        IncompatibleArtefact: The first tensor that is wrong.
    """
    wanted = {t.name: t for t in bundle.engine.inputs if t.name.startswith(BANK_PREFIX)}
    if set(wanted) != set(tensors):
        raise IncompatibleArtefact(
            "the packed task does not hold the tensors that the engine reads",
            where=where,
            found=f"not in both: {', '.join(sorted(set(wanted) ^ set(tensors))[:4])}",
        )
    for name, value in tensors.items():
        shape = wanted[name].shape[1:]
        if value.shape != shape or value.dtype.name != wanted[name].dtype:
            raise IncompatibleArtefact(
                "a tensor is not as the engine reads it",
                where=f"{where}: {name}",
                wanted=f"{wanted[name].dtype} {list(shape)}",
                found=f"{value.dtype.name} {list(value.shape)}",
            )
        if not np.isfinite(value).all():
            raise IncompatibleArtefact(
                "a tensor holds a value that is not finite",
                where=f"{where}: {name}",
                found=f"{int((~np.isfinite(value)).sum())} NaN or infinite values",
            )
