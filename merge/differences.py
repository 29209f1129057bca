"""What a tuned model changed, parameter by parameter, and the branches that carry it.

Exactly, except where a rank is asked for: then a weight's difference is cut to its nearest matrix of that
rank (Eckart and Young 1936, doi 10.1007/BF02288367), and the error is stated. Everything is float64: the
difference of two float32 numbers mostly does not fit into a third.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from timm.layers.norm import LayerNorm, LayerNorm2d
from torch import Tensor, nn

from .errors import IncompatibleArtefact, UsageError
from .ops import adds_bias_last, reads_patches
from .sites import measure
from .tuner import Branch, Point
from .tuners.bias import Bias
from .tuners.bottleneck import Bottleneck
from .tuners.difference import Difference
from .tuners.gain import Gain
from .tuners.norm import Norm

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .backbone import Backbone
    from .sites import Sites
    from .tuner import Weights

    Named = tuple[str, Branch, Weights]

PLAIN_NORMS = (nn.LayerNorm, LayerNorm, LayerNorm2d)  # no activation, no other arithmetic


@dataclass(frozen=True)
class Ranks:
    """How many ranks a difference keeps; one of the two is given.

    Attributes:
        rank: The same number for every tensor.
        energy: The share of each tensor's squared norm to keep, with as few ranks as that takes.
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise UsageError(
                "a low rank is a number or a share of the squared norm",
                wanted="one of rank and energy",
                found=f"rank {self.rank}, energy {self.energy}",
            )
        if self.rank is not None and self.rank < 1:
            raise UsageError("the rank is out of range", wanted="at least 1", found=self.rank)
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(
                "the share of the squared norm is out of range",
                wanted="above 0, at most 1",
                found=self.energy,
            )

    def __str__(self) -> str:
        return f"rank {self.rank}" if self.energy is None else f"energy {self.energy:g}"

    def choose(self, singular: Tensor, noise: float = 0.0) -> int:
        """The rank for a tensor: at least 1, and none for singular values that are rounding.

        Args:
            singular: Singular values, descending, `[n]` float64.
            noise: At or below it a singular value is rounding.
        """
        real = int((singular > noise).sum())
        squares = singular.square()
        if self.rank is not None:
            chosen = self.rank
        else:
            lost = squares.flip(0).cumsum(0).flip(0)  # lost[r]: what rank r leaves behind
            allowed = (1 - self.energy) * squares.sum()  # type: ignore[operator]
            chosen = int((lost > allowed).sum())
        return max(1, min(chosen, real))


@dataclass(frozen=True)
class Truncation:
    """What a low rank left of one tensor's difference.

    Attributes:
        tensor: Its name in the checkpoint.
        rank: Ranks kept.
        of: Ranks that the tensor could have.
        error: `|D - up down| / |D|`, Frobenius.
        norm: `|D|`.
    """

    tensor: str
    rank: int
    of: int
    error: float
    norm: float


@dataclass(frozen=True)
class Carried:
    """Branches that carry a difference.

    Attributes:
        branches: By name, in the order of the backbone's modules.
        tensors: Their stored tensors by name, float64.
        truncations: One row per tensor that was cut to a low rank, worst first.
    """

    branches: dict[str, Branch]
    tensors: dict[str, Weights]
    truncations: tuple[Truncation, ...] = ()

    @property
    def whole(self) -> tuple[str, ...]:
        """The branches that cannot share a batch with other tasks."""
        return tuple(name for name, branch in self.branches.items() if branch.tuner.no_bank)


