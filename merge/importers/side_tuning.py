"""Side-tuning as modelscope and ms-swift save it: `f' = sigmoid(alpha) f + (1 - sigmoid(alpha)) g(image)`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..tuner import Branch, Point
from ..tuners.gain import Gain
from ..tuners.side_network import NETWORKS, POOL, SideNetwork
from .foreign import Foreign, is_linear_layer, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from ..backbone import Backbone

KEYS = {  # ours, and theirs behind "side."
    "fcn4": {
        f"conv{n}_{ours}": f"conv{n}.{theirs}"
        for n in range(1, 5)
        for ours, theirs in (
            ("weight", "0.weight"),
            ("norm_weight", "1.weight"),
            ("norm_bias", "1.bias"),
        )
    },
    "alexnet": {
        f"conv{n}_{part}": f"features.{at}.{part}"
        for n, at in enumerate((0, 3, 6, 8, 10), start=1)
        for part in ("weight", "bias")
    },
}


def plant_side_network(
    path: Path,
    backbone: Backbone,
    side: Mapping[str, Tensor],
    found: Foreign,
    pooled: str | None = None,
) -> None:
    """The gain on the features and the network on the image.

    Args:
        path: The checkpoint, for messages.
        backbone: The frozen backbone.
        side: `alpha` and `side.*`.
        found: Takes the branches.
        pooled: The module that is given the features; by default the norm behind the pooling, or else the
            classifier.

    Raises:
        IncompatibleArtefact: The network is neither FCN4 nor AlexNet, or not whole, or the backbone has
            classifiers that read other features.
    """
    network = "alexnet" if any(name.startswith("side.features.") for name in side) else "fcn4"
    wanted = {ours: f"side.{theirs}" for ours, theirs in KEYS[network].items()}
    missing = [name for name in ("alpha", *wanted.values()) if name not in side]
    surplus = sorted(set(side) - {"alpha", *wanted.values(), "side.fc.weight", "side.fc.bias"})
    if missing or surplus:
        names = ", ".join((missing or surplus)[:3])
        raise refuse(
            path,
            f"the side network is not the {network} of side-tuning",
            found=f"{'missing' if missing else 'surplus'} {names}",
        )
    if side["alpha"].numel() != 1:
        raise refuse(
            path,
            "side-tuning has another share than one number",
            found=f"alpha of shape {list(side['alpha'].shape)}",
        )
    model = backbone.model
    pooled = pooled or ("fc_norm" if hasattr(model, "fc_norm") else backbone.classifiers[0])
    if len(backbone.classifiers) > 1 and pooled in backbone.classifiers:
        raise refuse(
            path,
            "the side network would be mixed with what only one of the classifiers reads",
            found=f"{backbone.identity.architecture} with {', '.join(backbone.classifiers)}",
            do="wanted: a backbone of one classifier",
        )
    add = Point(pooled, "input")
    width = int(model.num_features)  # type: ignore[arg-type]
    share = torch.sigmoid(side["alpha"].double().reshape(()))
    weights = {ours: side[theirs] for ours, theirs in wanted.items()}
    weights |= _last(path, side, network, width) | {"scale": 1 - share}
    found.plant(
        f"{pooled}/side_share",
        Branch(Gain(shift=False), add, add),
        {"gain": (share - 1).expand(width).clone()},
    )
    image = Point("patch_embed.proj", "input")
    found.plant(f"{pooled}/side", Branch(SideNetwork(network), image, add), weights)


def _last(path: Path, side: Mapping[str, Tensor], network: str, width: int) -> dict[str, Tensor]:
    """The last linear layer: absent it is the identity, of one row it serves all channels."""
    features = NETWORKS[network][-1].channels[1] * POOL[network] ** 2
    weight = side.get("side.fc.weight")
    if weight is None:
        weight = torch.eye(features)
    bias = side.get("side.fc.bias")
    linear = is_linear_layer(weight, bias)
    if bias is None:
        bias = weight.new_zeros(weight.shape[:1])
    if linear and weight.shape[0] == 1:
        weight, bias = weight.expand(width, -1).clone(), bias.expand(width).clone()
    if not linear or weight.shape != (width, features):
        raise refuse(
            path,
            "the side network does not give the backbone's features",
            found=f"{list(weight.shape)}, wanted [{width}, {features}]",
        )
    return {"fc_weight": weight, "fc_bias": bias}
