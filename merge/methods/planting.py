"""A method plants branches in a backbone; several methods combine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..sites import blocks
from ..tuner import Branch, Point, Tuner
from ..tuners.head import Head

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..backbone import Backbone
    from ..sites import Sites


@dataclass(frozen=True)
class Planted:
    """A branch and how it starts.

    Attributes:
        name: Of the branch.
        branch: Tuner and place.
        rank: Size of the tuner's padded axes; 0 where it has none.
        scale: Of the tensor `scale`, where the tuner has one.
        learn_scale: Training moves that scale too; otherwise it is a constant.
        rows: First and last row of `up` and `up_bias` that training moves, as ranges; None for all.
    """

    name: str
    branch: Branch
    rank: int = 0
    scale: float = 1.0
    learn_scale: bool = False
    rows: tuple[range, ...] | None = None


Method = Callable[["Backbone", "Sites"], Iterator[Planted]]


def in_blocks(
    label: str,
    tuner: Tuner,
    tap: str,
    add: str | None = None,
    *,
    rank: int = 0,
    scale: float = 1.0,
    learn_scale: bool = False,
    numbers: Sequence[int] | None = None,
) -> Method:
    """One tuner in every block, or in those numbered.

    Args:
        label: Ends the branch's name.
        tuner: What is computed.
        tap: Where it reads, `OP:SIDE` inside a block, such as `attn.qkv:input`; `:input` is the block's own.
        add: Where it joins; at the tap if None. What is added to an op's output joins where the residual
            sum takes it: behind a LayerScale, a gamma or a norm that stands there.
        rank: See `Planted`.
        scale: See `Planted`.
        learn_scale: See `Planted`.
        numbers: Of the blocks; None for all.

    Raises (when planted):
        UsageError: A block that is not there.
    """

    def plant(backbone: Backbone, sites: Sites) -> Iterator[Planted]:
        for block in chosen_blocks(backbone, numbers):
            joined = _point(block, add or tap)
            read = _point(block, tap)
            behind = sites.residual.get(joined.module) if joined.side == "output" else None
            if behind is not None and add in (None, tap):
                read = joined = behind
            elif behind is not None and sites.leads.get(behind) == sites.leads.get(read):
                joined = behind  # windows stay among themselves
            branch = Branch(tuner, read, joined)
            yield Planted(
                f"{_point(block, add or tap).module}/{label}", branch, rank, scale, learn_scale
            )

    return plant


def chosen_blocks(backbone: Backbone, numbers: Sequence[int] | None) -> list[str]:
    """Paths of the blocks with these numbers.

    Raises:
        UsageError: There is no such block.
    """
    found = blocks(backbone.model)
    for number in numbers or ():
        if number not in range(len(found)):
            raise UsageError(
                "the backbone has no such block", wanted=f"0 to {len(found) - 1}", found=number
            )
    return [found[number] for number in (range(len(found)) if numbers is None else numbers)]


def _point(block: str, text: str) -> Point:
    """A point of a block."""
    op, _, side = text.rpartition(":")
    return Point(f"{block}.{op}".rstrip("."), side)  # type: ignore[arg-type]


def head_branch(classifier: str) -> tuple[str, Branch]:
    """The task's classifier in the place of the backbone's."""
    return (
        f"{classifier}/head",
        Branch(Head(), Point(classifier, "input"), Point(classifier, "output")),
    )
