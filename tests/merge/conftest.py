"""What the tests of this room share: running a task, and moving it to another dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from utune_deploy.merge.attach import restore

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta
    from utune_deploy.merge.sites import Sites


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """These models are too small to share: several threads are ten times slower on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def error() -> Callable[[Tensor, Tensor], float]:
    """Largest difference over the largest value."""

    def error(found: Tensor, wanted: Tensor) -> float:
        assert found.shape == wanted.shape
        difference = (found.double() - wanted.double()).abs().max()
        return float(difference / wanted.double().abs().max())

    return error


@pytest.fixture(scope="session")
def run(sites_of: Callable[[Backbone], Sites]) -> Callable[[Backbone, Delta, Tensor], Tensor]:
    """Logits of one task, alone: `(backbone, delta, images)`."""

    @torch.no_grad()
    def run(backbone: Backbone, delta: Delta, images: Tensor) -> Tensor:
        return restore(backbone, delta, sites_of(backbone))(images)

    return run


@pytest.fixture(scope="session")
def moved() -> Callable[[Delta, Backbone], Delta]:
    """A delta on another copy of its backbone, in that copy's dtype: `(delta, backbone)`."""

    def moved(delta: Delta, backbone: Backbone) -> Delta:
        dtype = next(backbone.model.parameters()).dtype
        tensors = {
            branch: {name: tensor.to(dtype) for name, tensor in named.items()}
            for branch, named in delta.tensors.items()
        }
        return replace(delta, backbone=backbone.identity, tensors=tensors)

    return moved
