"""transformers' configurations of pictures: what is read prepares pictures as transformers does."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from utune_deploy.merge.backbone.transformers.processor import PROCESSOR, read_processor
from utune_deploy.merge.errors import IncompatibleArtefact
from utune_deploy.merge.preprocessing import Preprocessing

if TYPE_CHECKING:
    from pathlib import Path

transformers = pytest.importorskip("transformers")
LEVEL = 1 / 255
ROUNDED = {0: 60, 1: 3, 2: 3, 3: 3}  # levels by which two resizings of 8 bits differ, by `resample`

CASES: dict[str, tuple[str, dict[str, Any], tuple[bool, float]]] = {
    "ViT": ("ViTImageProcessor", {}, (True, 1.0)),
    "not square": ("ViTImageProcessor", {"size": {"height": 64, "width": 96}}, (True, 1.0)),
    "bicubic": ("ViTImageProcessor", {"resample": 3, "image_mean": [0.1, 0.2, 0.3]}, (True, 1.0)),
    "lanczos": ("ViTImageProcessor", {"resample": 1}, (True, 1.0)),
    "not normalised": ("ViTImageProcessor", {"do_normalize": False}, (True, 1.0)),
    "CLIP": ("CLIPImageProcessor", {}, (False, 1.0)),
    "DINOv2": ("BitImageProcessor", {"size": {"shortest_edge": 256}}, (False, 0.875)),
    "BEiT": ("BeitImageProcessor", {}, (True, 1.0)),
    "BEiT, cut": (
        "BeitImageProcessor", {"do_center_crop": True, "size": {"height": 256, "width": 256}}, (True, 0.875),
    ),
    "DeiT": ("DeiTImageProcessor", {}, (True, 0.875)),
    "SigLIP": ("SiglipImageProcessor", {}, (True, 1.0)),
    "ConvNeXt": ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}, (False, 0.875)),
    "ConvNeXt, large": ("ConvNextImageProcessor", {}, (True, 1.0)),
}  # fmt: skip


def smooth(height: int, width: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("case", CASES)
def test_pictures_become_what_transformers_makes_of_them(case: str, tmp_path: Path) -> None:
    kind, settings, (squash, crop) = CASES[case]
    processor = getattr(transformers, kind)(**settings)
    processor.save_pretrained(tmp_path)
    found = read_processor(tmp_path)
    assert found is not None
    assert (found.squash, found.crop) == (squash, pytest.approx(crop))
    for height, width in ((300, 450), (400, 232)):
        picture = smooth(height, width)
        wanted = np.asarray(processor(picture, return_tensors="np")["pixel_values"][0])
        got = found.apply(picture)
        assert got.shape == wanted.shape
        levels = np.abs(got - wanted) * np.reshape(found.std, (3, 1, 1)) / LEVEL
        assert levels.max() < ROUNDED[int(processor.resample)]
        assert levels.mean() < 0.6


def test_a_folder_without_one_says_nothing(tmp_path: Path) -> None:
    assert read_processor(tmp_path) is None


@pytest.mark.parametrize(
    ("size", "squash"),
    [(224, True), ({"height": 224, "width": 224}, True), ({"shortest_edge": 224}, False)],
    ids=str,
)
def test_old_files(size: Any, squash: bool, tmp_path: Path) -> None:
    file = {"size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    (tmp_path / PROCESSOR).write_text(json.dumps(file))
    assert read_processor(tmp_path) == Preprocessing((224, 224), "bilinear", squash=squash)
    file |= {"feature_extractor_type": "CLIPFeatureExtractor"}
    (tmp_path / PROCESSOR).write_text(json.dumps(file))
    found = read_processor(tmp_path)
    assert found is not None
    assert found.squash == (squash and not isinstance(size, int))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"do_resize": False}, "do_resize false"),
        ({"do_rescale": False}, "scaled to"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"do_pad": True}, "do_pad"),
        ({"resample": 5}, "resample 5"),
        ({"size": {"longest_edge": 224}}, "longest_edge"),
        ({"do_center_crop": True, "crop_size": {"height": 100, "width": 224}}, "same share"),
        ({"do_center_crop": True, "crop_size": 300}, "out of range"),
        ({"image_std": [0.5, 0.0, 0.5]}, "out of range"),
        ({"image_mean": "grey"}, "cannot be read"),
        ({"size": "large"}, "cannot be read"),
        ({"size": {"height": "x", "width": 2}}, "cannot be read"),
    ],
    ids=str,
)
def test_what_a_delta_cannot_name_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    size = {"height": 224, "width": 224}
    file = {"size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, **change}
    (tmp_path / PROCESSOR).write_text(json.dumps(file))
    with pytest.raises(IncompatibleArtefact) as caught:
        read_processor(tmp_path)
    assert said in str(caught.value)
    assert PROCESSOR in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", "3", '{"size": 224}'])
def test_a_malformed_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / PROCESSOR).write_text(text)
    with pytest.raises(IncompatibleArtefact, match="cannot be read"):
        read_processor(tmp_path)
