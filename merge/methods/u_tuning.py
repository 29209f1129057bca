"""U-Tuning (arXiv 2303.00690): a frozen op and a tuner of any kind beside it, every choice explicit.

`y = OP(x) + U(x)` (eq. 3) with OP an attention, an FFN, a whole block or the patch embedding, and U an
adapter, a LoRA, a prefix or a prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError
from ..tuner import Branch, Point
from ..tuners.bottleneck import Bottleneck
from ..tuners.prefix import Prefix
from ..tuners.prompt import Prompt
from .planting import Method, Planted, in_blocks
from .prompts import shallow_prompt

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..backbone import Backbone
    from ..sites import Sites
    from ..tuner import Tuner

KINDS = ("adapter", "lora", "prefix", "prompt")
OPS = {"attention": ("attn", "norm1"), "ffn": ("mlp", "norm2"), "block": ("", "")}


def u_tuner(
    kind: str,
    rank: int,
    *,
    op: str = "attention",
    before_norm: bool = False,
    serial: bool = False,
    activation: str = "gelu",
    bias: bool = True,
    scale: float = 1.0,
    joint_softmax: bool = True,
    blocks: Sequence[int] | None = None,
) -> Method:
    """One U-Tuner per block, or one at the patch embedding.

    Args:
        kind: `adapter`, `lora` (no activation), `prefix` or `prompt`.
        rank: Bottleneck width, or length.
        op: `attention`, `ffn`, `block` or `embedding`.
        before_norm: An adapter reads the residual stream in front of the op's norm instead of what the
            op reads. A block has its norms inside and reads the residual stream anyway.
        serial: An adapter reads the op's output instead.
        activation: Of an adapter.
        bias: Of an adapter.
        scale: Of an adapter or a LoRA.
        joint_softmax: Of a prefix or a prompt.
        blocks: Numbers of the blocks; None for all.

    Raises:
        UsageError: The combination means nothing, such as a prefix beside an FFN.
    """
    if kind not in KINDS or op not in (*OPS, "embedding"):
        raise UsageError(
            "no such U-Tuner",
            wanted=f"kind one of {', '.join(KINDS)}; op one of {', '.join(OPS)}, embedding",
            found=f"{kind} at {op}",
        )
    if (before_norm and (op not in ("attention", "ffn") or serial)) or (
        (before_norm or serial) and kind in ("prefix", "prompt")
    ):
        raise UsageError(
            "this U-Tuner has no such place",
            wanted="before_norm of a parallel adapter or LoRA at attention or ffn; serial of an adapter or LoRA",
            found=f"{kind} at {op}, before_norm={before_norm}, serial={serial}",
        )
    if kind in ("prefix", "prompt"):
        return _attended(kind, rank, op, joint_softmax=joint_softmax, blocks=blocks)
    tuner = Bottleneck("identity" if kind == "lora" else activation, bias=bias and kind != "lora")
    if op == "embedding":
        return _at_embedding(kind, tuner, rank, scale, serial=serial)
    inside, norm = OPS[op]
    tap = f"{norm}:input" if before_norm and norm else f"{inside}:input"
    tap = f"{inside}:output" if serial else tap
    return in_blocks(kind, tuner, tap, f"{inside}:output", rank=rank, scale=scale, numbers=blocks)


def _attended(
    kind: str, rank: int, op: str, *, joint_softmax: bool, blocks: Sequence[int] | None
) -> Method:
    """A prefix or prompt: where tokens attend to each other."""
    if op == "embedding" and kind == "prompt":
        return shallow_prompt(rank, joint_softmax=joint_softmax)
    if op not in ("attention", "block"):
        raise UsageError(
            f"a {kind} acts where tokens attend to each other",
            wanted="op attention or block" + (", or embedding" if kind == "prompt" else ""),
            found=op,
        )
    inside = "attn" if op == "attention" else ""
    if kind == "prompt":
        return in_blocks(
            kind, Prompt(joint_softmax=joint_softmax), f"{inside}:tokens", rank=rank, numbers=blocks
        )
    return in_blocks(
        kind, Prefix(joint_softmax=joint_softmax), "attn:keys", rank=rank, numbers=blocks
    )


def _at_embedding(kind: str, tuner: Tuner, rank: int, scale: float, *, serial: bool) -> Method:
    """A tuner that reads the patches themselves, or the embedded ones."""

    def plant(_: Backbone, __: Sites) -> Iterator[Planted]:
        add = Point("patch_embed.proj", "output")
        tap = add if serial else Point("patch_embed.proj", "patches")
        yield Planted(f"patch_embed.proj/{kind}", Branch(tuner, tap, add), rank, scale)

    return plant
