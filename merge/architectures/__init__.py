"""SHELF: backbones that timm lacks. A new one is a file here and a line in this table.

An architecture is a module that is created by keyword arguments that JSON can hold, `num_classes` among
them (0: no classifier), and that carries `pretrained_cfg` in timm's form. One that reads clips has a
`clip_size` of frames, height and width, and its configuration also says the `stride` and `views` of
`preprocessing.Clip`. `tests/merge/test_architectures.py` holds every line of the table to that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .video_swin import VideoSwin

if TYPE_CHECKING:
    from torch import nn

ARCHITECTURES: dict[str, type[nn.Module]] = {
    "video_swin_base": VideoSwin,
}
