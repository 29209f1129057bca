"""SideTune: a small convolutional network on the image itself, added to the trunk's features.

`f' = a f + (1 - a) g(image)` (arXiv 1912.13503, eq. 1) is two branches: a gain `a - 1` on the features, and
this, which gives `scale * g(image)`. Networks: `fcn4`, four convolutions with group norms, and `alexnet`,
the features of AlexNet, both as modelscope's `vision_efficient_tuning` has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ..tuner import Shapes, Tuner, Weights, wider

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Layer:
    """One convolution with a ReLU behind it.

    Attributes:
        channels: Given and taken.
        kernel: Side of its window.
        stride: Step.
        padding: Zeros at each edge.
        grouped: A group norm of two groups follows instead of a bias.
        pooled: A max pooling of 3 by 3, step 2, follows.
    """

    channels: tuple[int, int]
    kernel: int
    stride: int
    padding: int
    grouped: bool = False
    pooled: bool = False


NETWORKS: dict[str, tuple[Layer, ...]] = {
    "fcn4": (
        Layer((3, 16), 3, 1, 1, grouped=True),
        Layer((16, 16), 3, 2, 0, grouped=True),
        Layer((16, 32), 3, 2, 0, grouped=True),
        Layer((32, 64), 3, 1, 0, grouped=True),
    ),
    "alexnet": (
        Layer((3, 64), 11, 4, 2, pooled=True),
        Layer((64, 192), 5, 1, 2, pooled=True),
        Layer((192, 384), 3, 1, 1),
        Layer((384, 256), 3, 1, 1),
        Layer((256, 256), 3, 1, 1, pooled=True),
    ),
}
POOL = {"fcn4": 1, "alexnet": 6}  # side of the map in front of the last linear layer


@dataclass(frozen=True)
class SideNetwork(Tuner):
    """Image to features.

    Attributes:
        network: A key of `NETWORKS`.
    """

    network: str

    kind = "side_network"
    source = "arXiv 1912.13503 (side-tuning)"
    join = "add"
    reads_map = True
    no_fold = "a network of its own reads the image, and no weight of the backbone holds it"

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"network {self.network!r} is not one of {sorted(NETWORKS)}")

    @property
    def shapes(self) -> Shapes:
        """Per layer `convN_weight [out, in, k, k]` and vectors; `fc_weight [out, features]`, `fc_bias`; `scale`.

        The vectors of a layer are `convN_bias`, or `convN_norm_weight` and `convN_norm_bias`, each `[out]`.
        """
        return {**self.served, "scale": ()}

    @property
    def served(self) -> Shapes:
        """The scale is gone: it went into the last linear layer."""
        shapes: Shapes = {}
        for number, layer in enumerate(NETWORKS[self.network], start=1):
            given, taken = layer.channels
            shapes[f"conv{number}_weight"] = (taken, given, layer.kernel, layer.kernel)
            for name in self._vectors(layer):
                shapes[f"conv{number}_{name}"] = (taken,)
        features = NETWORKS[self.network][-1].channels[1] * POOL[self.network] ** 2
        return {**shapes, "fc_weight": ("out", features), "fc_bias": ("out",)}

    @staticmethod
    def _vectors(layer: Layer) -> tuple[str, ...]:
        return ("norm_weight", "norm_bias") if layer.grouped else ("bias",)

    def channels(self, sizes: Mapping[str, int]) -> tuple[int | None, int | None]:
        """Three, the image's, and the features."""
        return 3, sizes["out"]

    def settle(self, w: Mapping[str, Tensor]) -> Weights:
        """The scale folded into the last linear layer, in float64."""
        settled = {name: w[name] for name in self.served}
        for name in ("fc_weight", "fc_bias"):
            wide = wider(w[name], w["scale"])
            settled[name] = (w[name].double() * w["scale"].double()).to(wide)
        return settled

    def branch(self, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        """`scale * g(x)`, `[B, 1, out]`.

        Args:
            x: Images `[B, 3, H, W]`.
            w: See `shapes`.
        """
        for number, layer in enumerate(NETWORKS[self.network], start=1):
            x = _convolve(x, w[f"conv{number}_weight"], layer)
            if layer.grouped:
                norm_weight, norm_bias = (
                    w[f"conv{number}_norm_weight"],
                    w[f"conv{number}_norm_bias"],
                )
                x = F.group_norm(x, 2) * norm_weight[..., None, None] + norm_bias[..., None, None]
            else:
                x = x + w[f"conv{number}_bias"][..., None, None]
            x = torch.relu(x)
            if layer.pooled:
                x = F.max_pool2d(x, 3, 2)
        x = _pool(x, POOL[self.network]).flatten(1)[:, None]  # [B, 1, features]
        y = x @ w["fc_weight"].mT + w["fc_bias"][..., None, :]
        return y * w["scale"][..., None, None] if "scale" in w else y

    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """He-uniform convolutions, unit norms, a zero last layer, so that training starts at the backbone."""
        w: Weights = {}
        for name, axes in self.shapes.items():
            shape = [axis if isinstance(axis, int) else sizes[axis] for axis in axes]
            w[name] = torch.zeros(shape)
            if len(shape) == 4:
                bound = math.sqrt(6.0 / math.prod(shape[1:]))
                w[name].uniform_(-bound, bound, generator=generator)
            elif name.endswith("norm_weight") or name == "scale":
                w[name].fill_(1.0)
        return w


def _convolve(x: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    """A convolution whose weight may carry a batch axis: then each image's windows times its own weight."""
    if weight.dim() == 4:
        return F.conv2d(x, weight, stride=layer.stride, padding=layer.padding)
    windows = F.unfold(x, layer.kernel, padding=layer.padding, stride=layer.stride)
    height, width = (
        (side + 2 * layer.padding - layer.kernel) // layer.stride + 1 for side in x.shape[-2:]
    )
    return (weight.flatten(2) @ windows).unflatten(-1, (height, width))


def _pool(x: Tensor, side: int) -> Tensor:
    """Adaptive average pooling to `side` by `side`, as two products with constant matrices."""
    rows, columns = (_averages(size, side).to(x) for size in x.shape[-2:])
    return rows @ x @ columns.mT


def _averages(size: int, side: int) -> Tensor:
    """`[side, size]`: row i averages entries floor(i size / side) to ceil((i + 1) size / side)."""
    matrix = torch.zeros(side, size, dtype=torch.float64)
    for index in range(side):
        start, stop = index * size // side, -(-(index + 1) * size // side)
        matrix[index, start:stop] = 1 / (stop - start)
    return matrix
