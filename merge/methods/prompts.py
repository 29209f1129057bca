"""More keys and values, or more tokens: prefix tuning and visual prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..tuner import Branch, Point
from ..tuners.prefix import Prefix
from ..tuners.prompt import Prompt
from .planting import Method, Planted, chosen_blocks, in_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..backbone import Backbone
    from ..sites import Sites


def prefix(
    length: int,
    *,
    at: str = "attn",
    joint_softmax: bool = True,
    blocks: Sequence[int] | None = None,
) -> Method:
    """Constant keys and values in every attention (arXiv 2101.00190)."""
    tuner = Prefix(joint_softmax=joint_softmax)
    return in_blocks("prefix", tuner, f"{at}:keys", rank=length, numbers=blocks)


def deep_prompt(
    length: int,
    *,
    at: str = "",
    joint_softmax: bool = True,
    blocks: Sequence[int] | None = None,
) -> Method:
    """Learned tokens beside every block's input, or every attention's (VPT-deep, arXiv 2203.12119)."""
    tuner = Prompt(joint_softmax=joint_softmax)
    return in_blocks("prompt", tuner, f"{at}:tokens", rank=length, numbers=blocks)


def shallow_prompt(length: int, *, joint_softmax: bool = True) -> Method:
    """Learned tokens behind the embedded image, through all blocks (VPT-shallow, arXiv 2203.12119)."""

    def plant(backbone: Backbone, sites: Sites) -> Iterator[Planted]:
        found = chosen_blocks(backbone, None)
        tuner = Prompt(joint_softmax=joint_softmax)
        branch = Branch(tuner, Point(found[0], "tokens"), Point(found[-1], "tokens"))
        yield Planted(f"{found[0]}/prompt", branch, length)

    return plant
