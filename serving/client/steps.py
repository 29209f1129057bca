"""What a verb does, step by step, for a runner that blocks or one that awaits.

A verb is a generator: it yields a step, is sent the step's result or thrown its error, and returns its
own. So each verb is written once, and the two clients differ only in how they carry out a step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    from .calls import Call, Reply

T = TypeVar("T")


@dataclass(frozen=True)
class Send:
    """One attempt of a call; results in its `Reply`, or raises a `Failure`.

    Attributes:
        call: What is asked.
        limit_s: Seconds that it may take; None for no limit.
    """

    call: Call
    limit_s: float | None


@dataclass(frozen=True)
class Wait:
    """A pause of so many seconds."""

    pause_s: float


@dataclass(frozen=True)
class Work:
    """A computation long enough to keep it off an event loop; results in what it returns."""

    function: Callable[[], Any]


Steps: TypeAlias = Generator[Send | Wait | Work, Any, T]


class Transport(Protocol):
    """A way to a server, for several threads at once."""

    def send(self, call: Call, limit_s: float | None) -> Reply:
        """One attempt.

        Raises:
            Failure: There is no reply, or it is a refusal.
        """
        ...

    def close(self) -> None:
        """Close every connection."""
        ...


class AsyncTransport(Protocol):
    """A way to a server, for several coroutines of one event loop."""

    async def send(self, call: Call, limit_s: float | None) -> Reply:
        """As of `Transport`."""
        ...

    async def close(self) -> None:
        """Close every connection."""
        ...


def run(steps: Steps[T], transport: Transport) -> T:
    """Carry out a verb in the calling thread."""

    def perform(step: Send | Wait | Work) -> Any:
        if isinstance(step, Send):
            return transport.send(step.call, step.limit_s)
        if isinstance(step, Wait):
            return time.sleep(step.pause_s)
        return step.function()

    try:
        step = next(steps)
        while True:
            try:
                result = perform(step)
            except BaseException as error:
                step = steps.throw(error)
            else:
                step = steps.send(result)
    except StopIteration as done:
        return done.value


async def run_async(steps: Steps[T], transport: AsyncTransport) -> T:
    """Carry out a verb in the running event loop; computations go to a thread."""

    async def perform(step: Send | Wait | Work) -> Any:
        if isinstance(step, Send):
            return await transport.send(step.call, step.limit_s)
        if isinstance(step, Wait):
            return await asyncio.sleep(step.pause_s)
        return await asyncio.to_thread(step.function)

    try:
        step = next(steps)
        while True:
            try:
                result = await perform(step)
            except BaseException as error:
                step = steps.throw(error)
            else:
                step = steps.send(result)
    except StopIteration as done:
        return done.value
