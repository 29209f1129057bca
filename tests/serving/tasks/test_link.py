"""The socket between a model and its tasks' model."""

from __future__ import annotations

import os
import stat
import threading
from multiprocessing.connection import Client

import pytest

from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.serving.rejections import Stopping
from utune_deploy.serving.tasks import link as task_link


@pytest.fixture
def where(tmp_path):
    return task_link.address(
        tmp_path / "sockets", "tiny" * 60, "12"
    )  # a name longer than a socket's


@pytest.fixture
def listen(where):
    """`listen(run)`: the model's end."""
    opened = []

    def start(run):
        opened.append(task_link.TaskLink(where, run))
        return opened[-1]

    yield start
    for link in opened:
        link.close()


def test_a_command_and_its_file_go_over_and_the_reply_comes_back(listen, where):
    listen(lambda command, file: {"was": command, "bytes": None if file is None else len(file)})
    big = b"\x00\xff" * (5 << 20)
    assert task_link.ask(where, {"action": "add"}, big) == {"was": {"action": "add"}, "bytes": len(big)}  # fmt: skip
    assert task_link.ask(where, {"action": "list"}) == {"was": {"action": "list"}, "bytes": None}
    assert task_link.ask(where, {"action": "add"}, b"")["bytes"] == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("no such task", found="birds"), "INVALID_ARG"),
        (IncompatibleArtefact("does not fit"), "INVALID_ARG"),
        (Stopping("the server is stopping"), "UNAVAILABLE"),
        (KeyError("a mistake"), "INTERNAL"),
    ],
)
def test_a_refusal_keeps_its_words_and_its_code(listen, where, error, code):
    def refuse(*_):
        raise error

    listen(refuse)
    with pytest.raises(task_link.Refused) as refused:
        task_link.ask(where, {})
    assert refused.value.code == code
    assert getattr(error, "what", "a mistake") in str(refused.value)


def test_nobody_there_is_unavailable(listen, where):
    for _ in range(2):
        with pytest.raises(task_link.Refused, match="not ready") as refused:
            task_link.ask(where, {})
        assert refused.value.code == "UNAVAILABLE"
        listen(lambda *_: {}).close()
    assert not where.parent.exists()  # nothing is left behind


def test_only_this_user_and_who_knows_the_key_is_let_in(listen, where):
    listen(lambda *_: {})
    assert stat.S_IMODE(where.parent.stat().st_mode) == 0o700
    own = where.resolve()
    assert stat.S_IMODE(own.with_name(f"{own.name}.key").stat().st_mode) == 0o600
    with pytest.raises(Exception, match="digest"):
        Client(str(own), family="AF_UNIX", authkey=b"guessed")
    assert task_link.ask(where, {}) == {}  # and the next one is heard


def test_a_folder_that_others_may_enter_is_refused(listen, where):
    where.parent.mkdir(mode=0o755)
    with pytest.raises(UsageError, match="not this user's alone"):
        listen(lambda *_: {})


def test_what_a_killed_process_left_is_no_hindrance(listen, where):
    where.parent.mkdir(mode=0o700)
    for end in ("", ".4194999", ".4194999.key"):
        where.with_name(where.name + end).write_text("stale")
    listen(lambda *_: {"well": True})
    assert task_link.ask(where, {}) == {"well": True}
    assert len(list(where.parent.iterdir())) == 3


def test_the_process_that_came_last_is_asked_and_the_first_one_ends(listen, where, monkeypatch):
    first = listen(lambda *_: {"from": 1})
    monkeypatch.setattr(os, "getpid", os.getppid)  # another one that lives
    listen(lambda *_: {"from": 2})
    assert task_link.ask(where, {}) == {"from": 2}
    first.close()
    assert task_link.ask(where, {}) == {"from": 2}


def test_closing_waits_for_the_command_that_runs(listen, where):
    running, go = threading.Event(), threading.Event()

    def slow(*_):
        running.set()
        go.wait()
        return {"done": True}

    link = listen(slow)
    replies = []
    asker = threading.Thread(target=lambda: replies.append(task_link.ask(where, {})))
    asker.start()
    assert running.wait(30)
    closing = threading.Thread(target=link.close)
    closing.start()
    go.set()
    closing.join()
    asker.join()
    assert replies == [{"done": True}]
