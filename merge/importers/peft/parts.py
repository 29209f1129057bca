"""Branches of a part of a layer's rows, as branches of the layer: zeros beside them, and parts that join.

transformers keeps queries, keys and values in three layers, timm in one of three times the rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ...tuners.bottleneck import Bottleneck
from ...tuners.gain import Gain

if TYPE_CHECKING:
    from torch import Tensor

    from ...tuner import Branch, Tuner, Weights

OUT = ("up", "up_bias", "gain", "shift", "left")  # whose first axis is the rows, or divides them


def spread(tuner: Tuner, tensors: Weights, rows: slice, size: int) -> Weights:
    """The branch of a layer of `size` rows that acts on some of them.

    Args:
        tuner: A bottleneck, a gain behind the layer, or a Kronecker product.
        tensors: Of the part alone.
        rows: The part's.
        size: Rows of the layer.
    """
    names = ("left",) if "left" in tensors else OUT
    return {n: _padded(t, rows, size) if n in names else t for n, t in tensors.items()}


def _padded(tensor: Tensor, rows: slice, size: int) -> Tensor:
    """Zeros around a part; of a factor whose rows divide the part's, in proportion."""
    each = (rows.stop - rows.start) // len(tensor)
    whole = tensor.new_zeros(size // each, *tensor.shape[1:])
    whole[rows.start // each : rows.stop // each] = tensor
    return whole


def joined(first: Branch, kept: Weights, second: Branch, added: Weights) -> tuple[Branch, Weights]:
    """Two branches at one place that act on different rows, as one.

    Gains add up; bottlenecks stand side by side, one rank axis behind the other. Where their scales differ, each goes
    into its `up`, in float64.
    """
    if isinstance(first.tuner, Gain) and isinstance(second.tuner, Gain):
        shift = first.tuner.shift or second.tuner.shift
        names = ("gain", "shift") if shift else ("gain",)
        none = torch.zeros_like(kept["gain"])
        total = {name: kept.get(name, none) + added.get(name, none) for name in names}
        return replace(first, tuner=Gain(shift=shift), tap=first.tap), total
    assert isinstance(first.tuner, Bottleneck)  # what else stands on rows has the part in its name
    assert first.tuner == second.tuner
    if not torch.equal(kept["scale"], added["scale"]):
        kept, added = _unscaled(kept), _unscaled(added)
    axes = {"down": 0, "down_bias": 0, "up": 1}
    total = {
        name: torch.cat([kept[name], added[name]], axes[name]) for name in axes if name in kept
    }
    if "up_bias" in kept:
        total["up_bias"] = kept["up_bias"] + added["up_bias"]
    return first, {**total, "scale": kept["scale"]}


def _unscaled(w: Weights) -> Weights:
    """The same with a scale of one."""
    scaled = {n: w[n].double() * w["scale"].double() for n in ("up", "up_bias") if n in w}
    return {**w, **scaled, "scale": torch.ones((), dtype=torch.float64)}
