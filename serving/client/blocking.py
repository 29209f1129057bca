"""The client that blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...merge.errors import UsageError
from .address import parse
from .grpc import GrpcTransport
from .http import HttpTransport
from .retry import Retry
from .steps import run
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

DEADLINE_S = 60.0
FACTS_AGE_S = 60.0


class Client:
    """A client of a running server. Safe to use from several threads; close it, or use it in `with`.

    Every verb raises what the server refuses as the error that the server named (`serving.rejections`), and
    of its own `Unreachable`, `DeadlineExceeded` and `BadReply`. A full queue (503, UNAVAILABLE) and a
    connection that is refused or breaks are asked again until `retry` or the deadline ends that; what changes
    tasks is not asked again once it may have been carried out.

    How a task wants its pictures is asked for once, and again after `facts_age_s`, when this client changes
    the task, when the server refuses a prepared picture, and when an answer is not one of the task's.

    Args:
        url: `http://host:port`, `https://`, `grpc://` or `grpcs://`.
        model: The model's name; needed only where several are served.
        deadline_s: Seconds that a call may take, all attempts together; None for no limit. For `ask_many`,
            seconds for each request that it makes.
        retry: How often and when a call is asked again.
        certificates: For TLS, a PEM file with the authorities to trust; None for the system's.
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
        transport = GrpcTransport if address.is_grpc else HttpTransport
        self._transport = transport(address, certificates)
        self._closed = False

    def ask(
        self,
        source: Source,
        *,
        task: str | None = None,
        deadline_s: float | None = None,
        priority: int = 0,
    ) -> Answer:
        """What a task says to one picture, video or row.

        Args:
            source: A picture or video: a path, the bytes of a file, a Pillow picture, a list of frames. Or a
                row that is prepared already, without the batch axis: the array of the model's one input,
                `[3, H, W]` float32 for pictures, or arrays by name.
            task: The task's name; may be left out where the server has one.
            deadline_s: Seconds for the whole call; None for the client's.
            priority: As the server's queue has it; 0 is its default.

        Raises:
            InvalidRequest: The row is not what the model reads, or the server refuses it.
            UsageError: The picture cannot be read, or is not of the task's kind; or no model is named and
                several are served.
            UnknownModel: The server has no such model; or none that tells how pictures are prepared.
            Overloaded: The server was busy at every attempt.
            Unreachable: It could not be reached at any.
            DeadlineExceeded: The time is over.
            EngineFailed: The engine could not answer.
            BadReply: What answers there does not speak the protocol.
        """
        return self._run(self._verbs.ask(source, task, deadline_s, priority))

    def ask_many(
        self,
        sources: Sequence[Source] | NDArray[Any] | Mapping[str, NDArray[Any]],
        *,
        tasks: str | Sequence[str] | None = None,
        deadline_s: float | None = None,
        priority: int = 0,
    ) -> tuple[Answer, ...]:
        """What tasks say to many, in order; rows of different tasks share requests of up to the largest batch.

        Args:
            sources: Each as of `ask`; or arrays with a batch axis, `[n, ...]`, one or by name.
            tasks: A task's name for all or for each; may be left out where the server has one.
            deadline_s: Seconds for all of them together; None for the client's, for each request anew.
            priority: As of `ask`.

        Raises:
            InvalidRequest: As of `ask`; or there are other numbers of tasks than of sources.
            UtuneError: As of `ask`. Answers to earlier requests are lost with it.
        """
        return self._run(self._verbs.ask_many(sources, tasks, deadline_s, priority))

    def tasks(self, *, deadline_s: float | None = None) -> tuple[TaskInfo, ...]:
        """What tasks the server has now."""
        return self._run(self._verbs.tasks(deadline_s))

    def describe(self, *, deadline_s: float | None = None) -> dict[str, Any]:
        """What a task for this server must be laid out for, as `deploy.pack.Layout` reads it."""
        return self._run(self._verbs.describe(deadline_s))

    def add(
        self, file: bytes | str | os.PathLike[str], *, deadline_s: float | None = None
    ) -> TaskInfo:
        """Add a task to the running server, from a packed task's bytes or path."""
        return self._run(self._verbs.bring("add", file, deadline_s))

    def update(
        self, file: bytes | str | os.PathLike[str], *, deadline_s: float | None = None
    ) -> TaskInfo:
        """Give a task a new version, from a packed task's bytes or path."""
        return self._run(self._verbs.bring("update", file, deadline_s))

    def remove(self, name: str, *, deadline_s: float | None = None) -> None:
        """Take a task from the running server."""
        self._run(self._verbs.remove(name, deadline_s))

    def use(self, name: str, version: int, *, deadline_s: float | None = None) -> TaskInfo:
        """Let another version of a task answer."""
        return self._run(self._verbs.change("use", deadline_s, task=name, version=version))

    def pin(self, name: str, *, deadline_s: float | None = None) -> TaskInfo:
        """Keep a task in the engine's bank."""
        return self._run(self._verbs.change("pin", deadline_s, task=name))

    def unpin(self, name: str, *, deadline_s: float | None = None) -> TaskInfo:
        """Let a task be moved out of the engine's bank again."""
        return self._run(self._verbs.change("unpin", deadline_s, task=name))

    def close(self) -> None:
        """Close every connection."""
        self._closed = True
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        if self._closed:
            raise UsageError("the client is closed")
        return run(steps, self._transport)
