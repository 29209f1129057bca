"""What `attach` refuses, and what it leaves for an ordinary torch loop."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from utune_deploy.merge.attach import attach
from utune_deploy.merge.backbone import create
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.merge.methods import bitfit, deep_prompt, dual_adapter, lora, prefix


def test_an_ordinary_loop_moves_the_branches_and_nothing_else(vit):
    tuned = attach(vit, lora(2, alpha=4), dual_adapter(3), prefix(2), classes=4)
    frozen = {k: v.clone() for k, v in vit.model.state_dict().items()}
    before = {k: v.detach().clone() for k, v in tuned.named_parameters()}
    optimizer = torch.optim.SGD((p for p in tuned.parameters() if p.requires_grad), lr=1.0)
    images, classes = vit.example(8), torch.arange(8) % 4
    for _ in range(2):  # `up` starts at zero, so `down` moves in the second step
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(tuned.train()(images), classes).backward()
        optimizer.step()
    assert all(torch.equal(v, frozen[k]) for k, v in vit.model.state_dict().items())
    assert not vit.model.training
    for name, value in tuned.named_parameters():
        if name.startswith("weights."):
            assert torch.equal(value, before[name]) == name.endswith("scale"), name
    assert {id(p) for p in tuned.trainable()} == {
        id(p) for p in tuned.parameters() if p.requires_grad
    }


def test_a_pass_lets_go_of_what_it_tapped_without_a_collection(vit):
    tuned = attach(vit, dual_adapter(3), classes=4)
    seen = []
    hook = vit.model.blocks[1].mlp.register_forward_pre_hook(
        lambda _, args: seen.append(weakref.ref(args[0]))
    )
    gc.disable()
    try:
        with torch.no_grad():
            tuned(vit.example(2))
        assert [ref() for ref in seen] == [None]
    finally:
        gc.enable()
        hook.remove()


def test_prompts_on_a_rotary_backbone_are_refused():
    backbone = create("eva02_tiny_patch14_224", {"img_size": 28, "depth": 1})
    with pytest.raises(IncompatibleArtefact, match="does not run with these branches"):
        attach(backbone, deep_prompt(2), classes=3)


def test_biases_inside_an_attention_are_not_left_out_silently():
    backbone = create(
        "beit_base_patch16_224", {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 4}
    )
    with pytest.raises(UsageError, match="added inside a module") as caught:
        attach(backbone, bitfit(), classes=3)
    assert "q_bias" in str(caught.value)


@pytest.mark.parametrize("method", [lora(0), prefix(0), deep_prompt(-1)])
def test_a_rank_of_nothing_is_refused(method, vit):
    with pytest.raises(UsageError, match="at least 1"):
        attach(vit, method, classes=2)


def test_a_block_that_is_not_there(vit):
    with pytest.raises(UsageError, match="no such block"):
        attach(vit, lora(2, blocks=(0, 9)), classes=2)


def test_two_branches_of_one_name(vit):
    with pytest.raises(UsageError, match="one name"):
        attach(vit, lora(2), lora(3), classes=2)
