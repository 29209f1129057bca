"""Where tasks go, how a change of tasks is decided, and what a replica does, without Ray."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utune_deploy.export.engine import Device
from utune_deploy.merge.errors import CheckFailed, MissingDependency
from utune_deploy.serving.rejections import (
    EngineFailed,
    InvalidRequest,
    Stopping,
    from_line,
    one_line,
)
from utune_deploy.serving.servers.ray import library
from utune_deploy.serving.servers.ray.front import TaskTable
from utune_deploy.serving.servers.ray.keeper import Keeper
from utune_deploy.serving.servers.ray.messages import Ask, Key, Refusal
from utune_deploy.serving.servers.ray.placement import Load, Placement, rank
from utune_deploy.serving.servers.ray.replica import Replica
from utune_deploy.serving.tasks.packed import read_packed

NAMES = st.text(min_size=1, max_size=8)
REPLICAS = st.sets(NAMES, min_size=1, max_size=8).map(sorted)


@given(task=NAMES, replicas=REPLICAS, added=NAMES)
def test_a_replica_that_comes_moves_only_what_it_takes(task, replicas, added):
    before, after = rank(task, replicas), rank(task, sorted({*replicas, added}))
    assert sorted(before) == replicas
    assert [name for name in after if name in replicas] == list(before)


@given(task=NAMES, replicas=REPLICAS, order=st.randoms(use_true_random=False))
def test_everybody_ranks_alike(task, replicas, order):
    shuffled = list(replicas)
    order.shuffle(shuffled)
    assert rank(task, shuffled) == rank(task, replicas)


@pytest.mark.parametrize("count", [2, 3, 5, 8, 16])
def test_tasks_are_spread_evenly(count):
    tasks, replicas = 4000, [f"replica-{n}" for n in range(count)]
    homes = Counter(rank(f"task{n}", replicas)[0] for n in range(tasks))
    share = tasks / count
    # Of a fair draw the deviation is the root of share * (1 - 1/count); five of them happen once in a million.
    assert all(abs(homes[name] - share) < 5 * np.sqrt(share) for name in replicas)


def test_what_moves_is_the_share_of_the_new_one():
    tasks, replicas = [f"task{n}" for n in range(4000)], [f"replica-{n}" for n in range(4)]
    moved = sum(rank(t, replicas)[0] != rank(t, [*replicas, "new"])[0] for t in tasks)
    assert abs(moved - 800) < 5 * np.sqrt(800)


def _placement(rows_per_home: float = 4) -> tuple[Placement, list[float]]:
    now = [0.0]
    return Placement(rows_per_home=rows_per_home, load=Load(10, lambda: now[0]), seed=0), now


def test_a_hot_task_gets_more_homes_and_gives_them_back():
    placement, now = _placement()
    replicas = ["a", "b", "c"]
    assert len(placement.ranks(["x"], replicas)[0]) == 1
    placement.load.add(["x"] * 8, 1)
    assert len(placement.homes("x")) == 1  # an instant is no load
    now[0] = 100
    assert placement.load.mean("x") == pytest.approx(8, abs=1e-3)
    assert (
        len(placement.homes("x")) == 2
    )  # the next comes with the eighth row, which the mean only nears
    placement.load.add(["x"] * 8, -1)
    now[0] = 110
    assert len(placement.homes("x")) == 1
    now[0] = 1000
    assert placement.load.mean("x") < 1e-9
    assert "x" not in placement.load._loads  # tasks that nobody asks for are forgotten


@settings(max_examples=50)
@given(tasks=st.lists(NAMES, max_size=8), replicas=REPLICAS)
def test_every_replica_is_asked_in_some_order(tasks, replicas):
    placement, _ = _placement()
    groups = placement.ranks(tasks, replicas)
    assert sorted(name for group in groups for name in group) == replicas
    assert 1 <= len(groups[0]) <= 2


def test_a_mixed_request_goes_where_most_of_its_tasks_are():
    placement, _ = _placement()
    replicas = ["a", "b", "c", "d"]
    home = {n: rank(f"t{n}", replicas)[0] for n in range(200)}
    here = [f"t{n}" for n in home if home[n] == "b"][:3]
    there = [f"t{n}" for n in home if home[n] == "c"][:2]
    groups = placement.ranks([*there, *here], replicas)
    assert groups[0] == ["b"]
    assert groups[1] == ["c"]


@settings(max_examples=100)
@given(
    tasks=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=60),
    replicas=st.integers(1, 6),
)
def test_no_replica_is_given_much_more_than_its_share(tasks, replicas):
    placement, _ = _placement()
    names = [f"r{n}" for n in range(replicas)]
    rows = Counter()
    for task in tasks:
        chosen = placement.ranks([task], names)[0][0]
        placement.began(chosen, [task])
        rows[chosen] += 1
        assert rows[chosen] <= np.ceil(1.25 * rows.total() / replicas)
    for name in names:
        for _ in range(rows[name]):
            placement.ended(name, [])
    assert not placement._under_way


def test_what_is_too_much_for_a_home_goes_to_the_next_of_the_task():
    placement, _ = _placement()
    replicas = ["a", "b", "c", "d"]
    order = rank("x", replicas)
    for _ in range(2):
        assert placement.ranks(["x"], replicas)[0] == [order[0]]
        placement.began(order[0], ["x"])
        assert placement.ranks(["x"], replicas)[0] == [order[1]]
        placement.ended(order[0], ["x"])


def test_without_tasks_the_choice_is_between_two_random_ones():
    for placement, tasks in (
        (_placement()[0], ()),
        (Placement(by_task=False, rows_per_home=4), ["x", "y"]),
    ):
        firsts = {tuple(sorted(placement.ranks(tasks, "abcd")[0])) for _ in range(200)}
        assert len(firsts) == 6


def test_errors_travel_as_values():
    error = InvalidRequest("unknown task", where="task, row 1", wanted="one of a", found="b")
    again = Refusal.of(error).error()
    assert type(again) is InvalidRequest
    assert one_line(again) == one_line(error)
    assert from_line(one_line(again))[0] == "unknown task"


def test_without_ray_it_is_said_how_to_get_it(monkeypatch):
    real = importlib.import_module

    def absent(name, *given):
        if name.split(".")[0] == "ray":
            raise ImportError("No module named 'ray'")
        return real(name, *given)

    monkeypatch.setattr(library, "import_module", absent)
    with pytest.raises(MissingDependency) as refused:
        library.serve()
    assert refused.value.exit_code == 5
    assert library.INSTALL in str(refused.value)


class _Replicas:
    """What replicas say, for a keeper that has none."""

    def __init__(self, keeper: Keeper) -> None:
        self.refuses: str | None = None
        self.told: list[tuple] = []
        keeper._on_all = self

    async def __call__(self, method, *given, strict=True):
        self.told.append((method, *given))
        if strict and method == self.refuses:
            raise CheckFailed("the engine does not answer as the task does in torch")
        return [None, None]


def _keeper(banked, folder=None) -> tuple[Keeper, _Replicas, TaskTable]:
    from utune_deploy.serving.registry import Registry

    keeper = Keeper(str(banked.path), banked.identity, folder and str(folder), "app")
    return keeper, _Replicas(keeper), TaskTable(Registry(banked))


def test_one_replica_that_refuses_refuses_for_all(banked, packed):
    async def main() -> None:
        keeper, replicas, table = _keeper(banked)
        replicas.refuses = "stage"
        before = await keeper.table("front", 0)
        refused = await keeper.change("front", "add", None, None, packed("birds"))
        assert refused.kind == "CheckFailed"
        (staged, key, _), (forgotten, keys) = replicas.told
        assert (staged, forgotten, keys) == ("stage", "forget", [key])
        assert await keeper.table("front", 0) == before
        replicas.refuses = None
        name, shown = await keeper.change("front", "add", None, None, packed("birds", seed=1))
        table.read(shown)
        assert (name, table.numbers("birds")) == ("birds", [1])
        # The number was given before, to a file that was refused: as keys the two differ.
        assert table.keys[table.version("birds", 1)] != key

    asyncio.run(main())


def test_a_version_has_one_number_and_requests_under_way_keep_theirs(banked, packed):
    async def main() -> None:
        keeper, replicas, table = _keeper(banked)
        for action in ("add", "update", "update"):
            data = packed("birds", seed=len(replicas.told))
            _, shown = await keeper.change("front", action, None, None, data)
            table.read(shown)
        assert table.numbers("birds") == [1, 2, 3]
        first = table.version("birds", 1)
        _, shown = await keeper.change("front", "use", "birds", 1, None)
        table.read(shown)
        assert table._registry.versions["birds"] is first
        _, shown = await keeper.change("front", "pin", "birds", None, None)
        assert replicas.told[-2][:2] == ("pin", table.keys[first])
        _, shown = await keeper.change("front", "remove", "birds", None, None)
        assert table.read(shown) == {"birds"}
        assert table.keys[first] == Key("birds", 1, table.keys[first].file)
        refused = await keeper.change("front", "remove", "birds", None, None)
        assert refused.what == "unknown task"

    asyncio.run(main())


def test_a_keeper_that_starts_again_has_what_the_folder_kept(banked, packed, tmp_path):
    async def main() -> None:
        keeper, _, table = _keeper(banked, tmp_path / "kept")
        await keeper.change("front", "add", None, None, packed("birds"))
        keeper._claim.release()  # as the end of its process does
        again, _, _ = _keeper(banked, tmp_path / "kept")
        table.read(await again.table("front", 0))
        assert table.numbers("birds") == [1]
        held = {key: data for key, data, _ in await again.snapshot()}
        assert held[table.keys[table.version("birds", 1)]] == packed("birds")

    asyncio.run(main())


def test_a_keeper_leaves_another_servers_folder_alone(banked, tmp_path):
    from utune_deploy.merge.errors import UsageError
    from utune_deploy.serving.tasks.claim import claim

    with claim(tmp_path / "kept"), pytest.raises(UsageError, match="another server"):
        _keeper(banked, tmp_path / "kept")


def test_a_change_waits_for_the_other_fronts_but_not_for_ever(banked, packed, monkeypatch):
    from utune_deploy.serving.servers.ray import keeper as module

    monkeypatch.setattr(module, "SEEN_SECONDS", 0.2)

    async def main() -> None:
        keeper, _, _ = _keeper(banked)
        first = await keeper.table("other", 0)
        waiting = asyncio.create_task(keeper.table("other", first.epoch))
        await asyncio.sleep(0)
        change = asyncio.create_task(keeper.change("front", "add", None, None, packed("birds")))
        shown = await waiting
        assert shown.epoch > first.epoch
        assert not change.done()
        asking = asyncio.create_task(keeper.table("other", shown.epoch))
        _, seen = await change
        assert seen.epoch == shown.epoch
        asking.cancel()
        name, _ = await keeper.change("front", "remove", "birds", None, None)  # nobody listens
        assert name == "birds"

    asyncio.run(main())


class _Remote:
    """A keeper as a replica sees it: its methods by `.remote`."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    def __getattr__(self, name):
        return SimpleNamespace(remote=getattr(self._keeper, name))


