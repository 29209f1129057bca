"""What the machine does at best, measured in the same run: a large product and a large sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .work import Work


@dataclass(frozen=True)
class Ceilings:
    """The two limits of the roofline, through the same runtime, provider and threads as the engines.

    Attributes:
        provider: The execution provider that ran them.
        dtype: Number format of the product.
        flops_per_second: The best of several square products; two FLOP for each multiply-accumulate.
        product: `(M, K, N)` of that product.
        bytes_per_second: The best of several sums of two large float32 arrays; both read, the sum written.
        moved_bytes: Of all three arrays.
    """

    provider: str
    dtype: str
    flops_per_second: float
    product: tuple[int, int, int]
    bytes_per_second: float
    moved_bytes: int

    def bound_ms(self, work: Work) -> float:
        """The roofline's time of a call: its products at full speed or its operands at full speed, the longer, in ms."""
        return 1e3 * max(work.flops / self.flops_per_second, work.bytes / self.bytes_per_second)

    def reached(self, work: Work, milliseconds: float) -> float:
        """Part of the product's ceiling that a call of this duration reached; 1 is all of it."""
        return work.flops / (milliseconds / 1e3) / self.flops_per_second
