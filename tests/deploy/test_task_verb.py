"""`task`: the tasks of a running server from the command line."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from utune_deploy.deploy.verbs.task import _line
from utune_deploy.export.engine import Device
from utune_deploy.merge import methods
from utune_deploy.merge.backbone import save
from utune_deploy.merge.delta import save_delta
from utune_deploy.serving.client import TaskInfo
from utune_deploy.serving.service import Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from utune_deploy.export.bundle import Bundle
    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta


@pytest.fixture(scope="module")
def weights(vit: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    save(folder / "vit", vit)
    return folder / "vit"


@pytest.fixture
def live(bundles: Callable[[str], Bundle], served: Any) -> Iterator[tuple[Service, str]]:
    """A service of the six tasks, whose bank is an input, and its server."""
    service = Service.open(bundles("inputs"), Device(threads=1))
    with closing(service), served(service) as addresses:
        yield service, f"http://{addresses.http}"


@pytest.fixture
def later(vit: Backbone, random_delta: Callable[..., Delta], tmp_path: Path) -> tuple[Delta, Path]:
    delta = random_delta(vit, methods.lora(2), task="later", classes=4, seed=51)
    save_delta(tmp_path / "later.safetensors", delta)
    return delta, tmp_path / "later.safetensors"


def test_a_delta_is_added_asked_updated_and_removed(
    live: Any, later: Any, weights: Path, alone: Any, images: Any, cli: Any
) -> None:
    (service, url), (delta, path) = live, later
    said = cli("task", "add", path, "--server", url, "--weights", weights, "--json")
    assert said.code == 0, said.err
    (added,) = json.loads(said.out)["tasks"]
    assert (added["name"], added["version"], added["labels"]) == ("later", 1, list(delta.labels))
    batch = images(1, seed=4)
    wanted = alone(delta, batch)[0]
    found = service.answer(batch, ["later"]).logits[0, : len(wanted)]
    assert np.abs(found - wanted).max() <= 2e-5 * np.abs(wanted).max()
    said = cli("task", "update", path, "--server", url)
    assert said.code == 0, said.err
    assert "version 2 of 1, 2" in said.out
    assert "version 1" in cli("task", "use", "later", 1, "--server", url).out
    assert "pinned" in cli("task", "pin", "later", "--server", url).out
    assert "pinned" not in cli("task", "pin", "later", "--off", "--server", url).out
    listed = json.loads(cli("task", "list", "--server", url, "--json").out)["tasks"]
    assert [task["name"] for task in listed] == [
        *(t.name for t in service.registry.bundle.tasks),
        "later",
    ]
    assert cli("task", "remove", "later", "--server", url).out == "removed later\n"
    assert "later" not in cli("task", "list", "--server", url).out


def test_a_packed_task_needs_neither_delta_nor_backbone(
    live: Any, vit: Backbone, random_delta: Any, weights: Path, tmp_path: Path, cli: Any
) -> None:
    _, url = live
    deep = random_delta(vit, methods.deep_prompt(2), task="deep", classes=2, seed=52)
    save_delta(tmp_path / "deep.safetensors", deep)
    refused = cli("task", "add", tmp_path / "deep.safetensors", "--server", url)
    assert refused.code == 2
    assert "the backbone is needed" in refused.err
    packed = tmp_path / "deep.task"
    said = cli(
        "task",
        "pack",
        tmp_path / "deep.safetensors",
        "-o",
        packed,
        "--server",
        url,
        "--weights",
        weights,
    )
    assert said.code == 0, said.err
    assert cli("task", "add", packed, "--server", url).code == 0


@pytest.mark.parametrize("front", ["http", "grpc"])
def test_every_refusal_has_its_exit_code(
    bundles: Any,
    served: Any,
    later: Any,
    vit: Backbone,
    random_delta: Any,
    tmp_path: Path,
    cli: Any,
    front: str,
) -> None:
    delta, path = later
    with (
        closing(Service.open(bundles("inputs"), Device(threads=1))) as service,
        served(service) as a,
    ):
        url = f"{front}://{getattr(a, front)}"
        assert cli("task", "update", path, "--server", url).code == 2
        assert cli("task", "remove", "nobody", "--server", url).code == 2
        other = replace(delta, backbone=replace(delta.backbone, fingerprint="0" * 64))
        save_delta(tmp_path / "other.safetensors", other)
        refused = cli("task", "add", tmp_path / "other.safetensors", "--server", url)
        assert refused.code == 4
        assert "another backbone" in refused.err
        wide = random_delta(vit, methods.lora(9), task="wide", classes=2, seed=3)
        save_delta(tmp_path / "wide.safetensors", wide)
        refused = cli("task", "add", tmp_path / "wide.safetensors", "--server", url)
        assert refused.code == 4
        assert "larger than its slot" in refused.err
    assert cli("task", "list", "--server", url, "--timeout", "0.5").code == 1


def test_a_bundle_of_constants_says_that_its_tasks_stay(
    bundles: Any, served: Any, later: Any, cli: Any
) -> None:
    with (
        closing(Service.open(bundles("constants"), Device(threads=1))) as service,
        served(service) as a,
    ):
        url = f"http://{a.http}"
        assert cli("task", "list", "--server", url).code == 0
        refused = cli("task", "remove", "lora", "--server", url)
        assert refused.code == 2
        assert "--bank inputs" in refused.err


def test_a_line_names_the_alias_or_says_why_there_is_none() -> None:
    task = TaskInfo("pets", 1, (1,), ("cat", "dog"), None, None, True, False, "0" * 64)
    assert _line(task) == "version 1, 2 classes, in memory"
    assert _line(replace(task, alias="vit.pets")).endswith(", in memory, alias vit.pets")
    assert _line(replace(task, no_alias="so")).endswith(", in memory, no alias: so")
