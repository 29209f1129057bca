"""LoRA and its nearest kin: low-rank matrices beside a layer.

LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), AdaLoRA (2303.10512), VeRA (2310.11454).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...errors import IncompatibleArtefact
from ...tuners.bottleneck import Bottleneck
from .adapter import CONFIG
from .layer import low_rank

if TYPE_CHECKING:
    from .adapter import Adapter
    from .layer import Layer

PLAIN = Bottleneck("identity", bias=False)
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # that leave the frozen weights alone
REPEATED = ("pissa", "olora")
"""Starts out of the frozen weights that PEFT computes again whenever it loads the adapter, the same each time."""
RANKNUM = 1e-5  # what PEFT adds to AdaLoRA's rank before it divides by it


def read_lora(adapter: Adapter) -> None:
    """`scale * B A` beside each layer, with the rank and the scale of that layer; DoRA's magnitudes.

    Raises:
        IncompatibleArtefact: A variant or a layer that cannot be carried.
    """
    adapter.allow(
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
        *("lora_bias", "bias", "init_lora_weights"),
    )
    start = _start(adapter, *REPEATED)
    names = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector")
    for layer in adapter.layers(*names):
        out, *kernel = layer.matrix.shape
        if getattr(layer.op, "dilation", (1,))[0] != 1:
            raise _dilated(layer)
        down = layer.take("lora_A.weight", None, *kernel).flatten(1)
        rank = down.shape[0]
        up = layer.take("lora_B.weight", out, rank, *[1] * (len(kernel) - 1)).flatten(1)
        alpha = adapter.resolved("alpha_pattern", "lora_alpha", layer.name)
        scale = alpha / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)
        if start in REPEATED:
            down, up = _without(start, layer, down, up, scale)
        weights = low_rank(down, up, scale)
        if layer.has("lora_B.bias"):
            weights["down_bias"] = down.new_zeros(len(down))
            weights["up_bias"] = layer.take("lora_B.bias", out)
        layer.beside("lora", Bottleneck("identity", bias="up_bias" in weights), weights)
        if adapter.config.get("use_dora"):
            _magnitude(layer, scale * (up.double() @ down.double()))
        elif layer.has("lora_magnitude_vector"):
            raise IncompatibleArtefact(
                "the adapter has DoRA's magnitudes without saying use_dora",
                where=f"{adapter.path}: {layer.path}",
            )


def _magnitude(layer: Layer, change: Tensor) -> None:
    """DoRA, eq. 5: row i of `W + change` gets the length m_i; the bias is left alone.

    `g = m / |W + change|` from the frozen weight in float64 is a gain behind the layer and its LoRA.
    """
    out, *kernel = layer.weight.shape
    shape = [out] if len(kernel) == 1 else [1, out, *[1] * (len(kernel) - 1)]
    magnitude = layer.take("lora_magnitude_vector", *shape).flatten().double()
    length = (layer.weight.double().flatten(1) + change).norm(dim=1)
    layer.gain("magnitude", magnitude / length, keep=layer.given_bias)


def _start(adapter: Adapter, *repeated: str) -> str:
    """What the adapter was begun with; PiSSA, OLoRA, CorDA, LoftQ and others take it out of the frozen weights.

    Args:
        adapter: Whose.
        repeated: Those of them that can be computed again.

    Raises:
        IncompatibleArtefact: It may have changed the frozen weights, and cannot be computed again.
    """
    start = adapter.config.get("init_lora_weights", True)
    if start not in (*STARTS, *repeated):
        raise IncompatibleArtefact(
            "the adapter's start may have changed the frozen weights, so that it fits no frozen backbone",
            where=adapter.path / CONFIG,
            wanted=f"init_lora_weights one of {', '.join(map(repr, (*STARTS, *repeated)))}",
            found=repr(start),
            do="save it with save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    if start in repeated:
        adapter.found.notes["start"] = (
            f"{start} was taken out of the frozen weights again in float32, as PEFT does when it loads the adapter"
        )
    return str(start)


def _without(
    start: str, layer: Layer, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """LoRA beside the frozen weight less its start, as LoRA of twice the rank beside the frozen weight.

    PiSSA (arXiv 2404.02948, eq. 2-4) begins with the largest singular values, OLoRA (2406.01775) with the first rows
    and columns of a QR decomposition.
    """
    if not isinstance(layer.op, nn.Linear):
        raise layer.refuse_op(f"a linear layer for {start}")
    weight, rank = layer.weight.float(), len(down)
    if start == "pissa":
        u, singular, v = torch.linalg.svd(weight, full_matrices=False)
        root = (singular[:rank] / scale).sqrt()
        b, a = u[:, :rank] * root, root[:, None] * v[:rank]
    else:
        q, r = torch.linalg.qr(weight)
        b, a = q[:, :rank], r[:rank]
    return torch.cat([down, a.to(down)]), torch.cat([up, -b.to(up)], dim=1)


def _dilated(layer: Layer) -> IncompatibleArtefact:
    """PEFT builds LoRA's convolution without the dilation of the frozen one."""
    return IncompatibleArtefact(
        "LoRA beside a dilated convolution cannot be carried",
        where=f"{layer.adapter.path}: {layer.path}",
        wanted="dilation 1",
        found=f"dilation {layer.op.dilation}",
        do="leave the layer out of target_modules",
    )


