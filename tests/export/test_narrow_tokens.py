"""Tokens that nothing reads are not computed, and the others are what they were."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_ir.passes import common

from utune_deploy.export.graph import Inputs, clean, trace
from utune_deploy.export.macs import macs
from utune_deploy.export.passes import rewrite
from utune_deploy.export.passes.join_siblings import join_siblings
from utune_deploy.export.passes.narrow_tokens import narrow_tokens
from utune_deploy.merge.bank import stack
from utune_deploy.merge.lower import lower
from utune_deploy.merge.methods import dual_adapter, lora
from utune_deploy.merge.mixed import Mixed

if TYPE_CHECKING:
    from collections.abc import Callable

    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

EXACT = 1e-5  # of the largest value: another kernel may sum in another order
C, D, N = 6, 4, 6  # channels, channels behind, tokens
X = {"x": ["batch", N, C]}
Nodes = list[tuple[Any, ...]]


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32)


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


W = {
    "W": values(C, D), "b": values(D), "V": values(C, C), "g": values(C), "pos": values(1, N, C),
    "i": np.array(0), "last": np.array(-1), "two": ints(3, 0), "o": ints(0), "e": ints(1), "f": ints(3), "all": ints(99),
    "back": ints(-2),
}  # fmt: skip
FIRST = ("Gather", ["h", "i"], ["y"], {"axis": 1})
LINEAR: Nodes = [("MatMul", ["x", "W"], ["h_"]), ("Add", ["h_", "b"], ["h"])]


@pytest.fixture
def apply(run_onnx: Callable[..., list[np.ndarray]]) -> Callable[[ir.Model], int]:
    """Run the pass, hold the graph to its numbers, and the second run to doing nothing."""

    def apply(model: ir.Model) -> int:
        given = {
            value.name or "": values(*(d if isinstance(d, int) else 2 for d in value.shape or ()))
            for value in model.graph.inputs
        }
        names = [value.name for value in model.graph.outputs]
        shapes = [value.shape for value in model.graph.outputs]
        before, cost, untouched = run_onnx(model, given), macs(model, 2).total, str(model)
        times = narrow_tokens(model)
        if not times:
            assert str(model) == untouched
            return 0
        common.RemoveUnusedNodesPass()(model)
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        assert [value.name for value in model.graph.outputs] == names
        assert [value.shape for value in model.graph.outputs] == shapes
        assert macs(model, 2).total < cost or cost == 0
        for found, wanted in zip(run_onnx(model, given), before, strict=True):
            assert found.shape == wanted.shape
            np.testing.assert_allclose(found, wanted, rtol=0, atol=EXACT * np.abs(wanted).max())
        assert narrow_tokens(model) == 0
        return times

    return apply


NARROWS: dict[str, tuple[tuple[Any, ...], int]] = {
    "a layer": ((X, [*LINEAR, FIRST], W, ["y"]), 2),
    "a layer, read further": ((X, [*LINEAR, FIRST, ("Relu", ["y"], ["z"])], W, ["z"]), 2),
    "a layer without a bias": ((X, [("MatMul", ["x", "W"], ["h"]), FIRST], W, ["y"]), 1),
    "the last token": ((X, [*LINEAR, ("Gather", ["h", "last"], ["y"], {"axis": 1})], W, ["y"]), 2),
    "an axis counted from the end": ((X, [*LINEAR, ("Gather", ["h", "i"], ["y"], {"axis": -2})], W, ["y"]), 2),
    "two tokens": ((X, [*LINEAR, ("Gather", ["h", "two"], ["y"], {"axis": 1})], W, ["y"]), 2),
    "a slice": ((X, [*LINEAR, ("Slice", ["h", "e", "f", "e"], ["y"])], W, ["y"]), 2),
    "every second token": ((X, [*LINEAR, ("Slice", ["h", "e", "all", "back", "s"], ["y"])], {**W, "s": ints(2)}, ["y"]), 2),
    "tokens backwards": (
        (X, [*LINEAR, ("Slice", ["h", "all", "low", "e", "s"], ["y"])], {**W, "s": ints(-2), "low": ints(-99)}, ["y"]), 2,
    ),
    "a slice of one, squeezed": (
        (X, [*LINEAR, ("Slice", ["h", "o", "e", "e"], ["u"]), ("Squeeze", ["u", "e"], ["y"])], W, ["y"]), 2,
    ),
    "a slice of the first axis": (({"x": [N, C]}, [*LINEAR, ("Slice", ["h", "o", "e"], ["y"])], W, ["y"]), 2),
    "one token, picked in two ways": (
        (X, [*LINEAR, FIRST, ("Neg", ["y"], ["w"]), ("Slice", ["h", "o", "e", "e"], ["u"]), ("Relu", ["u"], ["z"])], W, ["w", "z"]), 2,
    ),
    "one token as two outputs": (
        (X, [*LINEAR, ("Gather", ["h", "i"], ["u"], {"axis": 1}), ("Relu", ["u"], ["y"]), ("Neg", ["u"], ["z"])], W, ["y", "z"]),
        2,
    ),
    "a sum of tokens and places": ((X, [("Add", ["x", "pos"], ["h"]), FIRST], W, ["y"]), 1),
    "a sum with one token for all": (({**X, "t": ["batch", 1, C]}, [("Add", ["t", "x"], ["h"]), FIRST], W, ["y"]), 1),
    "a product with itself": ((X, [("Mul", ["x", "x"], ["h"]), FIRST], W, ["y"]), 1),
    "a choice by token": (
        ({**X, "z": ["batch", N, C]}, [("Where", ["m", "x", "z"], ["h"]), FIRST], {**W, "m": values(N, 1) > 0}, ["y"]), 1,
    ),
    "a norm over the channels": ((X, [("LayerNormalization", ["x", "g", "g"], ["h"]), FIRST], W, ["y"]), 1),
    "a softmax over the channels": ((X, [("Softmax", ["x"], ["h"], {"axis": 2}), FIRST], W, ["y"]), 1),
    "a weight per row": (
        ({**X, "w": ["batch", C, D]}, [("MatMul", ["x", "w"], ["h"]), FIRST], W, ["y"]), 1,
    ),
    "a bank tensor of channels": (
        (X, [("MatMul", ["x", "bank/W"], ["h_"]), ("Add", ["h_", "bank/b"], ["h"]), FIRST],
         {**W, "bank/W": W["W"], "bank/b": W["b"]}, ["y"]), 2,
    ),
    "every row by every weight": (
        ({"x": ["batch", 1, N, C], "w": ["batch", C, D]},
         [("MatMul", ["x", "w"], ["h"]), ("Gather", ["h", "i"], ["y"], {"axis": 2})], W, ["y"]), 1,
    ),
    "tokens mixed by a constant": (
        (X, [("MatMul", ["mix", "x"], ["h"]), FIRST], {**W, "mix": values(N, N)}, ["y"]), 1,
    ),
    "both branches of a residual": (
        (X, [
            ("Tanh", ["x"], ["r"]), ("LayerNormalization", ["r", "g"], ["n"]), ("MatMul", ["n", "V"], ["u"]),
            ("Relu", ["u"], ["v"]), ("Add", ["r", "v"], ["h"]), FIRST,
        ], W, ["y"]), 5,
    ),
    "one branch, where the other is mixed": (
        (X, [
            ("LayerNormalization", ["x", "g"], ["n"]), ("MatMul", ["n", "V"], ["u"]), ("Add", ["x", "u"], ["h"]),
            FIRST, ("MatMul", ["mix", "x"], ["z"]),
        ], {**W, "mix": values(N, N)}, ["y", "z"]), 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NARROWS)
def test_the_pick_moves_to_the_front(
    case: str, hand: Callable[..., ir.Model], apply: Callable[[ir.Model], int]
) -> None:
    given, times = NARROWS[case]
    assert apply(hand(*given)) == times


LEFT_ALONE: dict[str, tuple[Any, ...]] = {
    "nothing picked": (X, LINEAR, W, ["h"]),
    "picked from an input": (X, [("Gather", ["x", "i"], ["y"], {"axis": 1})], W, ["y"]),
    "most tokens": (X, [*LINEAR, ("Slice", ["h", "e", "all", "e"], ["y"])], W, ["y"]),
    "most tokens, repeated": (X, [*LINEAR, ("Gather", ["h", "four"], ["y"], {"axis": 1})], {**W, "four": ints(0, 0, 1, 1)}, ["y"]),
    "a second reader": (X, [*LINEAR, FIRST, ("ReduceMean", ["h", "e"], ["z"])], W, ["y", "z"]),
    "two picks": (X, [*LINEAR, FIRST, ("Gather", ["h", "last"], ["z"], {"axis": 1})], W, ["y", "z"]),
    "an output": (X, [*LINEAR, FIRST], W, ["y", "h"]),
    "one token with two names": (
        X, [*LINEAR, ("Slice", ["h", "o", "e", "e"], ["y"]), ("Slice", ["h", "o", "e", "back"], ["z"])], W, ["y", "z"],
    ),
    "some channels": (X, [*LINEAR, ("Gather", ["h", "i"], ["y"], {"axis": 2})], W, ["y"]),
    "two axes at once": (
        X, [*LINEAR, ("Slice", ["h", "oo", "ee", "ax"], ["y"])], {**W, "oo": ints(0, 0), "ee": ints(1, 2), "ax": ints(1, 2)}, ["y"],
    ),
    "some examples": (X, [*LINEAR, ("Gather", ["h", "i"], ["y"], {"axis": 0})], W, ["y"]),
    "tokens in a table": (X, [*LINEAR, ("Gather", ["h", "t"], ["y"], {"axis": 1})], {**W, "t": np.array([[0]])}, ["y"]),
    "a norm over the tokens": (
        X, [("LayerNormalization", ["x", "n"], ["h"], {"axis": 1}), FIRST], {**W, "n": values(N, C)}, ["y"],
    ),
    "a softmax over the tokens": (X, [("Softmax", ["x"], ["h"], {"axis": 1}), FIRST], W, ["y"]),
    "a cumulative sum": (X, [("CumSum", ["x", "e"], ["h"]), FIRST], W, ["y"]),
    "a weight picked by row": (
        {"x": [N, 2, C], "w": [N, C, D]}, [("MatMul", ["x", "w"], ["h"]), ("Gather", ["h", "i"], ["y"], {"axis": 0})], W, ["y"],
    ),
    "a bank tensor of tokens": (
        X, [("Add", ["x", "bank/pos"], ["h"]), FIRST], {**W, "bank/pos": W["pos"]}, ["y"],
    ),
    "attention": (
        {name: ["batch", 2, N, 8] for name in "qkv"},
        [("Attention", ["q", "k", "v"], ["h"]), ("Gather", ["h", "i"], ["y"], {"axis": 2})], W, ["y"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_tokens_are_left_alone(
    case: str, hand: Callable[..., ir.Model], apply: Callable[[ir.Model], int]
) -> None:
    assert apply(hand(*LEFT_ALONE[case])) == 0


def test_a_place_that_is_an_input_stays(hand: Callable[..., ir.Model]) -> None:
    model = hand({**X, "at": []}, [("Cast", ["at"], ["k"], {"to": 7}), *LINEAR, ("Gather", ["h", "k"], ["y"], {"axis": 1})], W, ["y"])  # fmt: skip
    assert narrow_tokens(model) == 0


def test_the_last_block_of_a_vit_ends_with_one_token(
    vit: Backbone, run_onnx: Callable[..., list[np.ndarray]], caplog: pytest.LogCaptureFixture
) -> None:
    """Its proj, fc1 and fc2 cost one token of 17; numbers are torch's."""
    model = trace(vit.model, Inputs(vit.example(batch=2)))
    before = macs(model)
    assert rewrite(model)["narrow_tokens"] > 5
    after = macs(clean(model))
    assert before.total - after.total == 16 * (48 * 48 + 2 * 48 * 192)
    images = vit.example(batch=3)
    with torch.no_grad():
        wanted = vit.model(images).numpy()
    (found,) = run_onnx(model, {"images": images.numpy()})
    np.testing.assert_allclose(found, wanted, rtol=0, atol=EXACT * np.abs(wanted).max())
    said = [record for record in caplog.records if record.name.startswith("onnx_ir")]
    assert not said  # of values with a shape and no type


