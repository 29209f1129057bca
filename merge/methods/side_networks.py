"""Networks beside the trunk that read its hidden states: UniPT and the ladder (LST).

What stands at the classifier is replaced by what the network gives, and the trunk runs as if there were
none: one pass of it serves any number of tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..sites import blocks
from ..tuner import Branch, Point
from ..tuners.ladder import Ladder
from ..tuners.unipt import UniPT
from ..tuners.unipt_pyramid import UniPTPyramid
from .planting import Method, Planted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from ..backbone import Backbone
    from ..sites import Sites

STAGE = 4  # pixels per position of the first map that a side network reads; the stem's are finer


@dataclass(frozen=True)
class States:
    """The hidden states of a trunk; the last is the anchor.

    Attributes:
        points: Where they pass, in order.
        channels: At each.
        tokens: Of the anchor: its sequence, or the positions of its map.
        cells: Of maps, the side of every target's map over the anchor's; empty for sequences.
        channels_last: Maps are `[B, H, W, C]`.
        mask: Where the mask of valid tokens passes, if one does.
    """

    points: tuple[Point, ...]
    channels: tuple[int, ...]
    tokens: int
    cells: tuple[int, ...] = ()
    channels_last: bool = False
    mask: Point | None = None


def hidden_states(backbone: Backbone, sites: Sites) -> States:
    """Where a trunk's hidden states pass.

    Blocks of a plain transformer, in front of the first and behind each; the stages of a trunk whose maps
    shrink; or what an architecture of ours names.

    Raises:
        UsageError: None are known, or their sizes do not fit each other.
    """
    model = backbone.model
    stages = getattr(model, "feature_info", None) or ()
    mask = None
    if (named := getattr(model, "hidden_states", None)) is not None:
        points = [Point(path, "output") for path in named]
        mask = Point("mask", "output") if sites.calls.get(Point("mask", "output")) else None
    elif len({stage["reduction"] for stage in stages}) > 1:
        points = [Point(s["module"], "output") for s in stages if s["reduction"] >= STAGE]
    else:
        found = blocks(model)
        points = [Point(found[0], "input"), *(Point(block, "output") for block in found)]
    shapes = [sites.shapes[point] for point in points]
    if len(shapes[-1]) != 4:
        if len({shape[1:-1] for shape in shapes}) > 1:
            raise UsageError(
                "a side network wants hidden states with the same tokens, or stages that timm lists",
                where=backbone.identity.architecture,
                found="blocks whose tokens grow fewer",
            )
        channels = tuple(map(sites.require, points))
        return States(tuple(points), channels, shapes[-1][1], mask=mask)
    last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    grids = [shape[1:3] if last else shape[2:] for shape in shapes]
    cells = tuple(grid[0] // grids[-1][0] for grid in grids[:-1])
    for grid, side in zip(grids, cells, strict=False):
        if tuple(grid) != tuple(side * size for size in grids[-1]):
            raise UsageError(
                "a map of the backbone is not a whole number of times as large as its last",
                where=backbone.identity.architecture,
                found=f"{list(grid)} and {list(grids[-1])} positions",
                do="choose another size of images",
            )
    return States(
        tuple(points),
        tuple(shape[-1 if last else 1] for shape in shapes),
        grids[-1][0] * grids[-1][1],
        cells,
        last,
    )


def unipt(
    width: int | None = None, *, pool: str | None = None, norm: str = "layer", **settings: Any
) -> Method:
    """A UniPT beside the whole trunk (arXiv 2308.14316); the last hidden state is the anchor.

    Beside an encoder and a decoder there is one at each, and the decoder's reads what the encoder's gives.

    Args:
        width: Channels inside; half of the anchor's if None.
        pool: What goes to the classifier: the `first` token, or the `mean`; None as the trunk does.
        norm: See `tuners.unipt.UniPT`.
        settings: More of its fields.

    Raises (when planted):
        UsageError: The trunk has no hidden states that are known.
    """

    def plant(backbone: Backbone, sites: Sites) -> Iterator[Planted]:
        if hasattr(backbone.model, "decoder_hidden_states"):
            yield from _two_sides(backbone, sites, width, {"norm": norm, **settings})
            return
        states = hidden_states(backbone, sites)
        *targets, anchor = states.points
        add = Point(_classifier(backbone), "input")
        fields: dict[str, Any] = {
            "widths": states.channels[:-1],
            "anchor": states.channels[-1],
            "width": width or states.channels[-1] // 2,
            "out": sites.require(add),
            "norm": norm,
            "gives": pool or _pool(backbone.model),
            **settings,
        }
        others = [*targets[1:], anchor]
        if states.cells:
            fields |= {"cells": states.cells, "channels_last": states.channels_last}
            fields["gives"] = pool or "mean"
            tuner: UniPT = UniPTPyramid(**fields)
        else:
            if states.mask is not None:
                fields["masked"] = True
                others.append(states.mask)
            tuner = UniPT(**fields)
        yield Planted(f"{add.module}/unipt", Branch(tuner, targets[0], add, tuple(others)))

    return plant


def _two_sides(
    backbone: Backbone, sites: Sites, width: int | None, settings: dict[str, Any]
) -> Iterator[Planted]:
    """A network beside the encoder, whose answer is the memory of one beside the decoder."""
    model = backbone.model
    memory = Point("side_memory", "output")
    mask = next(
        Point(path, "output")
        for path in ("encoder_mask", "memory_mask")
        if Point(path, "output") in sites.calls
    )
    for half, add in (
        ("hidden_states", memory),
        ("decoder_hidden_states", Point("features", "output")),
    ):
        *targets, anchor = (Point(path, "output") for path in getattr(model, half))
        crossed = add is not memory
        wide = sites.require(anchor)
        inside = width or wide // 2
        tuner = UniPT(
            widths=tuple(map(sites.require, targets)),
            anchor=wide,
            width=inside,
            out=sites.require(add) if crossed else inside,
            up="relu" if crossed else "none",
            masked=not crossed,
            crossed=crossed,
            **settings,
        )
        others = (*targets[1:], anchor, *((memory, mask) if crossed else (mask,)))
        yield Planted(f"{add.module}/unipt", Branch(tuner, targets[0], add, others))


def ladder(width: int | None = None, *, heads: int = 4, pool: str | None = None) -> Method:
    """Ladder side-tuning beside a plain transformer (arXiv 2206.06522).

    Args:
        width: Channels of the side network; an eighth of the trunk's if None.
        heads: Of its attentions.
        pool: See `unipt`.

    Raises (when planted):
        UsageError: The trunk has no hidden states that are known, or its maps shrink.
    """

    def plant(backbone: Backbone, sites: Sites) -> Iterator[Planted]:
        states = hidden_states(backbone, sites)
        if states.cells:
            raise UsageError(
                "a ladder wants hidden states with the same tokens",
                where=backbone.identity.architecture,
                found="maps that shrink",
                do="use unipt()",
            )
        add = Point(_classifier(backbone), "input")
        narrow = width or max(heads, states.channels[-1] // 8 // heads * heads)
        tuner = Ladder(
            widths=states.channels,
            width=narrow,
            heads=heads,
            hidden=4 * narrow,
            out=sites.require(add),
            gives=pool or _pool(backbone.model),
            masked=states.mask is not None,
        )
        others = (*states.points[1:], *([states.mask] if states.mask else []))
        yield Planted(f"{add.module}/ladder", Branch(tuner, states.points[0], add, others))

    return plant


def _classifier(backbone: Backbone) -> str:
    classifier, *others = backbone.classifiers
    if others:
        raise UsageError(
            "a side network gives one feature, and the backbone has several classifiers",
            where=backbone.identity.architecture,
            found=", ".join(backbone.classifiers),
        )
    return classifier


def _pool(model: nn.Module) -> str:
    """As the trunk pools: its class token if it has one and takes it, the mean otherwise."""
    has_token = getattr(model, "cls_token", None) is not None or hasattr(model, "vision_model")
    return "first" if has_token and getattr(model, "global_pool", "token") == "token" else "mean"
