"""Random inputs of the fused kernels and what they must answer, in float64; how their library is called."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch.nn import functional as F

ACTIVATIONS = [
    lambda x: x, torch.relu, F.gelu, lambda x: F.gelu(x, approximate="tanh"), torch.tanh, torch.sigmoid,
]  # fmt: skip
CLOSE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
EPSILON = 1e-6
OUTSIDE = 2  # of a batch, the row whose task the bank does not have


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None)


def close(found: torch.Tensor, wanted: torch.Tensor, within: float | None = None) -> bool:
    """Close as a whole, and no number far off."""
    within = CLOSE[found.dtype] if within is None else within
    error = found.double() - wanted
    whole = error.norm() < within * wanted.norm()
    return bool(whole and error.abs().max() < 3 * within * wanted.abs().max())


class Branches:
    """A batch and a bank of branches `C -> R -> D`; `optional` inputs are there only where they are named.

    `shape` is rows, tokens, C, D, R, tasks. Optional are `bias`, `residual`, `down_bias` and `up_bias`.
    """

    OPTIONAL = ("bias", "residual", "down_bias", "up_bias")

    def __init__(
        self,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        optional: tuple[str, ...] = OPTIONAL,
        device: str = "cuda",
    ) -> None:
        self.rows, self.tokens, self.inside, self.outside, self.rank, self.tasks = shape
        self.dtype = dtype
        torch.manual_seed(sum(shape))

        def noise(*size: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*size, device=device) * scale).to(dtype)

        inside, outside, rank, tasks = self.inside, self.outside, self.rank, self.tasks
        rows, tokens = self.rows, self.tokens
        self.x, self.base = noise(rows, tokens, inside), noise(rows, tokens, outside)
        self.gamma, self.beta = noise(inside), noise(inside)
        self.down = noise(tasks, rank, inside, scale=inside**-0.5)
        self.up = noise(tasks, outside, rank, scale=rank**-0.5)
        sizes = {
            "bias": (outside,),
            "residual": (rows, tokens, outside),
            "down_bias": (tasks, rank),
            "up_bias": (tasks, outside),
        }
        self.given = {name: noise(*sizes[name]) if name in optional else None for name in sizes}
        self.task = torch.randint(0, tasks, (rows,), device=device)
        if rows > OUTSIDE:
            self.task[OUTSIDE] = tasks

    def inputs(self) -> list[torch.Tensor]:
        mine = [self.x, self.base, self.gamma, self.beta, self.down, self.up, self.task]
        return mine + [tensor for tensor in self.given.values() if tensor is not None]

    def add(self, total: torch.Tensor, *names: str) -> torch.Tensor:
        for name in names:
            tensor = self.given[name]
            total = total if tensor is None else total + tensor.double()
        return total

    def known(self) -> torch.Tensor:
        inside = (self.task >= 0) & (self.task < self.tasks)
        return inside[:, None, None]

    def branch(self, x: torch.Tensor, activation: int) -> torch.Tensor:
        task = torch.where(self.known().flatten(), self.task, 0)

        def of_rows(tensor: torch.Tensor | None) -> torch.Tensor | float:
            return 0.0 if tensor is None else tensor.double()[task][:, None]

        down, up = self.down.double()[task], self.up.double()[task]
        hidden = ACTIVATIONS[activation](x @ down.mT + of_rows(self.given["down_bias"]))
        return (hidden @ up.mT + of_rows(self.given["up_bias"])) * self.known()

    def grouped(self, activation: int) -> torch.Tensor:
        """What `utune_grouped_bottleneck` answers; `bias` is left out where the task is."""
        total = self.add(self.base.double(), "residual")
        bias = self.add(torch.zeros_like(total), "bias") * self.known()
        return total + bias + self.branch(self.x.double(), activation)

    def normed(self, activation: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What `utune_normed_branch` answers: the norm, and what is carried on."""
        total = self.add(self.x.double(), "bias", "residual")
        gamma, beta = self.gamma.double(), self.beta.double()
        norm = F.layer_norm(total, (self.inside,), gamma, beta, EPSILON)
        return norm, total + self.branch(norm, activation)

    def run_grouped(
        self, library: Any, out: torch.Tensor, activation: int, tile: int, machine: tuple[Any, ...]
    ) -> int:
        """Call it; `machine` is processors, shared memory of a block, stream. A cudaError_t is returned."""
        processors, _, stream = machine
        bias, residual, down_bias, up_bias = self.given.values()
        return library.utune_grouped_bottleneck(
            int(self.dtype == torch.bfloat16),
            *map(pointer, (self.x, self.base, residual, self.task, self.down, self.up, bias)),
            *map(pointer, (down_bias, up_bias, out)),
            self.rows, self.tokens, self.inside, self.outside, self.rank, self.tasks,
            activation, processors, stream, tile,
        )  # fmt: skip

    def run_normed(
        self,
        library: Any,
        normed: torch.Tensor,
        carried: torch.Tensor,
        activation: int,
        tile: int,
        machine: tuple[Any, ...],
    ) -> int:
        bias, skip, down_bias, up_bias = self.given.values()
        return library.utune_normed_branch(
            int(self.dtype == torch.bfloat16),
            *map(pointer, (self.x, bias, skip, self.gamma, self.beta, self.task)),
            *map(pointer, (self.down, self.up, down_bias, up_bias, normed, carried)),
            self.rows, self.tokens, self.inside, self.rank, self.tasks,
            ctypes.c_float(EPSILON), activation, *machine, tile,
        )  # fmt: skip