async def _replica(banked, keeper: Keeper) -> Replica:
    replica = Replica.__new__(Replica)
    await replica.__init__(
        str(banked.path), banked.identity, _Remote(keeper), Device(threads=1), None
    )
    return replica


def test_a_replica_is_healthy_as_long_as_its_engine_answers(banked, monkeypatch):
    async def main() -> None:
        replica = await _replica(banked, _keeper(banked)[0])
        await replica.check_health()

        def broken(*_) -> None:
            raise RuntimeError("the device fell off the bus")

        monkeypatch.setattr(replica._service.session, "run", broken)
        with pytest.raises(EngineFailed, match="the device fell off the bus"):
            await replica.check_health()
        await replica.drain()
        with pytest.raises(Stopping):
            await replica.check_health()

    asyncio.run(main())


def test_a_replica_takes_up_the_table_and_fetches_what_came_meanwhile(banked, packed, rows):
    async def main() -> None:
        keeper, _, table = _keeper(banked)
        images, _ = rows(1)
        await keeper.change("front", "add", None, None, packed("birds"))
        replica = await _replica(banked, keeper)
        _, shown = await keeper.change("front", "update", None, None, packed("birds", seed=1))
        table.read(shown)  # the stand-in told no replica of it
        for number in (1, 2):
            key = table.keys[table.version("birds", number)]
            reply = await replica.answer(Ask((key,)), {"images": images})
            wanted = images.reshape(1, -1) @ _head(packed("birds", seed=number - 1))
            np.testing.assert_allclose(reply.logits[:, :4], wanted[:, :4], rtol=1e-4, atol=1e-4)
            assert reply.calls
        refused = await replica.answer(Ask((Key("birds", 9),)), {"images": images})
        assert refused.kind == "UnknownModel"
        await replica.drain()

    asyncio.run(main())


