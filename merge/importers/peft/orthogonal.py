"""OFT (arXiv 2306.07280) and BOFT (arXiv 2311.06243): rotations of what a layer reads.

A rotation is Cayley's `(1 - S) (1 + S)^-1` of a skew matrix S, which PEFT's OFT by default truncates to the
first terms of its Neumann series.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...errors import IncompatibleArtefact
from ...tuners.rotation import Rotation
from .adapter import CONFIG

if TYPE_CHECKING:
    from .adapter import Adapter
    from .layer import Layer


def read_oft(adapter: Adapter) -> None:
    """`W R` with R of square blocks: a rotation before the layer.

    Raises:
        IncompatibleArtefact: A variant or a layer that cannot be carried.
    """
    adapter.allow(
        *("r", "oft_block_size", "bias", "coft", "eps", "block_share"),
        *("use_cayley_neumann", "num_cayley_neumann_terms"),
    )
    if old := [name for name in adapter.tensors if name.endswith(".oft_r")]:
        raise IncompatibleArtefact(
            "OFT of PEFT up to 0.14 cannot be carried: PEFT itself reads it no more",
            where=f"{adapter.path}: {old[0]}",
            wanted="oft_R.weight, the entries above the diagonals",
            found="oft_r, whole blocks",
            do="merge it into the weights with the PEFT that trained it (merge_and_unload)",
        )
    for layer in adapter.layers("oft_R.weight"):
        if isinstance(layer.op, nn.Conv2d) and layer.op.kernel_size != (1, 1):
            raise IncompatibleArtefact(
                "OFT at this layer cannot be carried",
                where=f"{adapter.path}: {layer.path}",
                wanted="a linear layer, or a convolution of 1 by 1",
                found=f"a convolution of {layer.op.kernel_size}: PEFT sums rotated windows that overlap",
                do="leave the layer out of target_modules (a short name such as proj matches convolutions too)",
            )
        width = layer.weight.shape[1] * getattr(layer.op, "groups", 1)
        upper = layer.take("oft_R.weight", None, None).double()
        block = round((1 + math.sqrt(1 + 8 * upper.shape[1])) / 2)
        rotation = _truncated if adapter.config.get("use_cayley_neumann", True) else _cayley
        skew = _skew(upper, block, layer)
        if adapter.config.get("coft"):
            skew = _shortened(skew, adapter.number("eps"))
        turn = rotation(skew, adapter) - torch.eye(block, dtype=torch.float64)
        if adapter.config.get("block_share"):
            turn = turn.repeat(width // block, 1, 1)
        _plant(layer, "oft", turn, width)


def read_boft(adapter: Adapter) -> None:
    """`diag(s) W R` with R a product of butterflies, last one first; the bias is not scaled.

    Beside a convolution, and at a part of a layer's rows, the whole change of its weight is kept.

    Raises:
        IncompatibleArtefact: A variant or a layer that cannot be carried.
    """
    adapter.allow("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "bias")
    for layer in adapter.layers("boft_R", "boft_s"):
        out, *kernel = layer.matrix.shape
        linear = isinstance(layer.op, nn.Linear)
        stretch = layer.take("boft_s", *((out, 1) if linear else (1, out))).double().flatten()
        skew = layer.take("boft_R", None, None, None, None).double()
        levels, blocks, block, _ = skew.shape
        layer.take("boft_R", levels, blocks, block, block)
        skew = (skew - skew.mT) / 2
        turns = _cayley(skew.flatten(0, 1), adapter).unflatten(0, (levels, blocks))
        turns = turns - torch.eye(block, dtype=torch.float64)
        if linear and not layer.part:
            for level in reversed(range(levels)):
                _plant(layer, f"boft.{level}", turns[level], kernel[0], level)
            layer.gain("stretch", stretch, keep=layer.given_bias)
            continue
        frozen = layer.weight.double().flatten(1)
        turned = _turned(frozen, turns, layer)
        layer.difference("boft", stretch[:, None] * turned - frozen)


def _plant(layer: Layer, label: str, turn: Tensor, width: int, level: int = 0) -> None:
    """A rotation before a layer."""
    layer.serial(label, _rotation(layer, turn, width, level), "input", {"turn": turn})


def _rotation(layer: Layer, turn: Tensor, width: int, level: int) -> Rotation:
    """A rotation of what a layer reads.

    Raises:
        IncompatibleArtefact: Its blocks are not as wide as what the layer reads, or have no such level.
    """
    blocks, block, _ = turn.shape
    halves = level == 0 or (blocks % 2**level == 0 and block % 2 == 0)
    if blocks * block != width or not halves:
        raise IncompatibleArtefact(
            "a rotation does not have the channels of its layer",
            where=f"{layer.adapter.path}: {layer.path}",
            wanted=f"{width} channels",
            found=f"{blocks} blocks of {block}, factor {level + 1}",
            do="load the backbone that it was trained on",
        )
    return Rotation(blocks, block, level)


def _turned(weight: Tensor, turns: Tensor, layer: Layer) -> Tensor:
    """`W R`, from what the rotations make of the rows of an identity, float64."""
    rotation = torch.eye(weight.shape[1], dtype=torch.float64)
    for level in reversed(range(len(turns))):
        tuner = _rotation(layer, turns[level], weight.shape[1], level)
        rotation = rotation + tuner.branch(rotation[None], {"turn": turns[level]})[0]
    return weight @ rotation.mT


def _skew(upper: Tensor, block: int, layer: Layer) -> Tensor:
    """Skew matrices `[blocks, block, block]` from the entries above their diagonals, `[blocks, n]`.

    Raises:
        IncompatibleArtefact: No matrix has as many.
    """
    rows, columns = torch.triu_indices(block, block, 1)
    if len(rows) != upper.shape[1]:
        raise IncompatibleArtefact(
            "a rotation has a number of entries that no block has",
            where=f"{layer.adapter.path}: {layer.path}",
            wanted="b (b - 1) / 2",
            found=upper.shape[1],
        )
    skew = upper.new_zeros(len(upper), block, block)
    skew[:, rows, columns] = upper
    return skew - skew.mT


def _shortened(skew: Tensor, eps: float) -> Tensor:
    """Constrained OFT: blocks longer than `eps / sqrt(blocks)` are cut to that length.

    PEFT does this at every step and every answer; the bound is a float32 number there.
    """
    bound = (torch.tensor(eps) / torch.tensor(float(len(skew))).sqrt()).double()
    length = skew.flatten(1).norm(dim=1)[:, None, None]
    return torch.where(length <= bound, skew, bound * skew / length)


def _cayley(skew: Tensor, _: Adapter) -> Tensor:
    """`(1 - S) (1 + S)^-1`."""
    one = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew)
    return torch.linalg.solve(one + skew, one - skew, left=False)


def _truncated(skew: Tensor, adapter: Adapter) -> Tensor:
    """`1 + 2 (S + S^2 + ... ) + S^(k-1)` of k terms, the last one once: PEFT's default.

    With one term it is the identity, with two `1 + 2 S`.

    Raises:
        IncompatibleArtefact: The number of terms is none.
    """
    terms = adapter.number("num_cayley_neumann_terms", 5)
    if not isinstance(terms, int) or terms < 1:
        raise IncompatibleArtefact(
            "the adapter's configuration is malformed",
            where=adapter.path / CONFIG,
            wanted="num_cayley_neumann_terms, a number from 1",
            found=terms,
        )
    total = torch.eye(skew.shape[-1], dtype=skew.dtype).repeat(len(skew), 1, 1)
    if terms > 1:
        total = total + 2 * skew
    if terms > 2:
        power = skew @ skew
        total = total + 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total = total + 2 * power
        total = total + power @ skew
    return total
