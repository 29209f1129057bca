"""The keeper: the one process that knows which tasks there are, in which versions.

A change is staged on every replica and held to every engine; only when all of them have agreed does the table
change that the fronts read, and with it what requests can name. One replica that refuses refuses for all. The
folder of `--tasks` is the keeper's alone: replicas are handed what they need.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....export.bundle import open_bundle, task_json
from ....merge.errors import IncompatibleArtefact, UtuneError
from ...registry import Registry
from ...rejections import EngineFailed, Stopping, UnknownModel
from ...tasks.claim import claim
from ...tasks.life import Tasks, fixed, refusal_to_change
from ...tasks.store import Store
from .library import ray as load_ray
from .library import serve as load_serve
from .messages import Key, Refusal, Table, TaskRow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...tasks.versions import Version

POLL_SECONDS = 5.0
"""How long a front waits for another table before it asks again."""
SILENT_SECONDS = 30.0
"""After which a front that does not ask is taken to be gone."""
SEEN_SECONDS = 2.0
"""How long a change waits for the other fronts to have seen it."""
ANSWER_SECONDS = 120
"""How long a replica may take over a step of a change: one that hangs must not stop all changes."""
DEPLOYMENT = "replica"


class _NoRows:
    """Where the tasks are kept nothing runs: pins and rows are the replicas' own."""

    def __contains__(self, version: Version) -> bool:
        return False

    def pin(self, version: Version, *, pinned: bool = True) -> None:
        """Nothing to pin."""

    def drop(self, version: Version) -> None:
        """Nothing to give back."""


