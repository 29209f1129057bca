"""A merged checkpoint is a plain timm checkpoint with the task inside, or it is not written."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from utune_deploy.merge.backbone import wrap
from utune_deploy.merge.bank import stack
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.merge.fold import LOSS, fold, refusals, report
from utune_deploy.merge.methods import (
    bitfit,
    deep_prompt,
    full,
    ia3,
    lokr,
    lora,
    norm_tuning,
    oft,
    parallel_adapter,
    prefix,
    serial_adapter,
    ssf,
)
from utune_deploy.merge.mixed import Mixed
from utune_deploy.merge.tuner import Branch, Point, Tuner
from utune_deploy.merge.tuners.bias import Bias
from utune_deploy.merge.tuners.bottleneck import Bottleneck
from utune_deploy.merge.tuners.difference import Difference
from utune_deploy.merge.tuners.gain import Gain
from utune_deploy.merge.tuners.kronecker import Kronecker
from utune_deploy.merge.tuners.norm import Norm
from utune_deploy.merge.tuners.rotation import Rotation

if TYPE_CHECKING:
    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

LINEAR = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


BESIDE = {"activation": "identity"}
METHODS = {
    "linear probe": [],
    "lora": [lora(4)],
    "lora, alpha 16 over r 4": [lora(4, alpha=16)],
    "lora everywhere": [lora(2 + i, alpha=3, at=at) for i, at in enumerate(LINEAR)],
    "bitfit": [bitfit()],
    "bitfit, then lora": [bitfit(), lora(3)],
    "lora, then bitfit": [lora(3), bitfit()],
    "serial": [serial_adapter(3, at="mlp.fc2", scale=0.7, **BESIDE)],
    "beside, then serial": [
        parallel_adapter(2, at="attn.proj", scale=2.0, **BESIDE),
        serial_adapter(3, at="attn.proj", **BESIDE),
    ],
    "serial, then beside": [
        serial_adapter(3, at="attn.proj", **BESIDE),
        parallel_adapter(2, at="attn.proj", **BESIDE),
    ],
    "serial between": [
        lora(2, at="mlp.fc1"),
        serial_adapter(3, at="mlp.fc1", **BESIDE),
        bitfit(),
    ],
    "ia3, then lora": [ia3(), lora(2)],
    "rotation, then ia3, then lora": [oft(4), ia3(outputs=(), inputs=("attn.qkv",)), lora(2)],
    "lora, then rotation": [lora(2), oft(8), bitfit()],
    "scale and shift": [ssf()],
    "norms, then scale and shift": [norm_tuning(), ssf()],
    "scale and shift, then norms": [ssf(), norm_tuning()],
    "kronecker": [lokr(2, 4, scale=0.5)],
    "full": [full()],
    "full, and lora": [lora(2), full(), bitfit()],
}


def plain(backbone: Backbone, tensors: dict[str, torch.Tensor], classes: int) -> torch.nn.Module:
    """The checkpoint in a model that timm alone makes."""
    model = timm.create_model(
        backbone.identity.architecture, **backbone.identity.arguments, num_classes=classes
    )
    dtype = next(iter(tensors.values())).dtype
    model.to(dtype).load_state_dict(tensors, strict=True)
    return model.eval()


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("name", METHODS)
def test_the_checkpoint_is_the_tuned_model(
    family, name, request, random_delta, moved, sites_of, run, error, tmp_path
):
    backbone32 = request.getfixturevalue(family)
    backbone64 = request.getfixturevalue(f"{family}64")
    for backbone, tolerance in ((backbone64, 1e-11), (backbone32, 3e-5)):
        delta = random_delta(backbone, *METHODS[name], classes=9)
        assert refusals(delta, backbone) == []
        merged = fold(delta, backbone, sites=sites_of(backbone))
        assert merged.dtype == next(backbone.model.parameters()).dtype
        save_file(dict(merged.tensors), tmp_path / "merged")
        model = plain(backbone, load_file(tmp_path / "merged"), 9)
        images = backbone.example(3)
        with torch.no_grad():
            assert error(model(images), run(backbone, delta, images)) < tolerance


SMALL = Bottleneck("identity", bias=True)
AT_ONE_OP: dict[str, tuple[str, str, list[tuple[Tuner, str]]]] = {
    "linear": (
        "vit",
        "blocks.1.attn.qkv",
        [
            (Difference("weight", (144, 48)), "weights"),
            (Difference("bias", (144,)), "weights"),
            (Rotation(8, 6, 1), "before"),
            (Gain(shift=True), "before"),
            (Bias(), "before"),
            (SMALL, "before"),
            (SMALL, "beside"),
            (Kronecker(3, 4), "beside"),
            (SMALL, "behind"),
            (Gain(shift=True), "behind"),
            (Bias(), "behind"),
        ],
    ),
    "layer norm": (
        "vit",
        "blocks.1.norm2",
        [
            (Difference("weight", (48,)), "weights"),
            (Norm(1e-6), "beside"),
            (Gain(shift=True), "behind"),
            (Norm(1e-6), "beside"),
            (Bias(), "behind"),
        ],
    ),
    "patches": (
        "vit",
        "patch_embed.proj",
        [
            (Difference("bias", (48,)), "weights"),
            (SMALL, "patches"),
            (Gain(shift=True), "behind"),
            (Bottleneck("identity", bias=False), "patches"),
            (Bias(), "behind"),
        ],
    ),
    "batch norm": (
        "resnet",
        "layer4.1.bn1",
        [
            (Difference("running_mean", (32,)), "weights"),
            (Gain(shift=True), "beside"),
            (Gain(shift=False), "behind"),
            (Bias(), "behind"),
            (Gain(shift=False), "beside"),
        ],
    ),
    "classifier": (
        "vit",
        "head",
        [
            (Gain(shift=True), "before"),
            (Bias(), "before"),
            (SMALL, "before"),
            (Rotation(12, 4), "before"),
        ],
    ),
}
SIDES = {
    "weights": ("weights", "weights"),
    "before": ("input", "input"),
    "beside": ("input", "output"),
    "behind": ("output", "output"),
    "patches": ("patches", "output"),
}


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("name", AT_ONE_OP)
def test_branches_at_one_op_fold_in_any_order(
    name, order, host, random_delta, random_weights, sites_of, run, error
):
    """What stands before, beside and behind an op, listed as it comes; and the same in a mixed batch."""
    family, module, listed = AT_ONE_OP[name]
    backbone = host(family)
    sites = sites_of(backbone)
    bare = random_delta(backbone, classes=4)
    shuffled = torch.randperm(len(listed), generator=torch.Generator().manual_seed(order)).tolist()
    branches, tensors = {}, {}
    for number in shuffled if order else range(len(listed)):
        tuner, where = listed[number]
        tap, add = (Point(module, side) for side in SIDES[where])
        sizes = {"r": 2}
        if where != "weights":
            sizes |= {"in": sites.require(tap), "out": sites.require(add)}
        branches[f"x{number}"] = Branch(tuner, tap, add)
        w = random_weights(tuner, sizes, number, torch.float64)
        tensors[f"x{number}"] = {key: 0.3 * tensor for key, tensor in w.items()}
    at = order % 2  # the head stands first or last
    parts = [(branches, tensors), (bare.branches, bare.tensors)][:: 1 if at else -1]
    task = replace(bare, branches=parts[0][0] | parts[1][0], tensors=parts[0][1] | parts[1][1])
    images = backbone.example(2)
    wanted = run(backbone, task, images)
    assert error(wanted, run(backbone, bare, images)) > 1e-3
    merged = fold(task, backbone, sites=sites)
    model = copy.deepcopy(backbone.model)
    model.reset_classifier(4)
    model.load_state_dict(merged.tensors, strict=True, assign=True)
    with torch.no_grad():
        assert error(model.eval()(images), wanted) < 1e-11
    free = {n: b for n, b in task.branches.items() if b.tuner.join != "weights"}
    task = replace(task, branches=free, tensors={n: task.tensors[n] for n in free})
    with torch.no_grad():
        bank = stack([replace(bare, task="bare"), task])
        together = Mixed(backbone, bank)(images, torch.tensor([1, 0]))
    assert error(together[:1], run(backbone, task, images[:1])) < 1e-12
    assert error(together[1:], run(backbone, bare, images[1:])) < 1e-12


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [4, 6, 8, 10]}),
        ("resnet10t", {"channels": [4, 6, 8, 10]}),
    ],
)
def test_every_bias_of_a_convolutional_backbone(architecture, arguments, random_delta, run, error):
    """Norms over maps `[B, C, H, W]` shift channels, not columns."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=4, **arguments).double()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape).double())
    backbone = wrap(model, architecture, arguments)
    delta = random_delta(backbone, bitfit(), classes=4)
    for name, branch in delta.branches.items():
        if branch.tuner.kind == "bias":
            shift = delta.tensors[name]["shift"]
            assert shift.shape == model.get_submodule(branch.add.module).bias.shape
    merged = fold(delta, backbone)
    images = backbone.example(1)
    with torch.no_grad():
        found = plain(backbone, merged.tensors, 4)(images)
    assert error(found, run(backbone, delta, images)) < 1e-11


