"""Products of every kind, counted by hand, and a whole model counted by torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from utune_deploy.export.graph import Inputs, trace
from utune_deploy.export.macs import COUNTED, Count, Product, macs
from utune_deploy.export.passes import rewrite
from utune_deploy.merge.bank import stack
from utune_deploy.merge.errors import UsageError
from utune_deploy.merge.lower import lower
from utune_deploy.merge.methods import lora
from utune_deploy.merge.mixed import Mixed

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


B = "batch"  # 3 below
FLAT = {"q_num_heads": 4, "kv_num_heads": 2}
BY_HAND: dict[str, tuple[str, dict[str, list[Any]], dict[str, np.ndarray], dict[str, Any], int]] = {
    "MatMul of rows": ("MatMul", {"x": [B, 8]}, {"w": ones(8, 5)}, {}, 3 * 8 * 5),
    "MatMul of tokens": ("MatMul", {"x": [B, 7, 8]}, {"w": ones(8, 5)}, {}, 3 * 7 * 8 * 5),
    "MatMul of a weight per row": ("MatMul", {"x": [B, 7, 8], "w": [B, 8, 5]}, {}, {}, 3 * 7 * 8 * 5),
    "MatMul of every row by every weight": (
        "MatMul", {"x": [B, 1, 7, 8]}, {"w": ones(4, 8, 5)}, {}, 3 * 4 * 7 * 8 * 5,
    ),
    "MatMul from the left": ("MatMul", {"w": [6, 7], "x": [B, 7, 8]}, {}, {}, 3 * 6 * 7 * 8),
    "MatMul by a vector": ("MatMul", {"x": [B, 7, 8]}, {"w": ones(8)}, {}, 3 * 7 * 8),
    "MatMul of a vector": ("MatMul", {"w": [8], "x": [B, 8, 5]}, {}, {}, 3 * 8 * 5),
    "MatMul of two vectors": ("MatMul", {"x": [8], "z": [8]}, {}, {}, 8),
    "Gemm": ("Gemm", {"x": [B, 8]}, {"w": ones(8, 5)}, {}, 3 * 8 * 5),
    "Gemm with a bias, transposed": (
        "Gemm", {"x": [8, B]}, {"w": ones(5, 8), "b": ones(5)}, {"transA": 1, "transB": 1}, 3 * 8 * 5,
    ),
    "Conv of patches": (
        "Conv", {"x": [B, 3, 8, 12]}, {"w": ones(6, 3, 4, 4)}, {"strides": [4, 4]}, 3 * (2 * 3) * 6 * 3 * 16,
    ),
    "Conv, padded": ("Conv", {"x": [B, 2, 5, 5]}, {"w": ones(4, 2, 3, 3)}, {"pads": [1] * 4}, 3 * 25 * 4 * 2 * 9),
    "Conv, strided": (
        "Conv", {"x": [B, 2, 5, 5]}, {"w": ones(4, 2, 3, 3)}, {"pads": [1] * 4, "strides": [2, 2]}, 3 * 9 * 4 * 2 * 9,
    ),
    "Conv in two groups": (
        "Conv", {"x": [B, 4, 5, 5]}, {"w": ones(6, 2, 3, 3)}, {"group": 2}, 3 * 9 * 6 * 2 * 9,
    ),
    "Conv, depthwise": ("Conv", {"x": [B, 4, 5, 5]}, {"w": ones(4, 1, 3, 3)}, {"group": 4}, 3 * 9 * 4 * 9),
    "Conv of one axis": ("Conv", {"x": [B, 4, 9]}, {"w": ones(6, 4, 3)}, {}, 3 * 7 * 6 * 4 * 3),
    "Attention": (
        "Attention", {"q": [B, 4, 5, 8], "k": [B, 4, 7, 8], "v": [B, 4, 7, 6]}, {}, {}, 3 * 4 * 5 * 7 * (8 + 6),
    ),
    "Attention with shared keys": (
        "Attention", {"q": [B, 4, 5, 8], "k": [B, 2, 7, 8], "v": [B, 2, 7, 6]}, {}, {}, 3 * 4 * 5 * 7 * (8 + 6),
    ),
    "Attention, causal": (
        "Attention", {"q": [B, 4, 5, 8], "k": [B, 4, 5, 8], "v": [B, 4, 5, 8]}, {}, {"is_causal": 1},
        3 * 4 * 5 * 5 * (8 + 8),
    ),
    "Attention, heads side by side": (
        "Attention", {"q": [B, 5, 32], "k": [B, 7, 16], "v": [B, 7, 12]}, {}, FLAT, 3 * 4 * 5 * 7 * (8 + 6),
    ),
    "Einsum of one head": (
        "Einsum", {"x": [B, 7, 8], "w": [4, 8, 5]}, {}, {"equation": "bnc,tcd->btnd"}, 3 * 4 * 7 * 8 * 5,
    ),
    "Einsum with an ellipsis": (
        "Einsum", {"x": [B, 2, 7, 8]}, {"w": ones(8, 5)}, {"equation": "...nc,cd->...nd"}, 3 * 2 * 7 * 8 * 5,
    ),
    "Einsum of one operand": ("Einsum", {"x": [B, 7, 8]}, {}, {"equation": "bnc->bc"}, 0),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_HAND)
def test_a_product_is_counted_as_by_hand(case: str, hand: Callable[..., ir.Model]) -> None:
    op, inputs, constants, attributes, wanted = BY_HAND[case]
    model = hand(inputs, [(op, [*inputs, *constants], ["y"], attributes)], constants, ["y"])
    count = macs(model, batch=3)
    assert count == Count(3, (Product(f"{op}_0", op, wanted),))
    assert count.total == wanted
    assert count.by_op == {op: wanted}
    assert count.per_example == wanted / 3


def test_every_rule_has_a_case() -> None:
    assert {case[0] for case in BY_HAND.values()} == set(COUNTED)


def test_attention_counts_the_past(hand: Callable[..., ir.Model]) -> None:
    past = {"pk": ["batch", 4, 2, 8], "pv": ["batch", 4, 2, 8]}
    model = hand(
        {"q": ["batch", 4, 5, 8], "k": ["batch", 4, 7, 8], "v": ["batch", 4, 7, 8], **past},
        [("Attention", ["q", "k", "v", "", "pk", "pv"], ["y", "nk", "nv"])],
        {},
        ["y", "nk", "nv"],
    )
    assert macs(model).total == 4 * 5 * (7 + 2) * (8 + 8)


def test_sums_and_order(hand: Callable[..., ir.Model]) -> None:
    """Elementwise work is free; products of constants are work like others."""
    model = hand(
        {"x": ["batch", 7, 8]},
        [
            ("MatMul", ["v", "w"], ["vw"]),
            ("MatMul", ["x", "vw"], ["y"]),
            ("Gelu", ["y"], ["z"]),
            ("Einsum", ["z", "z"], ["s"], {"equation": "bnc,bmc->bnm"}),
        ],
        {"v": ones(8, 2), "w": ones(2, 6)},
        ["s"],
    )
    count = macs(model, 2)
    assert [(node.name, node.macs) for node in count.nodes] == [
        ("MatMul_0", 8 * 2 * 6),
        ("MatMul_1", 2 * 7 * 8 * 6),
        ("Einsum_3", 2 * 7 * 7 * 6),
    ]
    assert list(count.by_op.items()) == [("MatMul", 768), ("Einsum", 588)]
    assert count.total == 768 + 588
    assert count.per_example == (768 + 588) / 2


@pytest.mark.parametrize(("tasks", "batch"), [(1, 1), (4, 3)])
def test_free_axes_have_the_sizes_that_are_given(
    tasks: int, batch: int, hand: Callable[..., ir.Model]
) -> None:
    model = hand(
        {"x": ["batch", 1, 7, 8], "bank/w": ["tasks", 8, 5]},
        [("MatMul", ["x", "bank/w"], ["y"])],
        {},
        ["y"],
    )
    assert macs(model, batch, tasks=tasks).total == batch * tasks * 7 * 8 * 5


def test_the_model_is_left_as_it_is(hand: Callable[..., ir.Model]) -> None:
    model = hand({"x": ["batch", 8]}, [("MatMul", ["x", "w"], ["y"])], {"w": ones(8, 5)}, ["y"])
    weight = model.graph.initializers["w"].const_value
    before = str(model)
    macs(model, 5)
    assert str(model) == before
    assert model.graph.initializers["w"].const_value is weight


def test_what_cannot_be_counted_is_named(hand: Callable[..., ir.Model]) -> None:
    free = hand({"x": ["batch", "width"]}, [("MatMul", ["x", "w"], ["y"])], {"w": ones(8, 5)}, ["y"])  # fmt: skip
    with pytest.raises(UsageError, match=r"(?s)no size.*input x.*width.*width=\.\.\."):
        macs(free)
    nameless = hand({"x": [None, 8]}, [("MatMul", ["x", "w"], ["y"])], {"w": ones(8, 5)}, ["y"])
    with pytest.raises(UsageError, match="without a name"):
        macs(nameless)
    unknown = hand(
        {"x": ["batch", 8]},
        [("NonZero", ["x"], ["i"]), ("Cast", ["i"], ["f"], {"to": 1}), ("MatMul", ["f", "w"], ["y"])],
        {"w": ones(4, 5)}, ["y"],
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"(?s)cannot be inferred.*MatMul_2"):
        macs(unknown)
    silent = hand({"x": ["batch", 2, 5]}, [("ConvTranspose", ["x", "w"], ["y"])], {"w": ones(2, 3, 3)}, ["y"])  # fmt: skip
    with pytest.raises(UsageError, match=r"(?s)no rule.*ConvTranspose_0"):
        macs(silent)
    three = hand({n: ["batch", 8] for n in "xyz"}, [("Einsum", list("xyz"), ["e"], {"equation": "bc,bc,bc->b"})], {}, ["e"])  # fmt: skip
    with pytest.raises(UsageError, match=r"(?s)order of products.*Einsum_0"):
        macs(three)


ARCHITECTURES: dict[str, tuple[dict[str, Any], int]] = {
    "vit_tiny_patch16_224": ({"img_size": 64, "depth": 2, "num_classes": 5}, 64),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]},
        64,
    ),
    "convnext_tiny": ({"depths": [1, 1, 1, 2], "dims": [8, 16, 24, 32], "num_classes": 5}, 64),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_counts_what_torch_counts(architecture: str) -> None:
    """`FlopCounterMode` counts every product twice, once for its multiplication."""
    arguments, size = ARCHITECTURES[architecture]
    module = timm.create_model(architecture, **arguments).eval()
    model = trace(module, Inputs(torch.randn(2, 3, size, size)))
    for batch in (1, 3):
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            module(torch.randn(batch, 3, size, size))
        count = macs(model, batch)
        assert count.total == flops.get_total_flops() / 2
        assert count.per_example == macs(model).total
    assert sum(count.by_op.values()) == count.total


def test_an_engine_for_many_tasks_is_counted_with_its_bank(
    vit: Backbone, sites_of: Callable[..., Any], random_delta: Callable[..., Delta]
) -> None:
    """One LoRA per row: down and up for every token, whatever the number of tasks in the bank."""
    deltas = [random_delta(vit, lora(2), task=name, seed=i) for i, name in enumerate("ab")]
    bank = stack([lower(vit, delta, sites_of(vit)) for delta in deltas], torch.float32)
    module = Mixed(vit, bank).eval()
    tensors = {f"bank/{name}": tensor for name, tensor in bank.tensors.items()}
    model = trace(module, Inputs(vit.example(batch=2), torch.tensor([0, 1]), tensors))
    plain = macs(trace(vit.model, Inputs(vit.example(batch=2))))
    count = macs(model, tasks=2)
    head = (5 - 7) * 48  # the tasks' own classifiers have 5 classes
    assert count.total == plain.total + 3 * 17 * (48 * 2 + 2 * 144) + head
    assert macs(model, 4, tasks=5).total == 4 * count.total
    rewrite(model)
    assert macs(model, tasks=2).total <= count.total