def test_a_layer_that_becomes_columns_of_a_wide_one_keeps_its_tokens(
    hand: Callable[..., ir.Model], apply: Callable[[ir.Model], int]
) -> None:
    """It is one product less; only what reads it is narrowed. One of half the width pays for itself."""
    constants = {
        **W, "Q": values(C, 48), "halves": ints(24, 24), "down": values(C, 6), "up": values(6, C)
    }  # fmt: skip
    nodes: Nodes = [
        ("MatMul", ["x", "Q"], ["q"]),
        ("Split", ["q", "halves"], ["q0", "q1"], {"axis": -1}),
        ("MatMul", ["x", "down"], ["d"]),
        ("Relu", ["d"], ["r"]),
        ("MatMul", ["r", "up"], ["h"]),
        FIRST,
    ]
    outputs = ["y", "q0", "q1"]
    model = hand(X, nodes, constants, outputs)
    assert apply(model) == 2
    assert join_siblings(model) == 1
    wide = {**constants, "down": values(C, 7), "up": values(7, C)}
    assert apply(hand(X, nodes, wide, outputs)) == 3


def test_tuners_of_the_last_block_are_narrowed_with_it(
    vit: Backbone,
    sites_of: Callable[..., Any],
    random_delta: Callable[..., Delta],
    run_onnx: Callable[..., list[np.ndarray]],
) -> None:
    """In an engine of two tasks, whose bank is an input."""
    tuners = [lora(2, at="mlp.fc1"), lora(2, at="attn.proj"), dual_adapter(3)]
    deltas = [random_delta(vit, *tuners, task=name, seed=i) for i, name in enumerate("ab")]
    bank = stack([lower(vit, delta, sites_of(vit)) for delta in deltas], torch.float32)
    module = Mixed(vit, bank).eval()
    tensors = {f"bank/{name}": tensor for name, tensor in bank.tensors.items()}
    images, task = vit.example(batch=3), torch.tensor([1, 0, 1])
    model = trace(module, Inputs(images, task, tensors))
    feeds = {"images": images.numpy(), "task": task.numpy()}
    feeds |= {name: tensor.numpy() for name, tensor in tensors.items()}
    (wanted,), before = run_onnx(model, feeds), macs(model, tasks=2)
    assert narrow_tokens(model) > 10
    (found,), after = run_onnx(clean(model), feeds), macs(model, tasks=2)
    known = wanted > np.finfo(np.float32).min
    np.testing.assert_array_equal(found > np.finfo(np.float32).min, known)
    np.testing.assert_allclose(
        found[known], wanted[known], rtol=0, atol=EXACT * np.abs(wanted[known]).max()
    )
    plain = 16 * (48 * 48 + 2 * 48 * 192)
    loras = 16 * 2 * ((48 + 192) + (48 + 48))
    adapter = 16 * 3 * 2 * 48  # of the mlp; the one of the attention may read all tokens
    assert before.total - after.total >= plain + loras + adapter