def test_only_what_the_task_moves_changes(vit, random_delta, sites_of):
    delta = random_delta(vit, lora(2, blocks=(1,)))
    merged = fold(delta, vit, sites=sites_of(vit))
    frozen = vit.model.state_dict()
    changed = {
        name
        for name, tensor in merged.tensors.items()
        if frozen[name].shape != tensor.shape or not torch.equal(frozen[name], tensor)
    }
    assert changed == {"blocks.1.attn.qkv.weight", "head.weight", "head.bias"}
    assert [loss.tensor for loss in merged.losses] == ["blocks.1.attn.qkv.weight"]


def test_the_backbone_is_not_changed(vit, random_delta, sites_of):
    before = copy.deepcopy(vit.model.state_dict())
    for listed in METHODS.values():
        fold(random_delta(vit, *listed), vit, sites=sites_of(vit), dtype=torch.float16)
    assert all(torch.equal(t, before[n]) for n, t in vit.model.state_dict().items())
    assert all(not p.requires_grad for p in vit.model.parameters())


def test_scale_is_alpha_over_r(vit64, random_delta, sites_of):
    """`W + alpha / r * up down`, the factor taken from the attached model."""
    from utune_deploy.merge.attach import attach

    tuned = attach(vit64, lora(4, alpha=6), classes=3, sites=sites_of(vit64))
    w = dict(tuned.weights[0].items())
    assert w["scale"].item() == 6 / 4
    delta = tuned.delta("a", ["a", "b", "c"])
    name = next(iter(delta.branches))
    up = torch.randn(144, 4, generator=torch.Generator().manual_seed(0))
    down = w["down"].detach()
    tensors = {**delta.tensors, name: {"up": up, "down": down, "scale": torch.tensor(1.5)}}
    merged = fold(replace(delta, tensors=tensors), vit64, sites=sites_of(vit64))
    frozen = vit64.model.state_dict()["blocks.0.attn.qkv.weight"]
    wanted = frozen + 1.5 * up.double() @ down.double()
    assert torch.allclose(merged.tensors["blocks.0.attn.qkv.weight"], wanted, rtol=0, atol=1e-13)


