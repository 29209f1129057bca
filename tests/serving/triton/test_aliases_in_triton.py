"""Aliases that follow their tasks, in a real tritonserver in each of its control modes."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tritonclient.grpc as grpc
import tritonclient.http as http
from tritonclient.utils import InferenceServerException

from utune_deploy.export.engine import Device
from utune_deploy.serving.client import Client
from utune_deploy.serving.repository import write_repository
from utune_deploy.serving.repository.options import ModelOptions
from utune_deploy.serving.servers import triton
from utune_deploy.serving.servers.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ONE = Device(threads=1)
IMAGES = np.random.default_rng(5).standard_normal((32, 3, 8, 8)).astype(np.float32)
SECONDS = 20.0


@contextmanager
def started(environment: Path, folder: Path, mode: str, monkeypatch) -> Iterator[str]:
    """The HTTP address of a tritonserver over `folder/models` that comes by its models in this mode."""
    start = subprocess.Popen

    def with_mode(command, **settings):
        words = [
            f"--model-control-mode={mode}" if "--model-control-mode" in word else word
            for word in command
        ]
        load = ["--load-model=*"] if mode == "explicit" else []
        return start([*words, *load], **settings)

    fit = triton.inspect_environment(environment, needs_safetensors=True)
    with monkeypatch.context() as patch:
        patch.setattr(triton.subprocess, "Popen", with_mode)
        ports = [free_port("127.0.0.1", 0) for _ in range(3)]
        process = triton.TritonProcess(fit, folder, "127.0.0.1", ports)
    try:
        process.wait_until_ready(60, lambda: False)
        yield process.addresses.http
    finally:
        monkeypatch.setattr(
            triton, "EXIT_SECONDS", 0.5
        )  # nothing goes with its folder in this mode
        process.end()


def until(condition, seconds: float = SECONDS) -> float:
    """Wait for it; how long that took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds
        time.sleep(0.01)
    return time.monotonic() - begin


def pixels(rows: int = 3) -> list[http.InferInput]:
    given = http.InferInput("images", [rows, 3, 8, 8], "FP32")
    given.set_data_from_numpy(IMAGES[:rows])
    return [given]


def answers_as(web, model: str, made) -> bool:
    """Whether an alias gives a task's logits and labels, and its class names."""
    classes = [http.InferRequestedOutput("logits", class_count=1)]
    reply = web.infer(model, pixels())
    best = [cell.decode() for cell in reply.as_numpy("label").ravel()]
    said = web.infer(model, pixels(), outputs=classes).as_numpy("logits").ravel()
    wanted = [made.labels[k] for k in made.logits(IMAGES[:3]).argmax(axis=1)]
    return (
        made.answers(IMAGES[:3], reply.as_numpy("logits"))
        and best == wanted
        and [cell.decode().split(":")[2] for cell in said] == wanted
    )


