"""Networks of their own beside the trunk: side-tuning and Res-Tuning-Bypass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError
from ..tuner import Branch, Point
from ..tuners.bypass import Bypass
from ..tuners.gain import Gain
from ..tuners.side_network import SideNetwork
from .planting import Method, Planted, chosen_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..backbone import Backbone
    from ..sites import Sites


def side_tuning(network: str = "fcn4") -> Method:
    """A network on the image, added to the pooled features with a gain on these (arXiv 1912.13503)."""

    def plant(backbone: Backbone, sites: Sites) -> Iterator[Planted]:
        classifier, *others = backbone.classifiers
        if others:
            raise UsageError(
                "side-tuning mixes one feature, and the backbone has several classifiers",
                where=backbone.identity.architecture,
                found=", ".join(backbone.classifiers),
            )
        add = Point(classifier, "input")
        yield Planted(f"{add.module}/side_share", Branch(Gain(shift=False), add, add))
        image = Point("patch_embed.proj", "input")
        yield Planted(f"{add.module}/side", Branch(SideNetwork(network), image, add))

    return plant


def bypass(rank: int, *, activation: str = "gelu") -> Method:
    """A ladder of adapters beside the blocks (Res-Tuning-Bypass, arXiv 2310.19859)."""

    def plant(backbone: Backbone, sites: Sites) -> Iterator[Planted]:
        found = chosen_blocks(backbone, None)
        stems = tuple(Point(block, "output") for block in found)
        branch = Branch(
            Bypass(len(found), activation), Point(found[0], "input"), Point("norm", "input"), stems
        )
        yield Planted("norm/bypass", branch, rank)

    return plant
