"""From a picture to the tensor that a backbone reads: timm's evaluation transform in NumPy.

Resize the shorter edge to `floor(size / crop)`, cut the centre, scale to [0, 1], normalise by channel.
Free of torch, so that a server can use it; `tests/merge/test_preprocessing.py` holds it to timm's own.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import IncompatibleArtefact

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from PIL.Image import Image

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """How a task wants its pictures.

    Attributes:
        size: Height and width in pixels that the backbone reads.
        interpolation: One of `INTERPOLATIONS`.
        crop: Share of the resized picture that the centre crop keeps, in (0, 1].
        mean: Subtracted per channel after scaling to [0, 1].
        std: Divided by per channel.
    """

    size: tuple[int, int]
    interpolation: str = "bicubic"
    crop: float = 1.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, where: object) -> Preprocessing:
        """Settings from JSON values.

        Raises:
            IncompatibleArtefact: A field is missing, surplus or out of range.
        """
        try:
            settings = cls(
                size=(int(values["size"][0]), int(values["size"][1])),
                interpolation=str(values["interpolation"]),
                crop=float(values["crop"]),
                mean=tuple(float(v) for v in values["mean"]),
                std=tuple(float(v) for v in values["std"]),
            )
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as cause:
            raise IncompatibleArtefact(
                "the preprocessing cannot be read",
                where=where,
                wanted="size, interpolation, crop, mean and std",
                found=dict(values) if hasattr(values, "keys") else values,
            ) from cause
        numbers = (*settings.size, settings.crop, *settings.mean, *settings.std)
        wrong = (
            set(values) != set(asdict(settings))
            or settings.interpolation not in INTERPOLATIONS
            or not all(math.isfinite(n) for n in numbers)
            or min(settings.size) < 1
            or not 0 < settings.crop <= 1
            or len(settings.mean) != len(settings.std)
            or min(settings.std, default=0) <= 0
        )
        if wrong:
            raise IncompatibleArtefact(
                "the preprocessing has a field that is surplus or out of range",
                where=where,
                wanted=f"interpolation in {INTERPOLATIONS}, 0 < crop <= 1, std > 0",
                found=dict(values),
            )
        return settings

    def apply(self, image: Image) -> NDArray[np.float32]:
        """One picture as `[3, H, W]` float32."""
        from PIL.Image import Resampling

        height, width = self.size
        scaled = (math.floor(height / self.crop), math.floor(width / self.crop))
        image = image.convert("L" if len(self.mean) == 1 else "RGB")
        image = image.resize(_resized(image.size, scaled), Resampling[self.interpolation.upper()])
        top = round((image.height - height) / 2)
        left = round((image.width - width) / 2)
        image = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(image, dtype=np.float32).reshape(height, width, -1) / np.float32(255)
        mean = np.asarray(self.mean, dtype=np.float32)
        std = np.asarray(self.std, dtype=np.float32)
        return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


def _resized(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """PIL width and height after timm's resize: the picture covers the target, its aspect ratio kept.

    For a target that is not square timm has another function, which rounds instead of cutting.
    """
    height, width = target
    old_width, old_height = size
    if height != width:
        ratio = min(old_height / height, old_width / width)
        return round(old_width / ratio), round(old_height / ratio)
    if old_width <= old_height:
        return width, int(width * old_height / old_width)
    return int(height * old_width / old_height), height
