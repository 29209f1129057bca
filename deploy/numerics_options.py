"""`export`'s options about numbers: what stays float32, and what to calibrate with."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from .options import PATH

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ..merge.backbone import Backbone
    from ..merge.preprocessing import Preprocessing
    from .numerics import Numerics

EIGHT_BITS = ("int8", "fp8")


@dataclass(frozen=True)
class NumericsChoice:
    """What a person asked for.

    Attributes:
        keep: Patterns of nodes that stay float32.
        calibration: A folder of pictures, or a file of arrays.
        method: How ranges are made of examples; None where it was not said.
        least_agreement: Share of rows with the same best class; None where it was not said.
        least_cosine: Cosine of logits; None where it was not said.
    """

    keep: tuple[str, ...]
    calibration: Path | None
    method: str | None
    least_agreement: float | None
    least_cosine: float | None

    def require(self, precision: str, target: str) -> None:
        """Refuse what does not fit a precision, before anything is read.

        Raises:
            UsageError: An option is of another precision, or examples are missing.
            MissingDependency: Nothing that could serve the engine computes in the precision.
        """
        from ..merge.errors import UsageError

        given = (self.method, self.least_agreement, self.least_cosine)
        if precision not in EIGHT_BITS and any(value is not None for value in given):
            raise UsageError(
                "--calibration-method, --least-agreement and --least-cosine are of int8 and fp8",
                found=f"--precision {precision}",
            )
        from .numerics import require

        require(precision, target, self.keep, calibrated=self.calibration is not None)

    def load(
        self, backbone: Backbone, tasks: Sequence[tuple[str, Preprocessing | None]]
    ) -> Numerics:
        """The choices with the examples read.

        Raises:
            UsageError: The examples cannot be read, or are too few.
        """
        from ..export.agreement import Least
        from .calibration import read_calibration
        from .numerics import Numerics

        given = {"agreement": self.least_agreement, "cosine": self.least_cosine}
        examples = (
            read_calibration(self.calibration, backbone, tasks)
            if self.calibration is not None
            else None
        )
        return Numerics(
            self.keep,
            examples,
            self.method or "minmax",
            Least(**{name: value for name, value in given.items() if value is not None}),
        )


def numerics_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """`--keep-fp32`, `--calibration` and what judges eight bits, handed on as `numbers`."""

    @click.option(
        "--keep-fp32",
        "keep",
        metavar="PATTERN",
        multiple=True,
        help="Nodes that stay float32, by name or operator, with * and ?; auto: those whose values would leave the "
        "range of fp16 or bf16. Repeatable.",
    )
    @click.option(
        "--calibration",
        type=PATH,
        help="Folder of pictures, or one per task in it, or an .npz of arrays: what the audit of fp16 and bf16 runs "
        "on, and what int8 and fp8 take their ranges from.",
    )
    @click.option(
        "--calibration-method",
        "method",
        type=click.Choice(["minmax", "percentile", "entropy"]),
        help="int8, fp8: how ranges are made of examples; minmax if not given.",
    )
    @click.option(
        "--least-agreement",
        type=click.FloatRange(0, 1),
        help="int8, fp8: share of each task's held-out examples whose best class is float32's; 0.99 if not given.",
    )
    @click.option(
        "--least-cosine",
        type=click.FloatRange(-1, 1),
        help="int8, fp8: cosine between logits that 95 % of them reach; 0.99 if not given.",
    )
    @functools.wraps(verb)
    def with_numbers(
        *args: Any,
        keep: tuple[str, ...],
        calibration: Path | None,
        method: str | None,
        least_agreement: float | None,
        least_cosine: float | None,
        **kwargs: Any,
    ) -> Any:
        choice = NumericsChoice(keep, calibration, method, least_agreement, least_cosine)
        return verb(*args, numbers=choice, **kwargs)

    return with_numbers
