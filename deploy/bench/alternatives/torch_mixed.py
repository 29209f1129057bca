"""The mixed batch in torch, each row's weights gathered from the bank: eager, and through torch.compile."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ....merge.bank import stack
from ....merge.errors import UsageError
from ....merge.lower import in_double, lower
from ....merge.mixed import Mixed, Single
from .opened import Opened

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import nn

    from ....export.engine import Device, Rows
    from ..subject import Run
    from .originals import Originals

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def torch_eager(originals: Originals, precision: str, device: Device) -> Opened:
    """See `Alternative.opens`."""
    return _open(originals, precision, device, lambda module: module)


def torch_compiled(originals: Originals, precision: str, device: Device) -> Opened:
    """See `Alternative.opens`."""
    return _open(originals, precision, device, compiled)


def compiled(module: nn.Module) -> Callable[..., torch.Tensor]:
    """Through torch.compile, once per batch size."""
    return torch.compile(module, dynamic=False)


def _open(
    originals: Originals,
    precision: str,
    device: Device,
    through: Callable[[nn.Module], Callable[..., torch.Tensor]],
) -> Opened:
    dtype = dtype_of(precision)
    module = _module(originals)
    call = through(prepared(module, dtype, device))
    run = runner(call, originals, dtype, device, takes_task=isinstance(module, Mixed))
    return Opened(run, torch_on(device))


def torch_on(device: Device) -> str:
    """The provider's name in a report."""
    return f"torch, {device.provider}"


def dtype_of(precision: str) -> torch.dtype:
    """The type that torch computes in.

    Raises:
        UsageError: Torch has no such precision as a type.
    """
    if precision not in DTYPES:
        raise UsageError(
            "torch is timed beside engines of its own types",
            wanted=", ".join(DTYPES),
            found=precision,
        )
    return DTYPES[precision]


def prepared(module: nn.Module, dtype: torch.dtype, device: Device) -> nn.Module:
    """A module on its device in its type, with the threads that the engines have; the given one stays as it is."""
    if device.threads is not None:
        torch.set_num_threads(device.threads)
    if dtype != torch.float32 or device.provider != "cpu":
        module = copy.deepcopy(module)
    return module.eval().to(device.provider, dtype)


def runner(
    call: Callable[..., torch.Tensor],
    originals: Originals,
    dtype: torch.dtype,
    device: Device,
    *,
    takes_task: bool,
) -> Run:
    """Host arrays to host logits through a torch module, as an engine is timed."""
    names = [entry.name for entry in originals.backbone.inputs]

    def given(array: NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(array).to(device.provider)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def run(rows: Rows, task: NDArray[np.int64]) -> NDArray[np.float32]:
        arrays = [rows] if isinstance(rows, np.ndarray) else [rows[name] for name in names]
        with torch.inference_mode():
            inputs = [given(array) for array in arrays]
            answer = call(*inputs, given(task)) if takes_task else call(*inputs)
            return answer.float().cpu().numpy()

    return run


def _module(originals: Originals) -> nn.Module:
    """The module that `export` traces: the same algebra, nothing fused."""
    backbone = originals.backbone
    double = in_double(backbone)
    bank = stack(
        [lower(backbone, delta, originals.sites, double) for delta in originals.deltas],
        torch.float32,
    )
    return Mixed(backbone, bank) if len(originals.deltas) > 1 else Single(backbone, bank)
