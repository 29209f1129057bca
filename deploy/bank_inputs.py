"""A bank as what an engine is fed: names and types."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..export.engine import BANK_PREFIX
from ..export.precision import HALF, to_half

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import torch
    from numpy.typing import NDArray


def bank_inputs(
    tensors: Mapping[str, torch.Tensor], precision: str = "fp32"
) -> dict[str, NDArray[np.generic]]:
    """Tensors of a bank by input name, in the type in which an engine of the precision reads them."""
    arrays = {f"{BANK_PREFIX}{key}": tensor.float().numpy() for key, tensor in tensors.items()}
    if precision not in HALF:
        return arrays
    return {name: to_half(array, precision)[0] for name, array in arrays.items()}
