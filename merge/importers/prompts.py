"""Prompts as modelscope and ms-swift run them: at the end of the sequence, replaced block by block.

Block 0 appends its prompts to the sequence; a later block replaces the last ones by its own. A prompt that
no later block replaces goes on as an ordinary token to the end (VPT, arXiv 2203.12119).
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from ..tuner import Branch, Point
from ..tuners.prompt import Prompt
from .foreign import Foreign, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from ..backbone import Backbone


def plant_prompts(
    path: Path,
    backbone: Backbone,
    prompts: Mapping[int, Tensor],
    places: Sequence[str],
    found: Foreign,
) -> None:
    """One branch for the tokens of a block that leave together.

    Args:
        path: The checkpoint, for messages.
        backbone: The frozen backbone.
        prompts: Tokens `[P, C]` by the number of their block.
        places: The blocks.
        found: Takes the branches.

    Raises:
        IncompatibleArtefact: Prompts enter a pooled mean, or overwrite image tokens.
    """
    if not prompts:
        return
    if getattr(backbone.model, "global_pool", "token") != "token":
        raise refuse(
            path, "prompts enter the pooled mean here", found="average pooling",
            do="wanted: a backbone that pools its class token",
        )  # fmt: skip
    lengths = {number: len(tokens) for number, tokens in sorted(prompts.items())}
    slots = lengths.get(0, 0)
    for number, length in lengths.items():
        if length > slots:
            raise refuse(
                path,
                "the prompts of a block overwrite image tokens",
                found=f"{places[number]} has {length} prompts, the sequence {slots} to replace",
                do="wanted: no block with more prompts than the first",
            )
    for number, length in lengths.items():
        leaves = [  # per token the last block that sees it
            next(
                (k - 1 for k in lengths if k > number and lengths[k] >= length - at),
                len(places) - 1,
            )
            for at in range(length)
        ]
        for last, run in groupby(range(length), key=leaves.__getitem__):
            group = list(run)
            name = f"{places[number]}/prompt" + ("" if len(group) == length else f".{group[0]}")
            branch = Branch(
                Prompt(), Point(places[number], "tokens"), Point(places[last], "tokens")
            )
            found.plant(name, branch, {"token": prompts[number][group]})