# All or nothing


@pytest.mark.parametrize(
    ("method", "label", "reason"),
    [
        (serial_adapter(2), "serial", "gelu between down and up"),
        (parallel_adapter(2, activation="tanh"), "adapter", "tanh between down and up"),
        (
            parallel_adapter(2, activation="identity"),
            "adapter",
            "a Mlp, which is not one linear layer",
        ),
        (
            parallel_adapter(2, at="norm1", activation="identity"),
            "adapter",
            "a LayerNorm, which is not",
        ),
        (prefix(2), "prefix", "no weight of the backbone holds them"),
        (deep_prompt(2), "prompt", "no weight of the backbone holds them"),
    ],
)
def test_one_refusal_is_enough(method, label, reason, vit, random_delta, sites_of):
    """Everything that can fold stands beside what cannot, and nothing is merged."""
    delta = random_delta(vit, lora(2), method)
    refused = refusals(delta, vit)
    assert [r.branch.rpartition("/")[2] for r in refused] == [label] * 3
    assert all(reason in r.reason for r in refused)
    with pytest.raises(
        UsageError, match="cannot be merged exactly, so nothing was merged"
    ) as caught:
        fold(delta, vit, sites=sites_of(vit))
    assert caught.value.exit_code == 2
    assert reason in caught.value.details["found"]
    assert "--mode parallel" in caught.value.details["do"]


