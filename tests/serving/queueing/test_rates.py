"""Rows per second of a task: a burst at once, then no faster than the rate, and no task pays for another."""

from __future__ import annotations

import asyncio
import random

import pytest

from utune_deploy.merge.errors import UsageError
from utune_deploy.serving.queueing.batcher import Batcher
from utune_deploy.serving.queueing.rates import Rates
from utune_deploy.serving.rejections import Overloaded
from utune_deploy.serving.service import Service

SECOND = 1_000_000_000


def taken(limits: Rates, tasks: tuple[str, ...], now: float) -> bool:
    at = round(now * SECOND)
    try:
        limits.check(tasks, at)
    except Overloaded:
        return False
    limits.count(tasks, at)
    return True


def test_a_second_s_worth_at_once_and_then_one_by_one():
    limits = Rates(10, None, least_burst=1)
    assert [taken(limits, ("pets",), 5.0) for _ in range(11)] == [True] * 10 + [False]
    assert [taken(limits, ("pets",), t) for t in (5.05, 5.1, 5.15, 5.25, 5.3)] == [
        False, True, False, True, True,
    ]  # fmt: skip
    assert [taken(limits, ("pets",), 60.0) for _ in range(11)] == [True] * 10 + [False]


def test_over_a_long_time_the_rate_holds():
    limits, now, rows, noise = Rates(None, {"pets": 7.5}, least_burst=4), 0.0, 0, random.Random(0)
    while now < 200:
        now += noise.expovariate(30)
        some = noise.randint(1, 4)
        rows += some if taken(limits, ("pets",) * some, now) else 0
    assert 0.97 * 7.5 * 200 < rows <= 7.5 * 200 + 8


def test_a_low_rate_still_lets_a_full_batch_through():
    limits = Rates(0.5, None, least_burst=8)
    assert taken(limits, ("pets",) * 8, 0)
    assert not taken(limits, ("pets",), 1.9)
    assert taken(limits, ("pets",), 2.0)


def test_tasks_have_clocks_of_their_own_and_a_mixed_request_needs_all_of_them():
    limits = Rates(None, {"pets": 1}, least_burst=1)
    assert all(taken(limits, ("cars",), 0) for _ in range(100))
    assert taken(limits, ("pets",), 0)
    assert not taken(limits, ("cars", "pets"), 0.5)
    assert taken(limits, ("cars", "pets"), 1.0)


def test_what_is_refused_elsewhere_costs_nothing():
    limits = Rates(1, None, least_burst=1)
    for _ in range(5):
        limits.check(("pets",), 0)
    assert taken(limits, ("pets",), 0)


@pytest.mark.parametrize("rate", [0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("named", [True, False])
def test_a_rate_is_a_positive_number(rate, named):
    with pytest.raises(UsageError, match="not a positive number"):
        Rates(None if named else rate, {"pets": rate} if named else None, least_burst=1)


def test_a_server_refuses_what_comes_too_fast_and_says_so(service, bundle, rows):
    service = Service(bundle, service.session)  # with counters of its own
    images, _ = rows(8)
    pets, cars = (service.registry.check(images, [task] * 8) for task in ("pets", "cars"))

    async def main():
        async with Batcher(service, rates={"pets": 8}) as batcher:
            await batcher.submit(pets)
            with pytest.raises(Overloaded, match="used up its rate") as caught:
                await batcher.submit(pets)
            assert "at most 8 rows per second" in str(caught.value)
            await asyncio.gather(*(batcher.submit(cars) for _ in range(3)))

    asyncio.run(main())
    totals = service.counters.read()
    assert (totals.answered, totals.failures["REJECTED"]) == (4, 1)
    assert totals.tasks["pets"].refused == 1
