"""The counters against a recount of everything that they were told."""

from __future__ import annotations

import asyncio
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utune_deploy.merge.errors import UsageError
from utune_deploy.serving.rejections import (
    EngineFailed,
    Expired,
    InvalidRequest,
    Overloaded,
    Stopping,
)
from utune_deploy.serving.watching.counters import (
    BATCH_BOUNDS,
    REQUEST_BOUNDS_NS,
    Counters,
    reason_of,
)

KNOWN = ("a", "b")
ERRORS = {
    Overloaded("full"): ("REJECTED", "refused"),
    Expired("late"): ("REJECTED", "refused"),
    Stopping("going"): ("REJECTED", "refused"),
    InvalidRequest("wrong"): ("OTHER", "refused"),
    EngineFailed("broken"): ("BACKEND", "failed"),
    ZeroDivisionError(): ("OTHER", "failed"),
    asyncio.CancelledError(): ("CANCELED", None),
}

names = st.lists(st.sampled_from((*KNOWN, "made up")), min_size=1, max_size=6)
times = st.sampled_from(
    [0, *REQUEST_BOUNDS_NS, *(bound + 1 for bound in REQUEST_BOUNDS_NS)]
) | st.integers(0, 10**11)
answers = st.tuples(st.just("answer"), names, times, times)
failures = st.tuples(st.just("failure"), names, times, st.sampled_from(list(ERRORS)))
batches = st.tuples(st.just("batch"), st.integers(1, 3000), st.integers(1, 3000), st.none())


@settings(deadline=None)
@given(st.lists(st.one_of(answers, failures, batches), max_size=50))
def test_a_reading_is_a_recount(events):
    counters = Counters(KNOWN)
    for kind, first, second, third in events:
        if kind == "answer":
            counters.answer(
                len(first),
                first,
                request_ns=second,
                queue_ns=third,
                engine_ns=1,
                input_ns=2,
                output_ns=3,
            )
        elif kind == "failure":
            counters.failure(third, second, first)
        else:
            counters.batch(first, second)
    totals = counters.read()
    good = [event for event in events if event[0] == "answer"]
    bad = [event for event in events if event[0] == "failure"]
    calls = [event for event in events if event[0] == "batch"]
    assert (totals.answered, totals.failed, totals.batches) == (len(good), len(bad), len(calls))
    assert totals.rows == sum(len(tasks) for _, tasks, _, _ in good)
    assert totals.request_ns == totals.request_time.total == sum(ns for *_, ns, _ in good)
    assert totals.failed_ns == sum(ns for *_, ns, _ in bad)
    assert totals.queue_ns == sum(ns for *_, ns in good)
    assert (totals.engine_ns, totals.input_ns, totals.output_ns) == (
        len(good),
        2 * len(good),
        3 * len(good),
    )
    assert (totals.last_ms > 0) == bool(good)
    for reason, count in totals.failures.items():
        assert count == sum(ERRORS[error][0] == reason for *_, error in bad)
    assert set(totals.tasks) == set(KNOWN)  # a made-up name is no series
    for name, task in totals.tasks.items():
        own = [event for event in good if name in event[1]]
        assert task.rows == sum(tasks.count(name) for _, tasks, _, _ in own)
        assert (task.answered, task.request_ns) == (len(own), sum(ns for *_, ns, _ in own))
        ends = [ERRORS[error][1] for _, tasks, _, error in bad if name in tasks]
        assert (task.refused, task.failed) == (ends.count("refused"), ends.count("failed"))
    for histogram, values, bounds in (
        (totals.request_time, [ns for *_, ns, _ in good], REQUEST_BOUNDS_NS),
        (totals.batch_rows, [rows for _, rows, _, _ in calls], BATCH_BOUNDS),
        (totals.batch_tasks, [tasks for _, _, tasks, _ in calls], BATCH_BOUNDS),
    ):
        below = [sum(value <= bound for value in values) for bound in bounds]
        assert list(histogram.counts) == [*below, len(values)]
        assert histogram.total == sum(values)


def test_threads_lose_nothing():
    counters = Counters(KNOWN)

    def work() -> None:
        for _ in range(2000):
            counters.answer(1, ("a",), request_ns=1, queue_ns=1, engine_ns=1)
            counters.batch(1, 1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    totals = counters.read()
    assert (totals.answered, totals.batches, totals.tasks["a"].rows) == (8000, 8000, 8000)


def test_a_task_is_counted_from_when_it_is_known_until_it_is_forgotten():
    counters = Counters(())
    for act in (lambda: None, lambda: counters.know("a"), lambda: counters.know("a")):
        act()
        counters.answer(1, ("a",), request_ns=1, queue_ns=0, engine_ns=0)
    assert counters.read().rows_by_task == {"a": 2}
    counters.forget("a")
    counters.forget("a")
    counters.answer(1, ("a",), request_ns=1, queue_ns=0, engine_ns=0)
    assert counters.read().tasks == {}
    counters.know("a")
    assert counters.read().rows_by_task == {"a": 0}
    assert counters.read().rows == 4


@pytest.mark.parametrize(("error", "reason"), [(e, r) for e, (r, _) in ERRORS.items()])
def test_every_error_has_a_reason(error, reason):
    assert reason_of(error) == reason
    assert reason_of(UsageError("x")) == "OTHER"
