"""Which versions stand in the engine's rows: least recent use, pins, and no row taken from a running call."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from utune_deploy.export.bundle import Task
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError, UtuneError
from utune_deploy.serving.tasks.resident import Resident
from utune_deploy.serving.tasks.versions import Version

SECONDS = 20  # far longer than any of it takes: what runs longer hangs


class Session:
    """Rows in a list; a write may be held up at a gate."""

    def __init__(self, rows: int) -> None:
        self.rows: list[object] = [None] * rows
        self.gate = threading.Event()
        self.gate.set()
        self.writing = threading.Semaphore(0)

    def write_row(self, row, tensors) -> None:
        self.rows[row] = "half written"
        self.writing.release()
        assert self.gate.wait(SECONDS)
        self.rows[row] = tensors["name"]


def version(name: str, read=None, number: int = 1) -> Version:
    return Version(Task(name, 0, ("a",), None, ""), number, read=read or (lambda: {"name": name}))


def damaged(name: str) -> Version:
    def read():
        raise IncompatibleArtefact("the file is damaged")

    return version(name, read)


def bank(rows: int, **settings) -> tuple[Resident, Session]:
    session = Session(rows)
    return Resident(session, rows, 8, **settings), session


def there(resident: Resident, versions) -> list[str]:
    return [each.name for each in versions if each in resident]


def touch(resident: Resident, *versions: Version) -> None:
    with resident.hold(versions) as rows:
        for each, row in zip(versions, rows, strict=True):
            assert resident._session.rows[row] == each.name


def in_thread(work) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def ends(thread: threading.Thread) -> bool:
    thread.join(SECONDS)
    return not thread.is_alive()


A, B, C, D, E = map(version, "abcde")


def test_rows_are_those_of_the_versions_one_for_each_answer():
    resident, session = bank(4)
    with resident.hold([A, B, A, C, B]) as rows:
        assert rows.dtype == np.int64
        assert [session.rows[row] for row in rows] == list("abacb")
        assert (rows[0], rows[1]) == (rows[2], rows[4])
    assert (resident.loads, resident.evictions, resident.used) == (3, 0, 3)


def test_what_is_there_is_not_read_again():
    resident, _ = bank(4)
    for _ in range(3):
        touch(resident, A, B)
        resident.fetch(A)
    assert resident.loads == 2


def test_the_least_recently_asked_makes_room():
    resident, _ = bank(3)
    for each in (A, B, C):
        touch(resident, each)
    touch(resident, A)
    touch(resident, D)
    assert there(resident, [A, B, C, D]) == ["a", "c", "d"]
    touch(resident, C, A)
    touch(resident, E)
    assert there(resident, [A, B, C, D, E]) == ["a", "c", "e"]
    assert (resident.loads, resident.evictions, resident.used) == (5, 2, 3)


def test_versions_of_one_task_are_told_apart():
    resident, _ = bank(3)
    old, new = version("a"), version("a", number=2)
    with resident.hold([old, new, old]) as rows:
        assert rows[0] == rows[2] != rows[1]


def test_a_call_never_loses_a_row_to_itself():
    resident, _ = bank(3)
    touch(resident, A, B, C)
    touch(resident, D, A, E)  # A is the oldest, and asked for
    assert there(resident, [A, B, C, D, E]) == ["a", "d", "e"]
    assert (resident.loads, resident.evictions) == (5, 2)  # A was never read again


def test_more_versions_than_rows_in_one_call_are_refused():
    resident, _ = bank(2)
    with pytest.raises(UsageError, match="more tasks than the bank has rows"):
        touch(resident, A, B, C)
    assert resident.used == 0


def test_a_pinned_version_stays():
    resident, _ = bank(4)
    touch(resident, A)
    resident.pin(A)
    for each in (B, C, D, E):
        touch(resident, each)
    assert there(resident, [A, B]) == ["a"]
    assert resident.pinned(A)
    resident.pin(A, pinned=False)
    touch(resident, C, D, E)
    touch(resident, B)
    assert there(resident, [A]) == []


def test_a_pin_reads_what_is_not_there():
    resident, _ = bank(4)
    resident.pin(A)
    assert A in resident
    resident.pin(A)  # twice is once
    resident.pin(B)
    with pytest.raises(UsageError, match="no more tasks can be pinned"):
        resident.pin(C)
    assert not resident.pinned(C)
    resident.pin(A, pinned=False)
    resident.pin(C)


@pytest.mark.parametrize(
    ("rows", "largest_call", "pins"), [(8, 8, 0), (9, 8, 1), (10, 8, 2), (100, 8, 50), (4, 1, 2)]
)
def test_pins_leave_rows_for_the_largest_call(rows, largest_call, pins):
    resident, _ = bank(rows, largest_call=largest_call)
    versions = [version(f"v{n}") for n in range(pins + 1)]
    for each in versions[:pins]:
        resident.pin(each)
    with pytest.raises(UsageError, match="no more tasks can be pinned"):
        resident.pin(versions[-1])
    others = [version(f"w{n}") for n in range(largest_call)]
    asker = in_thread(lambda: touch(resident, *others))
    assert ends(asker)


def test_a_dropped_version_gives_its_row_back():
    resident, _ = bank(4)
    touch(resident, A, B)
    resident.pin(A)
    resident.drop(A)
    resident.drop(C)  # not there: nothing to do
    assert there(resident, [A, B]) == ["b"]
    assert (resident.used, resident.evictions) == (1, 0)
    resident.pin(C)
    resident.pin(D)


def test_a_version_dropped_while_a_call_runs_with_it_leaves_when_the_call_ends():
    resident, session = bank(4)
    with resident.hold([A]) as rows:
        resident.drop(A)
        touch(resident, B)
        assert session.rows[rows[0]] == "a"
        with resident.hold([A]) as again:
            assert again[0] == rows[0]
        assert session.rows[rows[0]] == "a"
        assert resident.used == 2
    assert there(resident, [A, B]) == ["b"]
    touch(resident, A)  # a request that was under way: it is read once more, and leaves again
    assert there(resident, [A, B]) == ["b"]
    assert resident.used == 1


def test_a_version_dropped_while_it_is_read_leaves_when_the_call_ends():
    resident, session = bank(2)
    session.gate.clear()
    reader = in_thread(lambda: touch(resident, A))
    assert session.writing.acquire(timeout=SECONDS)
    resident.drop(A)
    session.gate.set()
    assert ends(reader)
    assert resident.used == 0


def test_a_running_calls_rows_are_never_taken():
    resident, session = bank(2)
    with ExitStack() as running:
        rows = running.enter_context(resident.hold([A, B]))
        waits = in_thread(lambda: touch(resident, C))
        waits.join(0.1)
        assert waits.is_alive()
        assert [session.rows[row] for row in rows] == ["a", "b"]
    assert ends(waits)
    assert C in resident


def test_a_row_that_is_being_written_is_not_taken_and_both_who_ask_for_it_get_it():
    resident, session = bank(2)
    session.gate.clear()
    first = in_thread(lambda: touch(resident, A))
    assert session.writing.acquire(timeout=SECONDS)
    second = in_thread(lambda: touch(resident, A))
    third = in_thread(lambda: touch(resident, B, C))
    second.join(0.05)
    assert second.is_alive()
    session.gate.set()
    assert ends(first)
    assert ends(second)
    assert ends(third)
    assert resident.loads == 3


def test_a_read_that_fails_frees_the_row_and_may_be_tried_again():
    resident, _ = bank(2)
    broken = [True]

    def read():
        if broken:
            raise IncompatibleArtefact("the file is damaged")
        return {"name": "a"}

    mended = version("a", read)
    for _ in range(5):
        with pytest.raises(IncompatibleArtefact, match="damaged"):
            touch(resident, B, mended)
    assert resident.used == 1
    broken.clear()
    touch(resident, mended, C)
    touch(resident, B, mended)


@pytest.mark.parametrize("raised", [MemoryError, KeyboardInterrupt])
def test_whatever_a_read_raises_frees_the_rows(raised):
    resident, _ = bank(2)

    def read():
        raise raised

    with pytest.raises(raised), resident.hold([version("x", read), A]):
        pass
    assert resident.used == 0
    touch(resident, A, B)


def test_a_read_that_fails_fails_everyone_who_waits_for_it():
    resident, _ = bank(4)
    reading, gate = threading.Semaphore(0), threading.Event()

    def read():
        reading.release()
        assert gate.wait(SECONDS)
        raise IncompatibleArtefact("the file is damaged")

    broken = version("x", read)
    found: list[UtuneError] = []

    def ask(*versions) -> None:
        try:
            touch(resident, *versions)
        except UtuneError as error:
            found.append(error)

    first = in_thread(lambda: ask(broken, B))
    assert reading.acquire(timeout=SECONDS)
    waiters = [in_thread(lambda: ask(A, broken)) for _ in range(3)]
    while resident._stands[broken].calls < 4:  # until all three wait
        threading.Event().wait(0.001)
    gate.set()
    assert all(map(ends, [first, *waiters]))
    assert sum(isinstance(error, IncompatibleArtefact) for error in found) == 1
    assert sum("another call waited" in error.what for error in found) == 3
    assert there(resident, [A, B, broken]) == ["a"]
    assert resident.used == 1
    touch(resident, A, B, C, D)


def test_many_threads_and_few_rows_end_and_every_row_is_right():
    rows, largest = 6, 4
    resident, session = bank(rows, largest_call=largest)
    versions = [version(f"v{n}") for n in range(25)] + [damaged(f"x{n}") for n in range(2)]
    wrong: list[object] = []

    def ask(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(300):
            chosen = [versions[n] for n in random.integers(0, 25, random.integers(1, largest + 1))]
            if random.random() < 0.05:
                chosen = [versions[25 + random.integers(0, 2)], *chosen[1:]]
            try:
                with resident.hold(chosen) as held:
                    names = [session.rows[row] for row in held]
                    if names != [each.name for each in chosen]:
                        wrong.append((names, chosen))
            except UtuneError as error:  # or it waited for a row behind a damaged one
                if chosen[0].name[0] != "x" and "another call waited" not in error.what:
                    wrong.append(error)
            if random.random() < 0.1:
                resident.drop(versions[random.integers(0, 27)])
            if random.random() < 0.1:
                try:
                    resident.pin(versions[random.integers(0, 25)], pinned=random.random() < 0.5)
                except UtuneError as error:
                    if "pinned" not in error.what and "another call" not in error.what:
                        wrong.append(error)

    threads = [in_thread(lambda seed=seed: ask(seed)) for seed in range(12)]
    assert all(map(ends, threads))
    assert not wrong
    assert resident.used <= rows
    assert resident.evictions > 0
    assert sorted([*resident._free, *(s.row for s in resident._stands.values())]) == list(
        range(rows)
    )
    assert all(stand.calls == 0 for stand in resident._stands.values())


class Life(RuleBasedStateMachine):
    """Against a model: a list of versions in order of use."""

    ROWS, LARGEST = 5, 3

    def __init__(self) -> None:
        super().__init__()
        self.resident, self.session = bank(self.ROWS, largest_call=self.LARGEST)
        self.versions = [version(f"v{n}") for n in range(9)]
        self.order: list[Version] = []
        self.pinned: set[Version] = set()
        self.dropped: set[Version] = set()
        self.held: list[tuple] = []

    def _held(self) -> set[Version]:
        return {each for chosen, _, _ in self.held for each in chosen}

    def _use(self, chosen) -> None:
        for each in dict.fromkeys(chosen):
            if each in self.order:
                self.order.remove(each)
            elif len(self.order) == self.ROWS:
                busy = self._held() | self.pinned | set(chosen)
                self.order.remove(next(v for v in self.order if v not in busy))
            self.order.append(each)

    def _end(self, chosen) -> None:
        for each in set(chosen) & self.dropped - self._held():
            self.order.remove(each)

    def _fits(self, chosen) -> bool:
        busy = self._held() | self.pinned | set(chosen)
        return len(busy) <= self.ROWS

    @rule(picked=st.lists(st.integers(0, 8), min_size=1, max_size=3))
    def ask(self, picked) -> None:
        chosen = [self.versions[n] for n in picked]
        if self._fits(chosen):
            touch(self.resident, *chosen)
            self._use(chosen)
            self._end(chosen)

    @rule(picked=st.lists(st.integers(0, 8), min_size=1, max_size=2))
    def begin(self, picked) -> None:
        chosen = [self.versions[n] for n in picked]
        if self._fits(chosen):
            call = self.resident.hold(chosen)
            rows = call.__enter__()
            self._use(chosen)
            self.held.append((chosen, call, rows))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 100))
    def end(self, which) -> None:
        chosen, call, _ = self.held.pop(which % len(self.held))
        call.__exit__(None, None, None)
        self._end(chosen)

    @rule(n=st.integers(0, 8))
    def drop(self, n) -> None:
        each = self.versions[n]
        self.resident.drop(each)
        self.dropped.add(each)
        self.pinned.discard(each)
        if each in self.order and each not in self._held():
            self.order.remove(each)

    @rule(n=st.integers(0, 8))
    def pin(self, n) -> None:
        each = self.versions[n]
        if each in self.dropped or not self._fits([each]):
            return
        self._use([each])
        if len(self.pinned - {each}) + 1 > self.ROWS - self.LARGEST:
            with pytest.raises(UsageError, match="no more tasks can be pinned"):
                self.resident.pin(each)
        else:
            self.resident.pin(each)
            self.pinned.add(each)

    @rule(n=st.integers(0, 8))
    def unpin(self, n) -> None:
        self.resident.pin(self.versions[n], pinned=False)
        self.pinned.discard(self.versions[n])

    @invariant()
    def it_is_as_the_model(self) -> None:
        assert list(self.resident._stands) == self.order
        assert self.resident.used == len(self.order) <= self.ROWS
        assert {v for v in self.versions if self.resident.pinned(v)} == self.pinned
        for chosen, _, rows in self.held:
            assert [self.session.rows[row] for row in rows] == [each.name for each in chosen]


Life.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_any_order_of_calls_is_as_a_list_in_order_of_use = Life.TestCase