def test_a_replica_refuses_what_its_engine_does_not_answer(banked, packed):
    async def main() -> None:
        replica = await _replica(banked, _keeper(banked)[0])
        data = packed("birds", right=False)
        key = Key("birds", 1, hashlib.sha256(data).hexdigest() + ".task")
        refused = await replica.stage(key, data)
        assert refused.kind == "CheckFailed"
        refused = await replica.stage(key, packed("birds"))
        assert refused.what == "a task came damaged"
        assert key not in replica._versions
        assert not list(replica._service.tasks.store.folder.glob("*.task"))
        await replica.drain()

    asyncio.run(main())


def test_a_version_can_be_asked_for_a_while_after_it_left_the_table(
    banked, packed, rows, monkeypatch
):
    from utune_deploy.serving.servers.ray import replica as module

    monkeypatch.setattr(module, "GRACE_SECONDS", 0.2)

    async def main() -> None:
        keeper, _, table = _keeper(banked)
        _, shown = await keeper.change("front", "add", None, None, packed("birds"))
        table.read(shown)
        key = table.keys[table.version("birds", 1)]
        replica = await _replica(banked, keeper)
        images, _ = rows(1)
        await replica.settle([], [])
        assert (await replica.answer(Ask((key,)), {"images": images})).labels
        await asyncio.sleep(0.3)
        assert key not in replica._versions
        await replica.drain()

    asyncio.run(main())


def test_pins_follow_the_table(banked):
    async def main() -> None:
        replica = await _replica(banked, _keeper(banked)[0])
        pets, cars = Key("pets", 1), Key("cars", 1)
        resident = replica._service.resident
        await replica.settle([pets, cars], [pets])
        assert resident.pinned(replica._versions[pets])
        await replica.settle([pets, cars], [cars])
        assert not resident.pinned(replica._versions[pets])
        assert resident.pinned(replica._versions[cars])
        assert await replica.pin(cars, False) is None
        assert not resident.pinned(replica._versions[cars])
        await replica.drain()

    asyncio.run(main())


def _head(data: bytes) -> np.ndarray:
    return read_packed(data).tensors["bank/heads"]
