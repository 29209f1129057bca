"""No trunk at all: hidden states that were computed elsewhere are the inputs, for side networks that read them.

Detectors and joint encoders of pictures and text keep their own code. What a network beside them needs is
what their layers gave, and this is a backbone of seats for exactly that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UsageError
from ..inputs import Input, require_rows
from .arguments import require_flags, require_sizes
from .head import classifier, masked_mean

if TYPE_CHECKING:
    from collections.abc import Sequence


class States(nn.Module):
    """Hidden states come in and are passed on, one seat each; the last of them is pooled.

    Seats, modules that forward what they are called with: `states.0`, `states.1`, ..., `embedding`, `mask`
    (`[B, N]` real numbers, 1 at valid tokens), `end` (`[B, N]`, 1 at one token), `features` (the last
    state), `pooled` (`[B, C]`: the embedding if there is one; or else the mean over valid tokens, or over the
    pixels of a map).

    Args:
        shapes: Of one row of every hidden state: `[N, C]` of tokens, `[C, H, W]` of a map.
        names: Of those inputs; `hidden.0`, `hidden.1`, ... if not given.
        anchor: Width of a further input, the vector `embedding`; None for none.
        mask: There is an input `mask`, `[N]` integers of which the first are 1 and the others 0.
        end: There is an input `end`, the index of one token.
        num_classes: Classes of the classifier; 0 for none.

    Raises:
        UsageError: An argument is out of range, or hidden states of differing length share a mask.
    """

    unit: Tensor  # [] of the dtype that the model works in

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        names: Sequence[str] | None = None,
        anchor: int | None = None,
        mask: bool = False,
        end: bool = False,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        require_flags(mask=mask, end=end)
        if not all(isinstance(shape, (list, tuple)) for shape in shapes):
            raise UsageError(
                "the shapes are not those of hidden states",
                where="shapes",
                wanted="a list of [N, C] or [C, H, W], one for each state",
                found=repr(shapes),
            )
        rows = [tuple(shape) for shape in shapes]
        names = (
            [f"hidden.{number}" for number in range(len(rows))] if names is None else list(names)
        )
        _require_states(rows, names)
        require_sizes(**({} if anchor is None else {"anchor": anchor}))
        inputs = [Input(name, shape) for name, shape in zip(names, rows, strict=True)]
        if anchor is not None:
            inputs.append(Input("embedding", (anchor,)))
        if mask or end:
            tokens = _tokens(rows)
            if mask:
                inputs.append(Input("mask", (tokens,), "mask"))
            if end:
                inputs.append(Input("end", (1,), "ids", high=tokens))
        self.inputs = tuple(inputs)
        self.pretrained_cfg: dict[str, Any] = {"classifier": "head"}
        self.num_features = anchor or rows[-1][0 if len(rows[-1]) == 3 else 1]
        self.states = nn.ModuleList(nn.Identity() for _ in rows)
        self.embedding = nn.Identity() if anchor is not None else None
        self.mask = nn.Identity() if mask else None
        self.end = nn.Identity() if end else None
        self.features = nn.Identity()
        self.pooled = nn.Identity()
        self.head = classifier(self.num_features, num_classes)
        self.register_buffer("unit", torch.ones(()), persistent=False)

    @property
    def hidden_states(self) -> tuple[str, ...]:
        """Paths of the modules whose outputs are the hidden states, in order."""
        return tuple(f"states.{number}" for number in range(len(self.states)))

    def forward(self, *tensors: Tensor) -> Tensor:
        """Logits `[B, K]` of the tensors that `inputs` names, in that order.

        Raises:
            UsageError: One of them has another shape.
        """
        require_rows(self.inputs, tensors)
        given = list(tensors)
        states = [state(given.pop(0)) for state in self.states]
        vector = None if self.embedding is None else self.embedding(given.pop(0))
        mask = None if self.mask is None else self.mask(given.pop(0).to(self.unit.dtype))
        if self.end is not None:
            (tokens,) = {s.shape[1] for s in states if s.dim() == 3}
            self.end(F.one_hot(given.pop(0)[:, 0], tokens).to(self.unit.dtype))
        x = self.features(states[-1])
        return self.head(self.pooled(_mean(x, mask) if vector is None else vector))


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """`[B, C]` of valid tokens `[B, N, C]` or of a map `[B, C, H, W]`."""
    if x.dim() == 4:
        return x.mean(dim=(2, 3))
    return x.mean(dim=1) if mask is None else masked_mean(x, mask)


def _tokens(rows: Sequence[tuple[int, ...]]) -> int:
    """The number of tokens of all hidden states that are tokens.

    Raises:
        UsageError: It differs, or there are none.
    """
    counts = {row[0] for row in rows if len(row) == 2}
    if len(counts) != 1 or len(rows[-1]) != 2:
        raise UsageError(
            "a mask or an end needs hidden states of one number of tokens",
            where="shapes",
            wanted="[N, C] with one N, and the last state among them",
            found=[list(row) for row in rows],
        )
    return counts.pop()


def _require_states(rows: Sequence[tuple[int, ...]], names: Sequence[str]) -> None:
    """There are hidden states, each of tokens or a map, and a name for each.

    Raises:
        UsageError: Not so.
    """
    whole = all(type(size) is int and size > 0 for row in rows for size in row)
    if not rows or not whole or any(len(row) not in (2, 3) for row in rows):
        raise UsageError(
            "the shapes are not those of hidden states",
            where="shapes",
            wanted="[N, C] of tokens or [C, H, W] of a map, at least one",
            found=[list(row) for row in rows],
        )
    reserved = {"embedding", "mask", "end"} & set(names)
    if len(names) != len(rows) or len(set(names)) != len(names) or reserved:
        raise UsageError(
            "every hidden state needs a name of its own",
            where="names",
            wanted=f"{len(rows)} names, none of them embedding, mask or end",
            found=", ".join(names),
        )
