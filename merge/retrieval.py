"""What a caption and a video have in common, from the vectors that a bundle answers with (CLIP4Clip).

`meanP` of CLIP4Clip (arXiv 2104.08860, section 3.3): frames at unit length, their mean, again at unit length.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 1e-6  # length of a vector that is divided by it


def similarity(captions: Tensor, frames: Tensor, mask: Tensor, logit_scale: float = 0.0) -> Tensor:
    """Scores `[captions, videos]`.

    Args:
        captions: `[captions, E]`.
        frames: `[videos, F, E]`.
        mask: `[videos, F]`, 1 at real frames.
        logit_scale: CLIP's, of which the exponential multiplies; an import notes it in the delta.
    """
    mask = mask.to(frames.dtype)
    count = mask.sum(1, keepdim=True)
    count = count + (count == 0).to(count.dtype)
    videos = (_unit(frames) * mask[..., None]).sum(1) / count
    return math.exp(logit_scale) * (_unit(captions) @ _unit(videos).mT)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=LEAST)
