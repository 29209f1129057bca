"""What a trunk computes in, counted."""

from __future__ import annotations

import pytest

from utune_deploy.merge.backbone import create
from utune_deploy.merge.calls import Calls, calls_of


@pytest.mark.parametrize(
    ("architecture", "arguments", "wanted"),
    [
        # the patches, four products a block, the head
        ("vit_tiny_patch16_224", {"depth": 3}, Calls(1 + 4 * 3 + 1, 3)),
        ("resnet18", {}, Calls(20 + 1, 0)),
    ],
)
def test_products_and_attentions_are_counted(
    architecture: str, arguments: dict[str, int], wanted: Calls
) -> None:
    assert calls_of(create(architecture, arguments)) == wanted


def test_an_attention_in_pieces_counts_its_two_products() -> None:
    backbone = create("vit_tiny_patch16_224", {"depth": 2})
    for block in backbone.model.blocks:
        block.attn.fused_attn = False
    assert calls_of(backbone) == Calls(1 + 6 * 2 + 1, 0)
