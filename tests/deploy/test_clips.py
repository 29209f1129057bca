"""Tasks that read videos, from deltas to the answers of a command line."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from utune_deploy.deploy.bench.run import bench
from utune_deploy.deploy.build import export_bundle
from utune_deploy.deploy.pictures import read_folder
from utune_deploy.deploy.reference import Evidence
from utune_deploy.export.engine import Device
from utune_deploy.merge.architectures.video_swin import VideoSwin
from utune_deploy.merge.attach import restore
from utune_deploy.merge.backbone import wrap
from utune_deploy.merge.errors import UsageError
from utune_deploy.merge.methods import lora, serial_adapter
from utune_deploy.merge.preprocessing import Clip, Preprocessing
from utune_deploy.serving.pictures import read_rows
from utune_deploy.serving.service import Service

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from utune_deploy.deploy.task import Task
    from utune_deploy.export.bundle import Bundle
    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

ARGUMENTS = {
    "clip_size": [4, 14, 20],
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "patch_size": [2, 2, 2],
    "window_size": [2, 4, 4],
    "num_classes": 3,
}
CLASSES = {"falls": 5, "waves": 3}
MAX_BATCH = 6


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """A small Video Swin with random values everywhere; its windows are padded and shifted."""
    model = VideoSwin(**ARGUMENTS)
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = p[0].numel() ** -0.5 if p.dim() > 1 and "table" not in name else 0.3
            one = "norm" in name and name.endswith("weight")
            p.copy_(one + scale * torch.randn(p.shape, generator=noise))
    return wrap(model, "video_swin_base", ARGUMENTS)


@pytest.fixture(scope="module")
def deltas(backbone: Backbone, random_delta: Callable[..., Delta]) -> dict[str, Delta]:
    settings = replace(backbone.preprocessing(), clip=Clip(4, 2, 3))
    made = {
        "falls": random_delta(backbone, lora(2), task="falls", classes=5, seed=1),
        "waves": random_delta(
            backbone, lora(3), serial_adapter(2), task="waves", classes=3, seed=2
        ),
    }
    return {task: replace(delta, preprocessing=settings) for task, delta in made.items()}


@pytest.fixture(scope="module")
def bundle(
    backbone: Backbone,
    deltas: dict[str, Delta],
    videos: Path,
    as_task: Callable[[Delta], Task],
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    wanted = [(task, delta.preprocessing) for task, delta in deltas.items()]
    return export_bundle(
        tmp_path_factory.mktemp("clips") / "bundle",
        backbone,
        [as_task(delta) for delta in deltas.values()],
        max_batch=MAX_BATCH,
        evidence=Evidence(images=read_folder(videos, wanted)),
        device=Device(threads=1),
    )


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a.gif` of 12 frames, `b` a folder of 9 frames."""
    root = tmp_path_factory.mktemp("videos")
    frames = [Image.fromarray(pixels).quantize(256) for pixels in noise(12)]
    frames[0].save(root / "a.gif", save_all=True, append_images=frames[1:])
    (root / "b").mkdir()
    for number, pixels in enumerate(noise(9, seed=1)):
        Image.fromarray(pixels).save(root / "b" / f"frame_{number + 3}.png")  # 3 to 11
    return root


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 24, 30, 3), dtype=np.uint8)


