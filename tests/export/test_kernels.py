"""The fused kernels against float64 in torch, on a CUDA device; UTUNE_KERNELS names the library."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.skipif("UTUNE_KERNELS" not in os.environ, reason="UTUNE_KERNELS names no library"),
]

ACTIVATIONS = [
    lambda x: x, torch.relu, F.gelu, lambda x: F.gelu(x, approximate="tanh"), torch.tanh, torch.sigmoid,
]  # fmt: skip
CLOSE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
dtypes = pytest.mark.parametrize("dtype", CLOSE)
activations = pytest.mark.parametrize("activation", range(len(ACTIVATIONS)))
OUTSIDE = 2  # of a batch, the row whose task the bank does not have


@pytest.fixture(scope="module")
def library() -> Any:
    return ctypes.CDLL(os.path.abspath(os.environ["UTUNE_KERNELS"]))


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None)


def facts() -> tuple[int, int, ctypes.c_void_p]:
    """Processors, shared memory of a block, the stream."""
    properties = torch.cuda.get_device_properties(0)
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin, stream


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    error = (found.double() - wanted).norm() / wanted.norm()
    return bool(error < CLOSE[found.dtype])


class Given:
    """Random inputs of a branch, `[B, N, C]` to `[B, N, D]`."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        rows, tokens, inside, outside, rank, tasks = shape
        torch.manual_seed(sum(shape))

        def noise(*size: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*size, device="cuda") * scale).to(dtype)

        self.x, self.base = noise(rows, tokens, inside), noise(rows, tokens, outside)
        self.residual, self.bias = noise(rows, tokens, outside), noise(outside)
        self.gamma, self.beta = noise(inside), noise(inside)
        self.down = noise(tasks, rank, inside, scale=inside**-0.5)
        self.up = noise(tasks, outside, rank, scale=rank**-0.5)
        self.down_bias, self.up_bias = noise(tasks, rank), noise(tasks, outside)
        self.task = torch.randint(0, tasks, (rows,), device="cuda")
        if rows > OUTSIDE:
            self.task[OUTSIDE] = tasks

    def branch(self, x: torch.Tensor, activation: int) -> torch.Tensor:
        known = self.task < len(self.down)
        task = torch.where(known, self.task, 0)
        down, up, d, u = (
            t.double()[task] for t in (self.down, self.up, self.down_bias, self.up_bias)
        )
        hidden = ACTIVATIONS[activation](x.double() @ down.mT + d[:, None])
        return (hidden @ up.mT + u[:, None]) * known[:, None, None]


@dtypes
@activations
@pytest.mark.parametrize("tile", [0, 1, 2, 4])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 197, 768, 768, 64, 64), (64, 197, 768, 768, 64, 64), (3, 1, 768, 768, 64, 8),
        (5, 50, 192, 384, 16, 3), (9, 77, 128, 64, 32, 4), (4, 33, 768, 2304, 16, 4), (40, 130, 256, 256, 128, 5),
    ],
)  # fmt: skip
def test_a_grouped_bottleneck(
    library: Any, dtype: torch.dtype, activation: int, tile: int, shape: tuple[int, ...]
) -> None:
    given = Given(dtype, shape)
    residual = given.residual if activation % 2 else None
    out = torch.full_like(given.base, torch.nan)
    processors, _, stream = facts()
    rows, tokens, inside, outside, rank, tasks = shape
    status = library.utune_grouped_bottleneck(
        int(dtype == torch.bfloat16),
        *map(pointer, (given.x, given.base, residual, given.task, given.down, given.up, given.bias)),
        *map(pointer, (given.down_bias, given.up_bias, out)),
        rows, tokens, inside, outside, rank, tasks, activation, processors, stream, tile,
    )  # fmt: skip
    torch.cuda.synchronize()
    wanted = given.base.double() + given.branch(given.x, activation)
    known = (given.task < tasks)[:, None, None]
    wanted = wanted + given.bias.double() * known
    if residual is not None:
        wanted = wanted + residual.double()
    assert status == 0
    assert close(out, wanted)


@dtypes
@activations
@pytest.mark.parametrize("tile", [0, 1, 2, 4])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 197, 768, 64, 64), (64, 197, 768, 64, 64), (3, 1, 768, 64, 8), (5, 50, 192, 16, 3), (9, 77, 128, 32, 4),
        (20, 130, 1024, 64, 5), (3, 40, 1280, 32, 3), (2, 33, 2048, 16, 2), (8, 257, 1024, 128, 8),
    ],
)  # fmt: skip
def test_a_norm_with_its_branch(
    library: Any, dtype: torch.dtype, activation: int, tile: int, shape: tuple[int, ...]
) -> None:
    rows, tokens, channels, rank, tasks = shape
    given = Given(dtype, (rows, tokens, channels, channels, rank, tasks))
    full = activation % 2 == 0
    bias, skip = (given.bias, given.residual) if full else (None, None)
    normed, carried = (torch.full_like(given.x, torch.nan) for _ in range(2))
    processors, shared, stream = facts()
    wide = tile > 1 and channels > 768
    status = library.utune_normed_branch(
        int(dtype == torch.bfloat16),
        *map(pointer, (given.x, bias, skip, given.gamma, given.beta, given.task, given.down, given.up)),
        *map(pointer, (given.down_bias, given.up_bias, normed, carried)),
        rows, tokens, channels, rank, tasks, ctypes.c_float(1e-6), activation, processors, shared, stream,
        0 if wide or rank > 64 else tile,
    )  # fmt: skip
    torch.cuda.synchronize()
    total = given.x.double()
    if full:
        total = total + given.bias.double() + given.residual.double()
    norm = F.layer_norm(total, (channels,), given.gamma.double(), given.beta.double(), 1e-6)
    assert status == 0
    assert close(normed, norm)
    assert close(carried, total + given.branch(norm, activation))
