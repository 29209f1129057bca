"""The fused kernels against float64 in torch, on a CUDA device; UTUNE_KERNELS names the library."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pytest
import torch
from branches import ACTIVATIONS, CLOSE, Branches, close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.skipif("UTUNE_KERNELS" not in os.environ, reason="UTUNE_KERNELS names no library"),
]

dtypes = pytest.mark.parametrize("dtype", CLOSE)
activations = pytest.mark.parametrize("activation", range(len(ACTIVATIONS)))


@pytest.fixture(scope="module")
def library() -> Any:
    return ctypes.CDLL(os.path.abspath(os.environ["UTUNE_KERNELS"]))


def machine() -> tuple[int, int, ctypes.c_void_p]:
    """Processors, shared memory of a block, the stream."""
    properties = torch.cuda.get_device_properties(0)
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin, stream


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
    residual = ("residual",) if activation % 2 else ()
    given = Branches(dtype, shape, ("bias", "down_bias", "up_bias", *residual))
    out = torch.full_like(given.base, torch.nan)
    status = given.run_grouped(library, out, activation, tile, machine())
    torch.cuda.synchronize()
    assert status == 0
    assert close(out, given.grouped(activation))


@dtypes
@activations
@pytest.mark.parametrize("tile", [0, 1, 2, 4])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 197, 768, 64, 64), (64, 197, 768, 64, 64), (3, 1, 768, 64, 8), (5, 50, 192, 16, 3), (9, 77, 128, 32, 4),
        (20, 130, 1024, 64, 5), (3, 40, 1280, 32, 3), (2, 33, 2048, 16, 2), (8, 257, 1024, 128, 8), (3, 33, 64, 128, 2),
    ],
)  # fmt: skip
def test_a_norm_with_its_branch(
    library: Any, dtype: torch.dtype, activation: int, tile: int, shape: tuple[int, ...]
) -> None:
    rows, tokens, channels, rank, tasks = shape
    full = ("bias", "residual") if activation % 2 == 0 else ()
    given = Branches(
        dtype, (rows, tokens, channels, channels, rank, tasks), ("down_bias", "up_bias", *full)
    )
    normed, carried = (torch.full_like(given.x, torch.nan) for _ in range(2))
    wide = tile > 1 and channels > 768
    tile = 0 if wide or rank > 64 else tile
    status = given.run_normed(library, normed, carried, activation, tile, machine())
    torch.cuda.synchronize()
    assert status == 0
    for found, wanted in zip((normed, carried), given.normed(activation), strict=True):
        assert close(found, wanted)
