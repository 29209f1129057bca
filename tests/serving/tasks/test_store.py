"""The folder of kept tasks: written whole, read back the same, refused where it is not its own."""

from __future__ import annotations

import contextlib
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utune_deploy.merge.errors import IncompatibleArtefact, UsageError, UtuneError
from utune_deploy.serving.tasks.store import TABLE, Kept, Store

ME = "a" * 64
KEPT = {
    "birds": Kept({1: "one.task", 2: "two.task"}, 2, pinned=True, counted=2),
    "pets": Kept({}, 0, counted=3),
    "cars": Kept({4: "four.task"}, 1, counted=4, shipped=True),
}


def test_a_table_is_read_as_it_was_written(tmp_path):
    store = Store(tmp_path / "kept" / "deep", ME)
    assert store.lasting
    assert store.read() == {}
    store.write(KEPT)
    assert Store(store.folder, ME).read() == KEPT
    assert {path.name for path in store.folder.iterdir()} == {TABLE}


def test_files_are_named_by_their_bytes_and_removed_when_nothing_names_them(tmp_path):
    store = Store(tmp_path, ME)
    first, second, third = (store.put(data) for data in (b"one", b"two", b"three"))
    assert store.put(b"one") == first
    assert (tmp_path / second).read_bytes() == b"two"
    (tmp_path / "notes.txt").write_text("mine")
    store.write({"birds": Kept({1: first}, 1)}, in_use={third})
    assert {path.name for path in tmp_path.iterdir()} == {TABLE, "notes.txt", first, third}
    store.write({"birds": Kept({1: first}, 1)})
    assert {path.name for path in tmp_path.iterdir()} == {TABLE, "notes.txt", first}


def test_a_temporary_folder_is_removed_and_another_stays(tmp_path):
    passing, lasting = Store(None, ME), Store(tmp_path, ME)
    assert not passing.lasting
    for store in (passing, lasting):
        store.put(b"one")
        store.close()
        store.close()
    assert not passing.folder.exists()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_table_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    store = Store(tmp_path, ME)
    store.write(KEPT)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UtuneError, match="a task cannot be kept") as caught:
        store.write({})
    assert caught.value.details["found"] == "No space left on device"
    with pytest.raises(UtuneError, match="a task cannot be kept"):
        store.put(b"one")
    assert store.read() == KEPT
    assert {path.name for path in tmp_path.iterdir()} == {TABLE}


def test_what_is_no_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="tasks cannot be kept there"):
        Store(tmp_path / "file", ME)
    with pytest.raises(UsageError, match="tasks cannot be kept there"):
        Store(tmp_path / "file" / "below", ME)


def good() -> dict:
    entry = {
        "files": {"1": "one.task"},
        "current": 1,
        "pinned": False,
        "counted": 1,
        "shipped": False,
    }
    return {"format": "utune-tasks", "version": 1, "identity": ME, "tasks": {"birds": entry}}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "1", "null", "\"text\"", "{}", "[" * 100_000,
        json.dumps({**good(), "tasks": []}),
        json.dumps({**good(), "tasks": {"birds": 1}}),
        json.dumps({**good(), "tasks": {"birds": {}}}),
        json.dumps({**good(), "tasks": {"birds": {**good()["tasks"]["birds"], "files": ["a"]}}}),
        json.dumps({**good(), "tasks": {"birds": {**good()["tasks"]["birds"], "files": {"a": "b"}}}}),
        json.dumps({**good(), "tasks": {"birds": {**good()["tasks"]["birds"], "current": None}}}),
        json.dumps({**good(), "tasks": {"birds": {**good()["tasks"]["birds"], "current": float("inf")}}}),
    ],
    ids=str,
)  # fmt: skip
def test_a_malformed_table_is_one_sentence(tmp_path, text):
    (tmp_path / TABLE).write_text(text)
    with pytest.raises(IncompatibleArtefact, match="the table of tasks is malformed"):
        Store(tmp_path, ME).read()


def test_a_table_that_is_no_text_is_one_sentence(tmp_path):
    (tmp_path / TABLE).write_bytes(b"\xff\xfe")
    with pytest.raises(IncompatibleArtefact, match="the table of tasks is malformed"):
        Store(tmp_path, ME).read()


@pytest.mark.parametrize(
    "change", [{"identity": "b" * 64}, {"identity": None}, {"version": 2}, {"format": "x"}]
)
def test_the_table_of_another_bundle_or_format_is_refused(tmp_path, change):
    (tmp_path / TABLE).write_text(json.dumps(good() | change))
    with pytest.raises(IncompatibleArtefact, match="another bundle, or of another version"):
        Store(tmp_path, ME).read()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.data())
@settings(deadline=None)
def test_a_table_with_any_other_value_in_it_brings_no_other_error(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "any"
    table = good()
    place = data.draw(st.sampled_from([table, table["tasks"], table["tasks"]["birds"]]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(json_values)
    store = Store(folder, ME)
    (folder / TABLE).write_text(json.dumps(table))
    with contextlib.suppress(IncompatibleArtefact):
        store.read()
