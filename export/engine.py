"""What an engine is to the floors above: images and task rows in, logits out.

A target (see `targets/`) builds an engine file and opens it as a `Session`. Nothing here needs torch,
onnx or a runtime, so a server can import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

IMAGES = "images"  # [B, 3, H, W] float32, [B, 3, T, H, W] of clips
TASK = "task"  # [B] int64, a row of the bank
LOGITS = "logits"  # [B, K] float32, K the largest class count


@dataclass(frozen=True)
class Tensor:
    """One input or output of an engine.

    Attributes:
        name: Its name in the graph.
        dtype: NumPy's name of its element type.
        shape: Sizes; a free axis is a name (`"batch"`).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Session(Protocol):
    """An open engine. Safe to call from several threads."""

    provider: str
    """The execution provider that really runs it, in the runtime's own name."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the exporter wrote into the engine file."""
        ...

    def run(
        self, images: NDArray[np.float32], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Logits `[B, K]` for images `[B, 3, H, W]` or clips `[B, 3, T, H, W]` and task rows `[B]`.

        A single-task engine takes no rows. Columns past a task's own classes hold the lowest
        float32; a row outside the bank yields NaN.
        """
        ...

    def replace_bank(self, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        """Serve from other task tensors from the next call on (bank as inputs only)."""
        ...
