"""Aliases that follow their tasks, in a real tritonserver in each of its control modes."""

from __future__ import annotations

import shutil
import threading
import time

import pytest
import tritonclient.grpc as grpc
import tritonclient.http as http
from tritonclient.utils import InferenceServerException

from utune_deploy.serving.client import Client
from utune_deploy.serving.repository import write_repository
from utune_deploy.serving.repository.options import ModelOptions
from utune_deploy.serving.servers import triton

from .running import IMAGES, ONE, answers_as, asker, pixels, started, until


def test_an_alias_comes_changes_and_goes_with_its_task(
    inputs_bundle, triton_environment, make_task, tmp_path, under_load
):
    first, second = make_task("birds", 3, seed=1), make_task("birds", 2, seed=2)
    second = second.changed(labels=("owl", "tit"))
    options = ModelOptions(task_control=True, keep=tmp_path / "kept", rows=8)
    pets, cars = make_task("pets"), make_task("cars")
    with (
        triton.running(
            inputs_bundle, environment=triton_environment, device=ONE, options=options, aliases=True
        ) as process,
        Client(f"http://{process.addresses.http}", deadline_s=30) as client,
        http.InferenceServerClient(process.addresses.http) as web,
    ):
        with under_load(
            asker(process.addresses, "http", "tiny.pets", pets),
            asker(process.addresses, "grpc", "tiny.cars", cars),
            asker(process.addresses, "http", "tiny", cars),
        ):
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
        started(triton_environment, tmp_path, "explicit", monkeypatch) as addresses,
        Client(f"http://{addresses.http}", deadline_s=30) as client,
        http.InferenceServerClient(addresses.http) as web,
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
        started(triton_environment, tmp_path / "again", "explicit", monkeypatch) as addresses,
        http.InferenceServerClient(addresses.http) as web,
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
        started(triton_environment, tmp_path, "poll", monkeypatch) as addresses,
        http.InferenceServerClient(addresses.http) as web,
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
        started(triton_environment, tmp_path, "none", monkeypatch) as addresses,
        Client(f"http://{addresses.http}", deadline_s=30) as client,
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
            started(triton_environment, tmp_path / "again", "none", monkeypatch) as addresses,
            Client(f"http://{addresses.http}", deadline_s=30) as client,
            http.InferenceServerClient(addresses.http) as web,
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
