"""From a picture or a video to the tensor that a backbone reads, in NumPy.

A picture goes through timm's evaluation transform: resize the shorter edge (or, squashed, each edge) to
`floor(size / crop)`, cut the centre, scale to [0, 1], normalise by channel. A video is thinned to every `stride`-th frame, and
some clips of equal length are cut from it at equal distances; every frame goes through the same transform.
That is how Video Swin was evaluated in V-PETL (arXiv 2210.00788, github.com/bruceyo/V-PETL), whose three
crops beside each other are one and the same, because a centre crop comes before.

Free of torch, so that a server can use it; `tests/merge/test_preprocessing.py` holds it to timm's own.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .errors import IncompatibleArtefact, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from PIL.Image import Image

INTERPOLATIONS = (
    "nearest",
    "bilinear",
    "bicubic",
    "lanczos",
)  # Pillow's, which smooth as they shrink
LINEAR = "linear"  # four neighbours, however far it shrinks: for clips
"""V-PETL resizes frames with OpenCV's `INTER_LINEAR`. OpenCV computes it in fixed point, this file in
float32: the same pixels up to one level of 255."""


class Frames(Protocol):
    """The frames of a video: a list of pictures, or what reads them one by one."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Image: ...


@dataclass(frozen=True)
class Clip:
    """How clips are cut from a video.

    Attributes:
        frames: Frames of a clip.
        stride: From one frame of a clip to the next, in frames of the video; at least 1.
        views: Clips per video, at equal distances from its first frame to its last; the answer is the
            mean of their raw logits. A single one lies in the middle.
    """

    frames: int
    stride: int = 1
    views: int = 1

    def cut(self, count: int) -> list[list[int]]:
        """For each view, the numbers of its frames in a video of `count` frames.

        A video that has fewer frames than a clip after thinning stands still at its last one.

        Raises:
            UsageError: The video has fewer frames than a clip even before.
        """
        if count < self.frames:
            raise UsageError(
                "the video is too short for a clip",
                wanted=f"at least {self.frames} frames",
                found=f"{count} frame{'s' if count != 1 else ''}",
            )
        kept = list(range(0, count, self.stride))
        kept += kept[-1:] * (self.frames - len(kept))
        spare = len(kept) - self.frames
        if self.views == 1:
            starts = [spare // 2]
        else:
            starts = [int(view * (spare / (self.views - 1))) for view in range(self.views)]
        return [kept[start : start + self.frames] for start in starts]


@dataclass(frozen=True)
class Preprocessing:
    """How a task wants its pictures or videos.

    Attributes:
        size: Height and width in pixels that the backbone reads.
        interpolation: One of `INTERPOLATIONS`; for clips also `LINEAR`.
        crop: Share of the resized picture that the centre crop keeps, in (0, 1].
        mean: Subtracted per channel after scaling to [0, 1].
        std: Divided by per channel.
        clip: How clips are cut from a video; None for a task of pictures.
        squash: Resize each edge by itself, whatever becomes of the aspect ratio; otherwise the picture keeps it and
            loses what stands over.
    """

    size: tuple[int, int]
    interpolation: str = "bicubic"
    crop: float = 1.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    clip: Clip | None = None
    squash: bool = False

    @property
    def input_size(self) -> tuple[int, ...]:
        """What it makes of a picture, `(C, H, W)`, or of one view of a video, `(C, T, H, W)`."""
        time = () if self.clip is None else (self.clip.frames,)
        return (len(self.mean), *time, *self.size)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values; a task of pictures has no `clip`, and `squash` stands there where it is on."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        if self.clip is None:
            del values["clip"]
        if not self.squash:
            del values["squash"]
        return values

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
                clip=_clip(values["clip"]) if "clip" in values else None,
                squash=values.get("squash", False),
            )
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as cause:
            raise IncompatibleArtefact(
                "the preprocessing cannot be read",
                where=where,
                wanted="size, interpolation, crop, mean and std, and of clips frames, stride and views",
                found=dict(values) if hasattr(values, "keys") else values,
            ) from cause
        numbers = (*settings.size, settings.crop, *settings.mean, *settings.std)
        clip = settings.clip
        known = INTERPOLATIONS if clip is None else (*INTERPOLATIONS, LINEAR)
        wrong = (
            set(values) != set(settings.to_json())
            or settings.squash not in (False, True)
            or settings.interpolation not in known
            or not all(math.isfinite(n) for n in numbers)
            or min(settings.size) < 1
            or not 0 < settings.crop <= 1
            or len(settings.mean) != len(settings.std)
            or min(settings.std, default=0) <= 0
            or (clip is not None and min(clip.frames, clip.stride, clip.views) < 1)
        )
        if wrong:
            raise IncompatibleArtefact(
                "the preprocessing has a field that is surplus or out of range",
                where=where,
                wanted=f"interpolation in {known}, 0 < crop <= 1, std > 0, squash true or not there, and of clips "
                "frames, stride and views of at least 1",
                found=dict(values),
            )
        return settings

    def apply(self, source: Image | Frames) -> NDArray[np.float32]:
        """One picture as `[C, H, W]` float32, one video as `[views, C, T, H, W]` float32.

        Args:
            source: A picture; or a video, as a picture of many frames or as a list of pictures.

        Raises:
            UsageError: The video is too short, or its frames are of different sizes, or the task is of
                the other kind.
        """
        if self.clip is None:
            return self._picture(_only(source))
        views = self.clip.cut(_count(source))
        frames: dict[int, NDArray[np.float32]] = {}
        sizes = set()
        for number in sorted({number for view in views for number in view}):
            frame = _frame(source, number)
            sizes.add(frame.size)
            frames[number] = self._picture(frame)
        if len(sizes) > 1:
            raise UsageError(
                "the frames of a video have different sizes",
                wanted="one width and height",
                found=", ".join(f"{width} x {height}" for width, height in sorted(sizes)),
            )
        return np.stack([np.stack([frames[n] for n in view], axis=1) for view in views])

    def _picture(self, image: Image) -> NDArray[np.float32]:
        """One picture or frame as `[C, H, W]` float32.

        Raises:
            UsageError: It has 32-bit values, whose range nobody knows.
        """
        height, width = self.size
        scaled = (math.floor(height / self.crop), math.floor(width / self.crop))
        image = _eight_bits(image)
        image = image.convert("L" if len(self.mean) == 1 else "RGB")
        target = (scaled[1], scaled[0]) if self.squash else _resized(image.size, scaled)
        image = _resize(image, target, self.interpolation)
        top = round((image.height - height) / 2)
        left = round((image.width - width) / 2)
        image = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(image, dtype=np.float32).reshape(height, width, -1) / np.float32(255)
        mean = np.asarray(self.mean, dtype=np.float32)
        std = np.asarray(self.std, dtype=np.float32)
        return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


