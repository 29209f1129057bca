"""One engine of several: the service and its batcher in a replica of Ray Serve.

Rows of different tasks share engine calls here as they do in the embedded server. Which versions of tasks there
are is the keeper's to say. A replica that is asked for one that it does not hold, because it
started while the task was being added, fetches it, holds its engine to it, and answers.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....export.bundle import open_bundle
from ....merge.errors import IncompatibleArtefact, UtuneError
from ...queueing.batcher import Batcher
from ...registry import Request
from ...rejections import ServerFailed
from ...service import Service
from ...watching.counters import Counters
from .messages import Key, Refusal, Reply

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from ....export.engine import Device
    from ...tasks.life import Staged
    from ...tasks.versions import Version
    from .messages import Ask

log = logging.getLogger(__name__)

GRACE_SECONDS = 60
"""How long a version that is no longer in the table can be asked for by requests that were under way."""
HEALTH_SECONDS = 30


def _as_values(
    method: Callable[..., Coroutine[Any, Any, Any]],
) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Errors that a user can act on as refusals."""

    @functools.wraps(method)
    async def wrapped(*given: Any, **named: Any) -> Any:
        try:
            return await method(*given, **named)
        except UtuneError as error:
            return Refusal.of(error)

    return wrapped


class Replica:
    """See the module. Its methods run in the replica's event loop."""

    async def __init__(
        self,
        path: str,
        identity: str,
        keeper: Any,
        device: Device,
        rows: int | None,
        **queueing: Any,
    ) -> None:
        """Open the bundle and take up the tasks.

        Args:
            path: The bundle's folder on this machine.
            identity: The bundle that it must be.
            keeper: Handle of the `Keeper`.
            device: Where the engine runs.
            rows: See `Service.open`.
            **queueing: Settings of `Batcher`.

        Raises:
            UtuneError: See `Service.open`; or the folder holds another bundle.
        """
        self._keeper = keeper
        self._service = await asyncio.to_thread(_open, path, identity, device, rows)
        services = [self._service]
        if self._service.every not in (None, self._service):
            services.append(self._service.every)
        self._counters = [_Calls(service.registry.names) for service in services]
        for service, counters in zip(services, self._counters, strict=True):
            service.counters = counters
        self._batchers = [Batcher(service, **queueing) for service in services]
        self._versions: dict[Key, Version] = {
            Key(name, 1): version for name, version in self._service.registry.versions.items()
        }
        self._staged: dict[Key, Staged] = {}
        self._pinned: set[Key] = set()
        self._leaving: dict[Key, asyncio.TimerHandle] = {}
        self._fetching = asyncio.Lock()
        for batcher in self._batchers:
            await batcher.__aenter__()
        if self._service.tasks is not None:
            for key, data, pinned in await keeper.snapshot.remote():
                if key not in self._versions:
                    assert data is not None
                    self._show(key, self._service.tasks.hold(data, key.number))
                if pinned:
                    self._pin(key)

    async def check_health(self) -> None:
        """An engine call, before all that waits: a replica that cannot make one is replaced.

        Raises:
            Exception: It cannot.
        """
        registry = self._service.registry
        version = next(iter(registry.versions.values()))
        versions = tuple(registry.versions.values()) if registry.all_tasks else (version,)
        request = Request(registry.draw(), versions)
        await asyncio.wait_for(self._batchers[0].ask(request), HEALTH_SECONDS)

    @_as_values
    async def answer(self, ask: Ask, inputs: Mapping[str, NDArray[Any]]) -> Reply:
        """Answer a checked request in company; a `Refusal` where it cannot be."""
        batcher = self._batchers[-1] if ask.every else self._batchers[0]
        registry = batcher.service.registry
        if ask.every:
            versions = tuple(registry.versions.values()) * len(next(iter(inputs.values())))
        else:
            versions = tuple([await self._version(key) for key in ask.versions])
        request = Request(dict(inputs), versions)
        answers = await batcher.submit(request, priority=ask.priority, timeout_us=ask.timeout_us)
        calls = self._counters[-1 if ask.every else 0].take_calls()
        return Reply(answers.logits, answers.labels, answers.scores, answers.engine_ns, calls)

    @_as_values
    async def stage(self, key: Key, data: bytes) -> None:
        """Hold a packed task to this engine; nobody names it before the keeper's table does."""
        await self._stage(key, data)

    @_as_values
    async def forget(self, keys: Sequence[Key]) -> None:
        """Give back what versions took that nobody was shown."""
        for key in keys:
            self._forget(key)

    @_as_values
    async def pin(self, key: Key, pinned: bool) -> None:
        """Keep a version in the engine's memory, or let it make room again."""
        await self._version(key)
        if pinned:
            await asyncio.to_thread(self._pin, key)
        else:
            self._unpin(key)

    async def settle(self, live: Sequence[Key], pinned: Sequence[Key]) -> None:
        """Keep the versions of a table; the others go when no request can be under way that asks for them."""
        for key in self._pinned - set(pinned):
            self._unpin(key)
        for key in set(pinned) - self._pinned:
            await self._version(key)
            await asyncio.to_thread(self._pin, key)
        loop = asyncio.get_running_loop()
        for key in set(self._staged) - set(live) - set(self._leaving):
            self._leaving[key] = loop.call_later(GRACE_SECONDS, self._forget, key)

    async def resident(self) -> list[Key]:
        """The versions that stand in the engine's bank."""
        rows = self._service.resident
        return [k for k, version in self._versions.items() if rows is None or version in rows]

    async def _version(self, key: Key) -> Version:
        version = self._versions.get(key)
        if version is not None:
            return version
        async with self._fetching:  # not twice at a time
            if key not in self._versions:
                try:
                    data = await self._keeper.packed.remote(key)
                except Exception as cause:  # whatever Ray says when an actor is gone
                    raise ServerFailed(
                        "the keeper of the tasks does not answer", where=key.name
                    ) from cause
                if isinstance(data, Refusal):
                    raise data.error()
                await self._stage(key, data)
        return self._versions[key]

    async def _stage(self, key: Key, data: bytes) -> None:
        tasks = self._service.require_tasks()
        staged = await asyncio.to_thread(tasks.hold, data, key.number)
        try:
            if staged.file != key.file:
                raise IncompatibleArtefact(
                    "a task came damaged", where=key.name, wanted=key.file, found=staged.file
                )
            tasks.require_right(staged, await self._batchers[0].ask(tasks.probe(staged)))
        except BaseException:
            self._give_back(staged)
            raise
        self._show(key, staged)

    def _show(self, key: Key, staged: Staged) -> None:
        self._versions[key] = staged.version
        self._staged[key] = staged

    def _forget(self, key: Key) -> None:
        self._leaving.pop(key, None)
        self._unpin(key)
        if staged := self._staged.pop(key, None):
            del self._versions[key]
            self._give_back(staged)

    def _give_back(self, staged: Staged) -> None:
        if self._service.resident is not None:
            self._service.resident.drop(staged.version)
        if all(other.file != staged.file for other in self._staged.values()):
            self._service.require_tasks().store.remove(staged.file)

    def _pin(self, key: Key) -> None:
        assert self._service.resident is not None
        self._service.resident.pin(self._versions[key])
        self._pinned.add(key)

    def _unpin(self, key: Key) -> None:
        if key in self._pinned and self._service.resident is not None:
            self._pinned.discard(key)
            self._service.resident.pin(self._versions[key], pinned=False)

    async def drain(self) -> None:
        """Answer what was taken, then forget the tasks that came."""
        for batcher in self._batchers:
            await batcher.__aexit__()
        self._service.close()


class ServedReplica(Replica):
    """A replica as Ray Serve ends it."""

    async def __del__(self) -> None:
        """Ray Serve awaits this once no request is under way; Python alone would not."""
        if hasattr(self, "_batchers"):  # else it was never whole
            await self.drain()


def _open(path: str, identity: str, device: Device, rows: int | None) -> Service:
    bundle = open_bundle(Path(path))
    if bundle.identity != identity:
        raise IncompatibleArtefact(
            "a machine of the cluster has another bundle there",
            where=path,
            wanted=f"identity {identity[:16]}",
            found=f"identity {bundle.identity[:16]}",
            do="copy the same bundle to the same path on every machine, or share the folder",
        )
    return Service.open(bundle, device, rows=rows)


class _Calls(Counters):
    """Counters that also note every engine call for the next reply: the fronts count the cluster's."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(names)
        self._calls: list[tuple[int, int]] = []

    def batch(self, rows: int, tasks: int) -> None:
        super().batch(rows, tasks)
        with self._lock:
            self._calls.append((rows, tasks))

    def take_calls(self) -> tuple[tuple[int, int], ...]:
        """Rows and tasks of the calls since this was asked last."""
        with self._lock:
            calls, self._calls = tuple(self._calls), []
            return calls
