"""The aliases of a model in Triton, as folders: written, changed and taken away with the tasks."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from utune_deploy.serving.registry import Registry
from utune_deploy.serving.repository import write_repository
from utune_deploy.serving.repository.config import parse
from utune_deploy.serving.repository.options import ModelOptions
from utune_deploy.serving.tasks.versions import Version
from utune_deploy.serving.triton import aliases
from utune_deploy.serving.triton.alias_folder import free_slot, read_slots
from utune_deploy.serving.triton.aliases import Aliases

if TYPE_CHECKING:
    from pathlib import Path


class Triton:
    """The backend's calls about models; what would fail ends the server, as it may in truth."""

    def __init__(self, *ready: str) -> None:
        self.ready, self.loaded = set(ready), []

    def is_model_ready(self, model: str) -> bool:
        return model in self.ready

    def load_model(self, model: str) -> None:
        self.loaded.append(model)
        self.ready.add(model)

    def unload_model(self, model: str) -> None:
        self.ready.remove(model)


@pytest.fixture
def repository(inputs_bundle, tmp_path):
    write_repository(inputs_bundle, tmp_path / "models", aliases=True)
    return tmp_path / "models"


@pytest.fixture
def begin(inputs_bundle, repository):
    """`begin(mode)` -> the aliases of a registry, to which `put` adds a task."""
    begun = []

    def start(
        mode: str = "poll", *, registry=None, triton=None, version="1", slots=1024, kept=True
    ):
        registry = registry or Registry(inputs_bundle)
        triton = triton or Triton("tiny", "tiny.task_names")
        made = Aliases(
            triton, registry, repository / "tiny", version, slots, kept=kept, mode=mode
        )  # fmt: skip
        begun.append(made)
        return made, registry

    yield start
    for made in begun:
        made.close()


def put(registry, make_task, name: str, number: int = 1, **fields) -> None:
    task = make_task(name).changed(**fields).packed.task
    registry.versions = {**registry.versions, name: Version(task, number)}


def read(folder: Path) -> dict[str, str]:
    """Files by name, and the versions."""
    files = {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}
    return {**files, "": ",".join(sorted(p.name for p in folder.iterdir() if p.is_dir()))}


def names(repository: Path) -> set[str]:
    return {path.name for path in repository.iterdir()}


def test_an_alias_is_written_as_the_repository_has_it(begin, repository, make_task):
    made, registry = begin()
    before = names(repository)
    for name in ("birds", "owls"):
        put(registry, make_task, name)
        made.follow(name)
        assert made.entry(name) == {"alias": f"tiny.{name}", "no_alias": None}
    assert names(repository) == before | {"tiny.birds", "tiny.owls"}
    own, shipped = (
        parse(read(repository / n)["config.pbtxt"]) for n in ("tiny.birds", "tiny.cars")
    )
    own.name, slot = "tiny.cars", next(iter(own.ensemble_scheduling.step[0].output_map))
    others = shipped.ensemble_scheduling.step[0].output_map
    assert (slot, list(others)) == ("3", ["1"])
    others.clear()
    others[slot] = "task"
    assert own == shipped
    assert read(repository / "tiny.birds")["labels.txt"] == "birds-0-0\nbirds-0-1\nbirds-0-2\n"
    said = [f"\0{slot}", "\x001", "pets", "\x00999", "\0x"]
    assert made.tasks_of(said) == ["birds", "cars", "pets", "\x00999", "\0x"]


def test_an_alias_has_its_tasks_labels_and_version_and_goes_with_it(begin, repository, make_task):
    made, registry = begin()
    put(registry, make_task, "birds")
    made.follow("birds")
    slot = json.loads(read(repository / "tiny.birds")["alias.json"])["slot"]
    put(registry, make_task, "birds", 2, labels=("owl", "tit"))
    made.follow("birds")
    found = read(repository / "tiny.birds")
    assert (found["labels.txt"], found[""]) == ("owl\ntit\n", "2")
    del registry.versions["birds"]
    made.follow("birds")
    assert "tiny.birds" not in names(repository)
    assert made.tasks_of([f"\0{slot}"]) == ["birds"]  # which the registry refuses by its name
    put(registry, make_task, "owls")
    made.follow("owls")
    assert made.tasks_of([f"\0{slot}"]) == ["birds"]  # Triton may not have forgotten it yet
    put(registry, make_task, "birds")
    made.follow("birds")
    assert json.loads(read(repository / "tiny.birds")["alias.json"])["slot"] == slot


