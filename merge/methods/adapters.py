"""Bottlenecks at their published places: LoRA, adapters, AdaptFormer, PATT, and dual U-Tuners."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..tuners.bottleneck import Bottleneck
from .planting import Method, Planted, in_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..backbone import Backbone
    from ..sites import Sites

THIRDS = {"kv": (1, 2), "qv": (0, 2), "qkv": (0, 1, 2)}  # of the rows of qkv


def lora(
    rank: int,
    *,
    alpha: float | None = None,
    at: str = "attn.qkv",
    blocks: Sequence[int] | None = None,
) -> Method:
    """LoRA on one linear layer per block, scale alpha / rank (arXiv 2106.09685)."""
    scale = 1.0 if alpha is None else alpha / max(rank, 1)
    tuner = Bottleneck(activation="identity", bias=False)
    return in_blocks(
        "lora", tuner, f"{at}:input", f"{at}:output", rank=rank, scale=scale, numbers=blocks
    )


def parallel_adapter(
    rank: int,
    *,
    at: str = "mlp",
    activation: str = "relu",
    scale: float = 1.0,
    blocks: Sequence[int] | None = None,
) -> Method:
    """An adapter beside an op that reads what the op reads (arXiv 2205.13535, 2303.00690)."""
    tuner = Bottleneck(activation=activation, bias=True)
    return in_blocks(
        "adapter", tuner, f"{at}:input", f"{at}:output", rank=rank, scale=scale, numbers=blocks
    )


def serial_adapter(
    rank: int,
    *,
    at: str = "mlp",
    activation: str = "gelu",
    scale: float = 1.0,
    blocks: Sequence[int] | None = None,
) -> Method:
    """An adapter on an op's output, added to it (arXiv 1902.00751)."""
    tuner = Bottleneck(activation=activation, bias=True)
    return in_blocks("serial", tuner, f"{at}:output", rank=rank, scale=scale, numbers=blocks)


def dual_adapter(
    rank: int,
    *,
    activation: str = "relu",
    scale: float = 1.0,
    blocks: Sequence[int] | None = None,
) -> Method:
    """Parallel adapters at attention and FFN: the dual U-Tuner (arXiv 2303.00690, section 3)."""
    return together(
        *(
            parallel_adapter(rank, at=at, activation=activation, scale=scale, blocks=blocks)
            for at in ("attn", "mlp")
        )
    )


def adaptformer(
    rank: int,
    *,
    scale: float = 0.1,
    learn_scale: bool = False,
    sequential: bool = False,
    norm: str = "none",
    blocks: Sequence[int] | None = None,
) -> Method:
    """A ReLU adapter beside the FFN, or behind it (arXiv 2205.13535, eq. 4).

    Args:
        rank: Of the bottleneck.
        scale: The factor; the start of it if it is learned.
        learn_scale: Train the factor too.
        sequential: Behind the FFN instead of beside it.
        norm: A layer norm of its own: `none`, `in` or `out`.
        blocks: Numbers of the blocks; None for all.
    """
    tuner = Bottleneck("relu", bias=True, norm=norm)
    tap = "mlp:output" if sequential else "mlp:input"
    return in_blocks(
        "adaptformer", tuner, tap, "mlp:output",
        rank=rank, scale=scale, learn_scale=learn_scale, numbers=blocks,
    )  # fmt: skip


def patt(
    rank: int, *, mode: str = "kv", scale: float = 0.2, blocks: Sequence[int] | None = None
) -> Method:
    """Parallel attention: a tanh bottleneck added to keys and values (V-PETL, arXiv 2210.00788).

    Args:
        rank: Middle width.
        mode: What is tuned: `kv`, `qv` or `qkv`. The other rows stay zero.
        scale: The factor.
        blocks: Numbers of the blocks; None for all.

    Raises:
        UsageError: No such mode.
    """
    if mode not in THIRDS:
        raise UsageError("no such mode of PATT", wanted=f"one of {', '.join(THIRDS)}", found=mode)
    tuner = Bottleneck("tanh", bias=True)
    everywhere = in_blocks(
        "patt", tuner, "attn.qkv:input", "attn.qkv:output", rank=rank, scale=scale, numbers=blocks
    )

    def plant(backbone: Backbone, sites: Sites) -> Iterator[Planted]:
        for planted in everywhere(backbone, sites):
            third = sites.require(planted.branch.add) // 3
            rows = tuple(range(i * third, (i + 1) * third) for i in THIRDS[mode])
            yield replace(planted, rows=rows)

    return plant


def bapat(
    attention_rank: int,
    rank: int,
    *,
    attention_scale: float = 0.8,
    scale: float = 0.1,
    blocks: Sequence[int] | None = None,
) -> Method:
    """PATT on keys and values with AdaptFormer beside the FFN (Swin-BAPAT, arXiv 2210.00788)."""
    return together(
        patt(attention_rank, scale=attention_scale, blocks=blocks),
        adaptformer(rank, scale=scale, blocks=blocks),
    )


def together(*methods: Method) -> Method:
    """Several methods as one."""

    def plant(backbone: Backbone, sites: Sites) -> Iterator[Planted]:
        for method in methods:
            yield from method(backbone, sites)

    return plant
