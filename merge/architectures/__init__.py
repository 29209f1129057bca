"""SHELF: backbones that timm lacks. A new one is a file here and a line in this table.

An architecture is a module that is created by keyword arguments that JSON can hold, `num_classes` among
them (0: no classifier), and that carries `pretrained_cfg` in timm's form. One that reads clips has a
`clip_size` of frames, height and width, and its configuration also says the `stride` and `views` of
`preprocessing.Clip`. One that reads anything but pictures names it in `inputs`, takes it in that order, and
calls modules without weights, its seats, on what side networks read or replace: `mask`, `features`, `pooled`.
Modules whose outputs are its hidden states it names in `hidden_states`. Where the rows of its classifier are
more than its classes, `logits_beside_classes` says by how many.
`tests/merge/test_architectures.py` holds every line of the table to that.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..errors import MissingDependency

if TYPE_CHECKING:
    from torch import nn

ARCHITECTURES: dict[str, tuple[str, str]] = {
    "video_swin_base": ("video_swin", "VideoSwin"),
    "caffe_resnet": ("caffe_resnet", "CaffeResNet"),
    "bert": ("bert", "Bert"),
    "clip_image": ("clip", "ClipImage"),
    "clip_text": ("clip", "ClipText"),
    "t5": ("t5", "T5"),
    "clip_vil": ("clip_vil", "ClipVil"),
    "mdetr": ("mdetr", "Mdetr"),
    "states": ("states", "States"),
}
"""By name the file and the class, which is imported when it is asked for: some need transformers."""


def find(name: str) -> type[nn.Module] | None:
    """The architecture of this name, or None.

    Raises:
        MissingDependency: It needs a package that is not installed.
    """
    if name not in ARCHITECTURES:
        return None
    file, own = ARCHITECTURES[name]
    try:
        module = importlib.import_module(f".{file}", __name__)
    except ModuleNotFoundError as cause:
        raise MissingDependency(
            f"the architecture {name} needs a package that is not installed",
            found=str(cause),
            do="pip install 'utune-deploy[transformers]'",
        ) from cause
    return getattr(module, own)