def test_what_hinders_an_alias_is_said_and_hinders_no_task(
    begin, repository, make_task, monkeypatch
):
    made, registry = begin(slots=4)
    (repository / "tiny.birds").mkdir()
    (repository / "tiny.owls").write_text("")
    for name in ("birds", "owls", "tasks", "task_names", "a/b", "../x", "tüt"):
        put(registry, make_task, name)
        made.follow(name)
        assert made.entry(name)["alias"] is None
        wanted = "cannot be a model's folder" if name[0] in "a.t" and name not in (
            "tasks", "task_names"
        ) else "another model is called"  # fmt: skip
        assert wanted in made.entry(name)["no_alias"]
    (repository / "tiny.owls").unlink()
    made.follow("owls")
    assert made.entry("owls")["alias"] == "tiny.owls"
    put(registry, make_task, "terns")
    made.follow("terns")
    assert "all 4 slots are taken" in made.entry("terns")["no_alias"]
    monkeypatch.setattr(
        "pathlib.Path.mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only"))
    )  # fmt: skip
    del registry.versions["terns"], registry.versions["birds"]
    made._count = 8
    put(registry, make_task, "terns")
    made.follow("terns")
    assert made.entry("terns") == {
        "alias": None, "no_alias": "its folder cannot be written: Read-only",
    }  # fmt: skip


def test_the_mode_of_the_server_decides_who_reads_the_folder(begin, repository, make_task):
    triton = Triton("tiny")
    made, registry = begin("explicit", triton=triton)
    put(registry, make_task, "birds")
    made.follow("birds")
    assert "tiny.task_names is not loaded" in made.entry("birds")["no_alias"]
    triton.ready.add("tiny.task_names")
    put(registry, make_task, "owls")
    made.follow("owls")
    assert (made.entry("owls")["alias"], triton.loaded) == ("tiny.owls", ["tiny.owls"])
    for name in ("owls", "birds"):  # one of them is not loaded, and to unload it would fail
        del registry.versions[name]
        made.follow(name)
    assert triton.ready == {"tiny", "tiny.task_names"}
    for kept in (False, True):
        made, registry = begin("none", triton=(triton := Triton()), kept=kept)
        put(registry, make_task, "birds")
        for _ in range(2):
            made.follow("birds")
            assert "--model-control-mode=none" in made.entry("birds")["no_alias"]
        assert ("tiny.birds" in names(repository)) is kept
        assert not triton.loaded


def test_a_start_puts_right_what_was_left(begin, repository, make_task, monkeypatch):
    made, registry = begin()
    put(registry, make_task, "birds")
    put(registry, make_task, "owls")
    for name in ("birds", "owls"):
        made.follow(name)
    (repository / "tiny.owls" / "1").rename(repository / "tiny.owls" / "7")  # killed in between
    (repository / "tiny.owls" / "labels.txt").unlink()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for left in (repository / f".tiny.aliases-{gone.pid}" / "tiny.x", repository / ".other"):
        left.mkdir(parents=True)
    listening = threading.Event()
    monkeypatch.setattr(aliases, "is_listening", lambda _: listening.is_set())
    del registry.versions["birds"]
    put(registry, make_task, "terns")
    again, _ = begin(registry=registry)
    again.start()
    assert {"tiny.terns", "tiny.birds"} <= names(repository)  # Triton may be reading what was there
    listening.set()
    again._thread.join()
    assert not {"tiny.birds", f".tiny.aliases-{gone.pid}"} & names(repository)
    assert ".other" in names(repository)
    found = read(repository / "tiny.owls")
    assert (found["labels.txt"], found[""]) == ("owls-0-0\nowls-0-1\nowls-0-2\n", "1")
    slots = read_slots(repository, "tiny")
    assert sorted(slots.values()) == ["cars", "flowers", "owls", "pets", "terns"]


