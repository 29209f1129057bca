"""Named methods: where each plants what, what training moves, and what no method may do."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from utune_deploy.merge import methods
from utune_deploy.merge.attach import attach
from utune_deploy.merge.backbone import create
from utune_deploy.merge.delta import require_backbone, validate
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.merge.fold import refusals
from utune_deploy.merge.methods import (
    Planted,
    adaptformer,
    bapat,
    bitfit,
    bypass,
    deep_prompt,
    full,
    ia3,
    ladder,
    lokr,
    lora,
    norm_tuning,
    oft,
    parallel_adapter,
    patt,
    shallow_prompt,
    side_tuning,
    ssf,
    together,
    u_tuner,
    unipt,
)
from utune_deploy.merge.sites import measure
from utune_deploy.merge.tuner import Branch, CannotFold, Point
from utune_deploy.merge.tuners.bias import Bias
from utune_deploy.merge.tuners.bottleneck import Bottleneck
from utune_deploy.merge.tuners.difference import Difference
from utune_deploy.merge.tuners.gain import Gain

EVERYWHERE = {
    "lora": lora(2),
    "patt": patt(2, mode="qkv"),
    "adaptformer": adaptformer(2),
    "bapat": bapat(2, 3),
    "bitfit": bitfit(),
    "norms": norm_tuning(),
    "ia3": ia3(),
    "ssf": ssf(),
    "oft": oft(8),
    "lokr": lokr(2, 4),
    "full": full(),
    "prompt": deep_prompt(2),
    "shallow": shallow_prompt(2),
    "bypass": bypass(2),
    "side": side_tuning(),
    "unipt": unipt(6),
    "unipt, batch norms": unipt(6, norm="batch", pool="mean", project="mlp", inner=5),
    "ladder": ladder(8),
    "all": together(lora(2), ia3(), ssf(), bitfit(), norm_tuning()),
}


@pytest.mark.parametrize("name", EVERYWHERE)
def test_every_method_starts_at_the_backbone_and_trains(name, vit, sites_of):
    tuned = attach(vit, EVERYWHERE[name], classes=3, sites=sites_of(vit))
    images = vit.example(2)
    bare = attach(vit, classes=3, sites=sites_of(vit))
    with torch.no_grad():
        for key, value in bare.head.items():
            value.copy_(tuned.head[key])
        change = (tuned(images) - bare(images)).abs().max()
    beside = ("prompt", "shallow", "bypass", "side", "unipt", "unipt, batch norms", "ladder")
    if name not in beside:  # these begin beside the backbone
        assert change < 1e-5
    tuned(images).square().sum().backward()
    moved = [p for p in tuned.trainable() if p.grad is not None and p.grad.abs().max() > 0]
    assert moved


def test_patt_moves_the_thirds_of_its_mode_only(vit, sites_of):
    tuned = attach(vit, patt(3, mode="qv"), classes=3, sites=sites_of(vit))
    optimizer = torch.optim.AdamW(tuned.trainable(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        tuned(vit.example(2)).square().sum().backward()
        optimizer.step()
    for name, _, weights in tuned.parts():
        if name.endswith("/patt"):
            assert not weights["up"][48:96].any()
            assert not weights["up_bias"][48:96].any()
            assert weights["up"][:48].any()
            assert weights["up"][96:].any()


@pytest.mark.parametrize("learn", [False, True])
def test_a_scale_is_learned_only_where_it_is_asked_for(learn, vit, sites_of):
    tuned = attach(vit, adaptformer(2, learn_scale=learn), classes=3, sites=sites_of(vit))
    scales = [w["scale"] for _, _, w in tuned.parts() if "scale" in w]
    assert len(scales) == 3
    assert all(scale.requires_grad == learn for scale in scales)
    listed = {id(p) for p in tuned.trainable()}
    assert all((id(scale) in listed) == learn for scale in scales)


@pytest.mark.parametrize(
    ("options", "tap", "add"),
    [
        ({"op": "attention"}, "blocks.0.attn:input", "blocks.0.attn:output"),
        ({"op": "attention", "before_norm": True}, "blocks.0.norm1:input", "blocks.0.attn:output"),
        ({"op": "ffn"}, "blocks.0.mlp:input", "blocks.0.mlp:output"),
        ({"op": "ffn", "before_norm": True}, "blocks.0.norm2:input", "blocks.0.mlp:output"),
        ({"op": "ffn", "serial": True}, "blocks.0.mlp:output", "blocks.0.mlp:output"),
        ({"op": "block"}, "blocks.0:input", "blocks.0:output"),
        ({"op": "embedding"}, "patch_embed.proj:patches", "patch_embed.proj:output"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_a_u_tuner_reads_and_joins_where_it_says(kind, options, tap, add, vit, sites_of):
    tuned = attach(vit, u_tuner(kind, 2, **options), classes=3, sites=sites_of(vit))
    branch = next(iter(tuned.branches.values()))
    assert (str(branch.tap), str(branch.add)) == (tap, add)
    activation = "gelu" if kind == "adapter" else "identity"
    assert branch.tuner == Bottleneck(activation, bias=kind == "adapter")


@pytest.mark.parametrize(
    ("kind", "op", "sentence"),
    [
        ("prefix", "ffn", "attend to each other"),
        ("prefix", "embedding", "attend to each other"),
        ("prompt", "ffn", "attend to each other"),
        ("novel", "ffn", "no such U-Tuner"),
        ("adapter", "head", "no such U-Tuner"),
    ],
)
def test_a_u_tuner_that_means_nothing(kind, op, sentence):
    with pytest.raises(UsageError, match=sentence):
        u_tuner(kind, 2, op=op)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "prompt", "op": "embedding", "serial": True},
        {"kind": "lora", "op": "block", "before_norm": True},
        {"kind": "adapter", "op": "ffn", "before_norm": True, "serial": True},
    ],
    ids=str,
)
def test_a_u_tuner_without_such_a_place(options):
    with pytest.raises(UsageError, match="no such place"):
        u_tuner(rank=2, **options)


@pytest.mark.parametrize("family", ["beit", "swinv2", "vit"])
def test_what_is_added_to_an_op_joins_the_residual_whole(family, host):
    """Behind BEiT's gamma and Swin V2's norm, so that neither scales the tuner."""
    backbone = host(family)
    block = "blocks.0" if family != "swinv2" else "layers.0.blocks.0"
    sites = measure(backbone)
    tuned = attach(backbone, adaptformer(2, scale=1.0, blocks=(0,)), classes=3, sites=sites)
    for _, _, weights in tuned.parts():
        if "up_bias" in weights:
            weights["up_bias"].data.fill_(0.7)
    seen = {}
    model = backbone.model.get_submodule(block)
    images = backbone.example(1)
    with torch.no_grad():
        for name, run in (("bare", backbone.model), ("tuned", tuned)):
            handle = model.register_forward_hook(
                lambda _, args, y, name=name: seen.update({name: y})
            )
            run(images)
            handle.remove()
    assert torch.allclose(seen["tuned"] - seen["bare"], torch.full_like(seen["bare"], 0.7))


def test_tokens_in_windows_and_tokens_in_rows_do_not_mix(swin, sites_of):
    with pytest.raises(IncompatibleArtefact, match="another order of tokens"):
        attach(swin, u_tuner("adapter", 2, before_norm=True), classes=3, sites=sites_of(swin))
    attach(swin, u_tuner("adapter", 2), classes=3, sites=sites_of(swin))


def test_a_value_that_is_overwritten_is_not_tapped(host):
    backbone = host("resnet")
    tap, add = Point("layer1.0.bn1", "output"), Point("layer1.0.bn2", "output")
    if not any(isinstance(m, nn.ReLU) and m.inplace for m in backbone.model.modules()):
        pytest.fail("the network has no activation that works in place")

    def method(*_):
        yield Planted("late", Branch(Bottleneck("relu", bias=True), tap, add), 2)

    with pytest.raises(IncompatibleArtefact, match="overwrites a tapped value"):
        attach(backbone, method, classes=3)


def test_a_parameter_that_modules_share_has_no_difference_of_its_own(host):
    backbone = host("vit")
    model = backbone.model
    own = model.blocks[1].norm1.weight
    model.blocks[1].norm1.weight = model.blocks[0].norm1.weight
    try:
        point = Point("blocks.0.norm1", "weights")
        branch = Branch(Difference("weight", (48,)), point, point)
        with pytest.raises(IncompatibleArtefact, match="several modules share"):
            measure(backbone).check(branch, {"shift": torch.ones(48)}, where="here")
    finally:
        model.blocks[1].norm1.weight = own


def test_a_tuner_that_the_head_would_replace(vit, random_delta, sites_of):
    at = Point("head", "output")

    def method(*_):
        yield Planted("head/late", Branch(Bias(), at, at))

    with pytest.raises(UsageError, match="replaced by the task's head"):
        attach(vit, method, classes=3, sites=sites_of(vit))
    delta = random_delta(vit, classes=3)
    for branch, tensors in (
        (Branch(Bias(), at, at), {"shift": torch.ones(3)}),
        (
            Branch(Difference("bias", (7,)), Point("head", "weights"), Point("head", "weights")),
            {"shift": torch.ones(7)},
        ),
    ):
        early = replace(
            delta,
            branches={"early": branch, **delta.branches},
            tensors={"early": tensors, **delta.tensors},
        )
        with pytest.raises(IncompatibleArtefact, match="would never act"):
            validate(early, where="here")


def test_side_tuning_mixes_one_feature(host):
    with pytest.raises(UsageError, match="several classifiers"):
        attach(host("deit"), side_tuning(), classes=3)


def test_the_same_prompts_twice(vit64, sites_of, random_delta, run):
    delta = random_delta(vit64, shallow_prompt(2))
    name = "blocks.0/prompt"
    twice = replace(
        delta,
        branches={"again": delta.branches[name], **delta.branches},
        tensors={"again": delta.tensors[name], **delta.tensors},
    )
    require_backbone(twice, vit64, sites_of(vit64))
    images = vit64.example(2)
    assert not torch.equal(run(vit64, twice, images), run(vit64, delta, images))


def test_a_gain_on_patches_stays_parallel():
    tap, add = Point("conv1", "patches"), Point("conv1", "output")
    branch = Branch(Gain(shift=False), tap, add)
    assert branch.place == "over"
    with pytest.raises(CannotFold, match="reads patches"):
        branch.tuner.fold({"gain": torch.ones(4)}, nn.Conv2d(1, 4, 2, 2), "over")


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (lora(0), "rank or length of at least 1"),
        (patt(2, mode="kv"), "never calls this module|no such module"),
        (oft(8, at="attn.nothing"), "no such module"),
        (lokr(2, 5), "does not fit its place|no such module"),
        (parallel_adapter(2, blocks=(9,)), "no such block"),
    ],
)
def test_what_does_not_fit_has_a_sentence(method, sentence, host, vit):
    for backbone in (vit, host("convnext")):
        if sentence.startswith("never") and backbone is vit:
            continue
        with pytest.raises((UsageError, IncompatibleArtefact), match=sentence):
            attach(backbone, method, classes=3)


def test_full_differences_fold(vit, sites_of):
    tuned = attach(vit, full(), classes=3, sites=sites_of(vit))
    assert refusals(tuned.delta("a", list("abc")), vit, sites_of(vit)) == []


SIDE = {
    "vit": ("first", ()),
    "dinov3": ("mean", ()),
    "eva": ("mean", ()),
    "beit": ("mean", ()),
    "deit": None,
    "swin": ("mean", (2,)),
    "swinv2": ("mean", (2,)),
    "convnext": ("mean", (8, 4, 2)),
    "resnet": ("mean", (8, 4, 2)),
}
"""By family how a side network pools, and the cells of its maps; none with several classifiers."""


@pytest.mark.parametrize("family", SIDE)
def test_a_side_network_reads_every_hidden_state(family, host, sites_of, random_delta, run):
    """UniPT on blocks or on stages; the trunk is untouched, and its classifier reads the network."""
    backbone = host(family)
    if SIDE[family] is None:
        for method in (unipt(8), ladder(8)):
            with pytest.raises(UsageError, match="several classifiers"):
                attach(backbone, method, classes=3, sites=sites_of(backbone))
        return
    gives, cells = SIDE[family]
    delta, bare = random_delta(backbone, unipt(8)), random_delta(backbone)
    (branch,) = (b for b in delta.branches.values() if not b.tuner.answers)
    assert branch.tuner.kind == ("unipt_pyramid" if cells else "unipt")
    assert branch.tuner.gives == gives
    assert getattr(branch.tuner, "cells", ()) == cells
    assert str(branch.add) == f"{backbone.classifiers[0]}:input"
    if not cells:
        found = [f"blocks.{number}:output" for number in range(3)]
        assert [str(point) for point in branch.taps] == ["blocks.0:input", *found]
    seen = []
    handle = backbone.model.get_submodule(branch.taps[-1].module).register_forward_hook(
        lambda _, args, value: seen.append(value)
    )
    images = backbone.example(2)
    try:
        for task in (delta, bare):
            run(backbone, task, images)
    finally:
        handle.remove()
    assert torch.equal(*seen)
    whole = refusals(delta, backbone, sites_of(backbone))
    assert [r.reason for r in whole] == [branch.tuner.no_fold]
    assert "no weight of the backbone holds it" in branch.tuner.no_fold


@pytest.mark.parametrize("family", SIDE)
def test_a_ladder_wants_the_same_tokens(family, host, sites_of):
    backbone = host(family)
    if SIDE[family] and not SIDE[family][1]:
        tuned = attach(backbone, ladder(8, heads=2), classes=3, sites=sites_of(backbone))
        branch = next(iter(tuned.branches.values()))
        assert branch.tuner.widths == (48,) * 4
        assert branch.tuner.gives == SIDE[family][0]
        return
    with pytest.raises(UsageError, match=r"several classifiers|with the same tokens") as caught:
        attach(backbone, ladder(8), classes=3, sites=sites_of(backbone))
    assert backbone.identity.architecture in caught.value.details["where"]


def test_hidden_states_that_do_not_fit_each_other():
    clips = {"clip_size": [4, 16, 24], "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
    clip = create("video_swin_base", {**clips, "window_size": [2, 3, 3]})
    odd = {"pretrained_cfg_overlay": {"input_size": [3, 72, 72]}, "channels": [8, 8, 8, 8]}
    resnet = create("resnet18", {**odd, "layers": [1, 1, 1, 1]})
    for backbone, sentence in ((clip, "tokens grow fewer"), (resnet, "not a whole number")):
        with pytest.raises(UsageError, match=sentence):
            attach(backbone, unipt(8), classes=3)
    bare = create("vgg11", {"pretrained_cfg_overlay": {"input_size": [3, 64, 64]}})
    with pytest.raises(UsageError, match="with the same tokens"):
        attach(bare, ladder(8), classes=3)


def test_the_arguments_of_every_method_are_in_its_document():
    text = (Path(__file__).resolve().parents[2] / "docs" / "tuners.md").read_text()
    helpers = {"Method", "Planted", "head_branch", "in_blocks", "together"}
    for name in set(methods.__all__) - helpers:
        parts, star = [], False
        for parameter in inspect.signature(getattr(methods, name)).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and not star:
                parts, star = [*parts, "*"], True
            needed = parameter.default is parameter.empty
            parts.append(parameter.name if needed else f"{parameter.name}={parameter.default!r}")
        assert f"\n    {name}({', '.join(parts)})\n" in text
