"""What stands behind a front: it reads requests as the embedded server does, and asks a replica for the answers.

Requests are checked here, against a table that the keeper sends, and name versions, not just tasks: a replica
answers with exactly those. Asking twice does no harm, so a request whose replica dies is asked again elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

from ....export.bundle import task_from_json
from ....merge.errors import UsageError
from ...answers import Answers
from ...registry import Registry
from ...rejections import EngineFailed, Expired, Overloaded, ServerFailed, Stopping
from ...tasks.commands import TaskCommands, require_called
from ...tasks.life import description, entry
from ...tasks.versions import Version
from ...watching.counters import Counters
from .keeper import last_line
from .library import ray as load_ray
from .library import serve as load_serve
from .messages import Ask, Key, Refusal, Reply

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ....export.bundle import Bundle
    from ...queueing.batcher import Batcher
    from ...registry import Request
    from .messages import Table, TaskRow

log = logging.getLogger(__name__)

ATTEMPTS = 5
"""Replicas that one request may outlive, less one."""
PAUSE_SECONDS = 0.05
"""Before the second attempt; twice that before the third, and so on."""
PATIENCE_SECONDS = 120
"""How long a request without a limit of its own waits for a cluster that does not answer."""
RETRY_SECONDS = 1.0
"""Before a keeper that does not answer is asked again."""


class TaskTable:
    """The keeper's table, as a front reads it."""

    def __init__(self, registry: Registry) -> None:
        """Of the registry whose tasks it decides."""
        self.epoch = 0
        self.changeable = False
        self.keys: WeakKeyDictionary[Version, Key] = WeakKeyDictionary()
        self._registry = registry
        self._rows: dict[str, TaskRow] = {}
        self._versions: dict[Key, Version] = {}

    def read(self, table: Table) -> set[str]:
        """Take up a table, unless a newer one is here; the tasks that are no more."""
        if table.epoch <= self.epoch:
            return set()
        versions: dict[Key, Version] = {}
        current: dict[str, Version] = {}
        for row in table.tasks:
            for key, facts in row.versions:
                known = self._versions.get(key)
                if known is None:  # else the same object: requests under way hold it
                    known = Version(task_from_json(facts, where=key.name), key.number)
                versions[key] = known
                self.keys[known] = key
                if key.number == row.current:
                    current[row.name] = known
        gone = set(self._rows) - set(current)
        self._rows = {row.name: row for row in table.tasks}
        self._versions = versions
        self._registry.versions = current
        self.changeable = table.changeable
        self.epoch = table.epoch
        return gone

    def numbers(self, name: str) -> list[int]:
        """See `Tasks.numbers`."""
        row = self._rows.get(name)
        return [key.number for key, _ in row.versions] if row is not None else []

    def version(self, name: str, number: int) -> Version:
        """See `Tasks.version`."""
        row = self._rows.get(name)
        for key, _ in row.versions if row is not None else ():
            if key.number == number:
                return self._versions[key]
        raise UsageError("the task has no such version", where=name, found=number)

    def entries(self, resident: set[Key], name: str | None = None) -> list[dict[str, Any]]:
        """See `Tasks.entries`; resident is a version that any replica has in its bank."""
        if name is not None and name not in self._rows:
            raise UsageError("unknown task", wanted=self._registry.some_names, found=name)
        entries = []
        for row in [self._rows[name]] if name is not None else self._rows.values():
            key = next(key for key, _ in row.versions if key.number == row.current)
            entries.append(
                entry(
                    self._versions[key],
                    self.numbers(row.name),
                    resident=key in resident,
                    pinned=row.pinned,
                )
            )
        return entries


class Cluster:
    """What there is to know of the service that the replicas carry: an `Answerer`."""

    def __init__(self, bundle: Bundle, *, all_tasks: bool = False) -> None:
        """Of a bundle, one task per row or every task for every row."""
        self.registry = Registry(bundle, all_tasks=all_tasks)
        self.counters = Counters(self.registry.names)
        self.table = TaskTable(self.registry)

    @property
    def tasks(self) -> TaskTable | None:
        """See `Answerer.tasks`."""
        return self.table if self.table.changeable else None

    def description(self) -> dict[str, Any]:
        """See `Service.description`."""
        return description(self.registry.bundle)