def test_an_older_version_of_the_model_leaves_aliases_alone(
    begin, repository, make_task, inputs_bundle
):
    made, registry = begin()
    put(registry, make_task, "birds")
    made.follow("birds")
    write_repository(inputs_bundle, repository, new_version=True)
    assert "tiny.birds" not in names(repository)
    made.follow("birds")
    assert made.entry("birds")["no_alias"] == "version 2 of tiny has the aliases"
    newer, registry = begin(version="2")
    for name in ("owls", "terns"):
        put(registry, make_task, name)
        newer.follow(name)
        assert newer.entry(name)["alias"] == f"tiny.{name}"
    said = ["\0" + str(newer._slot_of("terns"))]  # given out by another process
    assert made.tasks_of(said) == ["terns"]


@pytest.mark.parametrize("settings", [{"new_version": True}, {"force": True, "aliases": True}])
def test_the_slot_of_a_task_that_went_with_a_rewriting_is_not_the_next_one(
    begin, repository, make_task, inputs_bundle, settings
):
    """A tritonserver may have the alias loaded still, and it would lead to the other task."""
    made, registry = begin()
    put(registry, make_task, "birds")
    made.follow("birds")
    for tasks in (inputs_bundle.tasks[:2], inputs_bundle.tasks[:1]):
        write_repository(replace(inputs_bundle, tasks=tasks), repository, **settings)
    again, registry = begin(version="3" if "new_version" in settings else "1")
    put(registry, make_task, "owls")
    again.follow("owls")
    assert read_slots(repository, "tiny") == {0: "pets", 4: "owls"}


def test_a_model_that_was_written_anew_has_the_aliases_when_it_is_loaded(
    begin, repository, make_task, inputs_bundle
):
    made, registry = begin()
    put(registry, make_task, "birds")
    made.follow("birds")
    for _ in range(2):
        write_repository(inputs_bundle, repository, force=True, aliases=True)
        made.follow("birds")
        assert made.entry("birds") == {
            "alias": None, "no_alias": "tiny, which was written anew, has the aliases",
        }  # fmt: skip
        assert "tiny.birds" not in names(repository)
    del registry.versions["pets"]
    made.follow("pets")
    assert "tiny.pets" in names(repository)


def test_a_model_that_is_loaded_later_than_triton_loads_its_aliases(begin, monkeypatch):
    for is_up in (False, True):
        answers = iter([is_up])
        monkeypatch.setattr(aliases, "is_listening", lambda _, first=answers: next(first, True))
        triton = Triton("tiny", "tiny.task_names", "tiny.pets")
        made, _ = begin("explicit", triton=triton)
        made.start()
        made._thread.join()
        assert triton.loaded == (["tiny.cars", "tiny.flowers"] if is_up else [])


def test_the_repository_is_not_read_for_every_slot_that_nobody_knows(begin, monkeypatch):
    made, _ = begin()
    reads = []
    inner = aliases.read_slots
    monkeypatch.setattr(aliases, "read_slots", lambda *of: reads.append(of) or inner(*of))
    unknown = ["\0999"]
    made.tasks_of(unknown)
    before = len(reads)
    for _ in range(5):
        assert made.tasks_of(unknown) == unknown
    assert len(reads) == before
    made._looked -= aliases.RESCAN_SECONDS
    made.tasks_of(unknown)
    assert len(reads) == before + 1


@pytest.mark.parametrize("settings", [{"new_version": True}, {"force": True, "aliases": True}])
def test_aliases_of_kept_tasks_outlive_a_written_repository(
    begin, repository, make_task, inputs_bundle, tmp_path, settings
):
    made, registry = begin()
    put(registry, make_task, "birds")
    made.follow("birds")
    slots = read_slots(repository, "tiny")
    options = ModelOptions(keep=tmp_path / "kept")
    write_repository(inputs_bundle, repository, options=options, **settings)
    assert read_slots(repository, "tiny") == slots
    write_repository(inputs_bundle, repository, **settings)
    assert "birds" not in read_slots(repository, "tiny").values()


def test_many_tasks_have_slots_of_their_own(begin, repository, make_task):
    made, registry = begin()
    for number in range(300):
        put(registry, make_task, f"t{number}")
        made.follow(f"t{number}")
    slots = read_slots(repository, "tiny")
    assert len(slots) == 303
    assert made.tasks_of([f"\0{slot}" for slot in slots]) == list(slots.values())


def test_slots_go_round():
    assert free_slot({}, 3, -1) == 0
    assert free_slot({}, 3, 2) == 0
    assert free_slot({1: "a"}, 3, 0) == 2
    assert free_slot({0: "a", 1: "b", 2: "c"}, 3, 1) is None
