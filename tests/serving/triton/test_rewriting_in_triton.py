"""A repository that is written anew while a tritonserver serves it."""

from __future__ import annotations

import pytest
import tritonclient.http as http
from tritonclient.utils import InferenceServerException

from utune_deploy.serving.client import Client
from utune_deploy.serving.repository import write_repository
from utune_deploy.serving.repository.options import ModelOptions

from .running import ONE, answers_as, asker, pixels, started, until

MODES = ("poll", "explicit")
REFUSED = r"unknown task|unknown model"


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", [{"force": True, "aliases": True}, {"new_version": True}])
def test_another_bundle_comes_under_load_and_no_alias_answers_as_another(
    inputs_bundle, later_bundle, triton_environment, make_task, under_load, tmp_path, monkeypatch,
    mode, settings,
):  # fmt: skip
    options = ModelOptions(task_control=True, rows=8)
    models = tmp_path / "models"
    write_repository(inputs_bundle, models, device=ONE, options=options, aliases=True)
    owls = make_task("owls", seed=2).changed(identity=later_bundle.identity)
    pets, cars = ((make_task(name), make_task(name, seed=5)) for name in ("pets", "cars"))
    with (
        started(triton_environment, tmp_path, mode, monkeypatch) as addresses,
        Client(f"http://{addresses.http}", deadline_s=30) as client,
        http.InferenceServerClient(addresses.http) as web,
    ):
        client.add(make_task("birds", seed=1).data)
        until(lambda: web.is_model_ready("tiny.birds"))
        with under_load(
            asker(addresses, "http", "tiny.pets", *pets),
            asker(addresses, "grpc", "tiny.cars", *cars),
            asker(addresses, "http", "tiny", *cars),
        ) as counts:
            write_repository(later_bundle, models, device=ONE, options=options, **settings)
            if mode == "explicit":
                lost = client.add(make_task("terns", seed=3).data)
                assert lost.no_alias.endswith("has the aliases")
                for model in ("tiny", "tiny.tasks"):
                    web.load_model(model)
            until(lambda: web.is_model_ready("tiny.boats"))
            until(lambda: answers_as(web, "tiny.pets", pets[1]))
            assert answers_as(web, "tiny.cars", cars[1])
            assert answers_as(web, "tiny.boats", make_task("boats", 4, seed=5))
            until(
                lambda: (
                    {t.alias for t in client.tasks()} == {"tiny.boats", "tiny.cars", "tiny.pets"}
                )
            )
            assert client.add(owls.data).alias == "tiny.owls"
            until(lambda: web.is_model_ready("tiny.owls"))
            assert answers_as(web, "tiny.owls", owls)
            for gone in ("tiny.flowers", "tiny.birds", "tiny.terns"):
                with pytest.raises(InferenceServerException, match=REFUSED):
                    web.infer(gone, pixels())
            before = list(counts)
            until(lambda: all(now > then for now, then in zip(counts, before, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_kept_tasks_and_their_aliases_are_answered_all_along(
    inputs_bundle, later_bundle, triton_environment, make_task, under_load, tmp_path, monkeypatch,
    mode,
):  # fmt: skip
    options = ModelOptions(task_control=True, rows=8, keep=tmp_path / "kept")
    models = tmp_path / "models"
    write_repository(inputs_bundle, models, device=ONE, options=options, aliases=True)
    birds, owls = make_task("birds", seed=1), make_task("owls", seed=2)
    with (
        started(triton_environment, tmp_path, mode, monkeypatch) as addresses,
        Client(f"http://{addresses.http}", deadline_s=30) as client,
        http.InferenceServerClient(addresses.http) as web,
    ):
        client.add(birds.data)
        until(lambda: web.is_model_ready("tiny.birds"))
        with under_load(
            asker(addresses, "http", "tiny.birds", birds), asker(addresses, "grpc", "tiny", birds)
        ):
            write_repository(
                later_bundle, models, device=ONE, options=options, aliases=True, force=True
            )
            if mode == "explicit":
                assert client.add(owls.data).alias is None
                for model in ("tiny", "tiny.tasks"):
                    web.load_model(model)
                until(lambda: web.is_model_ready("tiny.owls"))
                assert answers_as(web, "tiny.owls", owls)
            else:
                log = tmp_path / "tritonserver.log"
                until(lambda: log.read_text().count("successfully loaded 'tiny'") == 2)
            until(lambda: not web.is_model_ready("tiny.flowers"))  # taken away by the model
            until(lambda: web.is_model_ready("tiny.boats"))
            assert "tiny.birds" in {task.alias for task in client.tasks()}
            assert answers_as(web, "tiny.birds", birds)
