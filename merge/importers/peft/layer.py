"""One tuned layer of a PEFT adapter: its tensors, held to the frozen layer, and the branches at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...errors import IncompatibleArtefact
from ...ops import reads_patches
from ...tuner import Branch, Point
from ...tuners.bottleneck import Bottleneck
from ...tuners.gain import Gain
from ...tuners.kronecker import Kronecker
from .parts import joined, spread

if TYPE_CHECKING:
    from ...backbone.transformers.counterparts import Place
    from ...tuner import Tuner, Weights
    from .adapter import Adapter


@dataclass
class Layer:
    """One tuned layer.

    Attributes:
        adapter: Whose.
        place: Where in the backbone: a module, or a part of its rows.
        name: Its name in the adapter, of which the adapter's patterns are.
        op: The frozen layer.
        tensors: Its tensors in the adapter, by PEFT's names.
    """

    adapter: Adapter
    place: Place
    name: str
    op: nn.Module
    tensors: dict[str, Tensor]

    @property
    def path(self) -> str:
        """Dotted path in the backbone."""
        return self.place.name

    @property
    def part(self) -> bool:
        """It is a part of the rows of what the backbone has there."""
        return self.place.of > 1

    @property
    def _rows(self) -> slice:
        """Its rows in the backbone's layer."""
        return self.place.rows(len(self.op.weight))  # type: ignore[arg-type]

    @property
    def given_bias(self) -> Tensor | None:
        """The bias that it adds, from wherever the backbone has it."""
        bias = self.adapter.given_bias(self.path)
        return bias if bias is None or not self.part else bias[self._rows]

    @property
    def outer_bias(self) -> Tensor | None:
        """The bias that it adds and that was not the layer's own when it was tuned."""
        if self.adapter.counterparts is not None:
            return None
        given = self.given_bias
        return None if given is getattr(self.op, "bias", None) else given

    @property
    def weight(self) -> Tensor:
        """The frozen weight, `[out, in]` or `[out, C, kh, kw]`.

        Raises:
            IncompatibleArtefact: The layer has none.
        """
        if not isinstance(self.op, nn.Linear | nn.Conv2d | nn.Conv3d):
            raise self.refuse_op("a linear layer or a convolution")
        weight = self.op.weight.detach()
        return weight[self._rows] if self.part else weight

    @property
    def matrix(self) -> Tensor:
        """The frozen weight of a layer that is one matrix on what it reads, `[out, ...]`.

        Raises:
            IncompatibleArtefact: The layer is not like that.
        """
        weight, _ = self.weight, self.inside
        return weight

    @property
    def inside(self) -> Point:
        """Where a branch beside the layer reads.

        Raises:
            IncompatibleArtefact: The layer is not one matrix on what it reads.
        """
        if isinstance(self.op, nn.Linear):
            return Point(self.path, "input")
        if not reads_patches(self.op):
            raise self.refuse_op("a linear layer, or a plain convolution of one group")
        return Point(self.path, "patches")

    def refuse_op(self, wanted: str) -> IncompatibleArtefact:
        """The error of a layer that a kind cannot stand at."""
        groups = getattr(self.op, "groups", 1)
        more = f" of {groups} groups" if groups != 1 else ""
        return IncompatibleArtefact(
            f"{self.adapter.config['peft_type']} at this layer cannot be carried",
            where=f"{self.adapter.path}: {self.path}",
            wanted=wanted,
            found=f"{type(self.op).__name__}{more}",
            do="leave the layer out of target_modules (a short name such as proj matches convolutions too)",
        )

    def has(self, name: str) -> bool:
        """The adapter has this tensor."""
        return name in self.tensors

    def take(self, name: str, *shape: int | None) -> Tensor:
        """A tensor of the adapter; None stands for any size but zero.

        Raises:
            IncompatibleArtefact: It is missing, or of another shape.
        """
        where = f"{self.adapter.path}: {self.name}.{name}"
        if name not in self.tensors:
            raise IncompatibleArtefact(
                "a tensor of the adapter is missing", where=where, found=", ".join(self.tensors)
            )
        tensor = self.tensors[name]
        fits = tensor.dim() == len(shape) and all(
            size == wanted if wanted is not None else size > 0
            for wanted, size in zip(shape, tensor.shape, strict=False)
        )
        if not fits:
            raise IncompatibleArtefact(
                "a tensor of the adapter has the wrong shape",
                where=where,
                wanted="[" + ", ".join("r" if size is None else str(size) for size in shape) + "]",
                found=list(tensor.shape),
                do="load the backbone that it was trained on",
            )
        return tensor

    def beside(self, label: str, tuner: Tuner, tensors: Weights) -> None:
        """Plant a branch from what the layer reads to its output."""
        if isinstance(tuner, Kronecker) and self.part:
            tuner = Kronecker(self.place.of * tuner.rows, tuner.columns)
            label = f"{label}.{self.place.part}"
        self._plant(label, Branch(tuner, self.inside, Point(self.path, "output")), tensors)

    def serial(self, label: str, tuner: Tuner, side: str, tensors: Weights) -> None:
        """Plant a branch on the layer's `input` or `output`.

        What a part of the rows reads, its neighbours read too: there the branch becomes a difference of the part.
        """
        if self.part and side == "input":
            self.difference(f"{label}.before", self._folded(tuner, tensors) - self.weight.double())
            return
        point = Point(self.path, side)  # type: ignore[arg-type]
        self._plant(label, Branch(tuner, point, point), tensors)

    def _folded(self, tuner: Tuner, tensors: Weights) -> Tensor:
        """The layer's weight with a branch before it, float64."""
        layer = nn.Linear(*self.weight.shape[::-1], bias=False, dtype=torch.float64)
        layer.requires_grad_(requires_grad=False)
        layer.weight.copy_(self.weight)
        exact = {name: tensor.double() for name, tensor in tensors.items()}
        return tuner.fold(exact, layer, "before")["weight"]

    def _plant(self, label: str, branch: Branch, tensors: Weights) -> None:
        """A part's tensors get zeros for the rows beside it, and join those of the parts before it."""
        found, name = self.adapter.found, f"{self.path}/{label}"
        if self.part:
            tensors = spread(branch.tuner, tensors, self._rows, len(self.op.weight))  # type: ignore[arg-type]
            if name in found.branches:
                branch, tensors = joined(found.branches[name], found.tensors[name], branch, tensors)
        found.plant(name, branch, tensors)

    def difference(self, label: str, change: Tensor) -> None:
        """Plant a change `[out, in]` of the whole weight, exactly, at the smaller of its ranks."""
        out, width = change.shape
        eye = torch.eye(min(out, width), dtype=change.dtype)
        down, up = (change, eye) if out <= width else (eye, change)
        self.beside(label, Bottleneck("identity", bias=False), low_rank(down, up, 1.0))

    def gain(self, label: str, factor: Tensor, *, keep: Tensor | None) -> None:
        """Plant a gain behind the layer.

        Args:
            label: Ends the branch's name.
            factor: What each channel of the output is multiplied by, `[out]`, float64.
            keep: The part of the output that is not multiplied, `[out]`, or None.
        """
        weights = {"gain": factor - 1}
        if keep is not None:
            weights["shift"] = (1 - factor) * keep.detach().double()
        self.serial(label, Gain(shift=keep is not None), "output", weights)


def low_rank(down: Tensor, up: Tensor, scale: float) -> Weights:
    """The tensors of a bottleneck `[r, in]`, `[out, r]` without biases; the scale in float64."""
    return {"down": down, "up": up, "scale": torch.tensor(scale, dtype=torch.float64)}