def subtract(frozen: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tuned - frozen` of the floating-point tensors that differ, float64, in the frozen ones' order."""
    return {
        name: tuned[name].double() - tensor.double()
        for name, tensor in frozen.items()
        if name in tuned
        and tensor.is_floating_point()
        and not torch.equal(tuned[name].double(), tensor.double())
    }


def carry(
    backbone: Backbone,
    differences: Mapping[str, Tensor],
    *,
    ranks: Ranks | None = None,
    sites: Sites | None = None,
) -> Carried:
    """The branches whose sum with the backbone is the tuned model.

    | what changed | branch |
    |---|---|
    | weight of a linear layer or convolution | `difference`; with `ranks` a linear `bottleneck`, where there is one |
    | bias that its module adds last | `bias` |
    | weight, or weight and bias, of a plain layer norm | `norm` |
    | a batch norm's weight and statistics | `gain`: in eval mode it is one gain and one shift per channel |
    | everything else, and what stands where no branch can join | `difference` |

    Args:
        backbone: The frozen backbone.
        differences: Tuned minus frozen by the names of the state dict, float64, the classifier's left out.
        ranks: Cuts weights to a low rank; exact if None.
        sites: From `measure`, when at hand.

    Raises:
        IncompatibleArtefact: A name is not the backbone's, or belongs to a parameter that two modules
            share, or two names of one tensor do not agree; a batch norm's variance would be negative.
    """
    sites = sites or measure(backbone)
    left = {name: tensor.double() for name, tensor in differences.items() if tensor.any()}
    found = Carried({}, {})
    truncations: list[Truncation] = []
    modules = dict(backbone.model.named_modules())
    held = {path: {**module._parameters, **module._buffers} for path, module in modules.items()}
    met: dict[int, Tensor] = {}
    owners = Counter(id(tensor) for own in held.values() for tensor in own.values())
    for path, module in modules.items():
        own = {key: left.pop(name) for key in held[path] if (name := _join(path, key)) in left}
        if shared := [key for key in own if owners[id(held[path][key])] > 1]:
            raise IncompatibleArtefact(
                "a parameter that changed is shared by two modules, which no branch can carry",
                where=_join(path, shared[0]),
            )
        met |= {id(held[path][key]): shift for key, shift in own.items()}
        for name, branch, w in _of_module(path, module, own, ranks, sites, truncations):
            found.branches[name] = branch
            found.tensors[name] = w
    tensors = backbone.model.state_dict(keep_vars=True)
    for name, shift in left.items():  # a module that the backbone holds twice has its tensors twice
        same = met.get(id(tensors.get(name)))
        if same is None or not torch.equal(same, shift):
            raise IncompatibleArtefact(
                "a tensor that changed is not the backbone's, or is its second name for another value",
                where=backbone.identity.architecture,
                found=name,
            )
    truncations.sort(key=lambda cut: (-cut.error, cut.tensor))
    return Carried(found.branches, found.tensors, tuple(truncations))


def low_rank(matrix: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, float]:
    """The nearest matrix of a low rank, as two factors that share its singular values.

    Args:
        matrix: `[out, in]` float64.
        ranks: How many ranks.

    Returns:
        `down [r, in]`, `up [out, r]`, float64, and the relative error in the Frobenius norm, which is
        that of the singular values left out. Of each pair of vectors the sign is such that the largest
        entry of `up` is positive, so that the same matrix gives the same factors.
    """
    u, singular, v = torch.linalg.svd(matrix, full_matrices=False)
    noise = float(singular[0]) * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    rank = ranks.choose(singular, noise)
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))[:, :rank]  # [1, rank]
    root = singular[:rank].sqrt() * largest.sign()
    down = root.mT * v[:rank]
    error = float(singular[rank:].norm() / singular.norm())
    return down.contiguous(), (u[:, :rank] * root).contiguous(), error


def total_error(truncations: tuple[Truncation, ...]) -> float | None:
    """The relative Frobenius error of these tensors together; None where there is none."""
    if not truncations:
        return None
    lost = math.hypot(*(cut.error * cut.norm for cut in truncations))
    return lost / math.hypot(*(cut.norm for cut in truncations))


def say_truncation(truncations: tuple[Truncation, ...]) -> str:
    """The errors as one sentence, for provenance."""
    if not truncations:
        return "none"
    worst, ranks = truncations[0], [cut.rank for cut in truncations]
    span = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
    return (
        f"{len(truncations)} tensors at rank {span}: relative Frobenius error {total_error(truncations):.3e} "
        f"in total, {worst.error:.3e} at worst ({worst.tensor})"
    )


def _of_module(
    path: str,
    module: nn.Module,
    own: dict[str, Tensor],
    ranks: Ranks | None,
    sites: Sites,
    truncations: list[Truncation],
) -> Iterator[Named]:
    """The branches of one module; `own` are the differences of its parameters and buffers."""
    if set(own) - {"bias"} and _slopes(module):
        gain = _gain(path, module, own)
        if _stands(gain, sites):
            yield gain
            return
    if "weight" in own and type(module) in PLAIN_NORMS and module.bias is not None:
        norm = _norm(path, module, own)
        if _stands(norm, sites):
            yield norm
            return
    for parameter, shift in own.items():
        exact = _difference(path, parameter, shift)
        if parameter == "bias" and adds_bias_last(module):
            point = Point(path, "output")
            bias: Named = (f"{path}/bias", Branch(Bias(), point, point), {"shift": shift})
            yield bias if _stands(bias, sites) else exact
            continue
        tap = _reads(path, module) if parameter == "weight" and ranks is not None else None
        if tap is None or ranks is None:
            yield exact
            continue
        down, up, error = low_rank(shift.flatten(1), ranks)
        branch = Branch(Bottleneck("identity", bias=False), tap, Point(path, "output"))
        scale = torch.ones((), dtype=torch.float64)
        lora: Named = (f"{path}/lora", branch, {"down": down, "up": up, "scale": scale})
        if not _stands(lora, sites):
            yield exact
            continue
        yield lora
        full, norm = min(shift.flatten(1).shape), float(shift.norm())
        truncations.append(Truncation(_join(path, parameter), len(down), full, error, norm))


def _reads(path: str, module: nn.Module) -> Point | None:
    """Where a low-rank branch beside the module reads, if the module is linear in what it reads."""
    if isinstance(module, nn.Linear):
        return Point(path, "input")
    return Point(path, "patches") if reads_patches(module) else None


def _difference(path: str, parameter: str, shift: Tensor) -> Named:
    """The branch that carries any parameter.

    Raises:
        IncompatibleArtefact: The parameter has no name of its own, as in a list.
    """
    name, point = _join(path, parameter), Point(path, "weights")
    try:
        tuner = Difference(parameter, tuple(shift.shape))
    except ValueError as cause:
        raise IncompatibleArtefact(
            "a parameter that changed cannot be named in a delta", where=name, found=str(cause)
        ) from cause
    return f"{name}/difference", Branch(tuner, point, point), {"shift": shift}


def _norm(path: str, module: nn.Module, own: Mapping[str, Tensor]) -> Named:
    """A layer norm's weight and bias."""
    branch = Branch(Norm(float(module.eps)), Point(path, "input"), Point(path, "output"))  # type: ignore[arg-type]
    shift = own.get("bias", torch.zeros_like(own["weight"]))
    return f"{path}/norm", branch, {"gain": own["weight"], "shift": shift}


def _slopes(module: nn.Module) -> bool:
    """In eval mode the module is one gain and one shift per channel."""
    kept = isinstance(module, nn.BatchNorm2d) and module.affine and module.running_var is not None
    return kept and adds_bias_last(module)


def _gain(path: str, module: nn.Module, own: Mapping[str, Tensor]) -> Named:
    """A batch norm, `(x - mean) weight / sqrt(var + eps) + bias`: the changes of its slope and its bias.

    Raises:
        IncompatibleArtefact: A variance is negative.
    """
    frozen = {key: tensor.double() for key, tensor in module.state_dict().items()}
    tuned = {key: tensor + own[key] if key in own else tensor for key, tensor in frozen.items()}
    if (tuned["running_var"] < 0).any():
        raise IncompatibleArtefact(
            "a batch norm would have a negative variance",
            where=f"{path}.running_var",
            wanted="at least 0",
            found=f"{float(tuned['running_var'].min()):.3g}",
            do="when combining, choose weights that sum to at most 1",
        )
    slopes, constants = [], []
    for state in (frozen, tuned):
        slopes.append(state["weight"] / (state["running_var"] + module.eps).sqrt())  # type: ignore[operator]
        constants.append(state["bias"] - state["running_mean"] * slopes[-1])
    branch = Branch(Gain(shift=True), Point(path, "input"), Point(path, "output"))
    tensors = {"gain": slopes[1] - slopes[0], "shift": constants[1] - constants[0]}
    return f"{path}/gain", branch, tensors


def _stands(named: Named, sites: Sites) -> bool:
    """The place was seen to carry the branch."""
    name, branch, tensors = named
    try:
        sites.check(branch, tensors, where=name)
    except IncompatibleArtefact:
        return False
    return True


def _join(path: str, parameter: str) -> str:
    return f"{path}.{parameter}" if path else parameter