def alone(backbone: Backbone, delta: Delta, rows: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return restore(backbone, delta)(torch.from_numpy(rows)).numpy()


# Reading


def test_frames_of_a_folder_follow_their_numbers(videos, deltas):
    settings = deltas["falls"].preprocessing
    frames = [Image.fromarray(pixels) for pixels in noise(9, seed=1)]
    assert np.array_equal(read_rows(videos / "b", settings), settings.apply(frames))


def test_rows_of_both_kinds(videos, deltas):
    settings = deltas["falls"].preprocessing
    assert read_rows(videos / "a.gif", settings).shape == (3, 3, 4, 14, 20)
    picture = Preprocessing((14, 20))
    assert read_rows(videos / "b" / "frame_3.png", picture).shape == (1, 3, 14, 20)


def test_what_cannot_be_read(videos, deltas, tmp_path):
    settings = deltas["falls"].preprocessing
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gif").write_text("no picture")
    for path, sentence in (
        (videos / "b" / "frame_3.png", "this is a single picture"),
        (tmp_path / "empty", "no frames of a video"),
        (tmp_path / "text.gif", "no picture that can be read"),
        (tmp_path / "none.gif", "no such picture"),
    ):
        with pytest.raises(UsageError, match=sentence) as caught:
            read_rows(path, settings)
        assert caught.value.details["where"] == str(path)
    with pytest.raises(UsageError, match="too short") as caught:
        read_rows(videos / "a.gif", replace(settings, clip=Clip(13)))
    assert caught.value.details == {
        "where": str(videos / "a.gif"),
        "wanted": "at least 13 frames",
        "found": "12 frames",
    }
    with pytest.raises(UsageError, match="reads single pictures"):
        read_rows(videos / "b", Preprocessing((14, 20)))
    for path in (videos / "b", tmp_path / "empty"):
        with pytest.raises(UsageError, match="no pictures for task falls") as caught:
            read_folder(path, [("falls", settings)])
        assert "folders of frames" in caught.value.details["wanted"]


# Answers


def test_the_bundle_says_that_it_reads_clips(bundle, deltas):
    assert bundle.engine.inputs[0].shape == ("batch", 3, 4, 14, 20)
    assert [task.preprocessing.clip for task in bundle.tasks] == [Clip(4, 2, 3)] * 2
    assert any("real images" in c["name"] for c in bundle.check["comparisons"])
    assert Service.open(bundle, Device(threads=1)).registry.inputs["images"].shape[1:] == (
        3,
        4,
        14,
        20,
    )


def test_predict_averages_the_logits_of_all_views(
    cli: Any, bundle: Bundle, backbone: Backbone, deltas: Any, videos: Path, tmp_path: Path
) -> None:
    paths, tasks = (videos / "a.gif", videos / "b", videos / "a.gif"), ("falls", "waves", "waves")
    asked = [part for task in tasks for part in ("--task", task)]
    output = tmp_path / "logits.npy"
    code, out, err = cli("predict", bundle.path, *paths, *asked, "-o", output, "--json")
    assert (code, err) == (0, "")
    logits = np.load(output)
    assert logits.shape == (3, 5)
    for row, path, task in zip(logits, paths, tasks, strict=True):
        rows = read_rows(path, deltas[task].preprocessing)
        assert len(rows) == 3
        wanted = alone(backbone, deltas[task], rows).mean(axis=0)
        found = row[: CLASSES[task]]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
        assert np.isfinite(row).all()
        assert (row[CLASSES[task] :] < -1e37).all()  # no class of the task
    said = json.loads(out)
    assert [row["input"] for row in said] == [str(path) for path in paths]
    for row, task, values in zip(said, tasks, logits, strict=True):
        assert row["top"][0]["label"] == deltas[task].labels[values.argmax()]


def test_predict_refuses_what_is_no_video(cli: Any, bundle: Bundle, videos: Path) -> None:
    code, out, err = cli("predict", bundle.path, videos / "b" / "frame_3.png", "--task", "falls")
    assert (code, out) == (2, "")
    assert "this is a single picture" in err
    assert "frame_3.png" in err


def test_predict_takes_a_tensor_of_clips(
    cli: Any, bundle: Bundle, backbone: Backbone, deltas: Any, tmp_path: Path
) -> None:
    clips = np.random.default_rng(3).standard_normal((2, 3, 4, 14, 20), np.float32)
    np.save(tmp_path / "clips.npy", clips)
    output = tmp_path / "logits.npy"
    asked = ("--tensor", tmp_path / "clips.npy", "--task", "falls", "-o", output)
    assert cli("predict", bundle.path, *asked)[0] == 0
    wanted = alone(backbone, deltas["falls"], clips)
    np.testing.assert_allclose(np.load(output), wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    np.save(tmp_path / "pictures.npy", clips[:, :, 0])
    code, _, err = cli(
        "predict", bundle.path, "--tensor", tmp_path / "pictures.npy", "--task", "falls"
    )
    assert code != 0
    assert "[n, 3, 4, 14, 20]" in err


def test_a_benchmark_of_clips(bundle):
    from utune_deploy.deploy.bench.report import Settings

    settings = Settings(warmup_rounds=1, min_rounds=2, min_seconds=0.1)
    report = bench(
        bundle, [], batches=[2], mixes=["uniform"], device=Device(threads=1), settings=settings
    )
    assert report.about.image_shape == (3, 4, 14, 20)
    assert ("clip", "3 x 4 x 14 x 20") in report.about.facts