def test_places_that_do_not_fold(vit, random_delta):
    delta = random_delta(vit, lora(2, blocks=(1,)))
    name = "blocks.1.attn.qkv/lora"
    tuner = delta.branches[name].tuner
    for tap, add, reason in (
        ("blocks.1.attn:input", "blocks.1.attn:input", "which is not one linear layer"),
        (
            "blocks.1.attn.qkv:output",
            "blocks.1.attn.qkv:input",
            "not the input of blocks.1.attn.qkv",
        ),
        ("blocks.0.norm1:input", "blocks.1.attn.qkv:output", "not the input of blocks.1.attn.qkv"),
        ("blocks.1.norm1:output", "blocks.1.attn.qkv:output", "not the input of blocks.1.attn.qkv"),
    ):
        branch = Branch(tuner, Point.parse(tap), Point.parse(add))
        (refused,) = refusals(replace(delta, branches={**delta.branches, name: branch}), vit)
        assert refused.branch == name
        assert reason in refused.reason
        assert str(refused) == f"{name}: {refused.reason}: {refused.alternative}"


@pytest.fixture(scope="module")
def without_bias():
    """A ViT whose qkv layers have no bias."""
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
    arguments["qkv_bias"] = False
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", num_classes=4, **arguments).double()
    return wrap(model, "vit_base_patch16_224", arguments)


def test_a_layer_without_bias_has_no_room_for_a_constant(without_bias, random_delta, sites_of):
    delta = random_delta(
        without_bias, parallel_adapter(2, at="attn.qkv", activation="identity"), classes=4
    )
    refused = refusals(delta, without_bias)
    assert len(refused) == 3
    assert all("frozen layer has no bias" in r.reason for r in refused)
    with pytest.raises(UsageError, match="no bias"):
        fold(delta, without_bias, sites=sites_of(without_bias))


def test_a_layer_without_bias_takes_what_is_linear(
    without_bias, random_delta, sites_of, run, error
):
    qkv = Point("blocks.1.attn.qkv", "output")
    for listed in ([lora(3)], [lora(3, at="attn.proj"), bitfit()]):
        delta = random_delta(without_bias, *listed, classes=4)
        if "blocks.1.attn.qkv/lora" in delta.branches:  # and a serial one, without a constant part
            branch = delta.branches["blocks.1.attn.qkv/lora"]
            square = {"down": torch.ones(2, 144).double() / 99, "up": torch.ones(144, 2).double()}
            delta = replace(
                delta,
                branches={**delta.branches, "serial": Branch(branch.tuner, qkv, qkv)},
                tensors={
                    **delta.tensors,
                    "serial": {**square, "scale": torch.tensor(0.3).double()},
                },
            )
        images = without_bias.example(2)
        merged = fold(delta, without_bias, sites=sites_of(without_bias))
        assert "blocks.1.attn.qkv.bias" not in merged.tensors
        with torch.no_grad():
            found = plain(without_bias, merged.tensors, 4)(images)
        assert error(found, run(without_bias, delta, images)) < 1e-11


def test_another_backbone_is_refused(vit, vit64, random_delta):
    with pytest.raises(IncompatibleArtefact, match="another backbone"):
        fold(random_delta(vit, lora(2)), vit64)


