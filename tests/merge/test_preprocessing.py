"""From a picture to a tensor: what timm's own evaluation transform makes of it, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.data.transforms_factory import transforms_imagenet_eval

from utune_deploy.merge.preprocessing import INTERPOLATIONS, Preprocessing

sample_images = pytest.importorskip("sklearn.datasets").load_sample_images

SHAPES = {  # width and height of what is fed in
    "as taken": None,
    "upright": (427, 640),
    "square": (300, 300),
    "wide": (611, 97),
    "tall": (61, 250),
    "tiny": (9, 14),
    "odd": (225, 223),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in sample_images().images]


def timm_says(settings: Preprocessing, picture: Image.Image) -> np.ndarray:
    transform = transforms_imagenet_eval(
        img_size=settings.size,
        crop_pct=settings.crop,
        interpolation=settings.interpolation,
        mean=settings.mean,
        std=settings.std,
    )
    return transform(picture.convert("RGB")).numpy()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("crop", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_equals_timm(interpolation, crop, shape, pictures):
    for picture in pictures:
        picture = picture.resize(SHAPES[shape]) if SHAPES[shape] else picture
        for size in ((224, 224), (32, 32), (33, 33)):
            settings = Preprocessing(size, interpolation, crop, MEAN, STD)
            found = settings.apply(picture)
            assert found.shape == (3, *size)
            assert found.dtype == np.float32
            assert found.flags.c_contiguous
            assert np.array_equal(found, timm_says(settings, picture)), size


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(64, 32), (32, 64), (97, 100)])
def test_equals_timm_where_the_target_is_not_square(size, shape, pictures):
    """timm covers the target and keeps the aspect ratio here, too."""
    for picture in pictures:
        picture = picture.resize(SHAPES[shape]) if SHAPES[shape] else picture
        for crop in (0.9, 1.0):
            settings = Preprocessing(size, "bicubic", crop, MEAN, STD)
            assert np.array_equal(settings.apply(picture), timm_says(settings, picture))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_every_interpolation(interpolation, pictures):
    settings = Preprocessing((48, 48), interpolation, 0.95)
    assert np.array_equal(settings.apply(pictures[0]), timm_says(settings, pictures[0]))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_other_picture_modes_become_rgb(mode, pictures):
    settings = Preprocessing((32, 32))
    picture = pictures[0].convert(mode)
    assert np.array_equal(settings.apply(picture), timm_says(settings, picture))


def test_a_picture_of_the_right_size_is_only_scaled():
    pixels = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    found = Preprocessing((4, 4), mean=(0.0,) * 3, std=(1.0,) * 3).apply(Image.fromarray(pixels))
    assert np.array_equal(found, pixels.transpose(2, 0, 1) / np.float32(255))


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_backbone_says_its_own(family, request, pictures):
    """`Backbone.preprocessing` is what timm resolves for the model."""
    backbone = request.getfixturevalue(family)
    settings = backbone.preprocessing()
    config = resolve_model_data_config(backbone.model)
    config["input_size"] = (3, *backbone.image_size)
    config["crop_mode"] = None
    transform = create_transform(**config)
    for picture in pictures:
        assert torch.equal(transform(picture), torch.from_numpy(settings.apply(picture)))
    assert settings.crop == config["crop_pct"]
    assert settings.mean == tuple(config["mean"])
    assert settings.std == tuple(config["std"])
