"""What models need of whoever answers: a batcher over an engine in this process, or one that asks other processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .answers import Answers
    from .registry import Registry, Request
    from .tasks.versions import Version
    from .watching.counters import Counters


class Versions(Protocol):
    """The versions of tasks that can change."""

    def numbers(self, name: str) -> list[int]:
        """See `Tasks.numbers`."""
        ...

    def version(self, name: str, number: int) -> Version:
        """See `Tasks.version`."""
        ...


class Answerer(Protocol):
    """What there is to know of the service."""

    @property
    def registry(self) -> Registry:
        """What is answered."""
        ...

    @property
    def counters(self) -> Counters:
        """What was done so far."""
        ...

    @property
    def tasks(self) -> Versions | None:
        """The versions of its tasks; None where they cannot change."""
        ...


class Answering(Protocol):
    """Takes checked requests."""

    @property
    def service(self) -> Answerer:
        """What answers."""
        ...

    @property
    def ready(self) -> bool:
        """Whether a request would be taken."""
        ...

    async def submit(self, request: Request, *, priority: int = 0, timeout_us: int = 0) -> Answers:
        """See `Batcher.submit`."""
        ...
