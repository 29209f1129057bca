"""Named methods: each a tuner type at a place, as its paper puts it.

A method is a list of `Planting`s; `attach` plants them in every block, or in those named. The places
are timm's module names inside a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import UsageError
from .tuner import Branch, Point, Side, Tuner
from .tuners.bias import Bias, adds_bias_last
from .tuners.bottleneck import Bottleneck
from .tuners.head import Head
from .tuners.prefix import Prefix
from .tuners.prompt import Prompt

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn


@dataclass(frozen=True)
class Planting:
    """One tuner in every block.

    Attributes:
        label: Ends the branch's name.
        tuner: What is computed.
        op: Module inside the block, such as `attn.qkv`; empty for the block itself.
        tap: Side of `op` where the branch reads.
        add: Side of `op` where it joins.
        rank: Size of the tuner's axis `r`; 0 where it has none.
        scale: Initial value of the tensor `scale`, where the tuner has one.
        blocks: Numbers of the blocks; None for all.
    """

    label: str
    tuner: Tuner
    op: str
    tap: Side
    add: Side
    rank: int = 0
    scale: float = 1.0
    blocks: tuple[int, ...] | None = None

    def branches(self, found: Sequence[str]) -> Iterator[tuple[str, Branch]]:
        """Names and branches in the blocks that were found, one by one.

        Raises:
            UsageError: A block is asked for that the backbone does not have.
        """
        for number in range(len(found)) if self.blocks is None else self.blocks:
            if number not in range(len(found)):
                raise UsageError(
                    "the backbone has no such block", wanted=f"0 to {len(found) - 1}", found=number
                )
            module = f"{found[number]}.{self.op}".rstrip(".")
            yield (
                f"{module}/{self.label}",
                Branch(self.tuner, Point(module, self.tap), Point(module, self.add)),
            )


@dataclass(frozen=True)
class EveryBias:
    """A shift beside every bias of the trunk (BitFit)."""

    def branches(self, model: nn.Module, classifier: str) -> Iterator[tuple[str, Branch]]:
        """Names and branches of all modules that have a bias, the classifier left out.

        Raises:
            UsageError: The trunk has biases that no module adds to its output.
        """
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
            if path != classifier and getattr(module, "bias", None) is not None:
                point = Point(path, "output")
                yield f"{path}/bias", Branch(Bias(), point, point)


def lora(
    rank: int,
    *,
    alpha: float | None = None,
    at: str = "attn.qkv",
    blocks: tuple[int, ...] | None = None,
) -> list[Planting]:
    """LoRA on one linear layer per block, scale alpha / rank (arXiv 2106.09685)."""
    scale = 1.0 if alpha is None else alpha / rank
    tuner = Bottleneck(activation="identity", bias=False)
    return [Planting("lora", tuner, at, "input", "output", rank, scale, blocks)]


def parallel_adapter(
    rank: int,
    *,
    at: str = "mlp",
    activation: str = "relu",
    scale: float = 1.0,
    blocks: tuple[int, ...] | None = None,
) -> list[Planting]:
    """An adapter beside an op that reads what the op reads (arXiv 2205.13535, 2303.00690)."""
    tuner = Bottleneck(activation=activation, bias=True)
    return [Planting("adapter", tuner, at, "input", "output", rank, scale, blocks)]


def dual_adapter(
    rank: int,
    *,
    activation: str = "relu",
    scale: float = 1.0,
    blocks: tuple[int, ...] | None = None,
) -> list[Planting]:
    """Parallel adapters at attention and FFN: the dual U-Tuner (arXiv 2303.00690, section 3)."""
    return [
        *parallel_adapter(rank, at="attn", activation=activation, scale=scale, blocks=blocks),
        *parallel_adapter(rank, at="mlp", activation=activation, scale=scale, blocks=blocks),
    ]


def serial_adapter(
    rank: int,
    *,
    at: str = "mlp",
    activation: str = "gelu",
    scale: float = 1.0,
    blocks: tuple[int, ...] | None = None,
) -> list[Planting]:
    """An adapter on an op's output, added to it (arXiv 1902.00751)."""
    tuner = Bottleneck(activation=activation, bias=True)
    return [Planting("serial", tuner, at, "output", "output", rank, scale, blocks)]


def prefix(
    length: int,
    *,
    at: str = "attn",
    joint_softmax: bool = True,
    blocks: tuple[int, ...] | None = None,
) -> list[Planting]:
    """Constant keys and values in every attention (arXiv 2101.00190)."""
    tuner = Prefix(joint_softmax=joint_softmax)
    return [Planting("prefix", tuner, at, "keys", "keys", length, blocks=blocks)]


def deep_prompt(length: int, *, blocks: tuple[int, ...] | None = None) -> list[Planting]:
    """Learned tokens beside every block's input (VPT-deep, arXiv 2203.12119)."""
    return [Planting("prompt", Prompt(), "", "tokens", "tokens", length, blocks=blocks)]


def bitfit() -> list[EveryBias]:
    """Every bias of the trunk and nothing else (arXiv 2106.10199)."""
    return [EveryBias()]


def head_branch(classifier: str) -> tuple[str, Branch]:
    """The task's classifier in the place of the backbone's."""
    return (
        f"{classifier}/head",
        Branch(Head(), Point(classifier, "input"), Point(classifier, "output")),
    )