class Front:
    """Asks replicas: what models take for a batcher. Entered before the first request, left when drained."""

    def __init__(self, service: Cluster, handle: Any, keeper: Any) -> None:
        """Over handles of the replicas and of the keeper."""
        self.service = service
        self.name = uuid.uuid4().hex
        self.keeper = keeper
        self._handle = handle
        self._stopping = True
        self._requests = 0
        self._rows = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._listening: asyncio.Task[None] | None = None
        exceptions = load_ray().exceptions
        # What a request dies of when its replica, its machine or the way there does.
        self._deaths = (
            exceptions.RayActorError,
            exceptions.NodeDiedError,
            exceptions.WorkerCrashedError,
            exceptions.ObjectLostError,
            exceptions.OwnerDiedError,
            exceptions.TaskCancelledError,
            exceptions.RpcError,
        )
        self._refusals = load_serve().exceptions.RayServeException

    @property
    def ready(self) -> bool:
        """Whether a request would be taken."""
        return not self._stopping

    @property
    def under_way_requests(self) -> int:
        """Requests that no replica has answered yet."""
        return self._requests

    @property
    def under_way_rows(self) -> int:
        """Their rows."""
        return self._rows

    async def __aenter__(self) -> Front:
        if not self.service.registry.all_tasks:
            self.take_up(await self.keeper.table.remote(self.name, 0))
            self._listening = asyncio.create_task(self._listen(), name="utune-table")
        self._stopping = False
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.stop()
        await self._idle.wait()
        if self._listening is not None:
            self._listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._listening

    def stop(self) -> None:
        """Take nothing new; what was taken is still answered."""
        self._stopping = True

    def take_up(self, table: Table) -> None:
        """Let requests name the tasks of a table."""
        for name in self.service.table.read(table):
            self.service.counters.forget(name)
        for name in self.service.registry.names:
            self.service.counters.know(name)

    async def submit(self, request: Request, *, priority: int = 0, timeout_us: int = 0) -> Answers:
        """Answer one checked request; see `Batcher.submit`."""
        start = time.perf_counter_ns()
        self._requests += 1
        self._rows += len(request)
        self._idle.clear()
        try:
            if self._stopping:
                raise Stopping("the server is stopping and takes no new request")
            reply = await self._ask(request, priority, timeout_us)
        except BaseException as error:
            spent = time.perf_counter_ns() - start
            self.service.counters.failure(error, spent, request.tasks)
            raise
        finally:
            self._requests -= 1
            self._rows -= len(request)
            if not self._requests:
                self._idle.set()
        spent = time.perf_counter_ns() - start
        for rows, tasks in reply.calls:
            self.service.counters.batch(rows, tasks)
        self.service.counters.answer(
            len(request),
            request.tasks,
            request_ns=spent,
            queue_ns=max(0, spent - reply.engine_ns),
            engine_ns=reply.engine_ns,
        )
        return Answers(reply.logits, reply.labels, reply.scores, request.versions, reply.engine_ns)

    async def _ask(self, request: Request, priority: int, timeout_us: int) -> Reply:
        keys = self.service.table.keys
        every = self.service.registry.all_tasks
        ask = Ask(
            () if every else tuple([self._key(keys, version) for version in request.versions]),
            every,
            priority,
            timeout_us,
        )
        limit = time.monotonic() + (timeout_us / 1e6 if timeout_us else PATIENCE_SECONDS)
        for attempt in range(ATTEMPTS):
            try:
                said = await self._once(ask, request.inputs, limit - time.monotonic())
            except asyncio.TimeoutError as cause:
                if timeout_us:
                    raise Expired(
                        "the request waited longer than it allowed",
                        do="allow more time, or try again later",
                    ) from cause
                raise Overloaded(
                    "no replica answers", found=f"none in {PATIENCE_SECONDS} s", do="try again"
                ) from cause
            except self._deaths as death:
                log.warning("a replica died with a request under way: %s", last_line(death))
                if attempt + 1 == ATTEMPTS:
                    raise Overloaded(
                        "one replica after the other died", found=last_line(death), do="try again"
                    ) from death
                await asyncio.sleep(PAUSE_SECONDS * 2**attempt)
                continue
            if isinstance(said, Refusal):
                if said.kind == Stopping.__name__ and attempt + 1 < ATTEMPTS:
                    await asyncio.sleep(PAUSE_SECONDS * 2**attempt)  # it drains: another one
                    continue
                raise said.error()
            return said
        raise AssertionError("the last attempt returns or raises")

    async def _once(self, ask: Ask, inputs: Mapping[str, Any], seconds: float) -> Reply | Refusal:
        response = self._handle.remote(ask, dict(inputs))
        try:
            return await asyncio.wait_for(_result(response), max(0.0, seconds))
        except (asyncio.TimeoutError, asyncio.CancelledError):
            response.cancel()  # takes it out of the replica's queue
            raise
        except self._deaths:
            raise
        except self._refusals as refusal:
            raise Stopping(
                "Ray Serve takes no request for the replicas now",
                found=last_line(refusal),
                do="try again later",
            ) from refusal
        except Exception as mistake:
            raise EngineFailed(
                "a replica failed by a mistake of its own", found=last_line(mistake)
            ) from mistake

    @staticmethod
    def _key(keys: Mapping[Version, Key], version: Version) -> Key:
        return keys.get(version) or Key(version.name, version.number)

    async def _listen(self) -> None:
        """Follow the keeper's table for as long as the front runs."""
        while True:
            try:
                table = await self.keeper.table.remote(self.name, self.service.table.epoch)
                self.take_up(table)
            except asyncio.CancelledError:
                raise
            except (
                Exception
            ) as error:  # it restarts elsewhere: what was shown last holds until then
                log.warning("the keeper of the tasks does not answer: %s", last_line(error))
                await asyncio.sleep(RETRY_SECONDS)