def test_a_backbone_without_a_classifier_gets_one(vit, random_delta, moved, run, error):
    """A backbone file without a head merges to a checkpoint with the task's."""
    arguments = vit.identity.arguments
    model = timm.create_model("vit_base_patch16_224", num_classes=0, **arguments)
    state = {k: v for k, v in vit.model.state_dict().items() if not k.startswith("head.")}
    model.load_state_dict(state)
    headless = wrap(model, "vit_base_patch16_224", arguments)
    assert headless.identity.fingerprint == vit.identity.fingerprint
    delta = random_delta(vit, lora(2), classes=6)
    merged = fold(delta, headless)
    images = vit.example(2)
    with torch.no_grad():
        assert error(plain(vit, merged.tensors, 6)(images), run(vit, delta, images)) < 1e-5
    assert torch.equal(run(headless, delta, images), run(vit, delta, images))


# The loss report


def to_half(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Rounding to nearest even, in NumPy alone, exactly representable in float64."""
    if dtype == torch.float16:
        return values.astype(np.float16).astype(np.float64)
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def small(delta: Delta, factor: float) -> Delta:
    tensors = {
        name: {**w, "scale": w["scale"] * factor} if "scale" in w else w
        for name, w in delta.tensors.items()
    }
    return replace(delta, tensors=tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 0.01, 1e-4])
def test_losses_against_numpy(dtype, factor, vit, random_delta, sites_of):
    delta = small(random_delta(vit, lora(2), lora(3, at="mlp.fc1")), factor)
    merged = fold(delta, vit, dtype=dtype, sites=sites_of(vit))
    assert {t.dtype for t in merged.tensors.values()} == {dtype}
    frozen = {n: t.double().numpy() for n, t in vit.model.state_dict().items()}
    assert len(merged.losses) == 6
    for loss in merged.losses:
        module = loss.tensor.removesuffix(".weight")
        w = {k: t.double().numpy() for k, t in delta.tensors[f"{module}/lora"].items()}
        exact = frozen[loss.tensor] + w["scale"] * (w["up"] @ w["down"])
        wanted = exact - frozen[loss.tensor]
        realised = to_half(exact, dtype) - to_half(frozen[loss.tensor], dtype)
        stored = merged.tensors[loss.tensor].double().numpy()
        assert (stored == to_half(exact, dtype)).mean() > 0.999  # one ulp of the float64 product
        error = np.linalg.norm(realised - wanted) / np.linalg.norm(wanted)
        assert loss.error == pytest.approx(error, rel=1e-3)
        unmoved = (realised[wanted != 0] == 0).mean()
        assert loss.unmoved == pytest.approx(unmoved, abs=1e-3)
        assert loss.largest == pytest.approx(np.abs(exact).max())
    errors = [loss.error for loss in merged.losses]
    assert errors == sorted(errors, reverse=True)
    assert merged.worst is merged.losses[0]


def test_the_warning_trips_at_its_threshold(vit, random_delta, sites_of):
    delta = random_delta(vit, lora(2))
    for dtype, factor, trips in (
        (torch.float32, 1e-3, False),
        (torch.bfloat16, 1.0, False),
        (torch.bfloat16, 1e-2, True),
        (torch.float16, 1e-4, True),
    ):
        merged = fold(small(delta, factor), vit, dtype=dtype, sites=sites_of(vit))
        assert (merged.worst.error > LOSS) == trips
        assert (merged.warning is not None) == trips
        if trips:
            assert merged.worst.tensor in merged.warning
            assert f"{merged.worst.error:.0%}" in merged.warning
    edge = replace(merged, losses=(replace(merged.worst, error=LOSS),))
    assert edge.warning is None
    over = replace(merged, losses=(replace(merged.worst, error=math.nextafter(LOSS, 1)),))
    assert over.warning is not None


def test_the_report_is_json(vit, random_delta, sites_of):
    import json

    merged = fold(random_delta(vit, lora(2)), vit, dtype=torch.float16, sites=sites_of(vit))
    values = json.loads(json.dumps(report(merged), allow_nan=False))
    assert values["dtype"] == "float16"
    assert values["changed_tensors"] == len(values["tensors"]) == 3
    assert set(values["tensors"][0]) == {"tensor", "error", "unmoved", "largest"}


def test_a_linear_probe_loses_nothing(vit, random_delta, sites_of):
    merged = fold(random_delta(vit), vit, dtype=torch.float16, sites=sites_of(vit))
    assert merged.losses == ()
    assert merged.worst is None
    assert merged.warning is None
