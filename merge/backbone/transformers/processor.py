"""`preprocessor_config.json` of transformers: how the pictures of a model were prepared.

Resizing of both edges or of the shorter one, a cut of the centre, [0, 1], mean and std by channel: what
`Preprocessing` says too. Where twice the margin is odd, transformers cuts one pixel further up or left.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from ...errors import IncompatibleArtefact
from ...preprocessing import Preprocessing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PROCESSOR = "preprocessor_config.json"
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
STEPS = frozenset(  # what may be on: everything else that is called do_... is refused
    {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}
)
WHOLE_FROM = 384  # pixels: from here on ConvNeXt's processor resizes both edges and cuts nothing
MOST = 1e-6  # by which a factor may differ from 1 / 255


def read_processor(folder: Path) -> Preprocessing | None:
    """How a folder's pictures were prepared; None where it does not say.

    Raises:
        IncompatibleArtefact: The file is malformed, or says something that `Preprocessing` cannot.
    """
    path = folder / PROCESSOR
    if not path.is_file():
        return None
    try:
        config: dict[str, Any] = dict(json.loads(path.read_text()))
        return _read(config, path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as cause:
        raise IncompatibleArtefact(
            "the configuration of pictures cannot be read", where=path, found=repr(cause)
        ) from cause


def _read(config: Mapping[str, Any], path: Path) -> Preprocessing:
    strange = sorted(
        name for name, on in config.items() if name.startswith("do_") and on and name not in STEPS
    )
    if strange:
        raise _refused(path, "no other steps", ", ".join(strange))
    if not config.get("do_resize", True):
        raise _refused(path, "pictures that are resized", "do_resize false")
    factor = config.get("rescale_factor", 1 / 255)
    if not config.get("do_rescale", True) or abs(factor - 1 / 255) > MOST / 255:
        raise _refused(path, "values scaled to [0, 1]", f"rescale_factor {factor}")
    resample = config.get("resample", 2)
    if resample not in RESAMPLING:
        raise _refused(path, f"resample in {sorted(RESAMPLING)}", f"resample {resample}")
    resized, squash = _resized(config, path)
    size = _edges(config["crop_size"]) if config.get("do_center_crop") else resized
    crop = size[0] / resized[0]
    if "crop_pct" in config and resized[0] < WHOLE_FROM:
        size, squash, crop = resized, False, float(config["crop_pct"])
    elif any(math.floor(edge / crop) != whole for edge, whole in zip(size, resized, strict=True)):
        raise _refused(path, "a cut of the same share of both edges, not larger than the picture",
                       f"{list(resized)} cut to {list(size)}")  # fmt: skip
    normalised = config.get("do_normalize", True)
    mean = config["image_mean"] if normalised else [0.0] * 3
    std = config["image_std"] if normalised else [1.0] * 3
    values = {
        "size": size, "interpolation": RESAMPLING[resample], "crop": crop, "mean": mean, "std": std,
        **({"squash": True} if squash else {}),
    }  # fmt: skip
    return Preprocessing.from_json(values, where=path)


def _resized(config: Mapping[str, Any], path: Path) -> tuple[tuple[int, int], bool]:
    """Height and width after resizing, and whether each edge went by itself."""
    size = config["size"]
    if isinstance(size, int):  # of old files: CLIP's shorter edge, and both edges of the others
        return (size, size), not str(config.get("feature_extractor_type", "")).startswith("CLIP")
    if not isinstance(size, dict):
        raise TypeError(f"size {size!r}")
    if set(size) == {"shortest_edge"}:
        edge = int(size["shortest_edge"])
        return (edge, edge), "crop_pct" in config  # ConvNeXt's from WHOLE_FROM on
    if set(size) == {"height", "width"}:
        return _edges(size), True
    raise _refused(path, "size of height and width, or of the shorter edge", f"size {size}")


def _edges(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))


def _refused(path: Path, wanted: str, found: str) -> IncompatibleArtefact:
    return IncompatibleArtefact(
        "pictures were prepared in a way that a delta cannot name",
        where=path,
        wanted=wanted,
        found=found,
        do="take the file away, and the pictures are prepared as timm does for the architecture",
    )
