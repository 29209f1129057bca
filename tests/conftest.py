"""Small seeded backbones and random deltas, for every room that needs a model.

The tests of serving run without torch, so torch is imported by the fixtures that need it and not here.
"""

from __future__ import annotations

import copy
import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import ModuleType

    from torch import Tensor, nn

    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta
    from utune_deploy.merge.sites import Sites

VIT = (
    "vit_base_patch16_224",
    {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 4,
        "num_classes": 7,
    },
)
SWIN = (
    "swin_tiny_patch4_window7_224",
    {
        "img_size": 64,
        "window_size": 4,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "num_classes": 6,
    },
)
SEQUENCE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": VIT,
    "dinov3": ("vit_small_patch16_dinov3", SEQUENCE),
    "eva": ("eva02_tiny_patch14_224", SEQUENCE),
    "beit": ("beit_base_patch16_224", SEQUENCE),
    "deit": ("deit_tiny_distilled_patch16_224", SEQUENCE),
    "swin": SWIN,
    "swinv2": (
        "swinv2_tiny_window8_256",
        {
            "img_size": 64,
            "window_size": 4,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
        },
    ),
    "convnext": (
        "convnext_tiny",
        {
            "depths": [1, 1, 1, 2],
            "dims": [8, 16, 24, 32],
            "pretrained_cfg_overlay": {"input_size": [3, 64, 64]},
        },
    ),
    "resnet": (
        "resnet18",
        {
            "layers": [1, 1, 1, 2],
            "channels": [8, 16, 24, 32],
            "pretrained_cfg_overlay": {"input_size": [3, 64, 64]},
        },
    ),
}
"""One small backbone per family of architectures: name and arguments of timm."""


