"""From a picture to a tensor: what timm's own evaluation transform makes of it, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.data.transforms_factory import transforms_imagenet_eval

from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.merge.preprocessing import INTERPOLATIONS, LINEAR, Clip, Preprocessing

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
        crop_mode="squash" if settings.squash else None,
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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(64, 64), (97, 100)])
@pytest.mark.parametrize("crop", [0.9, 1.0])
def test_equals_timm_where_the_picture_is_squashed(crop, size, shape, pictures):
    for picture in pictures:
        picture = picture.resize(SHAPES[shape]) if SHAPES[shape] else picture
        settings = Preprocessing(size, "bicubic", crop, MEAN, STD, squash=True)
        assert np.array_equal(settings.apply(picture), timm_says(settings, picture))
        assert Preprocessing.from_json(settings.to_json(), where="here") == settings


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


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_backbone_says_its_own(family, mode, request, pictures, monkeypatch):
    """`Backbone.preprocessing` is what timm resolves for the model."""
    backbone = request.getfixturevalue(family)
    released = {**backbone.model.pretrained_cfg, "crop_mode": mode}
    monkeypatch.setattr(backbone.model, "pretrained_cfg", released)
    settings = backbone.preprocessing()
    config = resolve_model_data_config(backbone.model)
    config["input_size"] = (3, *backbone.image_size)
    transform = create_transform(**config)
    for picture in pictures:
        assert torch.equal(transform(picture), torch.from_numpy(settings.apply(picture)))
    assert settings.crop == config["crop_pct"]
    assert settings.mean == tuple(config["mean"])
    assert settings.std == tuple(config["std"])


# Clips


def released(count: int, frames: int, stride: int, segments: int) -> list[list[int]]:
    """V-PETL's test views, from its description: thin, repeat the last, cut at equal distances."""
    kept = [n for n in range(count) if n % stride == 0]
    while len(kept) < frames:
        kept.append(kept[-1])
    step = (len(kept) - frames) / (segments - 1)
    return [[kept[int(view * step) + n] for n in range(frames)] for view in range(segments)]


@pytest.mark.parametrize("count", [8, 9, 15, 16, 17, 30, 64, 101])
@pytest.mark.parametrize(("frames", "stride", "views"), [(8, 2, 4), (8, 4, 4), (4, 1, 3)])
def test_views_are_those_of_the_release(frames, stride, views, count):
    assert Clip(frames, stride, views).cut(count) == released(count, frames, stride, views)


def test_views_by_hand():
    assert Clip(2, 3, 4).cut(14) == [[0, 3], [3, 6], [6, 9], [9, 12]]
    assert Clip(4, 2, 2).cut(5) == [[0, 2, 4, 4], [0, 2, 4, 4]]  # stands still at its last frame
    assert Clip(3, 1, 1).cut(9) == [[3, 4, 5]]  # one view lies in the middle
    for count in (0, 1, 3):
        with pytest.raises(UsageError, match="too short") as caught:
            Clip(4, 2, 2).cut(count)
        assert caught.value.details["wanted"] == "at least 4 frames"


def video(count: int, size: tuple[int, int] = (40, 30)) -> list[Image.Image]:
    noise = np.random.default_rng(0)
    pixels = noise.integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


@pytest.mark.parametrize("interpolation", ["bilinear", LINEAR])
def test_every_frame_of_a_clip_is_prepared_like_a_picture(interpolation):
    clips = Preprocessing((16, 24), interpolation, 1.0, MEAN, STD, Clip(3, 2, 4))
    frames = video(20)
    found = clips.apply(frames)
    assert found.shape == (4, *clips.input_size) == (4, 3, 3, 16, 24)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    plain = Preprocessing((16, 24), interpolation, 1.0, MEAN, STD)
    for view, numbers in zip(found, Clip(3, 2, 4).cut(20), strict=True):
        for time, number in enumerate(numbers):
            assert np.array_equal(view[:, time], plain.apply(frames[number]))


