"""LoHa and LoKr of LyCORIS (arXiv 2309.14859): products of low-rank matrices beside a layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ...errors import IncompatibleArtefact
from ...tuners.bottleneck import Bottleneck
from ...tuners.kronecker import Kronecker
from .layer import low_rank

if TYPE_CHECKING:
    from torch import Tensor

    from .adapter import Adapter
    from .layer import Layer

SETTINGS = ("r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d")


def read_loha(adapter: Adapter) -> None:
    """`alpha / r * (A1 B1) o (A2 B2)`, eq. 5: the rows' products of the factors, of rank r^2.

    `(A1 B1) o (A2 B2) = sum_ij (A1[:, i] o A2[:, j]) (B1[i, :] o B2[j, :])`; where r^2 is no less than the
    matrix's own rank, the matrix itself is kept.

    Raises:
        IncompatibleArtefact: A variant or a layer that cannot be carried.
    """
    adapter.allow(*SETTINGS)
    names = [f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")]
    for layer in adapter.layers(*names):
        scale = float(torch.tensor(_scale(layer), dtype=torch.float32))  # as PEFT holds LoHa's
        out, width = layer.matrix.flatten(1).shape
        if layer.has("hada_t1"):
            sizes = layer.matrix.shape[:2]
            first, second = (_tucker(layer, f"hada_t{i}", f"hada_w{i}", *sizes) for i in (1, 2))
            layer.difference("loha", scale * first.flatten(1) * second.flatten(1))
            continue
        a1 = layer.take("hada_w1_a", out, None).double()
        rank = a1.shape[1]
        b1 = layer.take("hada_w1_b", rank, width).double()
        a2 = layer.take("hada_w2_a", out, rank).double()
        b2 = layer.take("hada_w2_b", rank, width).double()
        if rank**2 >= min(out, width):
            layer.difference("loha", scale * (a1 @ b1) * (a2 @ b2))
            continue
        up = (a1[:, :, None] * a2[:, None, :]).flatten(1)  # [out, r * r]
        down = (b1[:, None] * b2[None]).flatten(0, 1)  # [r * r, in]
        layer.beside("loha", Bottleneck("identity", bias=False), low_rank(down, up, scale))


def read_lokr(adapter: Adapter) -> None:
    """`alpha / r * W1 (x) W2`, eq. 6, each factor whole or a product; a convolution's kernel is in W2.

    Raises:
        IncompatibleArtefact: A variant or a layer that cannot be carried.
    """
    adapter.allow(*SETTINGS, "decompose_both", "decompose_factor")
    names = [f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")]
    for layer in adapter.layers(*names):
        out, wide, *kernel = layer.matrix.shape
        left = _product(layer, "lokr_w1", None, None)
        rows, columns = left.shape
        c, d = out // rows, wide // columns
        if layer.has("lokr_t2"):
            right = _tucker(layer, "lokr_t2", "lokr_w2", c, d).flatten(1)
            down, up = _whole(right)
        elif layer.has("lokr_w2"):
            down, up = _whole(layer.take("lokr_w2", c, d, *kernel).double().flatten(1))
        else:
            up = layer.take("lokr_w2_a", c, None)
            down = layer.take("lokr_w2_b", up.shape[1], d * math.prod(kernel))
        weights = {"left": left, **low_rank(down, up, _scale(layer))}
        layer.beside("lokr", Kronecker(rows, columns), weights)


def _scale(layer: Layer) -> float:
    """`alpha / r` of this layer.

    Raises:
        IncompatibleArtefact: The rank is none.
    """
    adapter = layer.adapter
    rank = adapter.resolved("rank_pattern", "r", layer.name)
    if rank < 1:
        raise IncompatibleArtefact(
            "the adapter's configuration is malformed",
            where=f"{adapter.path}: {layer.path}",
            wanted="r from 1",
            found=rank,
        )
    return adapter.resolved("alpha_pattern", "alpha", layer.name) / rank


def _product(layer: Layer, name: str, rows: int | None, columns: int | None) -> Tensor:
    """A factor that is stored whole, or as `_a` times `_b`, float64 when multiplied."""
    if layer.has(name):
        return layer.take(name, rows, columns)
    a = layer.take(f"{name}_a", rows, None)
    return a.double() @ layer.take(f"{name}_b", a.shape[1], columns).double()


def _whole(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as `down` and `up`, one of them the identity."""
    out, width = matrix.shape
    eye = torch.eye(min(out, width), dtype=matrix.dtype)
    return (matrix, eye) if out <= width else (eye, matrix)


def _tucker(layer: Layer, core: str, factor: str, out: int, width: int) -> Tensor:
    """A kernel `[out, in, kh, kw]` from its core `[r, r, kh, kw]` and `_a [r, out]`, `_b [r, in]`, float64."""
    kernel = layer.weight.shape[2:]
    t = layer.take(core, None, None, *kernel).double()
    a = layer.take(f"{factor}_a", t.shape[0], out).double()
    b = layer.take(f"{factor}_b", t.shape[1], width).double()
    return torch.einsum("ijkl,io,jc->ockl", t, a, b)
