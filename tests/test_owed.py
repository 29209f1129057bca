"""`bench/gpu/owed.py` runs what is left while there is time, and goes on where it stopped."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / "bench" / "gpu" / "owed.py"


@pytest.fixture(scope="module")
def owed():
    spec = importlib.util.spec_from_file_location("owed", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["owed"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["owed"]


@pytest.fixture
def call(owed, monkeypatch, tmp_path, capsys):
    """`(steps, *options) -> (exit code, what was printed, results by name)`."""
    monkeypatch.setattr(owed, "name_of_device", lambda: "a device")
    monkeypatch.setattr(owed, "digest_of_sources", lambda: "abc")

    def call(steps, *options):
        words = ["owed.py", "-o", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *options]
        monkeypatch.setattr(sys, "argv", words)
        code = 0
        try:
            owed.main(tuple(steps))
        except SystemExit as left:
            code = left.code
        files = (tmp_path / "out" / "steps").glob("*.json")
        return code, capsys.readouterr().out, {f.stem: json.loads(f.read_text()) for f in files}

    return call


def test_steps_run_in_order_and_are_not_run_again(owed, call, tmp_path):
    log = tmp_path / "log"
    steps = [
        owed.Step("a", "first", f"echo a >> {log}", 1),
        owed.Step("b", "second", f"echo b >> {log}; echo said", 1, ("a",)),
    ]
    code, _, found = call(steps)
    assert (code, log.read_text()) == (0, "a\nb\n")
    assert found["b"]["tail"] == "said\n"
    assert (found["a"]["device"], found["a"]["sources"], found["a"]["code"]) == (
        "a device",
        "abc",
        0,
    )
    assert call(steps)[0] == 0
    assert log.read_text() == "a\nb\n"


def test_what_failed_is_run_again_and_what_needs_it_waits(owed, call, tmp_path):
    flag = tmp_path / "flag"
    steps = [
        owed.Step("a", "", f"test -e {flag}", 1),
        owed.Step("b", "", "true", 1, ("a",)),
        owed.Step("c", "", "true", 1),
    ]
    code, out, found = call(steps)
    assert (code, sorted(found)) == (owed.FAILED, ["a", "c"])
    assert "failed ['a'], left ['b']" in out
    flag.touch()
    assert call(steps)[0] == 0


def test_a_step_that_does_not_fit_is_left_for_another_call(owed, call):
    steps = [owed.Step("long", "", "true", 100), owed.Step("short", "", "true", 1)]
    code, _, found = call(steps, "--minutes", "0.5")
    assert (code, sorted(found)) == (owed.LEFT, ["short"])


def test_a_step_that_hangs_is_stopped(owed, call, monkeypatch):
    monkeypatch.setattr(owed, "GRACE", 0.5)
    code, _, found = call([owed.Step("a", "", "echo begun; exec sleep 60", 1)])
    assert (code, found["a"]["code"], found["a"]["tail"]) == (owed.FAILED, 124, "begun\n")


def test_another_device_or_other_sources_are_other_results(owed, call, monkeypatch):
    step = owed.Step("a", "what it is", "true", 1)
    assert call([step])[0] == 0
    assert "done  a" in call([step], "--list")[1]
    for name in ("name_of_device", "digest_of_sources"):
        with monkeypatch.context() as other:
            other.setattr(owed, name, lambda: "another")
            assert "owed  a" in call([step], "--list")[1]


def test_the_steps_are_commands_of_files_and_options_that_there_are(owed):
    """A step that cannot begin is found here and not on the device."""
    places = {"output": "out", "work": "work", "headers": "include", "python": sys.executable}
    names = [step.name for step in owed.STEPS]
    assert len(set(names)) == len(names)
    for number, step in enumerate(owed.STEPS):
        assert set(step.after) <= set(names[:number])
        words = step.command.format(**places).split()
        for word in words:
            if word.startswith(("bench/", "tests/", "examples/")):
                assert (PATH.parents[2] / word).exists(), word
        if "utune_deploy.deploy" in words:
            _require_known_options(words)


def _require_known_options(words):
    verb = words[words.index("utune_deploy.deploy") + 1]
    command = importlib.import_module(f"utune_deploy.deploy.verbs.{verb}").command
    known = {option for parameter in command.params for option in parameter.opts}
    for word in words[words.index(verb) :]:
        if word.startswith("--"):
            assert word in known, f"{verb} {word}"