@contextmanager
def asking(addresses, make_task, counts: list[int]) -> Iterator[None]:
    """Requests of aliases and of the model while the block runs; none may fail or be wrong."""
    stop, wrong = threading.Event(), []

    def ask(number: int, front: str, task: str, model: str) -> None:
        kinds = http if front == "http" else grpc
        made = make_task(task)
        client = kinds.InferenceServerClient(getattr(addresses, front))
        given = kinds.InferInput("images", [2, 3, 8, 8], "FP32")
        given.set_data_from_numpy(IMAGES[:2])
        inputs = [given]
        if model == "tiny":
            named = kinds.InferInput("task", [2, 1], "BYTES")
            named.set_data_from_numpy(np.array([[task.encode()]] * 2, dtype=object))
            inputs.append(named)
        while not stop.is_set():
            try:
                logits = client.infer(model, inputs).as_numpy("logits")
                wrong.extend([] if made.answers(IMAGES[:2], logits) else [model])
                counts[number] += 1
            except Exception as error:
                wrong.append(repr(error))
        client.close()

    whom = [("http", "pets", "tiny.pets"), ("grpc", "cars", "tiny.cars"), ("http", "cars", "tiny")]
    counts[:] = [0] * len(whom)
    threads = [threading.Thread(target=ask, args=(n, *who)) for n, who in enumerate(whom)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[:3]
    assert min(counts) > 0


def test_an_alias_comes_changes_and_goes_with_its_task(
    inputs_bundle, triton_environment, make_task, tmp_path
):
    first, second = make_task("birds", 3, seed=1), make_task("birds", 2, seed=2)
    second = second.changed(labels=("owl", "tit"))
    options = ModelOptions(task_control=True, keep=tmp_path / "kept", rows=8)
    counts: list[int] = []
    with (
        triton.running(
            inputs_bundle, environment=triton_environment, device=ONE, options=options, aliases=True
        ) as process,
        Client(f"http://{process.addresses.http}", deadline_s=30) as client,
        http.InferenceServerClient(process.addresses.http) as web,
    ):
        with asking(process.addresses, make_task, counts):
            added = client.add(first.data)
            assert (added.alias, added.no_alias) == ("tiny.birds", None)
            until(lambda: web.is_model_ready("tiny.birds"))
            assert answers_as(web, "tiny.birds", first)
            assert client.update(second.data).version == 2
            until(lambda: web.is_model_ready("tiny.birds", "2"))
            assert answers_as(web, "tiny.birds", second)
            client.use("birds", 1)
            until(lambda: web.is_model_ready("tiny.birds", "1"))
            assert answers_as(web, "tiny.birds", first)
            client.remove("birds")
            with pytest.raises(InferenceServerException, match=r"unknown task|unknown model"):
                web.infer("tiny.birds", pixels())  # never another's answer
            until(lambda: not web.is_model_ready("tiny.birds"))
            client.add(second.data)
            client.update(make_task("flowers", 4, seed=3).data)
            until(lambda: web.is_model_ready("tiny.birds"))
            until(lambda: web.is_model_ready("tiny.flowers", "2"))
        client.remove("pets")
        until(lambda: not web.is_model_ready("tiny.pets"))
        assert {task.alias for task in client.tasks()} == {
            "tiny.cars",
            "tiny.birds",
            "tiny.flowers",
        }
        log = process.log.read_text()
        for model in ("tiny", "tiny.tasks", "tiny.task_names"):
            assert log.count(f"successfully loaded '{model}'") == 1
        assert "failed to load" not in log
    with (
        triton.running(
            inputs_bundle, environment=triton_environment, device=ONE, options=options, aliases=True
        ) as process,
        http.InferenceServerClient(process.addresses.http) as web,
    ):
        assert answers_as(web, "tiny.birds", second)
        assert web.is_model_ready("tiny.birds", "3")
        until(lambda: web.is_model_ready("tiny.flowers", "2"))
        assert answers_as(web, "tiny.flowers", make_task("flowers", 4, seed=3))
        until(lambda: not web.is_model_ready("tiny.pets"))
        assert "failed to load" not in process.log.read_text()


def test_an_alias_is_there_at_once_where_models_are_loaded_on_request(
    inputs_bundle, triton_environment, make_task, tmp_path, monkeypatch
):
    options = ModelOptions(task_control=True, keep=tmp_path / "kept", rows=8)
    first, second = make_task("birds", 3, seed=1), make_task("birds", 2, seed=2)
    write_repository(inputs_bundle, tmp_path / "models", device=ONE, options=options, aliases=True)
    with (
        started(triton_environment, tmp_path, "explicit", monkeypatch) as address,
        Client(f"http://{address}", deadline_s=30) as client,
        http.InferenceServerClient(address) as web,
    ):
        assert client.add(first.data).alias == "tiny.birds"
        assert answers_as(web, "tiny.birds", first)
        client.update(second.data)
        assert answers_as(web, "tiny.birds", second)
        assert client.add(make_task("owls", seed=4).data).alias
        client.remove("owls")
        assert not web.is_model_ready("tiny.owls")
    log = (tmp_path / "tritonserver.log").read_text()
    assert log.count("successfully loaded 'tiny'") == 1
    write_repository(
        inputs_bundle, tmp_path / "again/models", device=ONE, options=options, aliases=True
    )
    with (
        started(triton_environment, tmp_path / "again", "explicit", monkeypatch) as address,
        http.InferenceServerClient(address) as web,
    ):
        until(lambda: web.is_model_ready("tiny.birds"))
        assert answers_as(web, "tiny.birds", second)


def test_a_model_is_loaded_once_though_python_would_leave_byte_code(
    inputs_bundle, triton_environment, tmp_path, monkeypatch
):
    write_repository(inputs_bundle, tmp_path / "models", device=ONE, aliases=True)
    with started(triton_environment, tmp_path, "poll", monkeypatch):
        time.sleep(2.5)  # two polls
    log = (tmp_path / "tritonserver.log").read_text()
    for model in ("tiny", "tiny.tasks", "tiny.task_names", "tiny.pets"):
        assert log.count(f"successfully loaded '{model}'") == 1


def test_stopping_cuts_no_request_of_an_alias(inputs_bundle, triton_environment):
    endings: list[str] = []

    def ask(address: str, begun: threading.Event) -> None:
        with grpc.InferenceServerClient(address) as client:
            given = grpc.InferInput("images", [1, 3, 8, 8], "FP32")
            given.set_data_from_numpy(IMAGES[:1])
            while True:
                try:
                    client.infer("tiny.pets", [given])
                    begun.set()
                except InferenceServerException as error:
                    endings.append(f"{error.status()} {error.message()}")
                    break

    with triton.running(
        inputs_bundle, environment=triton_environment, device=ONE, aliases=True
    ) as process:
        begun = [threading.Event() for _ in range(4)]
        askers = [
            threading.Thread(target=ask, args=(process.addresses.grpc, event)) for event in begun
        ]
        for asker in askers:
            asker.start()
        for event in begun:
            event.wait()
        end = time.monotonic()
    for asker in askers:
        asker.join()
    assert time.monotonic() - end < triton.EXIT_SECONDS
    assert len(endings) == 4
    # The alias itself is gone, not the model behind it under a request's feet.
    assert all("tiny.pets" in ending for ending in endings), endings


def test_several_instances_know_the_slots_of_each_other(
    inputs_bundle, triton_environment, make_task, tmp_path, monkeypatch
):
    """Kept tasks, whose aliases the first instance writes; nothing changes while several of them run."""
    options = ModelOptions(task_control=True, keep=tmp_path / "kept", rows=8)
    made = make_task("birds", seed=1)
    with (
        triton.running(
            inputs_bundle, environment=triton_environment, device=ONE, options=options
        ) as process,
        Client(f"http://{process.addresses.http}", deadline_s=30) as client,
    ):
        assert client.add(made.data).alias is None
    options = ModelOptions(keep=tmp_path / "kept", rows=8, instances=2)
    write_repository(inputs_bundle, tmp_path / "models", device=ONE, options=options, aliases=True)
    with (
        started(triton_environment, tmp_path, "poll", monkeypatch) as address,
        http.InferenceServerClient(address) as web,
    ):
        for _ in range(20):  # both instances have their turns
            assert answers_as(web, "tiny.birds", made)


def test_a_task_is_added_where_triton_reads_no_folder_and_the_answer_says_so(
    inputs_bundle, triton_environment, make_task, tmp_path, monkeypatch
):
    options = ModelOptions(task_control=True, rows=8)
    made = make_task("birds", seed=1)
    write_repository(inputs_bundle, tmp_path / "models", device=ONE, options=options, aliases=True)
    with (
        started(triton_environment, tmp_path, "none", monkeypatch) as address,
        Client(f"http://{address}", deadline_s=30) as client,
    ):
        added = client.add(made.data)
        assert added.alias is None
        assert "--model-control-mode=none" in added.no_alias
        assert client.ask(IMAGES[0], task="birds").label == made.labels[
            int(made.logits(IMAGES[:1]).argmax())
        ]  # fmt: skip
        listed = {task.name: task.alias for task in client.tasks()}
        assert listed["birds"] is None
        assert listed["pets"] == "tiny.pets"
    assert not (tmp_path / "models" / "tiny.birds").exists()
    options = ModelOptions(task_control=True, rows=8, keep=tmp_path / "kept")
    models = tmp_path / "again" / "models"
    write_repository(inputs_bundle, models, device=ONE, options=options, aliases=True)
    for alias in (None, "tiny.birds"):  # kept, so that the next start finds it
        with (
            started(triton_environment, tmp_path / "again", "none", monkeypatch) as address,
            Client(f"http://{address}", deadline_s=30) as client,
            http.InferenceServerClient(address) as web,
        ):
            if alias is None:
                client.add(made.data)
            else:
                assert answers_as(web, alias, made)
            assert {task.name: task.alias for task in client.tasks()}["birds"] == alias
        for part in ("backends", "caches"):  # of the server, not of the repository
            shutil.rmtree(tmp_path / "again" / part)
        for left in (tmp_path / "again").glob("drained-*"):
            left.rename(models / left.name.removeprefix("drained-"))


@pytest.mark.parametrize("settings", [{"force": True, "aliases": True}, {"new_version": True}])
def test_a_repository_may_be_written_anew_while_it_is_served(
    inputs_bundle, triton_environment, make_task, tmp_path, monkeypatch, settings
):
    """Requests may be refused while a model is replaced; no answer is another task's."""
    options = ModelOptions(task_control=True, keep=tmp_path / "kept", rows=8)
    birds = make_task("birds", 3, seed=1)
    models = tmp_path / "models"
    write_repository(inputs_bundle, models, device=ONE, options=options, aliases=True)
    with (
        started(triton_environment, tmp_path, "poll", monkeypatch) as address,
        Client(f"http://{address}", deadline_s=30) as client,
        http.InferenceServerClient(address) as web,
    ):
        assert client.add(birds.data).alias == "tiny.birds"
        until(lambda: web.is_model_ready("tiny.birds"))
        more = replace(options, rows=9)
        write_repository(inputs_bundle, models, device=ONE, options=more, **settings)

        def rows() -> str:
            return web.get_model_config("tiny")["parameters"]["rows"]["string_value"]

        def settled(task: str) -> bool:
            try:
                return answers_as(
                    web, f"tiny.{task}", birds if task == "birds" else make_task(task)
                )
            except InferenceServerException:
                return False

        version = "2" if "new_version" in settings else "1"
        until(lambda: web.is_model_ready("tiny", version) and rows() == "9")
        for task in ("birds", "pets", "cars", "flowers"):
            until(lambda task=task: settled(task))
        assert {task.name for task in client.tasks()} == {"birds", "pets", "cars", "flowers"}
        client.remove("birds")
        until(lambda: not web.is_model_ready("tiny.birds"))


def test_a_model_of_the_aliases_name_stays_what_it_is(
    inputs_bundle, triton_environment, make_task, tmp_path, monkeypatch
):
    models = tmp_path / "models"
    options = ModelOptions(task_control=True, rows=8)
    write_repository(inputs_bundle, models, device=ONE, options=options, aliases=True)
    shutil.copytree(models / "tiny.pets", models / "tiny.birds")  # somebody else's ensemble
    (models / "tiny.birds/alias.json").unlink()
    config = (models / "tiny.birds/config.pbtxt").read_text()
    (models / "tiny.birds/config.pbtxt").write_text(config.replace("tiny.pets", "tiny.birds"))
    before = {path.name for path in (models / "tiny.birds").iterdir()}
    birds = make_task("birds", 3, seed=1)
    with (
        started(triton_environment, tmp_path, "poll", monkeypatch) as address,
        Client(f"http://{address}", deadline_s=30) as client,
        http.InferenceServerClient(address) as web,
    ):
        added = client.add(birds.data)
        assert (added.alias, added.no_alias) == (None, "another model is called tiny.birds")
        assert birds.answers(IMAGES[:1], client.ask_many(IMAGES[:1], tasks="birds")[0].logits[None])
        assert answers_as(web, "tiny.birds", make_task("pets"))
        client.remove("birds")
        assert {path.name for path in (models / "tiny.birds").iterdir()} == before
        assert web.is_model_ready("tiny.birds")
