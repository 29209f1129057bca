"""Where tasks go and how a change of tasks is decided, without Ray."""

from __future__ import annotations

import asyncio
import importlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utune_deploy.merge.errors import CheckFailed, MissingDependency
from utune_deploy.serving.rejections import InvalidRequest, from_line, one_line
from utune_deploy.serving.servers.ray import library
from utune_deploy.serving.servers.ray.front import TaskTable
from utune_deploy.serving.servers.ray.keeper import Keeper
from utune_deploy.serving.servers.ray.messages import Key, Refusal
from utune_deploy.serving.servers.ray.placement import Load, Placement, rank

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
        again, _, _ = _keeper(banked, tmp_path / "kept")
        table.read(await again.table("front", 0))
        assert table.numbers("birds") == [1]
        held = {key: data for key, data, _ in await again.snapshot()}
        assert held[table.keys[table.version("birds", 1)]] == packed("birds")

    asyncio.run(main())


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
