"""Methods that change the frozen weights themselves, and fold: biases, norms, gains, rotations, all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ..errors import UsageError
from ..ops import adds_bias_last
from ..tuner import Branch, Point
from ..tuners.bias import Bias
from ..tuners.difference import Difference
from ..tuners.gain import Gain
from ..tuners.kronecker import Kronecker
from ..tuners.norm import Norm
from ..tuners.rotation import Rotation
from .planting import Method, Planted, chosen_blocks, in_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..backbone import Backbone
    from ..sites import Sites


def bitfit() -> Method:
    """Every bias of the trunk and nothing else (arXiv 2106.10199).

    Raises (when planted):
        UsageError: The trunk has biases that no module adds to its output.
    """

    def plant(backbone: Backbone, sites: Sites) -> Iterator[Planted]:
        model = backbone.model
        hidden = [n for n, _ in model.named_parameters() if n.rpartition(".")[2].endswith("_bias")]
        hidden += [
            f"{path}.bias"
            for path, module in model.named_modules()
            if getattr(module, "bias", None) is not None and not adds_bias_last(module)
        ]
        if hidden:
            raise UsageError(
                "some biases of the backbone are added inside a module, where no shift can join",
                where=type(model).__name__,
                found=", ".join(hidden[:3])
                + (f" and {len(hidden) - 3} more" if hidden[3:] else ""),
                do="choose another method for this backbone",
            )
        for path, module in model.named_modules():
            if path not in backbone.classifiers and getattr(module, "bias", None) is not None:
                point = Point(path, "output")
                yield Planted(f"{path}/bias", Branch(Bias(), point, point))

    return plant


def norm_tuning() -> Method:
    """Gain and bias of every layer norm of the trunk (arXiv 2312.11420).

    Raises (when planted):
        UsageError: The trunk has no layer norm with a gain and a bias.
    """

    def plant(backbone: Backbone, sites: Sites) -> Iterator[Planted]:
        found = 0
        for path, module in backbone.model.named_modules():
            if isinstance(module, nn.LayerNorm) and module.bias is not None:
                found += 1
                branch = Branch(Norm(module.eps), Point(path, "input"), Point(path, "output"))
                yield Planted(f"{path}/norm", branch)
        if not found:
            raise UsageError(
                "the backbone has no layer norm to tune", where=type(backbone.model).__name__
            )

    return plant


def ia3(
    *,
    outputs: Sequence[str] = ("attn.qkv",),
    inputs: Sequence[str] = ("mlp.fc2",),
    blocks: Sequence[int] | None = None,
) -> Method:
    """A factor per channel on some layers' outputs and on what others read (arXiv 2205.05638)."""
    places = [("ia3", f"{op}:output") for op in outputs]
    places += [("ia3_before", f"{op}:input") for op in inputs]

    def plant(backbone: Backbone, sites: Sites) -> Iterator[Planted]:
        for label, place in places:
            yield from in_blocks(label, Gain(shift=False), place, numbers=blocks)(backbone, sites)

    return plant


def ssf(
    *,
    at: Sequence[str] = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"),
    blocks: Sequence[int] | None = None,
) -> Method:
    """A factor and a shift per channel behind every op of a block (arXiv 2210.08823)."""

    def plant(backbone: Backbone, sites: Sites) -> Iterator[Planted]:
        for op in at:
            tuner = Gain(shift=True)
            yield from in_blocks("ssf", tuner, f"{op}:output", numbers=blocks)(backbone, sites)

    return plant


def oft(block: int, *, at: str = "attn.qkv", blocks: Sequence[int] | None = None) -> Method:
    """What one linear layer per block reads, turned in blocks of `block` channels (arXiv 2306.07280).

    The rotations are trained as free matrices; PEFT's parametrisation keeps them orthogonal.

    Raises (when planted):
        UsageError: The channels do not divide by `block`.
    """

    def plant(backbone: Backbone, sites: Sites) -> Iterator[Planted]:
        for place in chosen_blocks(backbone, blocks):
            width = sites.require(Point(f"{place}.{at}", "input"))
            if block < 1 or width % block:
                raise UsageError(
                    "the channels do not divide into blocks", where=f"{place}.{at}",
                    wanted=f"a divisor of {width}", found=block,
                )  # fmt: skip
            point = Point(f"{place}.{at}", "input")
            tuner = Rotation(width // block, block)
            yield Planted(f"{place}.{at}/rotation", Branch(tuner, point, point))

    return plant


def lokr(
    rank: int,
    factor: int,
    *,
    scale: float = 1.0,
    at: str = "attn.qkv",
    blocks: Sequence[int] | None = None,
) -> Method:
    """A Kronecker product beside one linear layer per block (arXiv 2309.14859)."""
    tuner = Kronecker(rows=factor, columns=factor)
    return in_blocks(
        "lokr", tuner, f"{at}:input", f"{at}:output", rank=rank, scale=scale, numbers=blocks
    )


def full() -> Method:
    """Every parameter of the trunk, as a difference: it folds, and cannot share a batch."""

    def plant(backbone: Backbone, sites: Sites) -> Iterator[Planted]:
        for name, parameter in backbone.model.named_parameters():
            if backbone.is_classifier(name):
                continue
            module, _, own = name.rpartition(".")
            point = Point(module, "weights")
            yield Planted(name, Branch(Difference(own, tuple(parameter.shape)), point, point))

    return plant
