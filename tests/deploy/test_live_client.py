"""Tasks of a running server by the client: a real backbone, a bank as input, both fronts."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from utune_deploy.export.bundle import open_bundle
from utune_deploy.export.engine import Device
from utune_deploy.merge.backbone import save
from utune_deploy.merge.delta import save_delta
from utune_deploy.merge.errors import IncompatibleArtefact
from utune_deploy.serving.client import Client
from utune_deploy.serving.rejections import InvalidRequest
from utune_deploy.serving.service import Service

if TYPE_CHECKING:
    from pathlib import Path

    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_task_lives_on_a_running_server(
    tmp_path: Path,
    vit: Backbone,
    deltas: dict[str, Delta],
    picture: Any,
    cli: Any,
    served: Any,
    scheme: str,
) -> None:
    save(tmp_path / "backbone", vit)
    for task in ("lora", "dual"):
        save_delta(tmp_path / f"{task}.safetensors", deltas[task])
    save_delta(tmp_path / "other.safetensors", replace(deltas["lora"], task="other"))
    weights = ("--weights", tmp_path / "backbone")
    exported = cli(
        "-q", "export", tmp_path / "lora.safetensors", tmp_path / "dual.safetensors", *weights,
        "-o", tmp_path / "bundle", "--max-batch", 4, "--threads", 1, "--bank", "inputs",
    )  # fmt: skip
    assert exported.code == 0, exported.err
    packed = tmp_path / "other.task.safetensors"
    said = cli(
        "task", "pack", tmp_path / "other.safetensors", *weights, "--for", tmp_path / "bundle",
        "-o", packed,
    )  # fmt: skip
    assert said.code == 0, said.err
    pixels = deltas["lora"].preprocessing.apply(Image.open(BytesIO(picture(0))))  # type: ignore[union-attr]
    with (
        closing(Service.open(open_bundle(tmp_path / "bundle"), Device(threads=1))) as service,
        served(service) as addresses,
        Client(f"{scheme}://{getattr(addresses, scheme)}") as client,
    ):
        assert [task.name for task in client.tasks()] == ["lora", "dual"]
        assert client.add(packed).version == 1
        updated = client.update(packed.read_bytes())
        assert (updated.version, updated.versions) == (2, (1, 2))
        assert client.use("other", 1).version == 1
        assert client.pin("other").pinned
        assert not client.unpin("other").pinned
        asked = ["lora", "dual", "other"] * 2
        answers = client.ask_many([picture(0)] * 6, tasks=asked)
        assert [answer.task for answer in answers] == asked
        reference = service.answer(pixels[None], ["lora"])
        for answer in (answers[0], answers[2]):
            assert answer.label == reference.labels[0]
            assert np.allclose(answer.logits, reference.logits[0, : len(answer.logits)], atol=1e-4)
        client.remove("other")
        with pytest.raises(InvalidRequest, match="unknown task"):
            client.ask(picture(0), task="other")
        with pytest.raises(IncompatibleArtefact):
            client.add(b"no packed task")
