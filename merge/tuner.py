"""The law: `y = OP(x) + U(x)`. OP is frozen and shared by all tasks, U is owned by one.

(U-Tuning, arXiv 2303.00690, eq. 3.) A `Tuner` is U without its weights: the settings that several
tasks can share. A `Branch` puts a tuner at a place: where it reads (`tap`) and where it joins (`add`).
All weights of a branch are tensors named by `Tuner.shapes`, so branches of many tasks can be stacked.
"""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import float32, promote_types

from .errors import IncompatibleArtefact

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Generator, Tensor, dtype, nn

Side = Literal["input", "output", "patches", "keys", "tokens", "weights"]
SIDES = ("input", "output", "patches", "keys", "tokens", "weights")

Place = Literal["beside", "over", "behind", "before"]
"""Of a branch on an op: from its input to its output, from a convolution's patches to its output, on its
output, or on its input."""

Weights = dict[str, "Tensor"]
Shapes = dict[str, tuple["str | int", ...]]


@dataclass(frozen=True)
class Point:
    """A place in a backbone, written `module:side`.

    Attributes:
        module: Dotted path of the module.
        side: `input` or `output` of the module; `patches`, what each position of a convolution reads,
            `[B, N, C * kh * kw]`; `keys`, where the attention inside it meets keys and values; `tokens`,
            the sequence that it is given and gives; `weights`, its parameters and buffers.
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

    Axes of `shapes` and `served` are sizes or symbols: `in`, the channels at the tap; `out`, the
    channels at the add point; those in `padded`, on which tasks may differ (rank, prefix length, class
    count). A task that is smaller there is padded with `fill`, which is exact.
    """

    kind: ClassVar[str]
    source: ClassVar[str]
    """Where the formula was published."""
    join: ClassVar[Literal["add", "extend", "tokens", "replace", "weights"]]
    """How the branch meets the frozen op: a sum, more keys and values, more tokens, its successor, or a
    sum with the op's own parameters."""
    fill: ClassVar[Mapping[str, float]] = {}
    """What an absent or padded entry of a served tensor holds; 0 where not named."""
    padded: ClassVar[frozenset[str]] = frozenset({"r"})
    """The symbols on which tasks may differ."""
    reads_map: ClassVar[bool] = False
    """`branch` wants the tap as the op sees it, such as `[B, C, H, W]`, not as tokens."""
    broadcasts: ClassVar[bool] = False
    """`branch` takes more leading axes, `x [B, 1, N, C]` with `w [T, ...]`, and gives `[B, T, ...]`."""
    answers: ClassVar[bool] = False
    """It stands in the place of the backbone's classifier: a head."""

    @property
    @abstractmethod
    def shapes(self) -> Shapes:
        """The tensors that a task stores, by name, with their axes."""

    @property
    def served(self) -> Shapes:
        """The tensors that an engine reads, after `settle`."""
        return self.shapes

    @property
    def reads(self) -> int:
        """How many places a branch reads."""
        return 1

    @abstractmethod
    def branch(self, x: Any, w: Mapping[str, Tensor]) -> Any:
        """What the branch gives to its join.

        Args:
            x: The tap, `[B, N, C]`; a tuple of them for a branch of several taps. Joins `extend`,
                `tokens` and `weights` ignore it.
            w: Stored or served tensors; each may carry a leading batch axis `[B, ...]`.

        Returns:
            For `add` and `replace` `[B, N, C_out]` (or what broadcasts to it); for `tokens` the tokens
            `[P, C]` and the mask `[P]` or None; for `extend` keys, values and the mask `[L]` or None;
            for `weights` what is added to the parameter.
        """

    @abstractmethod
    def init(self, sizes: Mapping[str, int], generator: Generator) -> Weights:
        """Trainable starting values, float32, for sizes of the symbols."""

    def settle(self, w: Mapping[str, Tensor]) -> Weights:
        """Stored tensors to served ones: what is constant at inference, computed once."""
        return dict(w)

    def channels(
        self, sizes: Mapping[str, int]
    ) -> tuple[int | tuple[int | None, ...] | None, int | None]:
        """Channels at the tap, or one number per tap, and at the add point, where the sizes say them."""
        return sizes.get("in"), sizes.get("out")

    def constant(self, tensor: str) -> bool:
        """The tensor of this name does not train, unless a method says so."""
        return tensor == "scale"

    def answer_width(self, sizes: Mapping[str, int]) -> int:
        """How many numbers a head answers with."""
        raise NotImplementedError(f"a {self.kind} is no head")

    def fold(self, w: Mapping[str, Tensor], op: nn.Module, place: Place) -> Weights:
        """The op's parameters after taking the branch in, exactly.

        Args:
            w: Stored tensors, float64.
            op: The module that the branch stands at, its parameters float64.
            place: Where at the op.

        Returns:
            The parameters of `op` that change, by name.

        Raises:
            CannotFold: There is no exact place for the branch.
        """
        raise CannotFold(self.no_fold)

    no_fold: ClassVar[str] = ""
    """Why `fold` refuses, for tuners that never fold."""
    no_bank: ClassVar[str] = ""
    """Why the branch cannot differ from row to row, for tuners that cannot."""

    def settings(self) -> dict[str, Any]:
        """The dataclass fields that differ from their defaults, as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if name not in plain or value != plain[name]
        }

    @classmethod
    def from_settings(cls, values: Mapping[str, Any], *, where: object) -> Tuner:
        """A tuner from JSON values.

        Raises:
            IncompatibleArtefact: A field is missing, unknown or out of range.
        """
        wanted = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if not needed <= set(values) <= wanted:
            raise IncompatibleArtefact(
                f"the settings of a {cls.kind} branch are not complete",
                where=where,
                wanted=sorted(wanted),
                found=sorted(values),
            )
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except (TypeError, ValueError) as cause:
            raise IncompatibleArtefact(
                f"a setting of a {cls.kind} branch is out of range", where=where, found=str(cause)
            ) from cause


@dataclass(frozen=True)
class Branch:
    """A tuner at its place.

    Attributes:
        tuner: What is computed.
        tap: Where it reads. Equal to `add` for a serial branch, which reads what it is added to. Tokens
            enter at `tap` and leave at `add`.
        add: Where it joins.
        others: Where else it reads, for tuners that read several places.
    """

    tuner: Tuner
    tap: Point
    add: Point
    others: tuple[Point, ...] = ()

    @property
    def taps(self) -> tuple[Point, ...]:
        """All places that it reads."""
        return (self.tap, *self.others)

    @property
    def serial(self) -> bool:
        """The branch reads the value that it is added to."""
        return self.taps == (self.add,)

    @property
    def place(self) -> Place | None:
        """Where it stands at one op, if it stands at one."""
        if self.serial:
            return {"output": "behind", "input": "before"}.get(self.add.side)  # type: ignore[return-value]
        if self.others or self.add.side != "output" or self.tap.module != self.add.module:
            return None
        return {"input": "beside", "patches": "over"}.get(self.tap.side)  # type: ignore[return-value]


def wider(*tensors: Tensor) -> dtype:
    """The dtype of a product of tensors that is not to be rounded: at least float32."""
    return functools.reduce(promote_types, (t.dtype for t in tensors), float32)


def bind(
    shapes: Mapping[str, tuple[str | int, ...]], tensors: Mapping[str, Tensor], *, where: object
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
            (axis if isinstance(axis, int) else sizes.setdefault(axis, size)) == size
            for axis, size in zip(axes, shape, strict=True)
        )
        if not fits:
            raise IncompatibleArtefact(
                "a tensor has the wrong shape",
                where=f"{where}/{name}",
                wanted="[" + ", ".join(_axis(axis, sizes) for axis in axes) + "]",
                found=list(shape),
            )
    return sizes


def _axis(axis: str | int, sizes: Mapping[str, int]) -> str:
    return f"{axis}={sizes[axis]}" if isinstance(axis, str) and axis in sizes else str(axis)
