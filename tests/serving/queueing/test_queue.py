"""Who goes next: nothing lost, order kept, shares by weight, nobody starved."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utune_deploy.merge.errors import UsageError
from utune_deploy.serving.queueing.queue import FairQueue
from utune_deploy.serving.rejections import Overloaded

BATCH = 8
TASKS = "abcd"
WEIGHTS = {"a": 3.0, "b": 0.5}

tasks_of_a_request = st.lists(st.sampled_from(TASKS), min_size=1, max_size=BATCH).map(tuple)
one_task = st.builds(
    lambda task, rows: (task,) * rows, st.sampled_from(TASKS), st.integers(1, BATCH)
)
requests = st.one_of(one_task, tasks_of_a_request)


def _put(queue, number, tasks, **settings):
    settings.setdefault("now", number)
    return queue.put((number, tasks), rows=len(tasks), tasks=tasks, **settings)


def _drain(queue, size=BATCH):
    while batch := queue.take(size):
        yield [ticket.item for ticket in batch]


@settings(deadline=None)
@given(st.lists(st.tuples(requests, st.integers(0, 4)), max_size=60), st.data())
def test_nothing_is_lost_or_doubled_and_each_flow_keeps_its_order(arrivals, data):
    """Puts, takes and removals in any order; what came out, and stayed in, is what went in."""
    queue = FairQueue(weights=WEIGHTS)
    waiting, out, put = {}, [], []
    for number, (tasks, priority) in enumerate(arrivals):
        waiting[number] = _put(queue, number, tasks, priority=priority)
        put.append(number)
        action = data.draw(st.sampled_from(("wait", "wait", "take", "remove")))
        if action == "take":
            size = data.draw(st.integers(BATCH, 2 * BATCH))
            batch = queue.take(size)
            assert batch
            assert sum(ticket.rows for ticket in batch) <= size
            out += [ticket.item for ticket in batch]
            for ticket in batch:
                del waiting[ticket.item[0]]
                assert not queue.remove(ticket)
        elif action == "remove" and waiting:
            gone = data.draw(st.sampled_from(sorted(waiting)))
            ticket = waiting.pop(gone)
            assert queue.remove(ticket)
            assert not queue.remove(ticket)
            put.remove(gone)
        assert len(queue) == len(waiting)
        assert queue.rows == sum(ticket.rows for ticket in waiting.values())
        assert queue.oldest == min(waiting, default=None)
    for batch in _drain(queue):
        assert sum(len(tasks) for _, tasks in batch) <= BATCH
        out += batch
    assert sorted(number for number, _ in out) == put
    assert (len(queue), queue.rows, queue.oldest) == (0, 0, None)
    assert not any(level.ring for level in queue._levels)  # an idle flow costs nothing
    lines = defaultdict(list)
    for number, tasks in out:
        priority = arrivals[number][1]
        lines[frozenset(tasks), priority if priority in (1, 3) else 2].append(number)
    for line in lines.values():
        assert line == sorted(line)


@given(st.lists(st.integers(1, BATCH), max_size=40))
def test_one_flow_alone_is_first_in_first_out_and_packed_in_that_order(sizes):
    queue = FairQueue(weights=WEIGHTS)
    for number, rows in enumerate(sizes):
        _put(queue, number, ("a",) * rows)
    line = deque(enumerate(sizes))
    for batch in _drain(queue):
        wanted, room = [], BATCH
        while line and line[0][1] <= room:
            room -= line[0][1]
            wanted.append(line.popleft()[0])
        assert [number for number, _ in batch] == wanted
    assert not line


@settings(deadline=None)
@given(st.lists(requests, min_size=1, max_size=60))
def test_a_batch_is_as_full_as_the_order_inside_flows_allows(arrivals):
    queue = FairQueue()
    lines = defaultdict(deque)
    for number, tasks in enumerate(arrivals):
        _put(queue, number, tasks)
        lines[frozenset(tasks)].append(len(tasks))
    for batch in _drain(queue):
        room = BATCH
        for _, tasks in batch:
            room -= lines[frozenset(tasks)].popleft()
        assert all(line[0] > room for line in lines.values() if line)


weights_of_tasks = st.dictionaries(
    st.sampled_from(TASKS), st.sampled_from((0.25, 0.5, 1.0, 2.0, 3.0)), min_size=2
)


def _quanta(weights):
    """What a turn gives each task: the lightest, or an unnamed task if it is lighter, one row."""
    return {task: weight / min(1.0, *weights.values()) for task, weight in weights.items()}


@settings(deadline=None)
@given(weights_of_tasks, st.lists(st.integers(1, 64), min_size=1, max_size=5))
def test_the_order_follows_the_weights_to_within_a_turn_and_a_request(weights, sizes):
    """One batch without a limit shows the order; as long as all wait, no two are further apart."""
    queue, quanta = FairQueue(weights=weights), _quanta(weights)
    rows = dict.fromkeys(weights, 0)
    for task in weights:
        for number in range(30):
            size = sizes[(number + len(rows)) % len(sizes)]
            _put(queue, number, (task,) * size)
            rows[task] += size
    sent = Counter()
    for ticket in queue.take(10**6):
        task = ticket.tasks[0]
        sent[task] += ticket.rows
        if sent[task] == rows[task]:  # this one waits no longer
            break
        for one in weights:
            for other in weights:
                lead = sent[one] / quanta[one] - sent[other] / quanta[other]
                assert lead <= 1 + max(sizes) / quanta[other]


@settings(deadline=None)
@given(weights_of_tasks, st.sampled_from((1, 2, 4, 8)), st.integers(1, 60))
def test_shares_over_many_batches_follow_the_weights(weights, size, batches):
    """With requests that fill batches exactly, what comes in between changes nothing."""
    queue, quanta = FairQueue(weights=weights), _quanta(weights)
    for task in weights:
        for number in range(2 * BATCH):
            _put(queue, number, (task,) * size)
    sent = Counter()
    for _ in range(batches):
        for ticket in queue.take(BATCH):
            sent[ticket.tasks[0]] += size
            _put(queue, 0, ticket.tasks)
    assert sum(sent.values()) == batches * BATCH
    for one in weights:
        for other in weights:
            lead = sent[one] / quanta[one] - sent[other] / quanta[other]
            assert lead <= 1 + size / quanta[other]


def test_room_is_given_away_only_when_nobody_who_can_pay_fits():
    """Of the three only `c` fits behind `a`, and both others behind `b`: the debts stay within bounds."""
    weights, rows = {"a": 3, "b": 0.25, "c": 1}, {"a": 7, "b": 4, "c": 2}
    queue, quanta = FairQueue(weights=weights), _quanta(weights)
    for task, size in rows.items():
        for number in range(2 * BATCH):
            _put(queue, number, (task,) * size)
    sent = Counter()
    for _ in range(3000):
        for ticket in queue.take(BATCH):
            sent[ticket.tasks[0]] += ticket.rows
            _put(queue, 0, ticket.tasks)
    turns = [sent[task] / quanta[task] for task in weights]
    assert max(turns) - min(turns) <= 2 * BATCH


def test_a_task_that_alone_fits_the_leftovers_has_them_and_the_others_their_shares():
    """Behind 5 rows of 8 there is room for the one-row task only; the other two stay even."""
    queue = FairQueue()
    for number in range(2 * BATCH):
        for task, size in (("a", 5), ("b", 5), ("c", 1)):
            _put(queue, number, (task,) * size)
    sent = Counter()
    for _ in range(1000):
        batch = queue.take(BATCH)
        assert sum(ticket.rows for ticket in batch) == BATCH
        for ticket in batch:
            sent[ticket.tasks[0]] += ticket.rows
            _put(queue, 0, ticket.tasks)
    assert abs(sent["a"] - sent["b"]) <= 5


def test_rows_of_one_row_requests_are_shared_to_within_one_turn():
    queue = FairQueue(weights={"a": 3, "b": 2})
    for number in range(600):
        for task in "abc":
            _put(queue, number, (task,))
    sent = Counter()
    for _ in range(100):
        sent.update(ticket.tasks[0] for ticket in queue.take(BATCH))
        turns = sum(sent.values()) / 6
        for task, weight in (("a", 3), ("b", 2), ("c", 1)):
            assert abs(sent[task] - weight * turns) <= weight


def test_mixed_sizes_share_evenly_although_large_ones_do_not_always_fit():
    queue = FairQueue()
    for number in range(2000):
        _put(queue, number, ("a",))
        _put(queue, number, ("b",) * 5)
    sent = Counter()
    for _ in range(200):
        batch = queue.take(BATCH)
        assert sum(ticket.rows for ticket in batch) == BATCH
        for ticket in batch:
            sent[ticket.tasks[0]] += ticket.rows
    assert abs(sent["a"] - sent["b"]) <= 2 * BATCH


@pytest.mark.parametrize("rows", range(1, BATCH + 1))
def test_a_request_of_any_size_is_answered_however_much_the_others_send(rows):
    """Nine tasks that never run dry: after at most one turn of each per row, and one batch, it is out."""
    queue = FairQueue()
    others = [f"hot{i}" for i in range(9)]
    for number in range(50):
        for task in others:
            _put(queue, number, (task,))
    _put(queue, 0, ("light",) * rows)
    batches = 0
    taken = []
    while ("light",) * rows not in taken:
        taken = [ticket.tasks for ticket in queue.take(BATCH)]
        batches += 1
        for tasks in taken:
            _put(queue, 0, tasks)
    assert batches <= rows * 10 // BATCH + 2


def test_an_idle_task_is_in_the_next_batch_however_long_another_waits():
    queue = FairQueue()
    for number in range(1000):
        _put(queue, number, ("hot",))
    for _ in range(5):
        queue.take(BATCH)
        _put(queue, 0, ("light",))
        assert ("light",) in [ticket.tasks for ticket in queue.take(BATCH)]


def test_who_filled_the_room_before_a_large_request_pays_for_it():
    queue = FairQueue()
    for number in range(40):
        _put(queue, number, ("small",))
    _put(queue, 0, ("large",) * 5)
    _put(queue, 1, ("large",) * 5)
    sent = [Counter(t.tasks[0] for t in queue.take(BATCH)) for _ in range(3)]
    assert [batch["large"] for batch in sent] == [0, 1, 1]
    assert [batch["small"] for batch in sent] == [8, 3, 3]


def test_naming_a_second_task_buys_no_larger_share():
    queue = FairQueue(weights={"rich": 4})
    for number in range(200):
        _put(queue, number, ("rich",))
        _put(queue, number, ("rich", "poor"))
        _put(queue, number, ("poor",))
    rows = Counter()
    for _ in range(30):
        for ticket in queue.take(BATCH):
            rows[ticket.tasks] += ticket.rows
    assert rows["rich",] == pytest.approx(4 * rows["poor",], abs=8)
    assert rows["rich", "poor"] == pytest.approx(rows["poor",], abs=8)


def test_levels_are_strict_and_unknown_ones_are_the_default():
    queue = FairQueue(priority_levels=3, default_priority=2)
    for number, priority in enumerate((3, 0, 9, 2, 1)):
        _put(queue, number, ("a",), priority=priority)
    assert [ticket.item[0] for ticket in queue.take(BATCH)] == [4, 1, 2, 3, 0]


def test_a_lower_level_fills_the_room_that_a_higher_one_leaves():
    queue = FairQueue()
    _put(queue, 0, ("a",) * 6, priority=1)
    _put(queue, 1, ("a",) * 4, priority=1)
    _put(queue, 2, ("b",) * 2)
    assert [ticket.item[0] for ticket in queue.take(BATCH)] == [0, 2]
    assert [ticket.item[0] for ticket in queue.take(BATCH)] == [1]


def test_limits_refuse_and_say_by_whom():
    queue = FairQueue(max_rows=7, max_task_rows=4)
    ticket = _put(queue, 0, ("a", "a", "b"))
    with pytest.raises(Overloaded, match="the task's part") as refused:
        _put(queue, 1, ("a", "b", "a", "a"))
    assert refused.value.details["where"] == "task a"
    _put(queue, 1, ("b", "b", "b"))
    with pytest.raises(Overloaded, match="the queue is full"):
        _put(queue, 2, ("c", "c"))
    queue.remove(ticket)
    _put(queue, 3, ("a", "a", "a", "a"))
    assert queue.rows == 7
    list(_drain(queue))
    assert not queue._rows_by_task


@given(st.lists(st.tuples(st.sampled_from(TASKS), st.none() | st.integers(0, 50)), max_size=40))
def test_exactly_those_expire_whose_deadline_has_come(arrivals):
    queue = FairQueue()
    for number, (task, deadline) in enumerate(arrivals):
        _put(queue, number, (task,), deadline=deadline)
    assert queue.next_deadline == min((d for _, d in arrivals if d is not None), default=None)
    late = [number for number, (_, d) in enumerate(arrivals) if d is not None and d <= 25]
    expired = [ticket.item[0] for ticket in queue.expire(25)]
    assert sorted(expired) == late
    assert expired == sorted(expired, key=lambda number: (arrivals[number][1], number))
    left = [number for batch in _drain(queue) for number, _ in batch]
    assert sorted(left + expired) == list(range(len(arrivals)))
    assert queue.next_deadline is None


def test_deadlines_of_requests_that_left_are_swept_out():
    queue = FairQueue()
    for number in range(10_000):
        _put(queue, number, ("a",), deadline=10**9 + number)
        queue.take(BATCH)
    assert len(queue._deadlines) < 100


@pytest.mark.parametrize("rows", [1, 64])
def test_thousands_of_flows_cost_no_more_than_one(rows):
    """Turns are counted, not timed: they are about as many as requests, large or small."""
    queue = FairQueue()
    turns = 0

    class Counting(OrderedDict):
        def move_to_end(self, key, last=True):
            nonlocal turns
            turns += 1
            super().move_to_end(key, last)

    queue._levels[1].ring = Counting()
    for number in range(3):
        for flow in range(2000):
            _put(queue, number, (f"task{flow}",) * rows)
    served = sum(map(len, _drain(queue, 64)))
    assert served == 6000
    assert turns <= 2 * served


@settings(deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=6))
def test_rounds_that_are_skipped_are_as_good_as_run(sizes):
    def order(queue):
        for number, size in enumerate(sizes * 4):
            _put(queue, number, (f"task{number % len(sizes)}",) * size)
        return [[number for number, _ in batch] for batch in _drain(queue, 64)]

    class Patient(type(FairQueue()._levels[0])):
        def skip_rounds(self):
            pass

    slow = FairQueue(weights={"task0": 0.5, "task1": 3})
    slow._levels = [Patient() for _ in slow._levels]
    assert order(FairQueue(weights={"task0": 0.5, "task1": 3})) == order(slow)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_is_a_positive_number(weight):
    with pytest.raises(UsageError, match="weight"):
        FairQueue(weights={"a": weight})


def test_the_default_priority_is_a_level():
    with pytest.raises(UsageError, match="default priority"):
        FairQueue(priority_levels=2, default_priority=3)
