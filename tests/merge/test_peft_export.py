"""Deltas as PEFT adapters, held to PEFT itself."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from utune_deploy.merge.attach import Tuned
from utune_deploy.merge.errors import UsageError
from utune_deploy.merge.importers.peft import read_peft
from utune_deploy.merge.methods import (
    bitfit,
    dual_adapter,
    lora,
    prefix,
    serial_adapter,
)
from utune_deploy.merge.to_peft import _alpha, to_peft, write_peft
from utune_deploy.merge.tuner import Branch, Point
from utune_deploy.merge.tuners.bias import Bias
from utune_deploy.merge.tuners.bottleneck import Bottleneck
from utune_deploy.merge.tuners.gain import Gain

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta
    from utune_deploy.merge.sites import Sites

FLOAT64, FLOAT32 = 1e-9, 2e-5
PLAIN = Bottleneck("identity", bias=False)

LAYERS = {
    "vit": ["blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.1.mlp.fc2", "patch_embed.proj"],
    "swin": [
        "layers.0.blocks.0.mlp.fc1",
        "layers.1.blocks.0.mlp.fc1",
        "layers.1.downsample.reduction",
    ],
    "convnext": ["stem.0", "stages.1.downsample.1", "stages.0.blocks.0.mlp.fc1"],
    "resnet": ["conv1", "layer1.0.conv1", "layer4.1.conv1"],  # conv1 is the end of other names
    "deit": ["blocks.0.attn.qkv", "blocks.0.attn.proj"],
}
SCALES = (0.1, 1.0, 7 / 3, -0.5, 1e-3)


@pytest.fixture(scope="module")
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


@torch.no_grad()
def in_peft(peft: Any, backbone: Backbone, folder: Path, classes: int, images: Tensor) -> Tensor:
    """Logits of timm's model with as many classes, and PEFT's adapter."""
    model = copy.deepcopy(backbone.model)
    for path in backbone.classifiers:
        parent, _, name = path.rpartition(".")
        features = model.get_submodule(path).in_features
        head = torch.nn.Linear(features, classes, dtype=images.dtype)
        setattr(model.get_submodule(parent), name, head)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder).eval()(images)


@torch.no_grad()
def tuned(backbone: Backbone, delta: Delta, images: Tensor) -> Tensor:
    return Tuned(backbone, delta.branches, delta.tensors)(images)


def beside(delta: Delta, sites: Sites, layers: list[str], *, bias: bool = False) -> Delta:
    """The delta with a random LoRA beside each layer, every one of another rank and scale."""
    generator = torch.Generator().manual_seed(5)
    branches, tensors = dict(delta.branches), dict(delta.tensors)
    for number, path in enumerate(layers):
        patches = Point(path, "patches")
        tap = patches if sites.calls.get(patches) else Point(path, "input")
        shapes = {"in": sites.channels[tap], "out": sites.channels[Point(path, "output")]}
        shapes["r"] = 3 + 2 * number
        tuner = Bottleneck("identity", bias=bias and number != 1)
        weights = {
            name: torch.randn([shapes[str(axis)] for axis in axes], generator=generator)
            for name, axes in tuner.shapes.items()
        }
        weights["scale"] = torch.tensor(SCALES[number], dtype=torch.float64)
        weights["down"] /= shapes["in"] ** 0.5
        branches[f"{path}/lora"] = Branch(tuner, tap, Point(path, "output"))
        tensors[f"{path}/lora"] = weights
    return replace(delta, branches=branches, tensors=tensors)


def with_branch(delta: Delta, name: str, branch: Branch, **tensors: Tensor) -> Delta:
    return replace(
        delta,
        branches={**delta.branches, name: branch},
        tensors={**delta.tensors, name: tensors},
    )


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("family", LAYERS)
def test_peft_answers_as_the_delta(
    family, bias, peft, host, random_delta, moved, sites_of, error, tmp_path
):
    backbone = host(family)
    sites = sites_of(backbone)
    delta = beside(random_delta(backbone, classes=5), sites, LAYERS[family], bias=bias)
    adapter = to_peft(moved(delta, backbone), backbone, sites)
    write_peft(tmp_path / "adapter", adapter)
    images = torch.randn(2, *backbone.input_size, dtype=torch.float64)
    wanted = tuned(backbone, moved(delta, backbone), images)
    assert error(in_peft(peft, backbone, tmp_path / "adapter", 5, images), wanted) <= FLOAT64
    assert adapter.config["lora_bias"] is bias
    assert len(adapter.config["rank_pattern"]) == len(LAYERS[family]) - 1
    again = read_peft(tmp_path / "adapter", backbone).delta("task", backbone)
    assert error(tuned(backbone, again, images), wanted) <= FLOAT64


def test_in_the_dtype_of_the_delta(peft, host, random_delta, sites_of, error, tmp_path):
    backbone = host("vit", double=False)
    delta = beside(random_delta(backbone, classes=5), sites_of(backbone), LAYERS["vit"])
    write_peft(tmp_path / "adapter", to_peft(delta, backbone))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    images = torch.randn(2, 3, 32, 32)
    found = in_peft(peft, backbone, tmp_path / "adapter", 5, images)
    assert error(found, tuned(backbone, delta, images)) <= FLOAT32


@pytest.mark.parametrize(("every", "named"), [(False, "lora_only"), (True, "all")])
def test_tuned_biases(every, named, peft, vit64, random_delta, sites_of, error, tmp_path):
    methods = [lora(3)]
    delta = random_delta(vit64, *methods, *([bitfit()] if every else []), classes=5)
    if not every:
        point = Point("blocks.1.attn.qkv", "output")
        shift = torch.randn(144, dtype=torch.float64)
        delta = with_branch(delta, "shift", Branch(Bias(), point, point), shift=shift)
    adapter = to_peft(delta, vit64, sites_of(vit64))
    assert adapter.config["bias"] == named
    write_peft(tmp_path / "adapter", adapter)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found = in_peft(peft, vit64, tmp_path / "adapter", 5, images)
    assert error(found, tuned(vit64, delta, images)) <= FLOAT64


@given(scale=st.floats(1e-6, 1e6) | st.floats(-1e3, -1e-3), rank=st.integers(1, 300))
def test_a_scale_is_kept_to_the_last_bit(scale, rank):
    alpha, padded = _alpha(scale, rank)
    assert alpha / padded == scale
    assert rank <= padded < 2 * rank


def test_a_scale_that_no_alpha_gives_pads_the_rank(peft, vit64, random_delta, error, tmp_path):
    rank = 3
    scale = next(s for s in (1.4 + k * 2**-52 for k in range(999)) if _alpha(s, rank)[1] != rank)
    delta = random_delta(vit64, lora(rank), classes=5)
    for name, tensors in delta.tensors.items():
        if name != delta.head:
            tensors["scale"].fill_(scale)  # type: ignore[index]
    adapter = to_peft(delta, vit64)
    assert (adapter.config["r"], adapter.config["lora_alpha"]) == (4, 4 * scale)
    write_peft(tmp_path / "adapter", adapter)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found = in_peft(peft, vit64, tmp_path / "adapter", 5, images)
    assert error(found, tuned(vit64, delta, images)) <= FLOAT64


def at(module: str, side: Any) -> Point:
    return Point(module, side)


QKV = "blocks.0.attn.qkv"
LOW = {"down": torch.ones(2, 48), "up": torch.ones(144, 2), "scale": torch.ones(())}
OTHERS: dict[str, tuple[Branch, dict[str, Tensor], str]] = {
    "a gain": (
        Branch(Gain(shift=False), at(QKV, "output"), at(QKV, "output")),
        {"gain": torch.ones(144)},
        "no form for a gain",
    ),
    "a second LoRA": (
        Branch(PLAIN, at(QKV, "input"), at(QKV, "output")),
        LOW,
        "one LoRA per layer",
    ),
    "a norm of its own": (
        Branch(
            Bottleneck("identity", bias=False, norm="in"),
            at("blocks.0.mlp.fc1", "input"),
            at("blocks.0.mlp.fc1", "output"),
        ),
        {
            "down": torch.ones(2, 48),
            "up": torch.ones(192, 2),
            "scale": torch.ones(()),
            "norm_weight": torch.ones(48),
            "norm_bias": torch.ones(48),
        },
        "layer norm of its own",
    ),
    "around two layers": (
        Branch(PLAIN, at("blocks.0.norm1", "input"), at(QKV, "output")),
        LOW,
        "and not what blocks.0.attn.qkv reads",
    ),
    "a bias before a layer": (
        Branch(Bias(), at(QKV, "input"), at(QKV, "input")),
        {"shift": torch.ones(48)},
        "no bias here",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_branch_without_a_form_is_refused_by_name(case, vit, random_delta, sites_of):
    branch, tensors, reason = OTHERS[case]
    delta = with_branch(random_delta(vit, lora(2), classes=5), case, branch, **tensors)
    with pytest.raises(UsageError, match="has no form as a PEFT adapter") as caught:
        to_peft(delta, vit, sites_of(vit))
    assert f"{case}: " in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("methods", "reason"),
    [
        ([dual_adapter(4)], "between down and up"),
        ([lora(2), serial_adapter(4)], "between down and up"),
        ([lora(2), prefix(3)], "no form for a prefix"),
        ([bitfit()], "no adapter without one"),
        ([], "no adapter without one"),
    ],
)
def test_a_method_without_a_form_is_refused(methods, reason, vit, random_delta, sites_of):
    with pytest.raises(UsageError) as caught:
        to_peft(random_delta(vit, *methods, classes=5), vit, sites_of(vit))
    assert reason in str(caught.value)


def test_what_is_read_was_measured_already(host, random_delta, sites_of):
    """The backbone is not run again to learn which layers it calls."""
    backbone = host("vit")
    sites = sites_of(backbone)
    delta = random_delta(backbone, lora(2), classes=5)
    passes = []
    handle = backbone.model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        to_peft(delta, backbone, sites)
    finally:
        handle.remove()
    assert not passes


def test_beside_a_convolution_as_one_layer_is_refused(host, random_delta, sites_of):
    """What reads a convolution's map and not its patches is no LoRA of it."""
    backbone = host("resnet")
    path = "layer1.0.conv2"
    branch = Branch(PLAIN, Point(path, "input"), Point(path, "output"))
    low = {"down": torch.ones(2, 8), "up": torch.ones(8, 2), "scale": torch.ones(())}
    delta = with_branch(random_delta(backbone, classes=5), "low", branch, **low)
    with pytest.raises(UsageError, match="it stands beside a Conv2d and does not read its patches"):
        to_peft(delta, backbone, sites_of(backbone))


def test_a_layer_that_peft_would_pass_by_is_refused(host, random_delta, sites_of):
    """EVA reads qkv's weight: PEFT's adapter would do nothing."""
    backbone = host("eva")
    with pytest.raises(UsageError, match="read and not called"):
        to_peft(random_delta(backbone, lora(2), classes=5), backbone, sites_of(backbone))
