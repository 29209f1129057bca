"""How requests travel: prepared bytes out, a reply with its times in. HTTP and gRPC each have a wire."""

from __future__ import annotations

import time
from typing import Any, NamedTuple, Protocol

OK = "ok"
TIMEOUT = "timeout"
BROKEN = "connection"
"""Statuses beside those of HTTP (`503`) and gRPC (`UNAVAILABLE`)."""

now = time.perf_counter_ns
"""Nanoseconds that only go up; every time of a load is read from it."""


class Reply(NamedTuple):
    """What became of a request.

    Attributes:
        sent_ns: When it was handed to the operating system or to gRPC.
        written_ns: When that call returned.
        first_ns: When the first bytes of the reply were there; over gRPC, when all of it was.
        ended_ns: When all of the reply was.
        status: `OK`, or what went wrong in a word.
        answer: The reply's content; of a refusal, what it says.
        head: Bytes of the JSON in front of binary tensors over HTTP; None where there are none.
    """

    sent_ns: int
    written_ns: int
    first_ns: int
    ended_ns: int
    status: str
    answer: bytes
    head: int | None = None


class Wire(Protocol):
    """A way to a server, for the coroutines of one event loop."""

    async def send(self, message: bytes, limit_s: float) -> Reply:
        """What becomes of a prepared request; never raises for what the server or the network does."""
        ...

    async def statistics(self, model: str) -> dict[str, Any] | None:
        """A model's entry of the statistics extension; None where the server has none."""
        ...

    async def server(self) -> dict[str, str]:
        """What the server calls itself, `name` and `version`; empty where it does not say."""
        ...

    async def close(self) -> None:
        """Close every connection."""
        ...


def failed(sent_ns: int, written_ns: int, status: str, says: str) -> Reply:
    """A request that got no answer, and why."""
    ended_ns = now()
    return Reply(sent_ns, written_ns, ended_ns, ended_ns, status, says.encode())
