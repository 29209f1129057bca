"""How requests meet in one engine call, and how they leave the queue."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from utune_deploy.serving.queueing.batcher import Batcher
from utune_deploy.serving.rejections import Expired, InvalidRequest, Overloaded, Stopping
from utune_deploy.serving.service import Service


class GatedSession:
    """Records every engine call; waits for the gate before it runs."""

    provider = "gated"

    def __init__(self, inner) -> None:
        self.inner = inner
        self.calls: list[list[int]] = []
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def run(self, inputs, task=None):
        self.entered.set()
        self.gate.wait()
        self.calls.append(task.tolist())
        return self.inner.run(inputs, task)


@pytest.fixture
def gated(service, bundle) -> Service:
    return Service(bundle, GatedSession(service.session))


async def _blocked(service: Service, batcher: Batcher, request, **settings) -> asyncio.Task:
    """A request that the engine holds, so that what follows gathers in the queue."""
    service.session.gate.clear()
    service.session.entered.clear()
    held = asyncio.create_task(batcher.submit(request, **settings))
    while not service.session.entered.is_set():
        assert not held.done(), held.result()
        await asyncio.sleep(0.001)
    return held


def _requests(service: Service, rows, sizes):
    return [service.registry.check(*rows(size, seed=seed)) for seed, size in enumerate(sizes)]


def test_rows_of_different_requests_and_tasks_share_one_call(gated, service, rows):
    requests = _requests(gated, rows, [1, 3, 2, 3])

    async def main():
        async with Batcher(gated) as batcher:
            held = await _blocked(gated, batcher, requests[0])
            others = [asyncio.create_task(batcher.submit(request)) for request in requests[1:]]
            await asyncio.sleep(0)
            gated.session.gate.set()
            return [await task for task in (held, *others)]

    answers = asyncio.run(main())
    assert [len(call) for call in gated.session.calls] == [1, 8]
    assert set(gated.session.calls[1]) == {0, 1, 2}
    for request, answer in zip(requests, answers, strict=True):
        reference = service.answer(request.inputs, request.tasks)
        np.testing.assert_allclose(answer.logits, reference.logits, rtol=1e-5, atol=1e-4)
        assert answer.labels == reference.labels


def test_the_servers_own_request_goes_before_all_others_whatever_the_limits(gated, service, rows):
    images, (task, another, *_) = rows(8)
    limits = {
        "max_queued_rows": 8, "max_task_rows": 8, "rates": {task: 1e-3}, "default_timeout_ms": 10.0
    }  # fmt: skip
    probe = gated.registry.check(images[:1], [task])

    async def main():
        async with Batcher(gated, **limits) as batcher:
            first = await _blocked(gated, batcher, gated.registry.check(images, [task] * 8))
            with pytest.raises(Overloaded, match="rate"):
                await batcher.submit(probe)
            full = gated.registry.check(images, [another] * 8)
            line = asyncio.create_task(batcher.submit(full, timeout_us=60_000_000))
            await asyncio.sleep(0)
            asked = asyncio.create_task(batcher.ask(probe))
            await asyncio.sleep(0.02)  # longer than others may wait
            gated.session.gate.set()
            await asyncio.gather(first, line)
            return await asked

    answer = asyncio.run(main())
    assert [len(call) for call in gated.session.calls] == [8, 1, 8]
    np.testing.assert_allclose(
        answer.logits, service.answer(probe.inputs, [task]).logits, rtol=1e-5, atol=1e-4
    )
    assert gated.counters.read().rows_by_task[task] == 8
    assert gated.counters.read().answered == 2


def test_a_line_of_the_same_task_does_not_hold_up_the_servers_own_request(gated, rows):
    first, *line = _requests(gated, rows, [8, 8, 8, 8])
    probe = gated.registry.check(*rows(1, seed=9))

    async def main():
        async with Batcher(gated) as batcher:
            held = await _blocked(gated, batcher, first)
            others = [asyncio.create_task(batcher.submit(request)) for request in line]
            await asyncio.sleep(0)
            asked = asyncio.create_task(batcher.ask(probe))
            await asyncio.sleep(0)
            gated.session.gate.set()
            await asyncio.gather(held, *others, asked)

    asyncio.run(main())
    assert [len(call) for call in gated.session.calls] == [8, 1, 8, 8, 8]


def test_no_call_is_larger_than_the_engine_allows_and_a_task_keeps_its_order(gated, rows):
    requests = _requests(gated, rows, [1, 5, 5, 3, 8, 1])

    async def main():
        done = []
        async with Batcher(gated) as batcher:
            tasks = [await _blocked(gated, batcher, requests[0])]
            tasks += [asyncio.create_task(batcher.submit(request)) for request in requests[1:]]
            for number, task in enumerate(tasks):
                task.add_done_callback(lambda _, number=number: done.append(number))
            await asyncio.sleep(0)
            gated.session.gate.set()
            await asyncio.gather(*tasks)
            await asyncio.sleep(0)
        return done

    done = asyncio.run(main())
    # The last one is alone in asking for its task, so its turn comes before the others' second.
    assert [len(call) for call in gated.session.calls] == [1, 6, 8, 8]
    assert [number for number in done if number not in (0, 5)] == [1, 2, 3, 4]
    assert done.index(5) <= 2


def test_a_hot_task_does_not_hold_up_another(gated, rows):
    images, _ = rows(1)
    hot, light = (gated.registry.check(images, [task]) for task in ("pets", "cars"))

    async def main():
        async with Batcher(gated) as batcher:
            held = await _blocked(gated, batcher, hot)
            many = [asyncio.create_task(batcher.submit(hot)) for _ in range(40)]
            await asyncio.sleep(0)
            one = asyncio.create_task(batcher.submit(light))
            await asyncio.sleep(0)
            gated.session.gate.set()
            await asyncio.gather(held, one, *many)

    asyncio.run(main())
    assert [1 in call for call in gated.session.calls] == [False, True, *[False] * 5]


def test_weights_and_priorities_order_the_queue(gated, rows):
    images, _ = rows(1)
    pets, cars = (gated.registry.check(images, [task]) for task in ("pets", "cars"))

    async def main():
        async with Batcher(gated, weights={"cars": 3}) as batcher:
            held = await _blocked(gated, batcher, pets)
            many = [asyncio.create_task(batcher.submit(pets)) for _ in range(20)]
            many += [asyncio.create_task(batcher.submit(cars)) for _ in range(12)]
            many += [asyncio.create_task(batcher.submit(cars, priority=3)) for _ in range(4)]
            many += [asyncio.create_task(batcher.submit(pets, priority=1)) for _ in range(8)]
            await asyncio.sleep(0)
            gated.session.gate.set()
            await asyncio.gather(held, *many)

    asyncio.run(main())
    assert [sum(call) for call in gated.session.calls] == [0, 0, 6, 6, 0, 0, 4]


@pytest.mark.parametrize("by_default", [True, False])
def test_who_waits_longer_than_allowed_hears_it_while_the_engine_runs(gated, rows, by_default):
    requests = _requests(gated, rows, [1, 2, 3])
    settings = {"default_timeout_ms": 5} if by_default else {}

    async def main():
        async with Batcher(gated, **settings) as batcher:
            held = await _blocked(gated, batcher, requests[0], timeout_us=60_000_000)
            patient = asyncio.create_task(batcher.submit(requests[2], timeout_us=60_000_000))
            with pytest.raises(Expired, match="longer than it allowed"):
                await batcher.submit(requests[1], timeout_us=0 if by_default else 5000)
            assert (batcher.queued_requests, batcher.queued_rows) == (1, 3)
            gated.session.gate.set()
            assert [len(await task) for task in (held, patient)] == [1, 3]

    asyncio.run(main())
    totals = gated.counters.read()
    assert (totals.answered, totals.failures["REJECTED"]) == (2, 1)
    assert sum(task.refused for task in totals.tasks.values()) == len(set(requests[1].tasks))


def test_a_request_larger_than_an_engine_call_is_refused(gated):
    class Large:
        tasks = ("pets",) * 9

        def __len__(self):
            return 9

    async def main():
        async with Batcher(gated) as batcher:
            with pytest.raises(InvalidRequest, match="does not fit"):
                await batcher.submit(Large())

    asyncio.run(main())


def test_each_request_counts_once_by_how_it_ended(gated, rows):
    images, _ = rows(2)
    pets = gated.registry.check(images, ["pets", "pets"])
    mixed = gated.registry.check(images, ["pets", "cars"])

    async def main():
        async with Batcher(gated, max_task_rows=4) as batcher:
            held = await _blocked(gated, batcher, pets)
            kept = asyncio.create_task(batcher.submit(mixed))
            dropped = asyncio.create_task(batcher.submit(pets))
            await asyncio.sleep(0)
            with pytest.raises(Overloaded):
                await batcher.submit(pets)
            dropped.cancel()
            await asyncio.gather(dropped, return_exceptions=True)
            gated.session.gate.set()
            await asyncio.gather(held, kept)
        with pytest.raises(Stopping):
            await batcher.submit(mixed)

    asyncio.run(main())
    totals = gated.counters.read()
    assert (totals.answered, totals.failed) == (2, 3)
    assert totals.failures == {"REJECTED": 2, "CANCELED": 1, "BACKEND": 0, "OTHER": 0}
    ends = {name: (t.rows, t.answered, t.refused, t.failed) for name, t in totals.tasks.items()}
    assert ends == {"pets": (3, 2, 2, 0), "cars": (1, 1, 1, 0), "flowers": (0, 0, 0, 0)}
    spent = totals.queue_ns + totals.engine_ns + totals.input_ns + totals.output_ns
    assert spent == totals.request_ns
    assert (totals.batch_rows.total, totals.batch_tasks.total) == (4, 3)


@pytest.mark.parametrize("delay", [0.0, 1.0, 60_000.0])
def test_a_full_batch_leaves_at_once_whatever_the_delay(gated, rows, delay):
    (full,) = _requests(gated, rows, [8])

    async def main():
        async with Batcher(gated, max_delay_ms=delay) as batcher:
            await batcher.submit(full)

    asyncio.run(main())
    assert len(gated.session.calls) == 1


def test_leaving_answers_what_waits_without_its_delay(gated, rows):
    (request,) = _requests(gated, rows, [1])

    async def main():
        async with Batcher(gated, max_delay_ms=60_000) as batcher:
            waiting = asyncio.create_task(batcher.submit(request))
            await asyncio.sleep(0)
        assert len(await waiting) == 1
        with pytest.raises(Stopping):
            await batcher.submit(request)

    asyncio.run(main())


def test_a_full_queue_refuses_newcomers_and_keeps_its_own(gated, rows):
    requests = _requests(gated, rows, [1, 3, 2])

    async def main():
        async with Batcher(gated, max_queued_rows=4) as batcher:
            held = await _blocked(gated, batcher, requests[0])
            queued = asyncio.create_task(batcher.submit(requests[1]))
            await asyncio.sleep(0)
            with pytest.raises(Overloaded, match="queue is full"):
                await batcher.submit(requests[2])
            gated.session.gate.set()
            assert [len(await task) for task in (held, queued)] == [1, 3]

    asyncio.run(main())


def test_a_cancelled_request_leaves_the_queue_and_frees_its_room(gated, rows):
    requests = _requests(gated, rows, [1, 4, 4])

    async def main():
        async with Batcher(gated, max_queued_rows=4) as batcher:
            held = await _blocked(gated, batcher, requests[0])
            dropped = asyncio.create_task(batcher.submit(requests[1]))
            await asyncio.sleep(0)
            dropped.cancel()
            await asyncio.gather(dropped, return_exceptions=True)
            kept = asyncio.create_task(batcher.submit(requests[2]))
            await asyncio.sleep(0)
            held.cancel()  # inside the engine: its rows run, nobody reads them
            gated.session.gate.set()
            assert len(await kept) == 4

    asyncio.run(main())
    assert [len(call) for call in gated.session.calls] == [1, 4]
    assert gated.counters.read().rows == 4


def test_cancelling_the_only_request_leaves_the_batcher_alive(gated, rows):
    (request,) = _requests(gated, rows, [1])

    async def main():
        async with Batcher(gated, max_delay_ms=20) as batcher:
            dropped = asyncio.create_task(batcher.submit(request))
            await asyncio.sleep(0.001)
            dropped.cancel()
            await asyncio.sleep(0.03)
            assert batcher.ready
            assert len(await batcher.submit(request)) == 1

    asyncio.run(main())


def test_our_own_mistake_reaches_the_callers_and_the_batcher_lives_on(gated, rows, monkeypatch):
    (request,) = _requests(gated, rows, [1])

    async def main():
        async with Batcher(gated) as batcher:
            with monkeypatch.context() as patch:
                patch.setattr(gated, "run", lambda requests: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    await batcher.submit(request)
            assert len(await batcher.submit(request)) == 1

    asyncio.run(main())