def _fill(model: nn.Module, seed: int) -> None:
    """Random values everywhere: timm's zero biases and unit norms would hide mistakes."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                fan_in = parameter[0].numel() if name.endswith("weight") else 1
                parameter.copy_(noise * fan_in**-0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))


def _backbone(architecture: str, arguments: Mapping[str, Any], seed: int) -> Backbone:
    import timm
    import torch

    from utune_deploy.merge.backbone import wrap

    torch.set_num_threads(1)  # these models are too small to share
    model = timm.create_model(architecture, pretrained=False, **arguments)
    _fill(model, seed)
    return wrap(model, architecture, arguments)


def _double(backbone: Backbone) -> Backbone:
    from utune_deploy.merge.backbone import wrap

    model = copy.deepcopy(backbone.model).double()
    return wrap(model, backbone.identity.architecture, backbone.identity.arguments)


@pytest.fixture(scope="session")
def vit() -> Backbone:
    """A ViT of 3 blocks, 48 channels, 4 heads, 32x32 pixels and 17 tokens, float32."""
    return _backbone(*VIT, seed=1)


@pytest.fixture(scope="session")
def swin() -> Backbone:
    """A Swin of 2 + 2 blocks, 64x64 pixels, windows of 4, every second block shifted, float32."""
    return _backbone(*SWIN, seed=2)


@pytest.fixture(scope="session")
def wide_vit() -> Backbone:
    """A ViT of 2 blocks, 64 channels, which the fused branches take, 2 heads and 17 tokens, float32."""
    return _backbone(VIT[0], {**VIT[1], "embed_dim": 64, "depth": 2, "num_heads": 2}, seed=4)


@pytest.fixture(scope="session")
def vit64(vit: Backbone) -> Backbone:
    """The ViT in float64."""
    return _double(vit)


@pytest.fixture(scope="session")
def swin64(swin: Backbone) -> Backbone:
    """The Swin in float64."""
    return _double(swin)


@pytest.fixture(scope="session")
def host(
    vit: Backbone, swin: Backbone, vit64: Backbone, swin64: Backbone
) -> Callable[..., Backbone]:
    """A small backbone of a family: `(family, double=True) -> Backbone`, once per family."""
    made = {
        ("vit", False): vit,
        ("vit", True): vit64,
        ("swin", False): swin,
        ("swin", True): swin64,
    }

    def host(family: str, *, double: bool = True) -> Backbone:
        if (family, False) not in made:
            architecture, arguments = FAMILIES[family]
            made[family, False] = _backbone(architecture, {**arguments, "num_classes": 7}, seed=3)
        if (family, double) not in made:
            made[family, True] = _double(made[family, False])
        return made[family, double]

    return host


@pytest.fixture(scope="session")
def sites_of() -> Callable[[Backbone], Sites]:
    """`measure`, once per backbone."""
    from utune_deploy.merge.sites import measure

    seen: dict[str, Sites] = {}

    def sites_of(backbone: Backbone) -> Sites:
        key = f"{id(backbone.model)} {backbone.identity.fingerprint}"
        if key not in seen:
            seen[key] = measure(backbone)
        return seen[key]

    return sites_of


@pytest.fixture(scope="session")
def random_weights() -> Callable[..., dict[str, Tensor]]:
    """Random tensors for a tuner: `(tuner, sizes, seed, dtype) -> {name: tensor}`.

    `sizes` are those of the symbols; the factors `c` and `d` of channels follow from `out` and `in`.
    """
    import torch

    def random_weights(
        tuner: Any, sizes: Mapping[str, int], seed: int = 0, dtype: Any = torch.float32
    ) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if hasattr(tuner, "columns"):
            factors = {"c": sizes["out"] // tuner.rows, "d": sizes["in"] // tuner.columns}
            sizes = {**factors, **sizes}
        weights = {}
        for name, axes in tuner.shapes.items():
            shape = [axis if isinstance(axis, int) else sizes[axis] for axis in axes]
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            if name.startswith("gate"):
                noise = 0.1 * noise  # a softmax or sigmoid behind it would saturate
            elif not shape or name.endswith("_var"):
                noise = 0.5 + noise.abs()
            elif len(shape) == 2 and axes[1] == "in":
                noise = noise * 1.5 * sizes["in"] ** -0.5
            elif isinstance(axes[-1], int) or axes[-1] in ("in", "d"):
                noise = noise * math.prod(shape[1:] if len(shape) != 3 else shape[2:]) ** -0.5
            elif len(shape) == 1:
                noise = 0.5 * noise
            weights[name] = noise.to(dtype)
        return weights

    return random_weights


@pytest.fixture(scope="session")
def random_delta(
    sites_of: Callable[[Backbone], Sites], random_weights: Callable[..., dict[str, Tensor]]
) -> Callable[..., Delta]:
    """A delta of `methods.py` lists with random values, in the backbone's dtype.

    `(backbone, *methods, task="a", classes=5, seed=0) -> Delta`
    """
    from utune_deploy.merge.attach import attach
    from utune_deploy.merge.tuner import bind

    def random_delta(
        backbone: Backbone, *methods: Any, task: str = "a", classes: int = 5, seed: int = 0
    ) -> Delta:
        tuned = attach(backbone, *methods, classes=classes, sites=sites_of(backbone))
        delta = tuned.delta(task, [f"{task}{i}" for i in range(classes)])
        dtype = next(backbone.model.parameters()).dtype
        tensors = {}
        for number, (name, branch) in enumerate(delta.branches.items()):
            sizes = {"in": 0, "out": 0, "r": 0}
            sizes |= bind(branch.tuner.shapes, delta.tensors[name], where=name)
            tensors[name] = random_weights(branch.tuner, sizes, 1000 * seed + number, dtype)
        return replace(delta, tensors=tensors)

    return random_delta


STANDINS = Path(__file__).parent / "export" / "standins"


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The stand-in for TensorRT, loaded afresh beside the one for CUDA's runtime; see its docstring."""
    monkeypatch.setattr(sys, "path", [str(STANDINS), *sys.path])
    for name in ("tensorrt", "standin_cuda"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    standin = importlib.import_module("tensorrt")
    assert Path(standin.__file__ or "").parent == STANDINS
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", standin.standin_cuda)
    yield standin
    for name in ("tensorrt", "standin_cuda"):
        sys.modules.pop(name, None)