class Keeper:
    """See the module. A Ray actor; its methods run in one event loop."""

    def __init__(self, path: str, identity: str, keep: str | None, application: str) -> None:
        """Read what was kept.

        Args:
            path: The bundle's folder on this machine.
            identity: The bundle that it must be.
            keep: Folder of the tasks that come while running; None forgets them at the end.
            application: Ray Serve's name of the replicas.

        Raises:
            UtuneError: The folders cannot be read.
        """
        bundle = open_bundle(Path(path))
        if bundle.identity != identity:
            raise IncompatibleArtefact(
                "the machine of the keeper has another bundle there", where=path
            )
        self._identity = identity
        self._registry = Registry(bundle)
        self._application = application
        self._handle: Any = None
        self._tasks: Tasks | None = None
        if fixed(bundle) is None and self._registry.takes_rows:
            folder = None if keep is None else Path(keep)
            self._claim = None if folder is None else claim(folder)  # gone with this process
            store = Store(folder, bundle.identity)
            self._tasks = Tasks(self._registry, _NoRows(), store)
        self._epoch = time.time_ns() // 1_000_000  # a keeper that restarts counts on
        self._changed = asyncio.Condition()
        self._change = asyncio.Lock()
        self._fronts: dict[str, tuple[int, float]] = {}  # the epoch that each has seen, and when

    async def identity(self) -> str:
        """Of the bundle."""
        return self._identity

    async def table(self, front: str, seen: int) -> Table:
        """The table, as soon as it is another one than the front has seen, or after a while."""
        self._fronts[front] = (seen, time.monotonic())
        async with self._changed:
            self._changed.notify_all()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: self._epoch != seen), POLL_SECONDS
                )
        return self._table()

    async def leave(self, front: str) -> int:
        """Take a front off the list; how many are left."""
        self._fronts.pop(front, None)
        return len(self._listening())

    async def snapshot(self) -> list[tuple[Key, bytes | None, bool]]:
        """Every version, with its file unless the bundle shipped it, and whether it is pinned."""
        if self._tasks is None:
            return []
        return [
            (
                key,
                await asyncio.to_thread(self._read, key) if key.file else None,
                row.pinned and key.number == row.current,
            )
            for row in self._rows()
            for key, _ in row.versions
        ]

    async def packed(self, key: Key) -> bytes | Refusal:
        """The file of a version."""
        try:
            return await asyncio.to_thread(self._read, key)
        except OSError:
            return Refusal.of(UnknownModel("the version is no longer kept", where=key.name))

    async def change(
        self, front: str, action: str, name: str | None, number: int | None, data: bytes | None
    ) -> tuple[str, Table] | Refusal:
        """Carry out a change of the tasks.

        Args:
            front: Who asks.
            action: `add`, `update`, `remove`, `use`, `pin` or `unpin`.
            name: The task, but for `add` and `update`.
            number: The version, for `use`.
            data: The packed task, for `add` and `update`.

        Returns:
            The task's name and the table with the change, once every front has it that listens; or why not.
        """
        try:
            async with self._change:
                if action in ("add", "update"):
                    assert data is not None
                    name = await self._add(data, update=action == "update")
                else:
                    assert name is not None
                    await self._other(action, name, number)
                await self._show()
            await self._seen_by_all(front)
            return name, self._table()
        except UtuneError as error:
            return Refusal.of(error)

    async def resident(self) -> list[Key]:
        """The versions that stand in the bank of any replica."""
        held = await self._on_all("resident", strict=False)
        return list({key for keys in held for key in keys})

    async def close(self) -> None:
        """Forget the tasks that were not to be kept."""
        if self._tasks is not None:
            self._tasks.store.close()

    async def _add(self, data: bytes, *, update: bool) -> str:
        tasks = self._require_tasks()
        staged = await asyncio.to_thread(tasks.stage, data, update=update)
        key = Key(staged.version.name, staged.version.number, staged.file)
        try:
            await self._on_all("stage", key, data)
            await asyncio.to_thread(tasks.publish, staged, update=update)
        except BaseException:
            await asyncio.shield(self._on_all("forget", [key], strict=False))
            tasks.discard(staged)
            raise
        return staged.version.name

    async def _other(self, action: str, name: str, number: int | None) -> None:
        tasks = self._require_tasks()
        if action == "remove":
            await asyncio.to_thread(tasks.remove, name)
        elif action == "use":
            assert number is not None
            await asyncio.to_thread(tasks.use, name, number)
        else:
            tasks.entries(name)  # refuses a task that is not there
            pinned = action == "pin"
            (key,) = (self._current(row) for row in self._rows() if row.name == name)
            try:
                await self._on_all("pin", key, pinned)
            except BaseException:
                if pinned and not self._is_pinned(name):
                    await asyncio.shield(self._on_all("pin", key, False, strict=False))
                raise
            await asyncio.to_thread(tasks.pin, name, pinned=pinned)

    async def _show(self) -> None:
        """Let the replicas settle on the new table, then let the fronts read it."""
        rows = self._rows()
        live = [key for row in rows for key, _ in row.versions]
        pinned = [self._current(row) for row in rows if row.pinned]
        await self._on_all("settle", live, pinned, strict=False)
        async with self._changed:
            self._epoch += 1
            self._changed.notify_all()

    async def _seen_by_all(self, but: str) -> None:
        """Wait until the other fronts ask with this table in hand; not for one that hangs."""

        def seen() -> bool:
            return all(epoch >= wanted for name, epoch in self._listening().items() if name != but)

        wanted = self._epoch
        async with self._changed:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(seen), SEEN_SECONDS)

    async def _on_all(self, method: str, *given: Any, strict: bool = True) -> list[Any]:
        """What every replica says; those that died meanwhile are left out, for they answer nobody.

        Raises:
            UtuneError: One refuses, if `strict`.
        """
        exceptions = load_ray().exceptions
        if self._handle is None:  # each handle has a router of its own, which stays
            self._handle = load_serve().get_deployment_handle(DEPLOYMENT, self._application)
        try:
            said = await self._handle.broadcast(method, *given).results_async(
                timeout_s=ANSWER_SECONDS, return_exceptions=True
            )
        except Exception as cause:
            if not strict:
                return []
            if isinstance(cause, (TimeoutError, asyncio.TimeoutError)):
                raise EngineFailed(
                    "not every replica answered", wanted=f"an answer in {ANSWER_SECONDS} s"
                ) from cause
            raise Stopping("no replica is there to hold the task to", found=str(cause)) from cause
        answers = []
        for each in said:
            if isinstance(each, Refusal):
                if strict:
                    raise each.error()
            elif isinstance(each, exceptions.RayActorError):
                continue
            elif isinstance(each, BaseException):
                if strict:
                    raise EngineFailed(
                        "a replica failed by a mistake of its own", found=last_line(each)
                    ) from each
            else:
                answers.append(each)
        if strict and not answers:
            raise Stopping("no replica is there to hold the task to")
        return answers

    def _read(self, key: Key) -> bytes:
        return (self._require_tasks().store.folder / key.file).read_bytes()

    def _table(self) -> Table:
        return Table(self._epoch, tuple(self._rows()), self._tasks is not None)

    def _rows(self) -> Sequence[TaskRow]:
        if self._tasks is None:
            return [
                TaskRow(name, 1, True, ((Key(name, 1), task_json(version.task)),))
                for name, version in self._registry.versions.items()
            ]
        return [
            TaskRow(
                listed.name,
                listed.current,
                listed.pinned,
                tuple(
                    (
                        Key(listed.name, number, listed.files.get(number, "")),
                        task_json(version.task),
                    )
                    for number, version in sorted(listed.versions.items())
                ),
            )
            for listed in self._tasks.listed()
        ]

    @staticmethod
    def _current(row: TaskRow) -> Key:
        return next(key for key, _ in row.versions if key.number == row.current)

    def _is_pinned(self, name: str) -> bool:
        return any(row.pinned for row in self._rows() if row.name == name)

    def _listening(self) -> dict[str, int]:
        """The fronts that asked lately, with the epoch that each has seen."""
        now = time.monotonic()
        return {f: seen for f, (seen, at) in self._fronts.items() if now - at < SILENT_SECONDS}

    def _require_tasks(self) -> Tasks:
        if self._tasks is None:
            raise refusal_to_change(self._registry.bundle)
        return self._tasks


def last_line(error: BaseException) -> str:
    """The last line of an error of Ray's, which holds the remote one; the lines before are its traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else repr(error)
