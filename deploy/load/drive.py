"""One step's requests against a server, each with its times.

In an open loop a request is sent when it is due, whatever became of those before it, and its latency counts from when
it was due. A client that waits for the answer before it sends, or counts from when it came round to sending, leaves
out just those requests that a stalled server would have kept waiting: coordinated omission (G. Tene, How NOT to
Measure Latency, 2013).
"""

from __future__ import annotations

import asyncio
import json
import selectors
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .answers import fault
from .arrivals import NS_PER_S, due_times
from .step import CLOSED
from .wire import OK, now

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from numpy.typing import NDArray

    from .step import Settings, Step
    from .traffic import Traffic
    from .wire import Reply, Wire

    T = TypeVar("T")

PAUSE_S = 0.01
"""A caller whose request failed waits so long: a server that is gone would be asked as fast as a loop turns."""


class Sample(NamedTuple):
    """A request's times, in nanoseconds of `wire.now`.

    Attributes:
        due_ns: When it should have been sent: as scheduled, or when its caller had the answer before.
        sent_ns: See `Reply`, like all that follow.
        written_ns: When sending it returned.
        first_ns: When its reply began.
        ended_ns: When its reply was there.
        status: `OK`, or what went wrong in a word.
    """

    due_ns: int
    sent_ns: int
    written_ns: int
    first_ns: int
    ended_ns: int
    status: str


@dataclass
class Run:
    """What happened in a step.

    Attributes:
        began_ns: When requests began to count.
        ended_ns: When they ceased to.
        samples: Every request in the order of its end, those of the warm-up included.
        before: The server's statistics when requests began to count; None where it has none.
        after: The same when they ceased to.
        says: What the first request of each status but `OK` was told.
    """

    began_ns: int
    ended_ns: int
    samples: list[Sample] = field(default_factory=list)
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    says: dict[str, str] = field(default_factory=dict)


def run_precisely(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a loop whose sleeps are exact to the microsecond; those of epoll are to the millisecond."""
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    try:
        return loop.run_until_complete(work)
    finally:
        left = asyncio.all_tasks(loop)  # none, unless a person interrupted
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.close()


async def drive(
    wire: Wire, traffic: Traffic, model: str, step: Step, settings: Settings, *, over_grpc: bool
) -> Run:
    """Send a step's requests, wait for the last reply, and keep every time.

    Args:
        wire: The server.
        traffic: What is sent, in turn.
        model: Whose statistics are read.
        step: How many callers, or how many a second.
        settings: For how long.
        over_grpc: Whether replies are messages of gRPC.
    """
    start_ns = now()
    began_ns = start_ns + int(settings.warmup_s * NS_PER_S)
    run = Run(began_ns, began_ns + int(settings.seconds * NS_PER_S))
    messages = cycle(traffic.messages)

    async def ask(due_ns: int) -> Sample:
        reply = await wire.send(next(messages), settings.timeout_s)
        status = reply.status
        if status == OK:
            status = fault(reply, traffic.rows, over_grpc=over_grpc) or OK
        if status != OK:
            run.says.setdefault(status, sentence(reply))
        sample = Sample(due_ns, *reply[:4], status)
        run.samples.append(sample)
        return sample

    async def watch() -> None:
        await _until(run.began_ns)
        run.before = await wire.statistics(model)
        await _until(run.ended_ns)
        run.after = await wire.statistics(model)

    if step.loop == CLOSED:
        load = _callers(ask, int(step.level), run.ended_ns)
    else:
        times = due_times(step, settings.warmup_s + settings.seconds, settings.seed)
        load = _arrivals(ask, times + start_ns)
    await asyncio.gather(load, watch())
    return run


def sentence(reply: Reply) -> str:
    """What a reply that is no answer says, on one line."""
    text = reply.answer[:2000].decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError):  # a proxy's page has none
        text = str(json.loads(text)["error"])
    return " ".join(text.split())[:200]


async def _callers(ask: Callable[[int], Awaitable[Sample]], count: int, end_ns: int) -> None:
    """So many callers, each of which asks again when it has the answer."""

    async def caller() -> None:
        due_ns = now()
        while due_ns < end_ns:
            sample = await ask(due_ns)
            due_ns = sample.ended_ns
            if sample.status != OK:
                await asyncio.sleep(PAUSE_S)
                due_ns = now()

    await asyncio.gather(*(caller() for _ in range(count)))


async def _arrivals(ask: Callable[[int], Coroutine[Any, Any, Sample]], times: NDArray[Any]) -> None:
    """Requests at given times, whatever became of those before; ends when all have ended."""
    open_: set[asyncio.Task[Sample]] = set()
    for due_ns in times.tolist():
        await _until(due_ns)
        task = asyncio.ensure_future(ask(due_ns))
        open_.add(task)
        task.add_done_callback(open_.discard)
    await asyncio.gather(*open_)


async def _until(at_ns: int) -> None:
    """Wait; also for a moment that is past, others get their turn."""
    await asyncio.sleep(max(at_ns - now(), 0) / NS_PER_S)