def read_adalora(adapter: Adapter) -> None:
    """`alpha / (init_r + 1e-5) * B (E A)`: the file holds the ranks that were kept.

    Raises:
        IncompatibleArtefact: A variant or a layer that cannot be carried.
    """
    adapter.allow(
        *("r", "init_r", "target_r", "lora_alpha", "rank_pattern", "bias", "init_lora_weights"),
        *("tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
    )
    _start(adapter)
    initial, alpha = adapter.number("init_r", 12), adapter.number("lora_alpha", 8)
    for layer in adapter.layers("lora_A", "lora_B", "lora_E"):
        if layer.has("lora_A") and layer.tensors["lora_A"].shape[0] == 0:
            continue  # all ranks were pruned
        out, *kernel = layer.matrix.shape
        down = layer.take("lora_A", None, math.prod(kernel))
        rank = down.shape[0]
        up, values = layer.take("lora_B", out, rank), layer.take("lora_E", rank, 1)
        scale = (alpha if alpha > 0 else rank) / (initial + RANKNUM)
        layer.beside("lora", PLAIN, low_rank(down.double() * values.double(), up, scale))


def read_vera(adapter: Adapter) -> None:
    """`b * B (d * A)` with A and B shared by all layers, each of which reads a corner of them.

    Raises:
        IncompatibleArtefact: A variant or a layer that cannot be carried, or a projection that is missing.
    """
    adapter.allow("r", "bias", "projection_prng_key", "save_projection", "d_initial")
    layers = adapter.layers("vera_lambda_b", "vera_lambda_d")
    for layer in layers:
        if not isinstance(layer.op, nn.Linear):
            raise layer.refuse_op("a linear layer")
    rank = int(adapter.number("r"))
    shapes = [layer.weight.shape for layer in layers]
    widest = max((s[0] for s in shapes), default=0), max((s[1] for s in shapes), default=0)
    a, b = _projections(adapter, rank, *widest)
    for layer in layers:
        out, width = layer.weight.shape
        outer = layer.take("vera_lambda_b", out).double()
        inner = layer.take("vera_lambda_d", rank).double()
        down = inner[:, None] * a[:, :width].double()
        up = outer[:, None] * b[:out].double()
        layer.beside("vera", PLAIN, low_rank(down, up, 1.0))


def _projections(adapter: Adapter, rank: int, out: int, width: int) -> tuple[Tensor, Tensor]:
    """A `[r, in]` and B `[out, r]`: from the file, or drawn again from the saved seed.

    Drawn as He's uniform distribution from one generator, A first (arXiv 1502.01852, eq. 10).

    Raises:
        IncompatibleArtefact: The file has none though it says so, or smaller ones than its layers need.
    """
    if adapter.config.get("save_projection", True):
        names = ("base_model.vera_A", "base_model.vera_B")
        found = [adapter.tensors.pop(name, torch.empty(0, 0)) for name in names]
        fits = found[0].shape[0] == rank == found[1].shape[1]
        if not fits or found[0].shape[1] < width or found[1].shape[0] < out:
            raise IncompatibleArtefact(
                "the shared projections do not fit the layers",
                where=adapter.path,
                wanted=f"vera_A [{rank}, {width} or more], vera_B [{out} or more, {rank}]",
                found=[list(tensor.shape) for tensor in found],
            )
        return found[0], found[1]
    generator = torch.Generator().manual_seed(int(adapter.number("projection_prng_key")))

    def drawn(*shape: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)

    a = drawn(rank, width)
    return a, drawn(out, rank)
