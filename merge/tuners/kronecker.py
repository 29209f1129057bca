"""LoKr: a difference that is a Kronecker product, `scale * left (x) (up down)`.

(LyCORIS, arXiv 2309.14859, section 3.2.) The product is never formed: with the channels seen as a grid of
`columns` by `C_in / columns`, `right` acts on each column and `left` mixes the columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Generator, Tensor, nn

from ..ops import is_linear
from ..tuner import CannotFold, Place, Shapes, Tuner, Weights, wider

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Kronecker(Tuner):
    """`left` is `rows` by `columns`; the right factor is a product of rank `r`.

    Attributes:
        rows: Divides the channels that come out.
        columns: Divides the channels that go in.
    """

    rows: int
    columns: int

    kind = "kronecker"
    source = "arXiv 2309.14859 (LoKr)"
    join = "add"

    def __post_init__(self) -> None:
        for name in ("rows", "columns"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} {value!r} is not a number from 1")

    @property
    def shapes(self) -> Shapes:
        """`left [rows, columns]`, `up [c, r]`, `down [r, d]`, `scale []`: C_out = rows c, C_in = columns d."""
        return {**self.served, "scale": ()}

    @property
    def served(self) -> Shapes:
        """The scale is gone: it went into `left`."""
        return {"left": (self.rows, self.columns), "up": ("c", "r"), "down": ("r", "d")}

    def channels(self, sizes: Mapping[str, int]) -> tuple[int | None, int | None]:
        """`columns * d` and `rows * c`."""
        return self.columns * sizes["d"], self.rows * sizes["c"]

    def branch(self, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        """`scale * (left (x) up down) x`, `[B, N, C_out]`."""
        left, up, down = (
            w[name] if w[name].dim() == 2 else w[name][:, None] for name in ("left", "up", "down")
        )
        grid = x.unflatten(-1, (self.columns, -1))  # [B, N, columns, d]
        y = (left @ (grid @ down.mT @ up.mT)).flatten(-2)  # [B, N, rows * c]
        return y * w["scale"][..., None, None] if "scale" in w else y

    def settle(self, w: Mapping[str, Tensor]) -> Weights:
        """The scale folded into `left`, in float64."""
        wide = wider(w["left"], w["scale"])
        left = (w["left"].double() * w["scale"].double()).to(wide)
        return {"left": left, "up": w["up"], "down": w["down"]}

    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """Normal `left` and `down`, zero `up`, so that training starts at the backbone.

        Raises:
            ValueError: The channels do not divide by rows and columns.
        """
        if sizes["in"] % self.columns or sizes["out"] % self.rows:
            raise ValueError(
                f"{sizes['in']} and {sizes['out']} channels do not divide by {self.columns} and {self.rows}"
            )
        d, c = sizes["in"] // self.columns, sizes["out"] // self.rows
        left = torch.empty(self.rows, self.columns)
        down = torch.empty(sizes["r"], d)
        return {
            "left": left.normal_(std=self.columns**-0.5, generator=generator),
            "up": torch.zeros(c, sizes["r"]),
            "down": down.normal_(std=d**-0.5, generator=generator),
            "scale": torch.ones(()),
        }

    def fold(self, w: Mapping[str, Tensor], op: nn.Module, place: Place) -> Weights:
        """`W + scale * left (x) up down`."""
        if place not in ("beside", "over") or not is_linear(op, place):
            raise CannotFold("it does not stand beside one linear layer")
        weight = cast("Tensor", op.weight)
        product = w["scale"] * torch.kron(w["left"], w["up"] @ w["down"])
        return {"weight": weight + product.reshape(weight.shape)}