async def _result(response: Any) -> Reply | Refusal:
    return await response


class ClusterCommands(TaskCommands):
    """NAME.tasks over the keeper: a change reaches every replica before any front shows it."""

    def __init__(self, front: Front, *, control: bool) -> None:
        """Over the front of NAME."""
        # Of a batcher the commands that are left as they are use no more than a front has.
        super().__init__(cast("Batcher", front), control=control)
        self._front = front

    async def add(self, data: bytes, *, update: bool, name: str | None = None) -> dict[str, Any]:
        """See `TaskCommands.add`."""
        require_called(data, name)
        added = await self._do("update" if update else "add", data=data)
        self._log("updated" if update else "added", added)
        return await self._entry(added)

    async def remove(self, name: str) -> dict[str, Any]:
        """See `TaskCommands.remove`."""
        await self._do("remove", name=name)
        self._log("removed", name)
        return {"removed": name}

    async def use(self, name: str, number: int) -> dict[str, Any]:
        """See `TaskCommands.use`."""
        await self._do("use", name=name, number=number)
        self._log("set to another version", name, version=number)
        return await self._entry(name)

    async def pin(self, name: str, *, pinned: bool) -> dict[str, Any]:
        """See `TaskCommands.pin`."""
        await self._do("pin" if pinned else "unpin", name=name)
        return await self._entry(name)

    async def entries(self, name: str | None = None) -> list[dict[str, Any]]:
        """See `TaskCommands.entries`; resident is what any replica has in its bank."""
        resident = set(await self._front.keeper.resident.remote())
        return self._front.service.table.entries(resident, name)

    async def _do(
        self,
        action: str,
        *,
        name: str | None = None,
        number: int | None = None,
        data: bytes | None = None,
    ) -> str:
        self._refuse_unless_control()
        try:
            said = await self._front.keeper.change.remote(
                self._front.name, action, name, number, data
            )
        except load_ray().exceptions.RayActorError as death:
            raise ServerFailed(
                "the keeper of the tasks died; what it showed last is still answered",
                found=last_line(death),
                do="start the server anew to change tasks again",
            ) from death
        if isinstance(said, Refusal):
            raise said.error()
        changed, table = said
        self._front.take_up(table)  # who changed a task finds it changed
        return changed

    async def _entry(self, name: str) -> dict[str, Any]:
        (shown,) = await self.entries(name)
        return {"task": shown}
