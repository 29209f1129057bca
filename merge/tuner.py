"""The law: `y = OP(x) + U(x)`. OP is frozen and shared by all tasks, U is owned by one.

(U-Tuning, arXiv 2303.00690, eq. 3.) A `Tuner` is U without its weights: the settings that several
tasks can share. A `Branch` puts a tuner at a place: where it reads (`tap`) and where it joins (`add`).
All weights of a branch are tensors named by `Tuner.shapes`, so branches of many tasks can be stacked.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .errors import IncompatibleArtefact

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Generator, Tensor, nn

Side = Literal["input", "output", "keys", "tokens"]
SIDES = ("input", "output", "keys", "tokens")

Weights = dict[str, "Tensor"]


@dataclass(frozen=True)
class Point:
    """A place in a backbone, written `module:side`.

    Attributes:
        module: Dotted path of the module.
        side: `input` or `output` of the module; `keys`, where the attention inside it meets keys and
            values; `tokens`, the sequence from the module's input to its output.
    """

    module: str
    side: Side

    def __str__(self) -> str:
        return f"{self.module}:{self.side}"

    @classmethod
    def parse(cls, text: str, *, where: object = None) -> Point:
        """The point that `str` wrote.

        Raises:
            IncompatibleArtefact: `text` is not `module:side`.
        """
        module, _, side = str(text).rpartition(":")
        if side not in SIDES or not re.fullmatch(r"[\w.]*", module):
            raise IncompatibleArtefact(
                "a point of the backbone cannot be read",
                where=where,
                wanted=f"MODULE:SIDE with SIDE one of {', '.join(SIDES)}",
                found=text,
            )
        return cls(module, side)  # type: ignore[arg-type]


class CannotFold(Exception):
    """The branch has no exact place in the frozen weights.

    Args:
        reason: Why, in one clause.
        alternative: What does carry the branch.
    """

    def __init__(self, reason: str, alternative: str = "keep it parallel") -> None:
        self.reason = reason
        self.alternative = alternative
        super().__init__(f"{reason}: {alternative}")


@dataclass(frozen=True)
class Tuner(ABC):
    """A tuner type; its dataclass fields are the settings that tasks share.

    Axes of `shapes` and `served` are symbols: `in`, the channels at the tap; `out`, the channels at
    the add point; `r`, the axis on which tasks may differ (rank, prefix length, class count). A task
    with a smaller `r` is padded with `fill`, which is exact.
    """

    kind: ClassVar[str]
    source: ClassVar[str]
    """Where the formula was published."""
    join: ClassVar[Literal["add", "extend", "tokens", "replace"]]
    """How the branch meets the frozen op: a sum, more keys and values, more tokens, its successor."""
    fill: ClassVar[Mapping[str, float]] = {}
    """What an absent or padded entry of a served tensor holds; 0 where not named."""

    @property
    @abstractmethod
    def shapes(self) -> dict[str, tuple[str, ...]]:
        """The tensors that a task stores, by name, with their axes."""

    @property
    def served(self) -> dict[str, tuple[str, ...]]:
        """The tensors that an engine reads, after `settle`."""
        return self.shapes

    @abstractmethod
    def branch(self, x: Tensor, w: Mapping[str, Tensor]) -> Any:
        """What the branch gives to its join.

        Args:
            x: The tap, `[B, N, C]`. Joins `extend` and `tokens` ignore it.
            w: Stored or served tensors; each may carry a leading batch axis `[B, ...]`.

        Returns:
            For `add` and `replace` `[B, N, C_out]` (or what broadcasts to it), for `tokens`
            `[P, C]`, for `extend` keys, values and the mask `[L]` or None.
        """

    @abstractmethod
    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """Trainable starting values, float32, for sizes of `in`, `out` and `r`."""

    def settle(self, w: Mapping[str, Tensor]) -> Weights:
        """Stored tensors to served ones: what is constant at inference, computed once."""
        return dict(w)

    def fold(self, w: Mapping[str, Tensor], op: nn.Module, *, serial: bool) -> Weights:
        """The op's parameters after taking the branch in, exactly.

        Args:
            w: Stored tensors, float64.
            op: The module that is added to, its parameters float64.
            serial: The branch reads the op's output instead of its input.

        Returns:
            The parameters of `op` that change, by name.

        Raises:
            CannotFold: There is no exact place for the branch.
        """
        raise CannotFold(self.no_fold)

    no_fold: ClassVar[str] = ""
    """Why `fold` refuses, for tuners that never fold."""

    def settings(self) -> dict[str, Any]:
        """The dataclass fields, as JSON values."""
        return asdict(self)

    @classmethod
    def from_settings(cls, values: Mapping[str, Any], *, where: object) -> Tuner:
        """A tuner from JSON values.

        Raises:
            IncompatibleArtefact: A field is missing, unknown or out of range.
        """
        wanted = {field.name for field in fields(cls)}
        if set(values) != wanted:
            raise IncompatibleArtefact(
                f"the settings of a {cls.kind} branch are not complete",
                where=where,
                wanted=sorted(wanted),
                found=sorted(values),
            )
        try:
            return cls(**values)
        except (TypeError, ValueError) as cause:
            raise IncompatibleArtefact(
                f"a setting of a {cls.kind} branch is out of range", where=where, found=str(cause)
            ) from cause


@dataclass(frozen=True)
class Branch:
    """A tuner at its place.

    Attributes:
        tuner: What is computed.
        tap: Where it reads. Equal to `add` for a serial branch, which reads what it is added to.
        add: Where it joins.
    """

    tuner: Tuner
    tap: Point
    add: Point

    @property
    def serial(self) -> bool:
        """The branch reads the value that it is added to."""
        return self.tap == self.add


def bind(
    shapes: Mapping[str, tuple[str, ...]], tensors: Mapping[str, Tensor], *, where: object
) -> dict[str, int]:
    """The sizes of the symbolic axes, read off a branch's tensors.

    Raises:
        IncompatibleArtefact: A tensor is missing or surplus, or its shape does not fit.
    """
    if missing := sorted(set(shapes) - set(tensors)):
        raise IncompatibleArtefact(
            "a tensor is missing", where=where, wanted=", ".join(missing), found=sorted(tensors)
        )
    if surplus := sorted(set(tensors) - set(shapes)):
        raise IncompatibleArtefact(
            "a tensor is surplus", where=where, wanted=sorted(shapes), found=", ".join(surplus)
        )
    sizes: dict[str, int] = {}
    for name, axes in shapes.items():
        shape = tuple(tensors[name].shape)
        fits = len(shape) == len(axes) and all(
            sizes.setdefault(axis, size) == size for axis, size in zip(axes, shape, strict=True)
        )
        if not fits:
            raise IncompatibleArtefact(
                "a tensor has the wrong shape",
                where=f"{where}/{name}",
                wanted="[" + ", ".join(_axis(axis, sizes) for axis in axes) + "]",
                found=list(shape),
            )
    return sizes


def _axis(axis: str, sizes: Mapping[str, int]) -> str:
    return f"{axis}={sizes[axis]}" if axis in sizes else axis
