"""A load against servers that are not right: they stall, refuse, break off, or answer with something else."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from loads import GOOD, target_at, traffic_of

from utune_deploy.deploy.load.answers import UNREADABLE
from utune_deploy.deploy.load.drive import drive, run_precisely
from utune_deploy.deploy.load.numbers import numbers
from utune_deploy.deploy.load.run import load
from utune_deploy.deploy.load.step import CLOSED, CONSTANT, POISSON, Settings, Step
from utune_deploy.deploy.load.wires import open_wire
from utune_deploy.merge.errors import CheckFailed
from utune_deploy.serving.rejections import Overloaded, Unreachable


def answer(value, status="200 OK"):
    body = json.dumps(value).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@contextmanager
def fake(reply):
    """An HTTP server in a thread: `reply(number)` is what it writes to the request of that number; None hangs up."""
    ready, box = threading.Event(), {"asked": 0}

    async def serve(reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                await reader.readexactly(length)
                said = answer({}, "404 Not Found") if b"/infer" not in head else reply(box["asked"])
                box["asked"] += b"/infer" in head
                if said is None:
                    break
                writer.write(said)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def main():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        box.update(loop=asyncio.get_running_loop(), stop=asyncio.Event())
        box["port"] = server.sockets[0].getsockname()[1]
        ready.set()
        await box["stop"].wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    ready.wait()
    try:
        yield f"http://127.0.0.1:{box['port']}"
    finally:
        box["loop"].call_soon_threadsafe(box["stop"].set)
        thread.join()


def driven(url, step, **settings):
    target = target_at(url)
    settings = Settings(**{"warmup_s": 0, "seconds": 0.3, "timeout_s": 5, **settings})

    async def work():
        wire = open_wire(target.address)
        try:
            return await drive(wire, traffic_of(target), "fake", step, settings, over_grpc=False)
        finally:
            await wire.close()

    return numbers(run_precisely(work()), step, 1)


def test_a_loop_that_is_interrupted_leaves_nothing_behind():
    ended = []

    async def other():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def work():
        task = asyncio.ensure_future(other())
        await asyncio.sleep(0)
        raise KeyboardInterrupt(task)

    with pytest.raises(KeyboardInterrupt):
        run_precisely(work())
    assert ended == [True]


# coordinated omission


def test_a_stall_is_seen_by_every_request_that_was_due_in_it():
    """A server that stands still for 0.4 s, at 100 requests/s: about 40 requests wait, 0.2 s on average."""
    stall_s = 0.4

    def reply(number):
        if number == 20:
            time.sleep(stall_s)  # nobody is answered
        return answer(GOOD)

    with fake(reply) as url:
        found = driven(url, Step(CONSTANT, 100), seconds=1.0)
    late = np.array(found.samples_ms) > 100
    assert found.latency.samples + found.failed == 100
    assert late.sum() >= 0.6 * 100 * (stall_s - 0.1)
    assert found.latency.p99_ms > 0.9 * stall_s * 1000
    assert found.offered_per_second == 100.0  # they were sent when they were due


def test_the_same_stall_is_one_sample_of_a_caller_who_waits():
    with fake(lambda number: time.sleep(0.4 * (number == 5)) or answer(GOOD)) as url:
        found = driven(url, Step(CLOSED, 1), seconds=0.8)
    assert found.latency.max_ms > 400
    assert found.latency.p50_ms < 200


# refusals


def test_refusals_are_counted_by_status():
    full = answer({"error": "the queue is full"}, "503 Service Unavailable")
    with fake(lambda number: answer(GOOD) if number % 2 else full) as url:
        found = driven(url, Step(CONSTANT, 100))
    ((status, count, says),) = [(e.status, e.count, e.says) for e in found.errors]
    assert (status, says) == ("503", "the queue is full")
    assert count + found.latency.samples == 30
    assert found.server is None  # it has no statistics


@pytest.mark.parametrize("step", [Step(CLOSED, 2), Step(POISSON, 50)])
def test_connections_that_break_are_errors(step):
    with fake(lambda number: answer(GOOD) if number % 3 else None) as url:
        found = driven(url, step)
    assert {e.status for e in found.errors} == {"connection"}
    assert found.latency is not None


def test_a_request_that_is_not_answered_is_given_up():
    with fake(lambda number: b"") as url:
        found = driven(url, Step(CONSTANT, 20), timeout_s=0.2)
    assert [(e.status, e.count) for e in found.errors] == [("timeout", 6)]
    assert found.latency is None


def test_nonsense_is_no_answer():
    with fake(lambda number: b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc") as url:
        found = driven(url, Step(CONSTANT, 20))
    assert [(e.status, e.count) for e in found.errors] == [(UNREADABLE, 6)]


def test_what_is_no_http_is_no_answer():
    with fake(lambda number: b"* OK IMAP4rev1 ready\r\n") as url:
        found = driven(url, Step(CONSTANT, 20))
    assert {e.status for e in found.errors} == {"connection"}


@pytest.mark.parametrize(
    ("said", "error", "what"),
    [
        (answer({"error": "full"}, "503 Service Unavailable"), Overloaded, "full"),
        (answer({"outputs": []}), CheckFailed, "no proper answer"),
        (None, Unreachable, "broke"),
    ],
)
def test_a_first_request_that_fails_ends_the_load(said, error, what):
    with fake(lambda number: said) as url:
        target = target_at(url)
        with pytest.raises(error, match=what):
            load(target, traffic_of(target), [Step(CLOSED, 1)], Settings())


def test_a_server_that_is_not_there_ends_the_load():
    target = target_at("http://127.0.0.1:9")
    with pytest.raises(Unreachable):
        load(target, traffic_of(target), [Step(CLOSED, 1)], Settings())
