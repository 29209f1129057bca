"""Two layers in a row: one where that is cheaper and the same, both left alone otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper, numpy_helper, shape_inference
from onnx_ir.passes import common
from torch import nn

from utune_deploy.export.graph import Inputs, clean, trace
from utune_deploy.export.macs import macs
from utune_deploy.export.passes import rewrite
from utune_deploy.export.passes.collapse_linears import collapse_linears

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXACT = 1e-5  # of the largest value, float32
ROUNDED = 1e-12  # of the largest weight, float64
K, M, N, TOKENS = 6, 8, 4, 5  # 6 * 4 is fewer than 6 * 8 + 8 * 4
X = {"x": ["batch", TOKENS, K]}
Nodes = list[tuple[Any, ...]]


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32)


W = {"W1": values(K, M), "b1": values(M), "W2": values(M, N), "b2": values(N)}


def first(y: str = "h", x: str = "x") -> Nodes:
    return [("MatMul", [x, "W1"], [f"{y}_"]), ("Add", [f"{y}_", "b1"], [y])]


def second(x: str = "h", y: str = "y") -> Nodes:
    return [("MatMul", [x, "W2"], [f"{y}_"]), ("Add", [f"{y}_", "b2"], [y])]


def without(*names: str, **others: np.ndarray) -> dict[str, np.ndarray]:
    return {name: array for name, array in {**W, **others}.items() if name not in names}


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


@pytest.fixture
def apply(run_onnx: Callable[..., list[np.ndarray]]) -> Callable[[ir.Model], int]:
    """Run the pass, hold the graph to its numbers, and the second run to doing nothing."""

    def apply(model: ir.Model) -> int:
        given = {
            value.name or "": values(*(d if isinstance(d, int) else 2 for d in value.shape or ()))
            for value in model.graph.inputs
        }
        names = [value.name for value in model.graph.outputs]
        before, cost, untouched = run_onnx(model, given), macs(model).total, str(model)
        times = collapse_linears(model)
        if not times:
            assert str(model) == untouched
            return 0
        common.RemoveUnusedNodesPass()(model)
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        assert macs(model).total < cost
        assert [value.name for value in model.graph.outputs] == names
        for found, wanted in zip(run_onnx(model, given), before, strict=True):
            assert found.shape == wanted.shape
            np.testing.assert_allclose(found, wanted, rtol=0, atol=EXACT * np.abs(wanted).max())
        assert collapse_linears(model) == 0
        return times

    return apply


def between(*nodes: tuple[Any, ...]) -> Nodes:
    """A chain from `h` to `z` between the two layers."""
    return [*first(), *nodes, *second("z")]


FLAT = {"x": ["batch", K]}
GEMM = ("Gemm", ["h", "V2", "b2"], ["y"], {"transB": 1})
V2 = {"V2": values(N, M)}
COLLAPSES: dict[str, tuple[Any, ...]] = {
    "directly": (X, [*first(), *second()], W, ["y"]),
    "and read further": (X, [*first(), *second(), ("Relu", ["y"], ["r"]), ("Mul", ["y", "r"], ["z"])], W, ["z"]),
    "and read as an output, too": (X, [*first(), *second(), ("Relu", ["y"], ["r"])], W, ["y", "r"]),
    "no first bias": (X, [("MatMul", ["x", "W1"], ["h"]), *second()], W, ["y"]),
    "no second bias": (X, [*first(), ("MatMul", ["h", "W2"], ["y"])], W, ["y"]),
    "no bias": (X, [("MatMul", ["x", "W1"], ["h"]), ("MatMul", ["h", "W2"], ["y"])], W, ["y"]),
    "a weight that others read": (
        X, [*first(), *second(), ("MatMul", ["y", "W3"], ["u"]), ("Relu", ["u"], ["r"]), ("MatMul", ["r", "W2"], ["z"])],
        without(W3=values(N, M)), ["y", "z"],
    ),
    "a Gemm behind": (FLAT, [*first(), GEMM], without(**V2), ["y"]),
    "a Gemm in front": (FLAT, [("Gemm", ["x", "W1", "b1"], ["h"]), *second()], W, ["y"]),
    "a Gemm with factors": (
        FLAT, [*first(), ("Gemm", ["h", "V2", "b2"], ["y"], {"transB": 1, "alpha": 0.3, "beta": -2.0})], without(**V2), ["y"],
    ),
    "a Gemm without a bias": (FLAT, [*first(), ("Gemm", ["h", "W2"], ["y"])], W, ["y"]),
    "a Gemm with one number as bias": (
        FLAT, [*first(), ("Gemm", ["h", "W2", "b"], ["y"])], without(b=np.array(2, np.float32)), ["y"],
    ),
    "a Gemm with a bias of two axes": (
        FLAT, [*first(), ("Gemm", ["h", "W2", "b"], ["y"])], without(b=values(1, N)), ["y"],
    ),
    "an Identity": (X, between(("Identity", ["h"], ["z"])), W, ["y"]),
    "the first token": (X, between(("Gather", ["h", "i"], ["z"], {"axis": 1})), without(i=np.array(0)), ["y"]),
    "the first token for a Gemm": (
        X, [*first("g"), ("Gather", ["g", "i"], ["h"], {"axis": 1}), GEMM], without(i=np.array(0), **V2), ["y"],
    ),
    "some tokens": (X, between(("Slice", ["h", "i", "j", "i"], ["z"])), without(i=ints(1), j=ints(4)), ["y"]),
    "tokens backwards": (
        X, between(("Slice", ["h", "i", "j", "a", "s"], ["z"])), without(i=ints(9), j=ints(-9), a=ints(-2), s=ints(-2)), ["y"],
    ),
    "the first token, cut": (
        X, between(("Slice", ["h", "o", "i", "i"], ["u"]), ("Squeeze", ["u", "i"], ["z"])), without(o=ints(0), i=ints(1)), ["y"],
    ),
    "another axis": (X, between(("Unsqueeze", ["h", "i"], ["z"])), without(i=ints(1)), ["y"]),
    "another order": (X, between(("Transpose", ["h"], ["z"], {"perm": [1, 0, 2]})), W, ["y"]),
    "tokens in one row": (X, between(("Reshape", ["h", "s"], ["z"])), without(s=ints(-1, M)), ["y"]),
    "tokens in a grid": (
        {"x": ["batch", 6, K]}, between(("Reshape", ["h", "s"], ["z"])), without(s=ints(0, 2, 3, -1)), ["y"],
    ),
    "several moves": (
        {"x": ["batch", 6, K]},
        between(
            ("Reshape", ["h", "s"], ["u"]), ("Transpose", ["u"], ["v"], {"perm": [0, 2, 1, 3]}),
            ("Gather", ["v", "i"], ["z"], {"axis": 1}),
        ),
        without(s=ints(-1, 2, 3, M), i=ints(2, 0)), ["y"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COLLAPSES)
def test_two_layers_become_one(
    case: str, hand: Callable[..., ir.Model], apply: Callable[[ir.Model], int]
) -> None:
    assert apply(hand(*COLLAPSES[case])) == 1


WIDE = ints(*[0] * (TOKENS + 1))
LEFT_ALONE: dict[str, tuple[Any, ...]] = {
    "an activation between": (X, between(("Relu", ["h"], ["z"])), W, ["y"]),
    "a norm between": (
        X, between(("LayerNormalization", ["h", "b1"], ["z"])), W, ["y"],
    ),
    "a second reader": (X, [*first(), *second(), ("Relu", ["h"], ["r"])], W, ["y", "r"]),
    "two layers behind": (
        X, [*first(), *second(), ("MatMul", ["h", "W3"], ["z"])], without(W3=values(M, 2)), ["y", "z"],
    ),
    "an output between": (X, [*first(), *second()], W, ["y", "h"]),
    "the first product is an output": (X, [*first(), *second()], W, ["y", "h_"]),
    "a moved output between": (X, between(("Identity", ["h"], ["z"])), W, ["y", "z"]),
    "an adapter: narrow down, wide up": (
        X, [*first(), *second()], without(W1=values(K, 2), b1=values(2), W2=values(2, K), b2=values(K)), ["y"],
    ),
    "as dear as before": (
        {"x": ["batch", TOKENS, 4]}, [*first(), *second()],
        without(W1=values(4, 2), b1=values(2), W2=values(2, 4), b2=values(4)), ["y"],
    ),
    "a first weight that is an input": ({**X, "W1": [K, M]}, [*first(), *second()], without("W1"), ["y"]),
    "a second weight that is an input": ({**X, "W2": [M, N]}, [*first(), *second()], without("W2"), ["y"]),
    "a weight that an input may replace": ({**X, "W2": [M, N]}, [*first(), *second()], W, ["y"]),
    "a Gemm whose bias is an input": (
        {**FLAT, "b": [N]}, [*first(), ("Gemm", ["h", "W2", "b"], ["y"])], W, ["y"],
    ),
    "a Gemm with a bias per row": (
        {"x": [3, K]}, [*first(), ("Gemm", ["h", "W2", "b"], ["y"])], without(b=values(3, N)), ["y"],
    ),
    "a Gemm that reads across": (
        {"x": [M, K]}, [*first(), ("Gemm", ["h", "W2", "b2"], ["y"], {"transA": 1})], W, ["y"],
    ),
    "a weight of the bank": (
        X, [*first(), ("MatMul", ["h", "bank/up"], ["y"])], without(**{"bank/up": values(M, N)}), ["y"],
    ),
    "a first weight of the bank": (
        X, [("MatMul", ["x", "bank/down"], ["h"]), *second()], without(**{"bank/down": values(K, M)}), ["y"],
    ),
    "a bias of the bank": (
        X, [*first(), ("MatMul", ["h", "W2"], ["y_"]), ("Add", ["y_", "bank/b"], ["y"])], without(**{"bank/b": values(N)}), ["y"],
    ),
    "a weight per row": (
        {"x": [2, TOKENS, K]}, [*first(), ("MatMul", ["h", "W3"], ["y"])], without(W3=values(2, M, N)), ["y"],
    ),
    "some channels": (
        X, between(("Slice", ["h", "i", "j", "a"], ["z"])),
        without(i=ints(0), j=ints(4), a=ints(-1), W2=values(4, N)), ["y"],
    ),
    "channels in another order": (
        X, between(("Gather", ["h", "i"], ["z"], {"axis": -1})), without(i=ints(*range(M))[::-1].copy()), ["y"],
    ),
    "more tokens": (X, between(("Gather", ["h", "i"], ["z"], {"axis": 1})), without(i=WIDE), ["y"]),
    "tokens as channels": (
        {"x": ["batch", M, K]}, between(("Transpose", ["h"], ["z"], {"perm": [0, 2, 1]})), W, ["y"],
    ),
    "channels cut into heads": (
        X, between(("Reshape", ["h", "s"], ["z"])), without(s=ints(-1, TOKENS, 2, 4), W2=values(4, N)), ["y"],
    ),
    "channels that a zero copies": (
        {"x": [M, K]}, between(("Reshape", ["h", "s"], ["z"])), without(s=ints(1, 0, M)), ["y"],
    ),
    "a squeeze of any axis": (X, between(("Squeeze", ["h"], ["z"])), W, ["y"]),
    "a bias per token": (
        X, [("MatMul", ["x", "W1"], ["h_"]), ("Add", ["h_", "b"], ["h"]), *second()], without(b=values(TOKENS, M)), ["y"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_layers_are_left_alone(
    case: str, hand: Callable[..., ir.Model], apply: Callable[[ir.Model], int]
) -> None:
    assert apply(hand(*LEFT_ALONE[case])) == 0


def test_three_layers_become_one(
    hand: Callable[..., ir.Model], apply: Callable[[ir.Model], int]
) -> None:
    nodes = [*first(), *second("h", "g"), ("MatMul", ["g", "W3"], ["y"])]
    assert apply(hand(X, nodes, without(W3=values(N, 2)), ["y"])) == 2


def test_a_later_pair_makes_an_earlier_one_pay(
    hand: Callable[..., ir.Model], apply: Callable[[ir.Model], int]
) -> None:
    """4 -> 1 -> 4 is cheaper apart; with 4 -> 1 behind it, all of it is 4 -> 1."""
    nodes = [("MatMul", ["x", "A"], ["a"]), ("MatMul", ["a", "B"], ["b"]), ("MatMul", ["b", "C"], ["y"])]  # fmt: skip
    weights = {"A": values(4, 1), "B": values(1, 4), "C": values(4, 1)}
    assert apply(hand({"x": ["batch", TOKENS, 4]}, nodes, weights, ["y"])) == 2


def in_type(nodes: Sequence[tuple[Any, ...]], weights: dict[str, np.ndarray], kind: Any) -> ir.Model:  # fmt: skip
    """As `hand`, with all numbers of another type."""
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    graph = helper.make_graph(
        [helper.make_node(op, ins, outs, name=f"{op}_{i}") for i, (op, ins, outs) in enumerate(nodes)],
        "by hand",
        [helper.make_tensor_value_info("x", dtype, X["x"])],
        [helper.make_tensor_value_info("y", dtype, None)],
        [numpy_helper.from_array(array.astype(kind), name) for name, array in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return ir.from_proto(shape_inference.infer_shapes(model, strict_mode=True, data_prop=True))


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16])
def test_the_weights_are_rounded_once(kind: Any) -> None:
    stored = {name: array.astype(kind).astype(np.float64) for name, array in W.items()}
    model = in_type([*first(), *second()], W, kind)
    assert collapse_linears(model) == 1
    common.RemoveUnusedNodesPass()(model)
    found = {value.name: value.const_value.numpy() for value in model.graph.initializers.values() if value.const_value is not None}  # fmt: skip
    assert sorted(found) == ["MatMul_2.product", "MatMul_2.product_bias"]
    wanted = {
        "MatMul_2.product": stored["W1"] @ stored["W2"],
        "MatMul_2.product_bias": stored["b1"] @ stored["W2"] + stored["b2"],
    }
    for name, exact in wanted.items():
        assert found[name].dtype == kind
        if kind is np.float64:
            np.testing.assert_allclose(found[name], exact, rtol=0, atol=ROUNDED * np.abs(exact).max())  # fmt: skip
        else:
            np.testing.assert_array_equal(found[name], exact.astype(kind))


def test_weights_past_the_largest_number_of_their_type_stay_apart() -> None:
    large = {name: 200 * np.ones_like(array) for name, array in W.items()}
    assert collapse_linears(in_type([*first(), *second()], large, np.float16)) == 0
    assert collapse_linears(in_type([*first(), *second()], large, np.float32)) == 1


def test_layers_of_two_types_stay_apart(hand: Callable[..., ir.Model]) -> None:
    nodes = [*first(), ("Cast", ["h"], ["z"], {"to": onnx.TensorProto.DOUBLE}), ("MatMul", ["z", "W2"], ["y"])]  # fmt: skip
    model = hand(X, nodes, without("b2", W2=W["W2"].astype(np.float64)), [])
    assert collapse_linears(model) == 0


class Heads(nn.Module):
    """A projection of every token, a classifier of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.head = nn.Linear(K, M), nn.Linear(M, N)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.proj(torch.tanh(x))[:, 0])


def test_the_pipeline_reads_one_token_with_one_layer(run_onnx: Callable[..., list[np.ndarray]]) -> None:  # fmt: skip
    torch.manual_seed(0)
    module = Heads().eval()
    images = torch.randn(2, TOKENS, K)
    model = trace(module, Inputs(images))
    assert macs(model).total == TOKENS * K * M + M * N
    done = rewrite(model)
    assert (done["narrow_tokens"], done["collapse_linears"]) == (3, 1)
    assert macs(clean(model)).total == K * N
    with torch.no_grad():
        wanted = module(images).numpy()
    (found,) = run_onnx(model, {"images": images.numpy()})
    np.testing.assert_allclose(found, wanted, rtol=0, atol=EXACT * np.abs(wanted).max())
