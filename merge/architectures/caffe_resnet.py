"""The first release's ResNet, as Caffe has it: pictures `[B, 3, H, W]` to logits `[B, K]`.

He et al., arXiv 1512.03385. Detectors such as the one of bottom-up attention (arXiv 1707.07998), and the trunks
that VSE-infinity and UniPT take from them, are of this form. It has timm's names and timm's shapes for its
tensors, so that a file of it loads into timm's ResNet as well, where it answers something else. Two things differ:

- The first convolution of a block is the one that takes every second pixel; in timm's the second does.
- The first pooling has no padding, and its last window may be cut off at the border.

Batch norms are those of inference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torch.nn import functional as F

from ..errors import UsageError
from ..inputs import IMAGES, Input, require_rows
from .arguments import require_sizes
from .head import classifier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

STAGES = 4
EXPANSION = 4  # channels of a block's output over those inside


class CaffeResNet(nn.Module):
    """A ResNet of bottleneck blocks; the defaults are ResNet-101 on pictures of 512 x 512 pixels.

    Args:
        image_size: Height and width of a picture, in pixels.
        num_classes: Classes of the classifier; 0 for none.
        layers: Blocks of each of the four stages.
        stem_width: Channels inside the blocks of the first stage; every stage doubles them.

    Raises:
        UsageError: An argument is out of range.
    """

    def __init__(
        self,
        image_size: int = 512,
        num_classes: int = 0,
        layers: Sequence[int] = (3, 4, 23, 3),
        stem_width: int = 64,
    ) -> None:
        super().__init__()
        if len(layers) != STAGES:
            raise UsageError(
                "the blocks are not those of four stages",
                where="layers",
                wanted=f"{STAGES} numbers",
                found=list(layers),
            )
        require_sizes(
            image_size=image_size,
            stem_width=stem_width,
            **{f"layers[{number}]": blocks for number, blocks in enumerate(layers)},
        )
        self.inputs = (Input(IMAGES, (3, image_size, image_size)),)
        self.pretrained_cfg: dict[str, Any] = {
            "input_size": (3, image_size, image_size),
            "classifier": "fc",
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
        }
        self.conv1 = nn.Conv2d(3, stem_width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
        width = stem_width
        stages = []
        for number, blocks in enumerate(layers):
            inner = stem_width * 2**number
            stride = 1 if number == 0 else 2
            first = Bottleneck(width, inner, stride)
            width = inner * EXPANSION
            rest = [Bottleneck(width, inner, 1) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(first, *rest))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.num_features = width
        self.fc = classifier(width, num_classes)

    @property
    def hidden_states(self) -> tuple[str, ...]:
        """Paths of the modules whose outputs `[B, C, H, W]` are the hidden states: the stages."""
        return tuple(f"layer{number + 1}" for number in range(STAGES))

    def forward_features(self, images: Tensor) -> Tensor:
        """The last map `[B, C, H / 32, W / 32]` of pictures `[B, 3, H, W]`.

        Raises:
            UsageError: The pictures have another size.
        """
        require_rows(self.inputs, (images,))
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward_head(self, x: Tensor) -> Tensor:
        """Logits `[B, K]` of a map `[B, C, H, W]`: its mean, classified."""
        return self.fc(x.mean(dim=(2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, K]` of pictures `[B, 3, H, W]`.

        Raises:
            UsageError: The pictures have another size.
        """
        return self.forward_head(self.forward_features(images))


class Bottleneck(nn.Module):
    """Three convolutions, the second one 3 x 3, added to what they read."""

    def __init__(self, width: int, inner: int, stride: int) -> None:
        super().__init__()
        out = inner * EXPANSION
        self.conv1 = nn.Conv2d(width, inner, kernel_size=1, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or width != out:
            shortcut = nn.Conv2d(width, out, kernel_size=1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """A map `[B, C, H, W]` to one of the next block."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))
