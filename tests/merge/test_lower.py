"""Deep prompts are constant prefixes, and both are VPT-deep as its paper writes it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from utune_deploy.merge.backbone import wrap
from utune_deploy.merge.bank import stack
from utune_deploy.merge.errors import IncompatibleArtefact
from utune_deploy.merge.lower import lower
from utune_deploy.merge.methods import (
    bitfit,
    deep_prompt,
    dual_adapter,
    lora,
    prefix,
    serial_adapter,
    shallow_prompt,
)
from utune_deploy.merge.mixed import Mixed
from utune_deploy.merge.parallel import joined
from utune_deploy.merge.tuner import Branch, Point
from utune_deploy.merge.tuners.prefix import Prefix
from utune_deploy.merge.tuners.prompt import Prompt

if TYPE_CHECKING:
    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

COMBINATIONS = {
    "alone": [deep_prompt(3)],
    "one token": [deep_prompt(1)],
    "more tokens than patches": [deep_prompt(20)],
    "lora": [deep_prompt(3), lora(4, alpha=8)],
    "every bias": [deep_prompt(3), bitfit()],
    "every bias first": [bitfit(), deep_prompt(3)],
    "serial adapters": [deep_prompt(3), serial_adapter(4), serial_adapter(2, at="attn")],
    "adapters beside": [deep_prompt(3), dual_adapter(4)],
    "adapters on qkv": [deep_prompt(3), serial_adapter(3, at="attn.qkv", activation="tanh")],
    **{
        f"prefix of {length}, joint {joint}": [deep_prompt(3), prefix(length, joint_softmax=joint)]
        for length in (2, 3, 7)
        for joint in (True, False)
    },
    "prefix first": [prefix(4), deep_prompt(3)],
    "everything": [
        bitfit(),
        lora(2),
        prefix(4),
        deep_prompt(3),
        serial_adapter(3),
        dual_adapter(2),
    ],
}
listed = pytest.mark.parametrize("methods", COMBINATIONS.values(), ids=list(COMBINATIONS))


@torch.no_grad()
def vpt_deep(backbone: Backbone, delta: Delta, images: torch.Tensor) -> torch.Tensor:
    """VPT-deep (arXiv 2203.12119, eq. 5), literally.

    Tokens are appended in front of block 0, and the last P tokens are replaced in front of each
    block after it. They stay to the end, and the class token is read.
    """
    model = backbone.model
    prompts = [delta.tensors[f"blocks.{i}/prompt"]["token"] for i in range(len(model.blocks))]
    length = len(prompts[0])
    others = [
        (branch, delta.tensors[name])
        for name, branch in delta.branches.items()
        if branch.tuner.join != "tokens"
    ]
    with joined(model, others):
        x = model.patch_embed(images)
        x = model.norm_pre(model._pos_embed(x))
        for number, (block, prompt) in enumerate(zip(model.blocks, prompts, strict=True)):
            kept = x if number == 0 else x[:, :-length]
            x = block(torch.cat([kept, prompt.expand(len(x), *prompt.shape)], dim=1))
        return model.forward_head(model.norm(x))


@listed
def test_prompts_are_vpt_deep(methods, vit64, random_delta, run, error):
    delta = random_delta(vit64, *methods)
    images = vit64.example(3)
    assert error(run(vit64, delta, images), vpt_deep(vit64, delta, images)) < 1e-12


@listed
def test_lowered_is_the_same(methods, vit64, random_delta, sites_of, run, error):
    delta = random_delta(vit64, *methods)
    lowered = lower(vit64, delta, sites_of(vit64))
    assert all(branch.tuner.join != "tokens" for branch in lowered.branches.values())
    assert list(lowered.branches) == list(delta.branches)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5)).double()
    assert error(run(vit64, lowered, images), run(vit64, delta, images)) < 1e-10
    assert error(run(vit64, lowered, images), vpt_deep(vit64, delta, images)) < 1e-10


def test_lowered_in_float32(vit, random_delta, sites_of, run, error):
    """Constants are measured in float64 and cast once."""
    delta = random_delta(vit, *COMBINATIONS["everything"])
    lowered = lower(vit, delta, sites_of(vit))
    name = "blocks.1/prompt"
    assert lowered.tensors[name]["key"].dtype == torch.float32
    assert lowered.tensors[name]["key"].shape == (3, 48)
    images = vit.example(3)
    assert error(run(vit, lowered, images), run(vit, delta, images)) < 1e-5


def test_prompts_in_some_blocks_and_of_unlike_lengths(vit64, random_delta, sites_of, run, error):
    delta = random_delta(vit64, deep_prompt(4, blocks=(0,)), deep_prompt(2, blocks=(2,)), lora(2))
    images = vit64.example(2)
    lowered = lower(vit64, delta, sites_of(vit64))
    assert error(run(vit64, lowered, images), run(vit64, delta, images)) < 1e-10


def test_a_delta_without_prompts_is_itself(vit, swin, random_delta, sites_of):
    for backbone in (vit, swin):
        delta = random_delta(backbone, lora(2), prefix(2))
        assert lower(backbone, delta, sites_of(backbone)) is delta


def test_prompts_that_stay_are_tokens_still(vit64, random_delta, sites_of, run, error):
    """From the second block on they depend on the image; those of one block are lowered beside them."""
    shallow = random_delta(vit64, shallow_prompt(3), lora(2))
    assert lower(vit64, shallow, sites_of(vit64)) is shallow
    both = random_delta(vit64, shallow_prompt(3), deep_prompt(2, blocks=(1, 2)), lora(2), prefix(2))
    lowered = lower(vit64, both, sites_of(vit64))
    kept = [branch.tuner for branch in lowered.branches.values() if branch.tuner.join == "tokens"]
    assert kept == [Prompt()]
    images = vit64.example(2)
    assert error(run(vit64, lowered, images), run(vit64, both, images)) < 1e-10


@pytest.mark.parametrize("joint", [True, False])
def test_prompts_keep_their_softmax(joint, vit64, random_delta, sites_of, run, error):
    delta = random_delta(vit64, deep_prompt(3, joint_softmax=joint), lora(2), prefix(2))
    lowered = lower(vit64, delta, sites_of(vit64))
    assert lowered.branches["blocks.1/prompt"].tuner == Prefix(joint_softmax=joint)
    images = vit64.example(2)
    assert error(run(vit64, lowered, images), run(vit64, delta, images)) < 1e-10


def test_the_inputs_are_not_changed(vit64, random_delta, sites_of):
    delta = random_delta(vit64, *COMBINATIONS["everything"])
    before = {b: {n: t.clone() for n, t in w.items()} for b, w in delta.tensors.items()}
    state = {n: t.clone() for n, t in vit64.model.state_dict().items()}
    lower(vit64, delta, sites_of(vit64))
    assert all(torch.equal(t, before[b][n]) for b, w in delta.tensors.items() for n, t in w.items())
    assert all(torch.equal(t, state[n]) for n, t in vit64.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit64.model.modules())


def test_a_key_norm_is_accounted_for(vit64, random_delta, sites_of, run, error):
    """Keys are measured where attention is called, behind whatever the block does to them."""
    import timm

    arguments = {**vit64.identity.arguments, "qk_norm": True}
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", num_classes=7, **arguments).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape).double())
    backbone = wrap(model, "vit_base_patch16_224", arguments)
    delta = random_delta(backbone, deep_prompt(3), lora(2), prefix(4))
    lowered = lower(backbone, delta, sites_of(backbone))
    images = backbone.example(2)
    assert error(run(backbone, lowered, images), run(backbone, delta, images)) < 1e-10


def test_several_prompts_at_one_attention_stay_tokens(vit64, random_delta, sites_of, run, error):
    """Which keys are whose cannot be told from the end of the sequence."""
    delta = random_delta(vit64, deep_prompt(2), deep_prompt(3, at="attn", blocks=(1,)))
    lowered = lower(vit64, delta, sites_of(vit64))
    kinds = {name: branch.tuner.kind for name, branch in lowered.branches.items()}
    assert [n for n, kind in kinds.items() if kind == "prompt"] == [
        "blocks.1/prompt",
        "blocks.1.attn/prompt",
    ]
    assert kinds["blocks.0/prompt"] == "prefix"
    images = vit64.example(2)
    with torch.no_grad():
        mixed = Mixed(vit64, stack([lowered]))(images, torch.zeros(2).long())
    assert error(mixed, run(vit64, delta, images)) < 1e-12


def test_prompts_that_depend_on_the_image_are_refused(vit, random_delta, sites_of):
    """A block that mixes the image into all tokens before its keys."""
    model = copy.deepcopy(vit.model)
    norm = model.blocks[1].norm1
    norm.register_forward_hook(lambda _, args, y: y + y.mean(1, keepdim=True))
    backbone = replace(vit, model=model)
    with pytest.raises(IncompatibleArtefact, match="depend on the image") as caught:
        lower(backbone, random_delta(vit, deep_prompt(2)), sites_of(vit))
    assert caught.value.exit_code == 4
    assert "blocks.1" in caught.value.details["where"]


def test_a_block_without_a_single_attention_is_refused(vit, random_delta, sites_of):
    delta = random_delta(vit, deep_prompt(2, blocks=(0,)))
    point = Point("blocks.0.mlp", "tokens")
    name = "blocks.0/prompt"
    moved = replace(
        delta, branches={**delta.branches, name: Branch(delta.branches[name].tuner, point, point)}
    )
    with pytest.raises(IncompatibleArtefact, match="no single attention"):
        lower(vit, moved, sites_of(vit))


def test_nothing_stays_open_when_the_measurement_fails(vit, random_delta, sites_of):
    model = copy.deepcopy(vit.model)

    def stop(*_):
        raise RuntimeError("stopped on purpose")

    model.blocks[1].attn.proj.register_forward_hook(stop)
    with pytest.raises(IncompatibleArtefact, match="does not run with the prompts") as caught:
        lower(
            replace(vit, model=model), random_delta(vit, deep_prompt(2), prefix(2)), sites_of(vit)
        )
    assert "on purpose" in str(caught.value)
    assert torch._C._len_torch_function_stack() == 0
