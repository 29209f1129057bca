"""The graph that prepares pictures, against Pillow."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from utune_deploy.export.engine import Tensor
from utune_deploy.export.served import picture_graph
from utune_deploy.merge.errors import UsageError
from utune_deploy.merge.preprocessing import Clip, Preprocessing

PLAIN = Preprocessing((48, 48))
OTHER = replace(PLAIN, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def bundle_of(*settings: Preprocessing | None, reads=("images",)):
    """What the graph reads of a bundle."""
    tasks = [
        SimpleNamespace(name=f"task{number}", preprocessing=setting)
        for number, setting in enumerate(settings)
    ]
    inputs = tuple(Tensor(name, "float32", ("batch", 3, 48, 48)) for name in reads)
    return SimpleNamespace(path=Path("b"), tasks=tasks, engine=SimpleNamespace(inputs=inputs))


def prepared(bundle, pictures: np.ndarray, names: list[str]) -> np.ndarray:
    session = ort.InferenceSession(picture_graph(bundle), providers=["CPUExecutionProvider"])
    tasks = np.array([[name] for name in names], dtype=object)
    (images,) = session.run(None, {"picture": pictures, "task": tasks})
    return images


def pictures_of(kind: str, height: int, width: int, count: int = 3) -> np.ndarray:
    """Noise, or noise at a coarse grid with smooth ways between."""
    random = np.random.default_rng(height * width)
    noise = random.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    if kind == "noise":
        return noise
    coarse = [Image.fromarray(picture[::8, ::8].copy()) for picture in noise]
    return np.stack(
        [np.asarray(p.resize((width, height), Image.Resampling.BICUBIC)) for p in coarse]
    )


def resized(picture: Image.Image, settings: Preprocessing) -> Image.Image:
    """A picture that is squashed, its width first; any other as it is.

    Pillow 13 begins with the height where that shrinks more, which changes cubic values by up to 17 levels.
    """
    if not settings.squash:
        return picture
    height, width = (math.floor(edge / settings.crop) for edge in settings.size)
    method = Image.Resampling[settings.interpolation.upper()]
    return picture.resize((width, picture.height), method).resize((width, height), method)


@pytest.mark.parametrize(
    ("crop", "squash"), [(1.0, False), (0.9, False), (0.875, False), (1.0, True), (0.9, True)]
)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(48, 48), (40, 56)])
@pytest.mark.parametrize(
    ("height", "width"), [(48, 48), (60, 80), (333, 500), (517, 391), (31, 40), (55, 54), (1, 7)]
)
def test_pictures_become_what_pillow_makes_of_them(
    height, width, size, interpolation, crop, squash
):
    shared = {"size": size, "interpolation": interpolation, "crop": crop, "squash": squash}
    first, second = replace(PLAIN, **shared), replace(OTHER, **shared)
    bundle = bundle_of(first, second)
    for kind in ("noise", "smooth"):
        pictures = pictures_of(kind, height, width)
        found = prepared(bundle, pictures, ["task1", "task0", "another"])
        for picture, image, settings in zip(pictures, found, (second, first, first), strict=True):
            expected = settings.apply(resized(Image.fromarray(picture), settings))
            std = np.array(settings.std, np.float32)[:, None, None]
            levels = np.abs(image - expected) * std * 255
            most, share = {"bicubic": (1, 0.005), "bilinear": (2, 0.1)}[interpolation]
            if squash and (size[0] > height) != (size[1] > width):
                share = (
                    0.3  # one edge grows and the other shrinks: single levels, but in more places
                )
            assert levels.max() < most + 0.01
            assert (levels > 0.5).mean() < share


def test_a_picture_of_the_right_size_is_exact():
    pictures = pictures_of("noise", 48, 48)
    found = prepared(bundle_of(PLAIN, OTHER), pictures, ["task0", "task1", "task1"])
    for picture, image, settings in zip(pictures, found, (PLAIN, OTHER, OTHER), strict=True):
        assert image.tobytes() == settings.apply(Image.fromarray(picture)).tobytes()


@pytest.mark.parametrize(
    ("bundle", "sentence"),
    [
        (bundle_of(None), "does not read single pictures"),
        (bundle_of(PLAIN, reads=("input_ids",)), "does not read single pictures"),
        (bundle_of(replace(PLAIN, clip=Clip(2))), "does not read single pictures"),
        (bundle_of(PLAIN, replace(PLAIN, crop=0.9)), "resized differently"),
        (bundle_of(PLAIN, replace(PLAIN, squash=True)), "resized differently"),
        (bundle_of(replace(PLAIN, interpolation="lanczos")), "does not have this preprocessing"),
        (bundle_of(replace(PLAIN, mean=(0.5,), std=(0.5,))), "does not have this preprocessing"),
    ],
)
def test_other_preprocessing_is_refused(bundle, sentence):
    with pytest.raises(UsageError, match=sentence):
        picture_graph(bundle)
