"""The life of tasks in one process: added, updated, rolled back, pinned, removed, and there again after a restart."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from dataclasses import replace

import numpy as np
import pytest

from utune_deploy.export.bundle import BANK, Task, open_bundle
from utune_deploy.export.engine import Device
from utune_deploy.merge.errors import CheckFailed, IncompatibleArtefact, UsageError, UtuneError
from utune_deploy.serving.answers import Answers
from utune_deploy.serving.queueing.batcher import Batcher
from utune_deploy.serving.rejections import InvalidRequest
from utune_deploy.serving.service import Service
from utune_deploy.serving.tasks import life
from utune_deploy.serving.tasks.commands import TaskCommands
from utune_deploy.serving.tasks.packed import Probe
from utune_deploy.serving.tasks.store import TABLE, Store

HEAD, OWN = "bank/head/weight", "bank/head/own"
IMAGES = np.random.default_rng(3).standard_normal((4, 3, 8, 8)).astype(np.float32)
CLASSES = {"pets": 5, "cars": 3, "flowers": 2}


def right(service: Service, made) -> bool:
    """Whether the service answers as this version of the task: logits and labels."""
    answers = service.answer(IMAGES, [made.name] * len(IMAGES))
    best = made.logits(IMAGES).argmax(axis=1)
    return made.answers(IMAGES, answers.logits) and answers.labels == tuple(
        made.labels[k] for k in best
    )


def files(service: Service) -> set[str]:
    return {path.name for path in service.tasks.store.folder.iterdir()}


def table(service: Service) -> list:
    """Everything that is said of every task, but for what stands in memory."""
    return sorted(
        ({**entry, "resident": None} for entry in service.entries()), key=lambda e: e["name"]
    )


def snapshot(service: Service) -> tuple:
    return (
        table(service),
        files(service),
        service.answer(IMAGES[:3], list(CLASSES)).logits.tobytes(),
    )


def test_the_shipped_tasks_answer_as_numpy_does(open_live, make_task):
    service = open_live()
    for name in CLASSES:
        assert right(service, make_task(name))


@pytest.mark.parametrize("probe", [True, False])
def test_an_added_task_answers_beside_the_old_ones(open_live, make_task, probe):
    service = open_live()
    before = service.answer(IMAGES[:3], list(CLASSES)).logits.tobytes()
    birds = make_task("birds", 4, seed=1, probe=probe)
    version = service.add(birds.data)
    assert (version.name, version.number) == ("birds", 1)
    assert right(service, birds)
    assert service.answer(IMAGES[:3], list(CLASSES)).logits.tobytes() == before
    mixed = service.answer(IMAGES, ["birds", "pets", "birds", "cars"])
    assert birds.answers(IMAGES[::2], mixed.logits[::2])
    assert service.registry.names == (*CLASSES, "birds")


def test_an_update_replaces_weights_and_labels_and_use_brings_the_old_ones_back(
    open_live, make_task
):
    service = open_live()
    old, new = make_task("pets"), make_task("pets", 2, seed=4, probe=True)
    assert service.add(new.data, update=True).number == 2
    assert right(service, new)
    service.tasks.use("pets", 1)
    assert right(service, old)
    service.tasks.use("pets", 2)
    assert right(service, new)
    (entry,) = service.entries("pets")
    assert (entry["version"], entry["versions"]) == (2, [1, 2])
    assert service.tasks.changes == {"add": 0, "update": 1, "remove": 0, "rollback": 2}


def test_an_update_after_a_rollback_gets_a_number_of_its_own(open_live, make_task):
    service = open_live()
    service.add(make_task("pets", seed=1).data, update=True)
    service.tasks.use("pets", 1)
    newest = make_task("pets", seed=2)
    assert service.add(newest.data, update=True).number == 3
    assert right(service, newest)
    assert service.tasks.numbers("pets") == [1, 2, 3]


def test_requests_checked_before_an_update_are_answered_with_the_old_weights_and_labels(
    open_live, make_task
):
    service = open_live(rows=8)
    old, new = make_task("cars"), make_task("cars", 5, seed=7)
    request = service.registry.check(IMAGES, ["cars"] * 4)
    service.add(new.data, update=True)
    late, now = service.run([request, service.registry.check(IMAGES, ["cars"] * 4)])
    assert isinstance(late, Answers)
    assert old.answers(IMAGES, late.logits)
    assert set(late.labels) <= set(old.labels)
    assert new.answers(IMAGES, now.logits)
    assert set(now.labels) <= set(new.labels)


@pytest.mark.parametrize("name", ["pets", "birds"])
def test_a_removed_task_is_refused_and_requests_under_way_are_answered(open_live, make_task, name):
    service = open_live(rows=12)
    birds = make_task("birds", seed=1)
    service.add(birds.data)
    request = service.registry.check(IMAGES, [name] * 4)
    service.tasks.remove(name)
    with pytest.raises(InvalidRequest, match="unknown task"):
        service.registry.check(IMAGES, [name] * 4)
    for other in ("cars", "flowers"):  # further changes that may clear the folder
        service.tasks.pin(other)
    service.tasks.remove("flowers")
    (answers,) = service.run([request])
    assert isinstance(answers, Answers)
    assert (birds if name == "birds" else make_task("pets")).answers(IMAGES, answers.logits)
    for refused in (
        lambda: service.tasks.remove(name),
        lambda: service.tasks.use(name, 1),
        lambda: service.tasks.pin(name),
        lambda: service.tasks.version(name, 1),
        lambda: service.entries(name),
    ):
        with pytest.raises(UsageError, match="unknown task"):
            refused()
    assert service.tasks.numbers(name) == []


def test_what_a_removed_task_held_is_given_back_once_nobody_asks_for_it(open_live, make_task):
    service = open_live(rows=12)
    birds = make_task("birds", seed=1)
    service.add(birds.data)
    request = service.registry.check(IMAGES, ["birds"] * 4)
    service.tasks.remove("birds")
    used = service.resident.used
    assert isinstance(service.run([request])[0], Answers)
    assert service.resident.used == used
    del request
    gc.collect()
    service.tasks.pin("pets")
    assert files(service) == {TABLE}


def test_a_removed_task_may_come_back_with_the_next_number(open_live, make_task, tmp_path):
    service = open_live(keep=tmp_path / "kept")
    service.tasks.remove("pets")
    again = make_task("pets", seed=5)
    assert service.add(again.data).number == 2
    assert right(service, again)
    assert service.tasks.numbers("pets") == [2]
    restarted = open_live(keep=tmp_path / "kept")
    assert table(restarted) == table(service)


def test_the_last_task_stays(open_live):
    service = open_live()
    service.tasks.remove("pets")
    service.tasks.remove("cars")
    with pytest.raises(UsageError, match="the last task cannot be removed"):
        service.tasks.remove("flowers")
    assert service.registry.names == ("flowers",)


@pytest.mark.parametrize("name", ["pets", "birds"])
def test_only_so_many_versions_are_kept_and_a_restart_keeps_the_same(
    open_live, make_task, tmp_path, name
):
    service = open_live(keep=tmp_path / "kept")
    made = {1: make_task(name)}
    if name == "birds":
        service.add(made[1].data)
    for number in range(2, life.KEPT_VERSIONS + 3):
        made[number] = make_task(name, seed=number)
        service.add(made[number].data, update=True)
    newest = list(made)[-life.KEPT_VERSIONS :]
    assert service.tasks.numbers(name) == newest
    service.tasks.pin("cars")  # what was dropped last goes with the next change
    assert len(files(service)) == 1 + len(newest)
    with pytest.raises(UsageError, match="the task has no such version"):
        service.tasks.use(name, 1)
    restarted = open_live(keep=tmp_path / "kept")
    for each in (service, restarted):
        assert each.tasks.numbers(name) == newest
        for number in newest:
            each.tasks.use(name, number)
            assert right(each, made[number])
    assert table(service) == table(restarted)


def test_an_update_between_rollbacks_drops_the_oldest_and_not_the_one_in_use(open_live, make_task):
    service = open_live()
    for seed in range(1, life.KEPT_VERSIONS):
        service.add(make_task("cars", seed=seed).data, update=True)
    service.tasks.use("cars", 1)
    newest = make_task("cars", seed=9)
    service.add(newest.data, update=True)
    assert 1 not in service.tasks.numbers("cars")
    assert right(service, newest)


def test_pins_stay_with_the_task_whatever_its_version(open_live, make_task, tmp_path):
    service = open_live(rows=16, keep=tmp_path / "kept")
    service.tasks.pin("pets")
    versions = [service.tasks.version("pets", 1)]
    assert service.resident.pinned(versions[0])
    versions.append(service.add(make_task("pets", seed=1).data, update=True))
    assert [service.resident.pinned(v) for v in versions] == [False, True]
    service.tasks.use("pets", 1)
    assert [service.resident.pinned(v) for v in versions] == [True, False]
    restarted = open_live(rows=16, keep=tmp_path / "kept")
    assert restarted.resident.pinned(restarted.tasks.version("pets", 1))
    assert table(restarted) == table(service)
    restarted.tasks.pin("pets", pinned=False)
    assert not restarted.entries("pets")[0]["pinned"]
    assert not open_live(rows=16, keep=tmp_path / "kept").entries("pets")[0]["pinned"]


def test_pins_leave_rows_for_a_full_batch_of_other_tasks(open_live, make_task):
    service = open_live(rows=10)
    birds = [make_task(f"birds{n}", seed=n) for n in range(6)]
    for each in birds:
        service.add(each.data)
    service.tasks.pin("pets")
    service.tasks.pin("cars")
    with pytest.raises(UsageError, match="no more tasks can be pinned"):
        service.tasks.pin("flowers")
    others = ["flowers", *(each.name for each in birds), "pets"]
    images = np.repeat(IMAGES, 2, axis=0)
    answered: list[Answers] = []
    asker = threading.Thread(target=lambda: answered.append(service.answer(images, others)))
    asker.daemon = True
    asker.start()
    asker.join(10)
    assert answered[0].tasks == tuple(others)


def test_a_restart_gives_the_same_table_and_the_same_answers(open_live, make_task, tmp_path):
    service = open_live(keep=tmp_path / "kept")
    service.add(make_task("birds", 4, seed=1, probe=True).data)
    service.add(make_task("ants", 2, seed=6).data)
    service.add(make_task("fish", 2, seed=2).data)
    service.add(make_task("birds", 3, seed=3).data, update=True)
    service.add(make_task("pets", 4, seed=4).data, update=True)
    service.tasks.use("birds", 1)
    service.tasks.remove("fish")
    service.tasks.remove("flowers")
    names = list(service.registry.versions)
    wanted = service.answer(IMAGES, names)
    restarted = open_live(keep=tmp_path / "kept")
    assert table(restarted) == table(service)
    assert restarted.registry.names == tuple(names)
    again = restarted.answer(IMAGES, names)
    assert again.logits.tobytes() == wanted.logits.tobytes()
    assert again.labels == wanted.labels
    assert restarted.add(make_task("fish", seed=5).data).number == 2  # numbers are not given twice


def test_a_temporary_folder_goes_with_the_service(inputs_bundle, make_task):
    service = Service.open(inputs_bundle, Device(threads=1))
    service.add(make_task("birds").data)
    folder = service.tasks.store.folder
    assert len(list(folder.iterdir())) == 2
    service.close()
    assert not folder.exists()
    forgotten = Service.open(inputs_bundle, Device(threads=1))
    folder = forgotten.tasks.store.folder
    del forgotten
    gc.collect()
    assert not folder.exists()


def test_the_same_file_may_be_sent_again(open_live, make_task):
    service = open_live()
    birds, other = make_task("birds", seed=1), make_task("birds", seed=2)
    service.add(birds.data)
    written = next(iter(service.tasks.store.folder.glob("*.task"))).stat()
    service.add(other.data, update=True)
    assert service.add(birds.data, update=True).number == 3
    assert right(service, birds)
    assert len(files(service)) == 3
    kept = service.tasks.store.folder / service.tasks.store.put(birds.data)
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)


class Killed(BaseException):
    """The process ends here."""


def _kill(*_, **__):
    raise Killed


@pytest.mark.parametrize(
    "moment", ["the packed file", "behind it", "the table", "behind the table"]
)
@pytest.mark.parametrize("change", ["add", "update", "use", "remove", "pin"])
def test_a_server_killed_at_any_moment_leaves_a_folder_that_opens(
    open_live, make_task, tmp_path, monkeypatch, moment, change
):
    service = open_live(keep=tmp_path / "kept")
    birds, newer = make_task("birds", seed=1), make_task("birds", 2, seed=2)
    service.add(birds.data)
    service.add(make_task("birds", seed=3).data, update=True)
    service.tasks.use("birds", 1)
    before = table(service)
    act = {
        "add": lambda: service.add(make_task("fish").data),
        "update": lambda: service.add(newer.data, update=True),
        "use": lambda: service.tasks.use("birds", 2),
        "remove": lambda: service.tasks.remove("birds"),
        "pin": lambda: service.tasks.pin("birds"),
    }[change]
    put, write = Store.put, Store.write
    with monkeypatch.context() as dying:
        dying.setattr(life.Tasks, "discard", _kill)
        if moment == "the packed file":
            dying.setattr(Store, "put", _kill)
        elif moment == "behind it":
            dying.setattr(Store, "put", lambda *a: (put(*a), _kill()))
        elif moment == "the table":
            dying.setattr(Store, "write", _kill)
        else:
            dying.setattr(Store, "write", lambda *a: (write(*a), _kill()))
        if "packed" in moment or moment == "behind it":
            if change in ("add", "update"):
                with pytest.raises(Killed):
                    act()
        else:
            with pytest.raises(Killed):
                act()
    restarted = open_live(keep=tmp_path / "kept")
    if moment != "behind the table":
        assert table(restarted) == before
        assert table(service) == before
        assert right(restarted, birds)
    elif change == "update":
        assert right(restarted, newer)
    restarted.tasks.pin("cars")
    named = json.loads((tmp_path / "kept" / TABLE).read_text())["tasks"].values()
    wanted = {file for entry in named for file in entry["files"].values()}
    assert files(restarted) == {TABLE, *wanted}


def test_half_a_file_of_a_killed_server_is_cleared_away(open_live, make_task, tmp_path):
    service = open_live(keep=tmp_path / "kept")
    service.add(make_task("birds").data)
    there = files(service)
    (tmp_path / "kept" / f".{'0' * 64}.task.abcd").write_bytes(b"half")
    (tmp_path / "kept" / f".{TABLE}.abcd").write_bytes(b"{")
    assert files(open_live(keep=tmp_path / "kept")) == there


@pytest.mark.parametrize("change", ["add", "update", "use", "remove", "pin"])
def test_a_disk_that_is_full_changes_nothing(open_live, make_task, monkeypatch, change):
    service = open_live()
    birds = make_task("birds", seed=1)
    service.add(birds.data)
    service.add(make_task("birds", seed=2).data, update=True)
    service.tasks.pin("birds")
    before = snapshot(service)

    def full(*_):
        raise OSError(28, "No space left on device")

    act = {
        "add": lambda: service.add(make_task("fish").data),
        "update": lambda: service.add(make_task("birds", seed=3).data, update=True),
        "use": lambda: service.tasks.use("birds", 1),
        "remove": lambda: service.tasks.remove("birds"),
        "pin": lambda: service.tasks.pin("pets"),
    }[change]
    with monkeypatch.context() as broken:
        broken.setattr("utune_deploy.serving.tasks.store.atomic_file", full)
        with pytest.raises(UtuneError, match="a task cannot be kept"):
            act()
    assert snapshot(service) == before
    assert service.resident.pinned(service.registry.versions["birds"])
    act()
    assert table(service) != before[0]


def test_the_folder_of_another_bundle_is_refused(open_live, make_task, tmp_path):
    open_live(keep=tmp_path / "kept").add(make_task("birds").data)
    path = tmp_path / "kept" / TABLE
    table = json.loads(path.read_text())
    path.write_text(json.dumps({**table, "identity": "0" * 64}))
    with pytest.raises(IncompatibleArtefact, match="the folder keeps tasks of another bundle"):
        open_live(keep=tmp_path / "kept")
    path.write_text(json.dumps({**table, "version": 2}))
    with pytest.raises(IncompatibleArtefact, match="another version of this format"):
        open_live(keep=tmp_path / "kept")


def test_kept_files_that_are_missing_or_damaged_are_refused_at_the_start(
    open_live, make_task, tmp_path
):
    service = open_live(keep=tmp_path / "kept")
    service.add(make_task("birds").data)
    (file,) = (tmp_path / "kept").glob("*.task")
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(IncompatibleArtefact, match="no safetensors file"):
        open_live(keep=tmp_path / "kept")
    file.unlink()
    with pytest.raises(IncompatibleArtefact, match="a kept task is missing"):
        open_live(keep=tmp_path / "kept")
    path = tmp_path / "kept" / TABLE
    table = json.loads(path.read_text())
    table["tasks"]["birds"] |= {"files": {}}
    path.write_text(json.dumps(table))
    with pytest.raises(IncompatibleArtefact, match="names a version that is not kept"):
        open_live(keep=tmp_path / "kept")


NAN = np.full((192, 5), np.nan, np.float32)
WRONG = {
    "another backbone": (
        lambda made: made.changed(fingerprint="0" * 64),
        IncompatibleArtefact, "the task belongs to another backbone",
    ),
    "another bundle": (
        lambda made: made.changed(identity="0" * 64),
        IncompatibleArtefact, "laid out for another bundle",
    ),
    "a tensor is missing": (
        lambda made: made.changed(tensors={HEAD: made.packed.tensors[HEAD]}),
        IncompatibleArtefact, "does not hold the tensors",
    ),
    "a tensor too many": (
        lambda made: made.changed(tensors={**made.packed.tensors, "bank/more": NAN[0]}),
        IncompatibleArtefact, "does not hold the tensors",
    ),
    "another shape": (
        lambda made: made.changed(tensors={**made.packed.tensors, HEAD: NAN[:191]}),
        IncompatibleArtefact, "a tensor is not as the engine reads it",
    ),
    "another type": (
        lambda made: made.changed(
            tensors={**made.packed.tensors, OWN: made.packed.tensors[OWN].astype(np.float16)}
        ),
        IncompatibleArtefact, "a tensor is not as the engine reads it",
    ),
    "not finite": (
        lambda made: made.changed(tensors={**made.packed.tensors, HEAD: NAN}),
        IncompatibleArtefact, "not finite",
    ),
    "too many labels": (
        lambda made: made.changed(labels=tuple("abcdef")),
        IncompatibleArtefact, "another number of labels",
    ),
    "no labels": (
        lambda made: made.changed(labels=(), width=3),
        IncompatibleArtefact, "no labels and the others have some",
    ),
    "no name": (lambda made: made.changed(name=""), IncompatibleArtefact, "lacks a field"),
    "a number for a name": (lambda made: made.changed(name=7), IncompatibleArtefact, "lacks a field"),
    "numbers for labels": (
        lambda made: made.changed(labels=(1, 2)), IncompatibleArtefact, "lacks a field",
    ),
    "half a character": (
        lambda made: made.changed(labels=("a", "\ud800")), IncompatibleArtefact, "lacks a field",
    ),
    "another probe": (
        lambda made: made.changed(probe=Probe({"images": IMAGES}, 1.01 * made.logits(IMAGES), 1e-5)),
        CheckFailed, "does not answer as the task does in torch",
    ),
    "a probe that is NaN": (
        lambda made: made.changed(probe=Probe({"images": IMAGES}, np.full((4, 3), np.nan), 1e-5)),
        CheckFailed, "does not answer as the task does in torch",
    ),
    "a probe of fewer columns": (
        lambda made: made.changed(
            probe=Probe({"images": IMAGES}, made.logits(IMAGES)[:, :1], 1e-5)
        ),
        CheckFailed, "does not answer as the task does in torch",
    ),
    "a probe without columns": (
        lambda made: made.changed(
            probe=Probe({"images": IMAGES}, made.logits(IMAGES)[:, :0], 1e-5)
        ),
        CheckFailed, "does not answer as the task does in torch",
    ),
    "a probe of one number": (
        lambda made: made.changed(probe=Probe({"images": IMAGES}, np.array(1.0), 1e-5)),
        IncompatibleArtefact, "lacks a field",
    ),
    "a probe of other inputs": (
        lambda made: made.changed(probe=Probe({"words": IMAGES}, made.logits(IMAGES), 1e-5)),
        InvalidRequest, "the inputs are not those",
    ),
    "a probe of other pictures": (
        lambda made: made.changed(
            probe=Probe({"images": IMAGES[:, :, :4]}, made.logits(IMAGES), 1e-5)
        ),
        InvalidRequest, "wrong shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("update", [False, True], ids=["add", "update"])
def test_a_packed_task_that_is_wrong_is_refused_and_leaves_nothing(
    open_live, make_task, wrong, update
):
    service = open_live()
    service.add(make_task("birds").data)
    before = snapshot(service)
    change, error, sentence = WRONG[wrong]
    bad = change(make_task("birds" if update else "fish", seed=8))
    with pytest.raises(error, match=sentence):
        service.add(bad.data, update=update)
    assert snapshot(service) == before
    assert service.resident.used == 4


def test_names_are_held_to_what_is_there(open_live, make_task):
    service = open_live()
    before = snapshot(service)
    with pytest.raises(UsageError, match="a task of that name is there already"):
        service.add(make_task("pets", seed=1).data)
    with pytest.raises(UsageError, match="there is no task of that name to update"):
        service.add(make_task("birds").data, update=True)
    assert snapshot(service) == before


def test_a_task_that_the_engine_answers_with_infinity_is_not_added(open_live, make_task):
    service = open_live()
    service.tasks.pin("pets")
    before = snapshot(service)
    large = make_task("birds")
    head = np.full_like(large.packed.tensors[HEAD], np.finfo(np.float32).max)
    with pytest.raises(UtuneError, match="not finite"):
        service.add(large.changed(tensors={**large.packed.tensors, HEAD: head}).data)
    assert snapshot(service) == before


def test_two_changes_of_one_task_at_once_make_one_of_them_start_again(open_live, make_task):
    service = open_live()
    first = service.tasks.stage(make_task("birds", seed=1).data, update=False)
    second = service.tasks.stage(make_task("birds", seed=2).data, update=False)
    service.tasks.publish(first, update=False)
    with pytest.raises(UsageError, match="is there already"):
        service.tasks.publish(second, update=False)
    third, fourth = (
        service.tasks.stage(make_task("birds", seed=s).data, update=True) for s in (3, 4)
    )
    service.tasks.publish(third, update=True)
    with pytest.raises(UsageError, match="changed by somebody else"):
        service.tasks.publish(fourth, update=True)
    for staged in (second, fourth):
        service.tasks.discard(staged)
    assert right(service, make_task("birds", seed=3))
    assert len(files(service)) == 3


def test_a_staged_task_survives_the_changes_of_others(open_live, make_task):
    service = open_live()
    fish = make_task("fish", seed=3, probe=True)
    staged = service.tasks.stage(fish.data, update=False)
    service.add(make_task("birds").data)
    service.tasks.pin("birds")
    (answers,) = service.run([service.tasks.probe(staged)])
    service.tasks.require_right(staged, answers)
    service.tasks.publish(staged, update=False)
    assert right(service, fish)


def test_what_was_published_is_not_given_back_and_what_was_given_back_is_not_published(
    open_live, make_task
):
    """A caller may go away while its change is written down."""
    service = open_live()
    birds = make_task("birds")
    staged = service.tasks.stage(birds.data, update=False)
    service.tasks.publish(staged, update=False)
    service.tasks.discard(staged)
    assert right(service, birds)
    late = service.tasks.stage(make_task("fish").data, update=False)
    service.tasks.discard(late)
    with pytest.raises(UsageError, match="changed by somebody else"):
        service.tasks.publish(late, update=False)
    assert "fish" not in service.registry.names
    assert len(files(service)) == 2


def test_who_only_looks_does_not_wait_for_a_change_that_is_written_down(
    open_live, make_task, monkeypatch
):
    service = open_live()
    writing, gate = threading.Event(), threading.Event()
    write = Store.write

    def slow(*arguments):
        writing.set()
        gate.wait(20)
        write(*arguments)

    monkeypatch.setattr(Store, "write", slow)
    changing = threading.Thread(target=service.add, args=(make_task("birds").data,))
    changing.start()
    assert writing.wait(20)
    looked: list = []

    def look() -> None:
        looked.append([entry["name"] for entry in service.entries()])
        looked.append(service.tasks.numbers("pets"))
        looked.append(service.tasks.version("pets", 1).number)
        looked.append(len(service.answer(IMAGES, ["pets"] * 4)))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(10)
    gate.set()
    changing.join()
    assert looked == [list(CLASSES), [1], 1, 4]
    assert right(service, make_task("birds"))


@pytest.mark.parametrize("moment", ["before it is written", "behind it"])
def test_a_client_that_hangs_up_while_its_task_is_published_leaves_all_of_it_or_nothing(
    open_live, make_task, monkeypatch, moment
):
    service = open_live()
    service.tasks.pin("pets")
    before = snapshot(service)
    arrived, gate, ended = threading.Event(), threading.Event(), threading.Event()
    publish = service.tasks.publish

    def slow(*arguments, **settings):
        try:
            if moment == "behind it":
                publish(*arguments, **settings)
            arrived.set()
            gate.wait(20)
            if moment != "behind it":
                publish(*arguments, **settings)
        finally:
            ended.set()

    monkeypatch.setattr(service.tasks, "publish", slow)

    async def hang_up() -> None:
        async with Batcher(service) as batcher:
            commands = TaskCommands(batcher)
            adding = asyncio.create_task(commands.run({"action": "add"}, make_task("birds").data))
            await asyncio.to_thread(arrived.wait, 20)
            adding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await adding
            gate.set()
            await asyncio.to_thread(ended.wait, 20)

    asyncio.run(hang_up())
    if moment == "behind it":
        assert right(service, make_task("birds"))
        assert len(files(service)) == 2
    else:
        assert snapshot(service) == before
    monkeypatch.undo()
    service.add(make_task("fish", seed=2).data)
    assert right(service, make_task("fish", seed=2))


def test_more_tasks_than_rows_answer_rightly_from_many_threads(open_live, make_task):
    service = open_live(rows=8)
    made = [make_task(f"birds{n}", 2 + n % 4, seed=n) for n in range(20)]
    for each in made:
        service.add(each.data)
    wrong: list[object] = []

    def ask(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(30):
            chosen = [made[n] for n in random.integers(0, len(made), random.integers(1, 9))]
            images = np.repeat(IMAGES, 2, axis=0)[: len(chosen)]
            try:
                answers = service.answer(images, [each.name for each in chosen])
            except Exception as error:
                wrong.append(error)
                continue
            for row, each in enumerate(chosen):
                if not each.answers(images[row : row + 1], answers.logits[row : row + 1]):
                    wrong.append(each.name)

    threads = [threading.Thread(target=ask, args=(seed,), daemon=True) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong
    assert service.resident.evictions > 0
    assert service.resident.used == 8


def test_changes_from_several_threads_all_happen(open_live, make_task):
    service = open_live(rows=16)
    wrong: list[BaseException] = []

    def change(n: int) -> None:
        name = f"birds{n}"
        try:
            service.add(make_task(name, seed=n, probe=True).data)
            for seed in range(3):
                service.add(make_task(name, seed=10 * n + seed, probe=True).data, update=True)
            service.tasks.use(name, 2)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=change, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for n in range(1, 5):
        assert right(service, make_task(f"birds{n}", seed=10 * n))
    assert len(files(service)) == 1 + 4 * 4


def test_bundles_whose_tasks_cannot_change_say_so(bundle, make_task, tmp_path):
    service = Service.open(bundle, Device(threads=1))
    assert service.tasks is None
    assert service.resident is None
    assert service.description()["fixed"] == "its tasks are constants of the engine"
    with pytest.raises(UsageError, match="cannot change while it is served"):
        service.add(make_task("birds").data)
    with pytest.raises(UsageError, match="--rows is for a bank that is an input"):
        Service.open(bundle, Device(threads=1), rows=8)
    Service.open(bundle, Device(threads=1), keep=tmp_path / "kept")  # as images do for any bundle
    assert not (tmp_path / "kept").exists()


def test_fewer_rows_than_a_batch_are_refused(inputs_bundle):
    with pytest.raises(UsageError, match="more tasks than the bank has rows"):
        Service.open(inputs_bundle, Device(threads=1), rows=7)


def test_a_damaged_bank_fails_those_who_ask_for_it_and_says_why(inputs_bundle, tmp_path, open_live):
    import shutil

    copied = open_bundle(shutil.copytree(inputs_bundle.path, tmp_path / "copied"))
    service = open_live(replace(copied, path=copied.path))
    (copied.path / BANK).write_bytes(b"")
    with pytest.raises(UtuneError, match="the engine failed") as caught:
        service.answer(IMAGES[:1], ["pets"])
    assert "no safetensors file" in str(caught.value)
    assert service.resident.used == 0


def test_one_line_says_what_there_is_to_say_of_a_task(open_live, make_task):
    service = open_live()
    service.add(make_task("birds", 2, seed=1).data)
    (entry,) = service.entries("birds")
    assert entry == {
        "name": "birds", "version": 1, "versions": [1], "labels": ["birds-1-0", "birds-1-1"],
        "width": None, "delta": f"{1:064x}", "resident": True, "pinned": False,
        "preprocessing": make_task("birds").packed.task.preprocessing.to_json(),
    }  # fmt: skip
    assert not service.entries("pets")[0]["resident"]
    service.warm()
    assert all(each["resident"] for each in service.entries())
    assert isinstance(service.registry.versions["birds"].task, Task)
