"""Tasks of a running server, through its tasks' model."""

from __future__ import annotations

import json

import numpy as np
import pytest

from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.merge.preprocessing import Preprocessing
from utune_deploy.serving.client import TaskInfo
from utune_deploy.serving.client.answers import read_task
from utune_deploy.serving.rejections import BadReply, InvalidRequest
from utune_deploy.serving.tasks.life import entry as task_entry
from utune_deploy.serving.tasks.versions import Version


@pytest.fixture(scope="module")
def addresses(embed, service):
    with embed(service) as running:
        yield running


@pytest.fixture
def client(client_kind, addresses):
    with client_kind(f"http://{addresses.http}") as made:
        yield made


@pytest.fixture
def tasks(client, bundle, tasks_of):
    made = tasks_of(bundle)
    client.put(made.beside)
    return made


def test_tasks_are_told_with_all_their_facts(client, tasks, bundle):
    pets, *others = client.tasks()
    assert pets == TaskInfo(
        name="pets",
        version=1,
        versions=(1,),
        labels=bundle.task("pets").labels,
        preprocessing=Preprocessing((8, 8)),
        width=None,
        resident=True,
        pinned=False,
        delta=bundle.task("pets").delta,
    )
    assert [task.name for task in others] == ["cars", "flowers"]
    assert client.tasks()
    assert len(tasks.commands) == 2  # never from memory


def test_an_alias_is_told_or_why_there_is_none(bundle):
    entry = task_entry(Version(bundle.task("pets")), [1])
    assert read_task(entry, where="here").alias is None  # of a server that has none
    entry |= {"alias": "tiny.pets", "no_alias": None}
    assert read_task(entry, where="here").alias == "tiny.pets"
    found = read_task({**entry, "alias": None, "no_alias": "so"}, where="here")
    assert (found.alias, found.no_alias) == (None, "so")


def test_a_real_server_tells_its_tasks_and_refuses_what_it_cannot_change(client, bundle):
    found = client.tasks()
    assert [(task.name, task.labels, task.preprocessing, task.delta) for task in found] == [
        (task.name, task.labels, task.preprocessing, task.delta) for task in bundle.tasks
    ]
    assert "fixed" in client.describe()
    for change in (lambda: client.pin("pets"), lambda: client.add(b"no packed task")):
        with pytest.raises(InvalidRequest):
            change()


@pytest.mark.parametrize("form", ["bytes", "path", "text"])
def test_a_packed_task_is_sent_whole(client, tasks, tmp_path, form):
    path = tmp_path / "birds.task.safetensors"
    path.write_bytes(b"birds")
    added = client.add({"bytes": b"birds", "path": path, "text": str(path)}[form])
    assert (added.name, added.version) == ("birds", 1)
    updated = client.update(b"birds")
    assert (updated.version, updated.versions) == (2, (1, 2))
    assert client.use("birds", 1).version == 1
    assert client.pin("birds").pinned
    assert not client.unpin("birds").pinned
    assert client.remove("birds") is None
    assert "birds" not in tasks.table
    assert tasks.files == [b"birds", b"birds"]
    assert tasks.commands == [
        {"action": "add"},
        {"action": "update"},
        {"action": "use", "task": "birds", "version": 1},
        {"action": "pin", "task": "birds"},
        {"action": "unpin", "task": "birds"},
        {"action": "remove", "task": "birds"},
    ]


def test_what_a_change_replies_is_remembered(client, tasks):
    """A picture after it needs no question, and is prepared the new way."""
    client.tasks()
    tasks.table["pets"]["preprocessing"] = Preprocessing((8, 8), crop=0.5).to_json()
    client.update(b"pets")
    from PIL import Image

    client.ask(Image.new("RGB", (20, 20), "red"), task="pets")
    assert [command["action"] for command in tasks.commands] == ["list", "update"]


def test_an_unknown_task_is_refused(client, tasks):
    with pytest.raises(InvalidRequest, match="unknown task"):
        client.pin("birds")


def test_a_file_that_is_not_there_is_said(client, tasks, tmp_path):
    with pytest.raises(UsageError, match="cannot be read") as refused:
        client.add(tmp_path / "none.safetensors")
    assert refused.value.details["where"].endswith("none.safetensors")


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (b"{", BadReply),
        (b"[]", BadReply),
        (b"\xff", BadReply),
        (b'{"tasks": 3}', BadReply),
        (b'{"tasks": [{}]}', BadReply),
        (b'{"tasks": ["pets"]}', BadReply),
        (None, BadReply),
        ("preprocessing", IncompatibleArtefact),
    ],
)
def test_a_reply_that_cannot_be_read_is_said(client, tasks, monkeypatch, reply, kind):
    if reply == "preprocessing":
        entry = {**tasks.table["pets"], "preprocessing": {"size": [8, 8]}}
        reply = json.dumps({"tasks": [entry]}).encode()
    said = {} if reply is None else {"reply": np.array([reply], dtype=object)}
    monkeypatch.setattr(tasks, "answer", lambda call: said)
    with pytest.raises(kind):
        client.tasks()


def test_commands_travel_as_the_tasks_model_wants_them(client_kind, stage):
    """`command` and `file` are BYTES [1], `reply` comes as JSON or as bytes."""
    entry = {"name": "pets", "version": 3, "versions": [3], "labels": [], "preprocessing": None}
    entry |= {"width": 5, "resident": False, "pinned": False, "delta": "ab"}
    text = json.dumps({"model": "tiny", "task": entry})
    output = {"name": "reply", "datatype": "BYTES", "shape": [1], "data": [text]}
    stage.script = [stage.say(200, {"model_name": "tiny.tasks", "outputs": [output]})]
    with client_kind(stage.url) as client:
        task = client.add(bytes(range(256)))
    assert (task.version, task.width, task.labels) == (3, 5, ())
    (body,) = stage.bodies
    sent = [(entry["name"], entry["datatype"], entry["shape"]) for entry in body["inputs"]]
    assert sent == [("command", "BYTES", [1]), ("file", "BYTES", [1])]
    assert body["inputs"][1]["parameters"]["binary_data_size"] == 4 + 256
