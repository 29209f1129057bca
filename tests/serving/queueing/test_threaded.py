"""A batcher for callers without an event loop."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from utune_deploy.merge.errors import UsageError
from utune_deploy.serving.answers import Answers
from utune_deploy.serving.queueing.threaded import ThreadedBatcher
from utune_deploy.serving.rejections import EngineFailed, Expired, Overloaded, Stopping
from utune_deploy.serving.service import Service


class GatedSession:
    """Waits for the gate before it runs."""

    provider = "gated"

    def __init__(self, inner) -> None:
        self.inner = inner
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def run(self, inputs, task=None):
        self.entered.set()
        self.gate.wait()
        return self.inner.run(inputs, task)


class Box:
    """Keeps what callbacks bring."""

    def __init__(self, count: int) -> None:
        self.results = [None] * count
        self.left = count
        self.lock, self.full = threading.Lock(), threading.Event()

    def at(self, index: int):
        def on_done(result) -> None:
            with self.lock:
                assert self.results[index] is None
                self.results[index] = result
                self.left -= 1
                if not self.left:
                    self.full.set()

        return on_done


@pytest.fixture
def gated(service, bundle) -> Service:
    return Service(bundle, GatedSession(service.session))


def test_requests_of_many_threads_are_answered_each_with_its_own(gated, service, rows):
    requests = [gated.registry.check(*rows(1 + i % 3, seed=i)) for i in range(60)]
    box = Box(len(requests))

    def some(start: int) -> None:
        for index in range(start, len(requests), 4):
            batcher.submit(requests[index], box.at(index))

    with ThreadedBatcher(gated) as batcher:
        threads = [threading.Thread(target=some, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert box.full.wait(30)
    for request, answers in zip(requests, box.results, strict=True):
        wanted = service.answer(request.inputs, request.tasks)
        np.testing.assert_allclose(answers.logits, wanted.logits, rtol=1e-5, atol=1e-4)
        assert answers.labels == wanted.labels
    assert gated.counters.read().answered == len(requests)


def test_closing_answers_what_was_taken_and_refuses_the_rest(gated, rows):
    request = gated.registry.check(*rows(1))
    box = Box(21)
    batcher = ThreadedBatcher(gated, max_delay_ms=60_000)
    for index in range(20):
        batcher.submit(request, box.at(index))
    batcher.close()
    batcher.close()
    assert all(isinstance(result, Answers) for result in box.results[:20])
    batcher.submit(request, box.at(20))
    assert isinstance(box.results[20], Stopping)
    assert not batcher.batcher.ready


def test_refusals_come_through_the_callback(gated, rows):
    request = gated.registry.check(*rows(1))
    gated.session.gate.clear()
    box = Box(5)
    with ThreadedBatcher(gated, max_queued_rows=2) as batcher:
        batcher.submit(request, box.at(0))
        assert gated.session.entered.wait(30)
        late = threading.Event()

        def on_late(result) -> None:
            box.at(1)(result)
            late.set()

        batcher.submit(request, on_late, timeout_us=1000)
        assert late.wait(30)  # and its room in the queue is free again
        batcher.submit(request, box.at(2), priority=1)
        batcher.submit(request, box.at(3))
        batcher.submit(request, box.at(4))
        gated.session.gate.set()
        assert box.full.wait(30)
    kinds = [type(result) for result in box.results]
    assert kinds == [Answers, Expired, Answers, Answers, Overloaded]


def test_mistakes_of_ours_and_of_the_caller_end_no_thread(gated, rows, monkeypatch, caplog):
    request = gated.registry.check(*rows(1))
    box = Box(2)
    with ThreadedBatcher(gated) as batcher:
        arrived = threading.Event()

        def broken(result) -> None:
            box.at(0)(result)
            arrived.set()
            raise KeyError("the callback's own")

        with monkeypatch.context() as patch:
            patch.setattr(gated, "run", lambda requests: 1 / 0)
            batcher.submit(request, broken)
            assert arrived.wait(30)
        batcher.submit(request, box.at(1))
        assert box.full.wait(30)
    assert isinstance(box.results[0], EngineFailed)
    assert isinstance(box.results[0].__cause__, ZeroDivisionError)
    assert isinstance(box.results[1], Answers)
    assert "callback failed" in caplog.text


def test_a_wrong_setting_is_raised_where_it_is_written(gated):
    with pytest.raises(UsageError, match="weight"):
        ThreadedBatcher(gated, weights={"pets": 0})


def test_other_work_runs_on_the_same_loop_and_is_waited_for(gated, rows):
    gated.session.gate.clear()
    request = gated.registry.check(*rows(1))
    results = []
    with ThreadedBatcher(gated) as batcher:

        def ask() -> None:
            results.append(batcher.run(lambda: batcher.batcher.submit(request)))

        asker = threading.Thread(target=ask)
        asker.start()
        assert gated.session.entered.wait(30)
        closer = threading.Thread(target=batcher.close)
        closer.start()
        gated.session.gate.set()
        asker.join()
        closer.join()
        with pytest.raises(Stopping):
            batcher.run(lambda: batcher.batcher.submit(request))
    assert isinstance(results[0], Answers)


def test_what_other_work_raises_is_raised(gated):
    async def broken() -> None:
        raise KeyError("its own")

    with ThreadedBatcher(gated) as batcher, pytest.raises(KeyError):
        batcher.run(broken)