@pytest.mark.parametrize("size", [(53, 47), (20, 31), (61, 250), (32, 40), (64, 64)])
def test_linear_takes_four_neighbours(size):
    """As torch interpolates without smoothing, rounded to whole levels."""
    (frame,) = video(1, size)
    settings = Preprocessing((32, 32), LINEAR, 1.0, (0.0,) * 3, (1.0,) * 3)
    short = min(size)
    width, height = (int(32 * side / short) for side in size)
    pixels = torch.from_numpy(np.asarray(frame).copy()).permute(2, 0, 1)[None].double()
    if short != 32:
        pixels = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear")
    top, left = round((height - 32) / 2), round((width - 32) / 2)
    known = pixels[0, :, top : top + 32, left : left + 32].numpy()
    found = settings.apply(frame) * 255
    assert np.abs(found - known).max() <= 0.5 + 1e-3


def test_videos_from_animated_files(tmp_path):
    frames = [f.quantize(256) for f in video(7)]
    settings = Preprocessing((16, 16), "bilinear", 1.0, MEAN, STD, Clip(3, 1, 2))
    known = settings.apply(frames)
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    colour = [f.convert("RGB") for f in frames]
    colour[0].save(tmp_path / "a.tiff", save_all=True, append_images=colour[1:])
    colour[0].save(tmp_path / "a.webp", save_all=True, append_images=colour[1:], lossless=True)
    for name in ("a.gif", "a.tiff", "a.webp"):
        with Image.open(tmp_path / name) as image:
            assert image.n_frames == 7
            assert np.array_equal(settings.apply(image), known), name


def test_the_wrong_kind_of_input():
    clips = Preprocessing((16, 16), clip=Clip(3))
    with pytest.raises(UsageError, match="reads videos, and this is a single picture"):
        clips.apply(video(1)[0])
    with pytest.raises(UsageError, match="reads single pictures, and this is a video"):
        Preprocessing((16, 16)).apply(video(3))
    with pytest.raises(UsageError, match="too short"):
        clips.apply(video(2))
    with pytest.raises(UsageError, match="different sizes") as caught:
        clips.apply([*video(2), *video(1, (30, 40))])
    assert caught.value.details["found"] == "30 x 40, 40 x 30"


def test_clips_as_json():
    pictures = Preprocessing((32, 32), "bicubic", 0.9)
    assert set(pictures.to_json()) == {"size", "interpolation", "crop", "mean", "std"}
    clips = Preprocessing((32, 48), LINEAR, 1.0, MEAN, STD, Clip(8, 2, 4))
    values = clips.to_json()
    assert values["clip"] == {"frames": 8, "stride": 2, "views": 4}
    assert Preprocessing.from_json(values, where="here") == clips
    wrong = [
        {"clip": None},
        {"clip": 8},
        {"clip": {"frames": 8}},
        {"clip": {"frames": 8, "stride": 2, "views": 4, "crops": 3}},
        {"clip": {"frames": 0, "stride": 2, "views": 4}},
        {"clip": {"frames": 8, "stride": 0, "views": 4}},
        {"clip": {"frames": 8, "stride": 2, "views": "four"}},
        {"wings": 2},
    ]
    for change in wrong:
        with pytest.raises(IncompatibleArtefact):
            Preprocessing.from_json({**values, **change}, where="here")
    with pytest.raises(IncompatibleArtefact, match="out of range"):
        Preprocessing.from_json({**pictures.to_json(), "interpolation": LINEAR}, where="here")


def test_sixteen_bits_are_scaled_and_thirty_two_refused():
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    plain = Preprocessing((8, 8))
    eight = plain.apply(Image.fromarray(levels))
    sixteen = plain.apply(Image.fromarray(levels.astype(np.uint16) * 257))
    assert np.array_equal(eight, sixteen)
    with pytest.raises(UsageError, match="32-bit values"):
        plain.apply(Image.fromarray(levels.astype(np.float32)))