def _eight_bits(image: Image) -> Image:
    """A picture of 16-bit grey levels as one of 8 bits; Pillow's own conversion would clip it to white.

    Raises:
        UsageError: It has 32-bit values.
    """
    if image.mode.startswith("I;16"):
        from PIL.Image import fromarray

        levels = np.asarray(image).astype(np.float64)
        return fromarray(np.rint(levels / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UsageError(
            "a picture has 32-bit values, whose range is not known",
            wanted="8 or 16 bits per channel",
            found=f"mode {image.mode}",
            do="save it again with 8 bits",
        )
    return image


def _clip(values: Mapping[str, Any]) -> Clip:
    """The settings of clips from JSON values.

    Raises:
        TypeError: They are not an object.
        KeyError: A field is missing or surplus.
    """
    if not hasattr(values, "keys"):
        raise TypeError("clip")
    if surplus := set(values) - {"frames", "stride", "views"}:
        raise KeyError(*surplus)
    return Clip(int(values["frames"]), int(values["stride"]), int(values["views"]))


def _only(source: Image | Frames) -> Image:
    """The picture of a task of pictures.

    Raises:
        UsageError: It is a sequence of frames.
    """
    from PIL.Image import Image as Picture

    if not isinstance(source, Picture):
        raise UsageError(
            "the task reads single pictures, and this is a video",
            wanted="one picture",
            found=f"{len(source)} frames",
        )
    return source


def _count(source: Image | Frames) -> int:
    """Number of frames.

    Raises:
        UsageError: There is one, in a file that could have held several.
    """
    from PIL.Image import Image as Picture

    if not isinstance(source, Picture):
        return len(source)
    count = getattr(source, "n_frames", 1)
    if count == 1:
        raise UsageError(
            "the task reads videos, and this is a single picture",
            wanted="a video",
            found=f"a picture of {source.width} x {source.height}",
            do="give an animated file (GIF, WebP, TIFF) or a folder of frames",
        )
    return count


def _frame(source: Image | Frames, number: int) -> Image:
    """One frame; of a picture of many frames, valid until the next is asked for."""
    from PIL.Image import Image as Picture

    if not isinstance(source, Picture):
        return source[number]
    source.seek(number)
    return source


def _resize(image: Image, size: tuple[int, int], interpolation: str) -> Image:
    """The picture in another size, PIL width and height."""
    from PIL.Image import Resampling, fromarray

    if interpolation != LINEAR:
        return image.resize(size, Resampling[interpolation.upper()])
    if image.size == size:
        return image
    pixels = np.asarray(image, dtype=np.float32)
    for axis, length in ((1, size[0]), (0, size[1])):
        near, far, share = _neighbours(pixels.shape[axis], length)
        share = share.reshape(-1, *[1] * (pixels.ndim - 1 - axis))
        pixels = pixels.take(near, axis) * (1 - share) + pixels.take(far, axis) * share
    return fromarray(np.rint(pixels).astype(np.uint8))


def _neighbours(
    old: int, new: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """For each of `new` pixels its two neighbours among `old` ones, and the share of the second."""
    place = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
    near = place.astype(np.int64)
    return near, np.minimum(near + 1, old - 1), (place - near).astype(np.float32)


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
