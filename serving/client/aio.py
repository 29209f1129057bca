"""The client that awaits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...merge.errors import UsageError
from .address import parse
from .blocking import DEADLINE_S, FACTS_AGE_S
from .grpc import AsyncGrpcTransport
from .http import AsyncHttpTransport
from .retry import Retry
from .steps import run_async
from .verbs import Verbs

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import TypeVar

    from numpy.typing import NDArray

    from .answers import Answer, TaskInfo
    from .rows import Source
    from .steps import Steps

    T = TypeVar("T")


class AsyncClient:
    """A client of a running server for asyncio: the verbs of `Client`, awaited.

    Belongs to the event loop that first uses it, and may be used by many of its coroutines at once. Pictures
    are read and prepared in threads. Close it, or use it in `async with`.

    Args:
        url: As of `Client`, like all that follow.
        model: The model's name.
        deadline_s: Seconds that a call may take.
        retry: How often and when a call is asked again.
        certificates: For TLS, the authorities to trust.
        facts_age_s: Seconds for which a task's facts are believed.

    Attributes:
        url: As it was given.

    Raises:
        UsageError: The URL is none, or a setting makes no sense.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        deadline_s: float | None = DEADLINE_S,
        retry: Retry | None = None,
        certificates: Path | None = None,
        facts_age_s: float = FACTS_AGE_S,
    ) -> None:
        address = parse(url)
        self.url = url
        self._verbs = Verbs(address, model, retry or Retry(), deadline_s, facts_age_s)
        transport = AsyncGrpcTransport if address.is_grpc else AsyncHttpTransport
        self._transport = transport(address, certificates)
        self._closed = False

    async def ask(
        self,
        source: Source,
        *,
        task: str | None = None,
        deadline_s: float | None = None,
        priority: int = 0,
    ) -> Answer:
        """See `Client.ask`."""
        return await self._run(self._verbs.ask(source, task, deadline_s, priority))

    async def ask_many(
        self,
        sources: Sequence[Source] | NDArray[Any] | Mapping[str, NDArray[Any]],
        *,
        tasks: str | Sequence[str] | None = None,
        deadline_s: float | None = None,
        priority: int = 0,
    ) -> tuple[Answer, ...]:
        """See `Client.ask_many`."""
        return await self._run(self._verbs.ask_many(sources, tasks, deadline_s, priority))

    async def tasks(self, *, deadline_s: float | None = None) -> tuple[TaskInfo, ...]:
        """See `Client.tasks`."""
        return await self._run(self._verbs.tasks(deadline_s))

    async def describe(self, *, deadline_s: float | None = None) -> dict[str, Any]:
        """What a task for this server must be laid out for, as `deploy.pack.Layout` reads it."""
        return await self._run(self._verbs.describe(deadline_s))

    async def add(
        self, file: bytes | str | os.PathLike[str], *, deadline_s: float | None = None
    ) -> TaskInfo:
        """See `Client.add`."""
        return await self._run(self._verbs.bring("add", file, deadline_s))

    async def update(
        self, file: bytes | str | os.PathLike[str], *, deadline_s: float | None = None
    ) -> TaskInfo:
        """See `Client.update`."""
        return await self._run(self._verbs.bring("update", file, deadline_s))

    async def remove(self, name: str, *, deadline_s: float | None = None) -> None:
        """See `Client.remove`."""
        await self._run(self._verbs.remove(name, deadline_s))

    async def use(self, name: str, version: int, *, deadline_s: float | None = None) -> TaskInfo:
        """See `Client.use`."""
        return await self._run(self._verbs.change("use", deadline_s, task=name, version=version))

    async def pin(self, name: str, *, deadline_s: float | None = None) -> TaskInfo:
        """See `Client.pin`."""
        return await self._run(self._verbs.change("pin", deadline_s, task=name))

    async def unpin(self, name: str, *, deadline_s: float | None = None) -> TaskInfo:
        """See `Client.unpin`."""
        return await self._run(self._verbs.change("unpin", deadline_s, task=name))

    async def close(self) -> None:
        """Close every connection."""
        self._closed = True
        await self._transport.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        if self._closed:
            raise UsageError("the client is closed")
        return await run_async(steps, self._transport)
