"""UniPT: a light network beside the whole trunk that reads its hidden states (arXiv 2308.14316, section 3).

With targets `T_l = down_l(h_l)`, the anchor `Q = down(h_a)`, and means over tokens `q`, `t_l`:

    c   = softmax over l of w . (q * t_l)                       confidence aggregation (the gate)
    A_l = L1norm over tokens of relu(Q T_l^T) * mask            parallel interaction: no softmax, no scale
    M   = sum over l of c_l (A_l T_l + own row of T_l)
    y   = up(Q + project(M))

Each publication of it chose its norms, its own row and its epsilon; they are the fields of `UniPT`. A bias
of the gate would cancel in the softmax and is not kept.

What is computed is the same sum in a cheaper order: the targets of all layers stand side by side, so that
scores and `M` are one product each over layers and tokens. Where the anchor is one vector and no norm stands
behind `down`, the targets themselves are never made: `Q . (W_l h + b_l) = (W_l^T Q) . h + b_l . Q`, and
tokens are summed before they are projected. `as_written` is the formula in its own order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ..tuner import Shapes, Tuner, Weights, wider

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CHOICES = {
    "norm": ("layer", "batch", "none"),
    "own": ("query", "first", "end", "none"),
    "guard": ("add", "clamp"),
    "project": ("linear", "mlp", "none"),
    "up": ("relu", "linear", "none"),
    "onto": ("query", "anchor"),
    "gives": ("tokens", "first", "mean"),
}
BATCH_EPS = 1e-5  # torch's default, which every published checkpoint was trained with


@dataclass(frozen=True)
class UniPT(Tuner):
    """A side network.

    Attributes:
        widths: Channels of each target, one per layer that is read.
        anchor: Channels of the anchor.
        width: Channels d inside.
        out: Channels that it gives.
        norm: Behind `down` and `project`: a layer norm, a batch norm (by its running statistics), or none.
        norm_eps: Of the layer norms.
        relu_first: A ReLU stands in front of each `down`.
        vector: The anchor is one vector per example, not tokens.
        own: The row of T_l that is added to `A_l T_l`: the query's own token, the first token, the one that
            a tap marks, or none.
        guard: How a sum of zero is met: `eps` is added to it, or it is at least `eps`.
        eps: See `guard`.
        project: One linear layer, or two with a ReLU between them and `inner` channels, or none.
        inner: See `project`.
        up: A linear layer to `out` channels behind a ReLU, one without, or none.
        up_norm: A layer norm stands behind `up`.
        onto: What `project(M)`, or `up(M)` without it, is added to: `Q`, or the anchor as it was read.
        gives: All tokens, the first, or their mean.
        masked: The tap behind the anchor is a mask `[B, N]`, 1 at valid tokens. (With `own` `end` the next
            marks the token, `[B, N]`.)
        crossed: Targets first take from a memory, `T_l += cross_l(A(T_l, memory) memory)`, the two last
            taps: `[B, N', d]` and its mask `[B, N']` (MDETR's decoder).
    """

    widths: tuple[int, ...]
    anchor: int
    width: int
    out: int
    norm: str = "layer"
    norm_eps: float = 1e-5
    relu_first: bool = False
    vector: bool = False
    own: str = "query"
    guard: str = "add"
    eps: float = 1e-8
    project: str = "linear"
    inner: int = 0
    up: str = "relu"
    up_norm: bool = False
    onto: str = "query"
    gives: str = "tokens"
    masked: bool = False
    crossed: bool = False

    kind = "unipt"
    source = "arXiv 2308.14316 (UniPT)"
    join = "replace"
    padded = frozenset()
    broadcasts = True
    no_fold = "a network of its own reads the hidden states, and no weight of the backbone holds it"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {choices}")
        for name in ("relu_first", "vector", "up_norm", "masked", "crossed"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} {getattr(self, name)!r} is neither true nor false")
        sizes = (*self.widths, self.anchor, self.width, self.out)
        if not self.widths or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"a width among {sizes} is not a number from 1")
        for name in ("eps", "norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, float) or not value > 0:
                raise ValueError(f"{name} {value!r} is not above zero")
        if type(self.inner) is not int or (self.inner > 0) != (self.project == "mlp"):
            raise ValueError(f"inner {self.inner!r} is not a number from 1 with an mlp, 0 without")
        if self.vector and self.own == "query":
            raise ValueError("an anchor that is one vector has no own row among the tokens")
        if self.up == "none" and self.out != self.width:
            raise ValueError(f"without up it gives width {self.width}, not out {self.out}")
        if self.onto == "anchor" and (self.out != self.anchor or self.project != "none"):
            raise ValueError("what is added to the anchor has its width, and no projection")
        if (self.project == "none") != (self.onto == "anchor"):
            raise ValueError("only what is added to the anchor goes without a projection")

    @property
    def contracted(self) -> bool:
        """Targets are never made; see the module's docstring."""
        return self.vector and self.norm == "none" and not self.crossed and self.stacked

    @property
    def stacked(self) -> bool:
        """All targets have one width, so that their `down` is one tensor."""
        return len(set(self.widths)) == 1

    @property
    def reads(self) -> int:
        """Targets, anchor, and the taps that `masked`, `own` and `crossed` ask for."""
        return len(self.widths) + 1 + self.masked + (self.own == "end") + 2 * self.crossed

    @property
    def shapes(self) -> Shapes:
        """Per target `targetN_weight [width, widths[N]]`, `targetN_bias [width]` and norm; see `_linear`.

        `anchor`, `project`, with an mlp `project_in` too, `up`, with `crossed` `crossN`, and `gate [width]`.
        """
        d = self.width
        shapes: Shapes = {"gate": (d,)}
        for number, wide in enumerate(self.widths):
            shapes |= self._linear(f"target{number}", d, wide, self.norm)
        shapes |= self._linear("anchor", d, self.anchor, self.norm)
        if self.project == "mlp":
            shapes |= self._linear("project_in", self.inner, d, "none")
        if self.project != "none":
            shapes |= self._linear(
                "project", d, self.inner if self.project == "mlp" else d, self.norm
            )
        if self.up != "none":
            shapes |= self._linear("up", self.out, d, "layer" if self.up_norm else "none")
        for number in range(len(self.widths) if self.crossed else 0):
            shapes |= self._linear(f"cross{number}", d, d, self.norm)
        return shapes

    @property
    def served(self) -> Shapes:
        """Batch norms are folded, targets of one width are one tensor, and a number `present []` is 1.

        A task without the network holds 0 there.
        """
        shapes = {n: s for n, s in self.shapes.items() if not n.endswith(("_mean", "_var"))}
        if self.norm == "batch":
            shapes = {n: s for n, s in shapes.items() if "_norm_" not in n or n.startswith("up")}
        if self.stacked:
            depth = len(self.widths)
            for name in [n for n in shapes if n.startswith("target0_")]:
                shapes[name.replace("target0", "target")] = (depth, *shapes[name])
            shapes = {n: s for n, s in shapes.items() if not n.startswith("target") or n[6] == "_"}
        return {**shapes, "present": ()}

    @staticmethod
    def _linear(name: str, out: int, given: int, norm: str) -> Shapes:
        """`NAME_weight [out, given]`, `NAME_bias [out]`, and what its norm holds, each `[out]`."""
        parts = {
            "none": (),
            "layer": ("weight", "bias"),
            "batch": ("weight", "bias", "mean", "var"),
        }
        return {
            f"{name}_weight": (out, given),
            f"{name}_bias": (out,),
            **{f"{name}_norm_{part}": (out,) for part in parts[norm]},
        }

    def channels(self, sizes: Mapping[str, int]) -> tuple[tuple[int | None, ...], int | None]:
        """Of every tap, and what it gives."""
        given: list[int | None] = [*self.widths, self.anchor]
        given += [None] * (self.masked + (self.own == "end"))
        return (*given, *([self.width, None] if self.crossed else [])), self.out

    def constant(self, tensor: str) -> bool:
        """Running statistics do not train."""
        return tensor.endswith(("_norm_mean", "_norm_var"))

    def settle(self, w: Mapping[str, Tensor]) -> Weights:
        """Batch norms into the linear layers in front of them, in float64; targets of one width stacked."""
        settled = dict(w)
        if self.norm == "batch":
            settled = fold_batch_norms(settled)
        if self.stacked:
            depth = range(len(self.widths))
            for name in [n for n in settled if n.startswith("target0_")]:
                own = [settled.pop(name.replace("target0", f"target{n}")) for n in depth]
                axis = own[0].dim() - len(self.shapes[name])  # behind a batch axis
                settled[name.replace("target0", "target")] = torch.stack(own, dim=axis)
        settled["present"] = settled["gate"].new_ones(settled["gate"].shape[:-1])
        return {name: settled[name] for name in self.served}

    def read(self, x: Sequence[Tensor], w: Mapping[str, Tensor]) -> Read:
        """The taps by what they are."""
        depth = len(self.widths)
        rest = list(x[depth + 1 :])
        mask = rest.pop(0) if self.masked else None
        end = rest.pop(0) if self.own == "end" else None
        return Read(tuple(x[:depth]), x[depth], mask, end, (rest[0], rest[1]) if rest else None)

    def branch(self, x: Sequence[Tensor], w: Mapping[str, Tensor]) -> Tensor:
        """What stands in for the trunk's own value, `[B, N, out]`, or `[B, 1, out]`.

        Args:
            x: Targets `[B, N, widths[l]]`, the anchor `[B, N, anchor]` (one token if it is a vector), then as
                `masked`, `own` and `crossed` say; masks are `[B, 1, N]`.
            w: See `shapes`.
        """
        if "present" not in w:
            w = self.settle(w)
        read = self.read(x, w)
        return self._contracted(read, w) if self.contracted else self._side_by_side(read, w)

    def _side_by_side(self, read: Read, w: Mapping[str, Tensor]) -> Tensor:
        """The targets of all layers in one tensor `[B, L, N, d]`."""
        targets = self._targets(read, w)
        anchor = self._down("anchor", read.anchor, w)  # [B, N, d]
        if self.crossed:
            targets = self._cross(targets, read, w)
        shares = _shares(targets, read.mask)  # [B, 1, N]
        own_mean = anchor if self.vector else shares @ anchor
        means = (shares[..., None, :, :] @ targets).squeeze(-2)  # [B, L, d]
        wide = wider(anchor)  # sums of products overflow and underflow in half precision
        evidence = (own_mean.to(wide) * means.to(wide)) @ w["gate"].to(wide)[..., None]
        confidence = torch.softmax(evidence, dim=-2)  # [B, L, 1]
        query = anchor[..., :1, :] if self.gives == "first" else anchor
        side_by_side = targets.flatten(-3, -2)  # [B, L N, d]
        scores = query.to(wide) @ side_by_side.to(wide).mT
        scores = scores.unflatten(-1, targets.shape[-3:-1])  # [B, N, L, N]
        if read.mask is not None:
            scores = scores * read.mask[..., None, :, :].to(wide)
        affinity = self.normalised(torch.relu(scores)) * confidence[..., None, :, :]
        merged = affinity.flatten(-2).to(targets.dtype) @ side_by_side  # [B, N, d]
        merged = merged + self._own_rows(targets, read, confidence.to(targets.dtype))
        return self._finish(query, read, merged, w)

    def _contracted(self, read: Read, w: Mapping[str, Tensor]) -> Tensor:
        """Without the targets; `[B, L, ...]` throughout."""
        states = torch.stack(read.targets, dim=-3)  # [B, L, N, C]
        states = torch.relu(states) if self.relu_first else states
        weight, bias = w["target_weight"], w["target_bias"]  # [L, d, C], [L, d]
        query = self._down("anchor", read.anchor, w)  # [B, 1, d]
        wide = wider(query)  # as in `_side_by_side`
        gates = w["gate"].to(wide)[..., None, :]
        gated = torch.cat([query.to(wide), query.to(wide) * gates], dim=-2)  # [B, 2, d]
        flat = weight.transpose(-3, -2).flatten(-2)  # [d, L C]: all layers in one product
        through = (gated @ flat.to(wide)).unflatten(-1, (len(self.widths), -1)).transpose(-3, -2)
        offsets = (gated @ bias.to(wide).mT).mT[..., None]  # [B, L, 2, 1]; through is [B, L, 2, C]
        scores = through[..., :1, :] @ states.mT.to(wide) + offsets[..., :1, :]
        if read.mask is not None:
            scores = scores * read.mask[..., None, :, :].to(wide)
        affinity = self.normalised(torch.relu(scores)).to(states.dtype)  # [B, L, 1, N]
        shares = _shares(states, read.mask)[..., None, :, :].expand_as(affinity)
        tokens = torch.cat([affinity + self._own_marks(affinity, read), shares], dim=-2)
        summed = tokens @ states  # [B, L, 2, C]
        weights = tokens.sum(-1, keepdim=True)  # [B, L, 2, 1]
        evidence = (through[..., 1:, :] * summed[..., 1:, :].to(wide)).sum(-1, keepdim=True)
        evidence = evidence + offsets[..., 1:, :] * weights[..., 1:, :].to(wide)
        confidence = torch.softmax(evidence, dim=-3).to(states.dtype)  # [B, L, 1, 1]
        mixed = (confidence * summed[..., :1, :]).flatten(-3)[..., None, :]  # [B, 1, L C]
        merged = mixed @ flat.mT  # [B, 1, d]
        shift = (confidence * weights[..., :1, :]).squeeze(-1).mT @ bias  # [B, 1, d]
        return self._finish(query, read, merged + shift, w)

    def as_written(self, x: Sequence[Tensor], w: Mapping[str, Tensor]) -> Tensor:
        """The formula in its own order, layer by layer: what `branch` is held to."""
        if "present" not in w:
            w = self.settle(w)
        read = self.read(x, w)
        anchor = self._down("anchor", read.anchor, w)
        targets = self._targets(read, w)
        if self.crossed:
            targets = self._cross(targets, read, w)
        shares = _shares(targets, read.mask)
        evidence, found = [], []
        for target in targets.unbind(-3):
            scores = anchor @ target.mT
            if read.mask is not None:
                scores = scores * read.mask
            found.append(self.normalised(torch.relu(scores)) @ target)
            mean = anchor if self.vector else shares @ anchor
            evidence.append((mean * (shares @ target)) @ w["gate"][..., None])
        confidence = torch.softmax(torch.stack(evidence, dim=-3), dim=-3)  # [B, L, 1, 1]
        merged = (torch.stack(found, dim=-3) * confidence).sum(-3)
        merged = merged + self._own_rows(targets, read, confidence.squeeze(-1), every=True)
        given = self._finish(anchor, read, merged, w, every=True)
        return given[..., :1, :] if self.gives == "first" else given

    def normalised(self, affinity: Tensor) -> Tensor:
        """Affinities over their sum along the last axis; a row of zeros stays zero."""
        total = affinity.sum(-1, keepdim=True)
        return affinity / (total + self.eps if self.guard == "add" else total.clamp(min=self.eps))

    def _targets(self, read: Read, w: Mapping[str, Tensor]) -> Tensor:
        """`[B, L, N, d]`."""
        if self.stacked:
            return self._down("target", torch.stack(read.targets, dim=-3), w)
        each = [self._down(f"target{n}", state, w) for n, state in enumerate(read.targets)]
        return torch.stack(each, dim=-3)

    def _down(self, name: str, x: Tensor, w: Mapping[str, Tensor], norm: str = "") -> Tensor:
        """A linear layer and its norm, behind a ReLU if there is one."""
        if self.relu_first and name.startswith(("target", "anchor")):
            x = torch.relu(x)
        y = x @ w[f"{name}_weight"].mT + w[f"{name}_bias"][..., None, :]
        if (norm or self.norm) != "layer":
            return y
        normed = F.layer_norm(y, y.shape[-1:], eps=self.norm_eps)
        return (
            normed * w[f"{name}_norm_weight"][..., None, :] + w[f"{name}_norm_bias"][..., None, :]
        )

    def _cross(self, targets: Tensor, read: Read, w: Mapping[str, Tensor]) -> Tensor:
        """Targets with what they take from the memory, through one linear layer each."""
        assert read.memory is not None
        memory, mask = (t[..., None, :, :] for t in read.memory)
        wide = wider(targets)
        scores = targets.to(wide) @ memory.to(wide).mT * mask.to(wide)  # [B, L, N, N']
        taken = self.normalised(torch.relu(scores)).to(targets.dtype) @ memory
        names = [f"cross{n}" for n in range(len(self.widths))]
        given = [self._down(n, t, w) for n, t in zip(names, taken.unbind(-3), strict=True)]
        return targets + torch.stack(given, dim=-3)

    def _own_rows(
        self, targets: Tensor, read: Read, confidence: Tensor, *, every: bool = False
    ) -> Tensor | float:
        """`sum over l of c_l` times the own row of T_l, `[B, N, d]` or `[B, 1, d]`."""
        if self.own == "none":
            return 0.0
        if read.end is not None:
            rows = read.end[..., None, :, :] @ targets  # [B, L, 1, d]
        elif self.own == "first" or (self.gives == "first" and not every):
            rows = targets[..., :1, :]
        else:
            rows = targets
        return (confidence[..., None] * rows).sum(-3)

    def _own_marks(self, affinity: Tensor, read: Read) -> Tensor | float:
        """1 at the token whose row is added, `[B, L, 1, N]`."""
        if self.own == "none":
            return 0.0
        if read.end is not None:
            return read.end[..., None, :, :].to(affinity.dtype)
        length = affinity.shape[-1]
        return F.pad(affinity.new_ones(1), (0, length - 1))

    def _finish(
        self,
        query: Tensor,
        read: Read,
        merged: Tensor,
        w: Mapping[str, Tensor],
        *,
        every: bool = False,
    ) -> Tensor:
        """`up(Q + project(M))`, or `anchor + up(relu(M))`."""
        if self.project == "mlp":
            merged = torch.relu(self._down("project_in", merged, w, norm="none"))
        y = merged if self.project == "none" else query + self._down("project", merged, w)
        if self.up != "none":
            y = torch.relu(y) if self.up == "relu" else y
            y = self._down("up", y, w, norm="layer" if self.up_norm else "none")
        if self.onto == "anchor":
            first = self.gives == "first" and not every
            y = (read.anchor[..., :1, :] if first else read.anchor) + y
        if self.gives == "mean" and not self.vector:
            y = _shares(y, read.mask) @ y
        return y

    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """Linear layers as in `nn.Linear`, unit norms, zero biases."""
        w: Weights = {}
        for name, axes in self.shapes.items():
            shape = [int(axis) for axis in axes]
            w[name] = torch.zeros(shape)
            if name.endswith(("norm_weight", "norm_var")):
                w[name].fill_(1.0)
            elif len(shape) == 2 or name == "gate":
                bound = 1 / math.sqrt(shape[-1])
                w[name].uniform_(-bound, bound, generator=generator)
        return w


class Read(NamedTuple):
    """The taps of a network by what they are.

    Attributes:
        targets: `[B, N, C]` each.
        anchor: `[B, N, C]`.
        mask: 1 at valid tokens, `[B, 1, N]`, or None.
        end: 1 at the marked token, `[B, 1, N]`, or None.
        memory: `[B, N', d]` and its mask `[B, 1, N']`, or None.
    """

    targets: tuple[Tensor, ...]
    anchor: Tensor
    mask: Tensor | None
    end: Tensor | None
    memory: tuple[Tensor, Tensor] | None


def fold_batch_norms(w: Mapping[str, Tensor]) -> Weights:
    """Linear layers `NAME_weight`, `NAME_bias` with `NAME_norm_{weight,bias,mean,var}` folded in, in float64."""
    folded = dict(w)
    for name in [n.removesuffix("_norm_var") for n in w if n.endswith("_norm_var")]:
        slope, shift, mean, var = (
            folded.pop(f"{name}_norm_{part}").double() for part in ("weight", "bias", "mean", "var")
        )
        weight, bias = w[f"{name}_weight"], w[f"{name}_bias"]
        gain = slope / (var + BATCH_EPS).sqrt()
        folded[f"{name}_weight"] = (weight.double() * gain[..., None]).to(wider(weight))
        folded[f"{name}_bias"] = ((bias.double() - mean) * gain + shift).to(wider(bias))
    return folded


def _shares(values: Tensor, mask: Tensor | None) -> Tensor:
    """What each token of `[..., N, C]` has in the mean: `[B, 1, N]`; padding has nothing."""
    if mask is None:
        length = values.shape[-2]
        return values.new_full((1, length), 1.0) / length
    mask = mask.to(values.dtype)
    return mask / mask.sum(-1, keepdim=True).clamp(min=1.0)
