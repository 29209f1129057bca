"""A gain per channel: IA3, SSF, the magnitudes of DoRA and BOFT, a tuned batch norm.

`y = x + gain * x + shift`. IA3 (arXiv 2205.05638, section 3.3) stores `1 + gain`; SSF (arXiv 2210.08823,
eq. 3) a gain and a shift behind every op.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Generator, Tensor, nn

from ..ops import adds_bias_last, op_bias, reads_patches
from ..tuner import CannotFold, Place, Shapes, Tuner, Weights

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Gain(Tuner):
    """Each channel of the tap times a number, perhaps plus another, is added.

    Attributes:
        shift: Whether there is a shift.
    """

    shift: bool

    kind = "gain"
    source = "arXiv 2205.05638 (IA3), 2210.08823 (SSF)"
    join = "add"
    broadcasts = True

    def __post_init__(self) -> None:
        if not isinstance(self.shift, bool):
            raise TypeError(f"shift {self.shift!r} is neither true nor false")

    @property
    def shapes(self) -> Shapes:
        """`gain [out]`, and with a shift `shift [out]`."""
        return {"gain": ("out",), **({"shift": ("out",)} if self.shift else {})}

    def channels(self, sizes: Mapping[str, int]) -> tuple[int | None, int | None]:
        """The gain's channels at both ends."""
        return sizes["out"], sizes["out"]

    def branch(self, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        """`gain * x + shift`, `[B, N, C]`."""
        y = x * w["gain"][..., None, :]
        return y + w["shift"][..., None, :] if self.shift else y

    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """Zero: training starts at the backbone."""
        names = ("gain", "shift") if self.shift else ("gain",)
        return {name: torch.zeros(sizes["out"]) for name in names}

    def fold(self, w: Mapping[str, Tensor], op: nn.Module, place: Place) -> Weights:
        """Behind an op the rows of its weight and its bias are scaled, before it the columns."""
        gain, shift = w["gain"], w.get("shift")
        if place == "over":
            raise CannotFold("it reads patches, and no weight is their diagonal")
        if place == "beside":
            return self._beside(gain, shift, op)
        if place == "behind":
            if not adds_bias_last(op) or getattr(op, "weight", None) is None:
                raise CannotFold(f"a {type(op).__name__} has no weight that scales its output")
            bias = getattr(op, "bias", None)
            weight = cast("Tensor", op.weight)
            changed: Weights = {"weight": weight * _first(1 + gain, weight)}
            if bias is not None or shift is not None:
                bias = op_bias(op) * (1 + gain)
                changed["bias"] = bias if shift is None else bias + shift
            return changed
        if shift is None and reads_patches(op):
            return {"weight": op.weight * (1 + gain).reshape(1, -1, *[1] * len(op.kernel_size))}
        if not isinstance(op, nn.Linear):
            raise CannotFold(f"what a {type(op).__name__} is given does not scale with its weight")
        changed = {"weight": op.weight * (1 + gain)}
        if shift is not None:
            changed["bias"] = op_bias(op) + op.weight @ shift
        return changed

    @staticmethod
    def _beside(gain: Tensor, shift: Tensor | None, op: nn.Module) -> Weights:
        """A linear layer's diagonal; in a batch norm, whose output is `(x - mean) * slope + bias`."""
        if isinstance(op, nn.Linear):
            changed: Weights = {"weight": op.weight + torch.diag(gain)}
            return changed if shift is None else changed | {"bias": op_bias(op) + shift}
        if isinstance(op, nn.BatchNorm2d) and op.affine and adds_bias_last(op):
            deviation = (op.running_var + op.eps).sqrt()  # type: ignore[operator]
            bias = op.bias + gain * op.running_mean  # type: ignore[operator]
            return {
                "weight": op.weight + gain * deviation,
                "bias": bias if shift is None else bias + shift,
            }
        raise CannotFold(f"a {type(op).__name__} has no weight on the diagonal")


def _first(vector: Tensor, like: Tensor) -> Tensor:
    """The vector along the first axis of a weight."""
    return vector.reshape(-1, *[1] * (like.dim() - 1))
