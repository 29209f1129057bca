"""The typing pass: what becomes half, what stays float32, and what the report says of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from utune_deploy.export.islands import SUMS
from utune_deploy.export.precision import HALF, ON_CUDA, PRECISIONS, QUANTISED, retype, to_half
from utune_deploy.merge.errors import BuildFailed, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

F32, F16, BF16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
LARGEST = 65504.0  # of float16
N, C = 5, 8
X = {"x": ["batch", N, C]}
CLOSE = 4e-3  # of the largest value: a few roundings to float16


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32)


W = {"W": weights(C, C), "V": weights(C, C, seed=1), "b": weights(C)}
PRODUCT = ("MatMul", ["x", "W"], ["p"])
LAST = ("MatMul", ["z", "V"], ["end"])  # without a product behind it, a value would be of the tail


def types(model: ir.Model) -> dict[str, ir.DataType | None]:
    """The type of every value by name."""
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [output for node in model.graph for output in node.outputs]
    return {value.name or "": value.dtype for value in values}


def reads(model: ir.Model, name: str) -> list[ir.DataType | None]:
    """The types that the node which gives a value reads."""
    (node,) = (n for n in model.graph if any(o.name == name for o in n.outputs))
    return [value.dtype for value in node.inputs if value is not None]


def same(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=CLOSE * np.abs(wanted).max())


@pytest.fixture
def typed(
    hand: Callable[..., ir.Model], run_onnx: Callable[..., list[np.ndarray]]
) -> Callable[..., Any]:
    """Type a graph as float16 and hold its answers to float32's: `(*graph) -> (model, report)`."""

    def typed(*given: Any, fed: dict[str, np.ndarray] | None = None) -> Any:
        model = hand(*given)
        fed = fed or {n: weights(2, N, C, seed=1) for n in given[0]}
        before = run_onnx(model, fed)
        ends = [(v.name, v.dtype) for v in model.graph.outputs]
        report = retype(model, "fp16")
        assert [(v.name, v.dtype) for v in model.graph.outputs] == ends
        common.CheckerPass(full_check=True)(model)
        for found, wanted in zip(run_onnx(model, fed), before, strict=True):
            same(found, wanted)
        return model, report

    return typed


# which precisions there are


def test_an_unknown_precision_is_refused(hand: Callable[..., ir.Model]) -> None:
    with pytest.raises(UsageError, match="unknown precision") as caught:
        retype(hand(X, [("MatMul", ["x", "W"], ["end"])], W, ["end"]), "int4")
    assert caught.value.details["wanted"] == ", ".join(PRECISIONS)


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p not in HALF])
def test_a_precision_of_float32_leaves_the_graph_as_it_is(
    precision: str, hand: Callable[..., ir.Model]
) -> None:
    model = hand(X, [PRODUCT, ("Softmax", ["p"], ["z"]), LAST], W, ["end"])
    before = ir.to_proto(model).SerializeToString()
    report = retype(model, precision)
    assert ir.to_proto(model).SerializeToString() == before
    assert report.to_json() == {
        "precision": precision, "islands": {}, "cast": 0, "clipped": {}, "flushed": {}, "error": 0.0,
        "subnormal": {}, "kept": {}, "audit": None,
    }  # fmt: skip


def test_all_but_float32_is_laid_out_for_a_device() -> None:
    assert {"fp32", *QUANTISED} | ON_CUDA == set(PRECISIONS)
    assert set(HALF) <= ON_CUDA


@pytest.mark.parametrize(("precision", "half"), HALF.items())
def test_products_are_half_and_the_ends_are_float32(
    precision: str, half: ir.DataType, hand: Callable[..., ir.Model]
) -> None:
    model = hand(X, [PRODUCT, ("Relu", ["p"], ["z"]), LAST], W, ["end"])
    report = retype(model, precision)
    found = types(model)
    assert (found["x"], found["end"]) == (F32, F32)
    assert {found[name] for name in ("p", "z", "W", "V", "end.half")} == {half}
    assert [value.name for value in model.graph.outputs] == ["end"]
    assert reads(model, "p") == [half, half]
    assert (report.precision, report.cast, report.islands) == (precision, 2, {})
    assert "b" not in model.graph.initializers  # nothing reads it
    common.CheckerPass(full_check=True)(model)


# islands

ISLANDS = {
    "a softmax": ([PRODUCT, ("Softmax", ["p"], ["z"]), LAST], {"Softmax": 1}),
    "a sum": ([PRODUCT, ("ReduceSum", ["p", "axis"], ["z"]), LAST], {"ReduceSum": 1}),
    "a mean": ([PRODUCT, ("ReduceMean", ["p", "axis"], ["z"]), LAST], {"ReduceMean": 1}),
    "a power": ([PRODUCT, ("Pow", ["p", "two"], ["z"]), LAST], {"Pow": 1}),
    "an exponential": ([PRODUCT, ("Exp", ["p"], ["z"]), LAST], {"Exp": 1}),
    "what is elementwise behind it": (
        [PRODUCT, ("Exp", ["p"], ["e"]), ("Add", ["e", "b"], ["f"]), ("Sqrt", ["f"], ["g"]), ("Div", ["p", "g"], ["z"]), LAST],
        {"Exp": 1, "Add": 1, "Sqrt": 1, "Div": 1},
    ),
    "what moves values behind it": (
        [PRODUCT, ("Exp", ["p"], ["e"]), ("Transpose", ["e"], ["f"], {"perm": [1, 0, 2]}), ("Transpose", ["f"], ["z"], {"perm": [1, 0, 2]}), LAST],
        {"Exp": 1, "Transpose": 2},
    ),
    "no further than the next product": (
        [PRODUCT, ("Exp", ["p"], ["e"]), ("MatMul", ["e", "W"], ["f"]), ("Relu", ["f"], ["z"]), LAST], {"Exp": 1},
    ),
    "nor what is elementwise in front of it": (
        [PRODUCT, ("Tanh", ["p"], ["e"]), ("Exp", ["e"], ["z"]), LAST], {"Exp": 1},
    ),
    "nor what reads the pictures themselves": (
        [("Add", ["x", "b"], ["a"]), ("MatMul", ["a", "W"], ["z"]), LAST], {},
    ),
    "a cast that is asked for": (
        [PRODUCT, ("Cast", ["p"], ["c"], {"to": 1}), ("Add", ["c", "b"], ["z"]), LAST], {"Cast": 1, "Add": 1},
    ),
}  # fmt: skip
CONSTANTS = {**W, "axis": np.array([1]), "first": np.array(1), "two": np.array(2, np.float32)}


@pytest.mark.parametrize("case", ISLANDS)
def test_islands_are_named_and_nothing_else_is_float32(
    case: str, typed: Callable[..., Any]
) -> None:
    nodes, wanted = ISLANDS[case]
    model, report = typed(X, nodes, CONSTANTS, ["end"])
    assert report.islands == wanted
    inside = {n: t for n, t in types(model).items() if t in (F32, F16)}
    for op, _, (name, *_), *_ in nodes[:-1]:
        island = op in wanted or op == "Cast"
        assert inside[name] == (F32 if island else F16), name
        floats = {t for t in reads(model, name) if t in (F32, F16)}
        assert floats == ({F16} if not island or op == "Cast" else {F32})
    assert reads(model, "end.half") == [F16, F16]


@pytest.mark.parametrize("op", sorted(SUMS))
def test_no_sum_or_power_is_computed_in_half(op: str, hand: Callable[..., ir.Model]) -> None:
    vector = {"s": weights(N), "m": weights(N), "v": np.abs(weights(N)), "g": weights(C)}
    more: dict[str, tuple[list[str], dict[str, Any]]] = {
        "Pow": (["two"], {}),
        "CumSum": (["first"], {}),
        "InstanceNormalization": (["s", "m"], {}),
        "GroupNormalization": (["s", "m"], {"num_groups": 1}),
        "BatchNormalization": (["s", "m", "m", "v"], {}),
        "RMSNormalization": (["g"], {}),
    }
    inputs, attributes = more.get(op, ([], {}))
    nodes = [PRODUCT, (op, ["p", *inputs], ["z"], attributes), ("Cast", ["z"], ["end"], {"to": 1})]
    model = hand(X, nodes, {**CONSTANTS, **vector}, ["end"])
    assert retype(model, "fp16").islands[op] == 1
    assert {t for t in reads(model, "z") if t != ir.DataType.INT64} == {F32}


def test_a_sum_of_squares_beyond_the_range_of_half_stays_finite(
    hand: Callable[..., ir.Model], run_onnx: Callable[..., list[np.ndarray]]
) -> None:
    nodes = [
        PRODUCT, ("Mul", ["p", "p"], ["q"]), ("ReduceSum", ["q", "axes"], ["s"]), ("Sqrt", ["s"], ["r"]),
        ("Div", ["p", "r"], ["z"]), LAST,
    ]  # fmt: skip
    width = 400
    eye, fed = np.eye(width, dtype=np.float32), np.full((2, 1, width), 20, np.float32)
    constants = {"W": eye, "V": eye, "axes": np.array([-1])}
    assert fed[0].max() ** 2 < LARGEST < (fed[0] ** 2).sum()
    model = hand({"x": ["batch", 1, width]}, nodes, constants, ["end"])
    retype(model, "fp16")
    (found,) = run_onnx(model, {"x": fed})
    same(found, fed / np.sqrt((fed**2).sum(-1, keepdims=True)))


def test_the_tail_behind_the_last_product_is_float32(typed: Callable[..., Any]) -> None:
    nodes = [
        ("MatMul", ["x", "W"], ["p"]), ("Add", ["p", "b"], ["q"]), ("Reshape", ["q", "flat"], ["r"]),
        ("Greater", ["r", "zero"], ["known"]), ("Where", ["known", "r", "lowest"], ["end"]),
    ]  # fmt: skip
    lowest = np.array(-3e38, np.float32)
    constants = {**W, "flat": np.array([0, N * C]), "zero": np.array(-1e9, np.float32)}
    model, report = typed(X, nodes, {**constants, "lowest": lowest}, ["end"])
    assert report.islands == {"Add": 1, "Reshape": 1, "Where": 1}
    assert report.clipped.get("lowest") is None
    found = types(model)
    assert (found["p"], found["q"], found["lowest"], found["b"]) == (F16, F32, F32, F32)


def test_biases_of_a_bank_of_constants_are_of_the_tail(typed: Callable[..., Any]) -> None:
    nodes = [
        PRODUCT, ("Gather", ["bank/bias", "rows"], ["g"]), ("Unsqueeze", ["g", "one"], ["v"]), ("Add", ["p", "v"], ["end"]),
    ]  # fmt: skip
    bank = weights(3, C)
    bank[0] = -1e37  # of classes that a task does not have
    constants = {**W, "bank/bias": bank, "rows": np.array([2, 1]), "one": np.array([1])}
    model, report = typed(X, nodes, constants, ["end"])
    assert (report.islands, report.clipped) == ({"Add": 1, "Unsqueeze": 1, "Gather": 1}, {})
    assert types(model)["bank/bias"] == F32


def test_a_sum_of_two_values_is_no_tail(typed: Callable[..., Any]) -> None:
    nodes = [
        ("MatMul", ["x", "W"], ["p"]),
        ("MatMul", ["x", "V"], ["q"]),
        ("Add", ["p", "q"], ["end"]),
    ]
    model, report = typed(X, nodes, W, ["end"])
    assert report.islands == {}
    assert reads(model, "end.half") == [F16, F16]


# constants


def test_numbers_beyond_the_range_and_numbers_that_vanish_are_counted_and_named(
    hand: Callable[..., ir.Model],
) -> None:
    large, small, exact = weights(C, C), weights(C, C, seed=2), np.ones((C, C), np.float32)
    large[0, :3] = 1e6, -1e6, LARGEST
    small[1, :2] = 1e-9, 0.0
    nodes = [
        ("MatMul", ["x", "large"], ["a"]),
        ("MatMul", ["a", "small"], ["z"]),
        ("MatMul", ["z", "exact"], ["end"]),
    ]
    model = hand(X, nodes, {"large": large, "small": small, "exact": exact}, ["end"])
    report = retype(model, "fp16")
    assert (report.clipped, report.flushed) == ({"large": 2}, {"small": 1})
    assert report.cast == 3
    value = model.graph.initializers["large"].const_value
    assert value is not None
    assert value.numpy()[0, :3].tolist() == [LARGEST, -LARGEST, LARGEST]
    assert report.error == pytest.approx((1e6 - LARGEST) / 1e6)


def test_the_largest_rounding_is_told(typed: Callable[..., Any]) -> None:
    between = 1 + 2.0**-11  # as far from 1 as from the next half
    V = np.where(np.eye(C) > 0, between, 0.5).astype(np.float32)
    _, report = typed(
        X,
        [PRODUCT, ("Relu", ["p"], ["z"]), LAST],
        {"W": np.eye(C, dtype=np.float32), "V": V},
        ["end"],
    )
    assert report.error == pytest.approx(2.0**-11 / between)


@pytest.mark.parametrize(("precision", "largest"), [("fp16", LARGEST), ("bf16", 3.3895314e38)])
def test_values_in_half_are_clipped_and_rounded_never_infinite(
    precision: str, largest: float
) -> None:
    given = np.array([0, 1, -3.4e38, 3.4e38, 1e-45, -np.inf, np.inf, np.nan], np.float32)
    cast, clipped, flushed = to_half(given, precision)
    assert (
        cast.dtype
        == {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}[precision]
    )
    found = cast.astype(np.float32)
    assert found[:4] == pytest.approx([0, 1, -largest, largest])
    assert np.isinf(found[5:7]).all()
    assert np.isnan(found[7])
    assert (clipped, flushed) == (2, 1)


def test_a_constant_is_cast_for_those_that_read_it_in_half_and_kept_for_an_island(
    typed: Callable[..., Any],
) -> None:
    nodes = [
        PRODUCT, ("Add", ["p", "b"], ["a"]), ("Exp", ["a"], ["e"]), ("Mul", ["e", "b"], ["f"]),
        ("Add", ["f", "b"], ["z"]), LAST,
    ]  # fmt: skip
    model, report = typed(X, nodes, W, ["end"])
    assert report.cast == 3
    assert sorted(model.graph.initializers) == ["V", "W", "b", "b.fp16"]
    found = types(model)
    assert (found["b"], found["b.fp16"]) == (F32, F16)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        assert value.const_value.name == value.name
    assert reads(model, "a") == [F16, F16]
    assert reads(model, "f") == reads(model, "z") == [F32, F32]


def test_a_constant_that_is_cast_once_keeps_its_name(typed: Callable[..., Any]) -> None:
    nodes = [PRODUCT, ("Add", ["p", "b"], ["a"]), ("Mul", ["a", "b"], ["z"]), LAST]
    model, report = typed(X, nodes, W, ["end"])
    assert report.cast == 3
    assert sorted(model.graph.initializers) == ["V", "W", "b"]
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        assert (value.const_value.name, value.const_value.dtype) == (value.name, F16)


def test_integers_and_truths_are_left_alone(typed: Callable[..., Any]) -> None:
    nodes = [
        PRODUCT, ("Greater", ["p", "b"], ["m"]), ("Cast", ["m"], ["i"], {"to": 7}), ("Cast", ["i"], ["c"], {"to": 1}),
        ("Add", ["p", "c"], ["z"]), LAST,
    ]  # fmt: skip
    model, report = typed(X, nodes, W, ["end"])
    found = types(model)
    assert (found["m"], found["i"], found["c"]) == (ir.DataType.BOOL, ir.DataType.INT64, F32)
    assert report.islands == {"Add": 1}  # made of integers as float32, and what reads it


def test_types_that_the_exporter_left_out_are_filled_in(hand: Callable[..., ir.Model]) -> None:
    nodes = [
        PRODUCT, ("Greater", ["p", "b"], ["m"]), ("Where", ["m", "p", "b"], ["w"]), ("Exp", ["w"], ["e"]),
        ("Shape", ["e"], ["s"]), ("Expand", ["b", "s"], ["y"]), ("Add", ["e", "y"], ["z"]), LAST,
    ]  # fmt: skip
    full, bare = (hand(X, nodes, W, ["end"]) for _ in range(2))
    for node in bare.graph:
        for value in node.outputs:
            value.dtype = None
    bare.graph.outputs[0].dtype = F32
    assert retype(bare, "fp16") == retype(full, "fp16")
    assert types(bare) == types(full)


def test_scales_of_a_resize_stay_float32(typed: Callable[..., Any]) -> None:
    nodes = [
        ("MatMul", ["x", "W"], ["p"]), ("Resize", ["p", "", "scales"], ["z"], {"mode": "nearest"}), LAST,
    ]  # fmt: skip
    scales = np.array([1, 2, 1], np.float32)
    model, report = typed(X, nodes, {**W, "scales": scales}, ["end"])
    assert reads(model, "z") == [F16, F32]
    assert report.islands == {}


# the bank


def test_a_bank_of_inputs_arrives_in_half(
    hand: Callable[..., ir.Model], run_onnx: Callable[..., list[np.ndarray]]
) -> None:
    inputs = {**X, "bank/up": [3, C, C], "bank/bias": [3, C], "task": ["batch"]}
    nodes = [
        ("Gather", ["bank/up", "task"], ["u"]), ("MatMul", ["x", "u"], ["p"]),
        ("Gather", ["bank/bias", "task"], ["g"]), ("Unsqueeze", ["g", "one"], ["v"]), ("Add", ["p", "v"], ["end"]),
    ]  # fmt: skip
    model = hand(inputs, nodes, {"one": np.array([1])}, ["end"])
    fed = {
        "x": weights(2, N, C),
        "bank/up": weights(3, C, C),
        "bank/bias": weights(3, C),
        "task": np.array([2, 0]),
    }
    before = run_onnx(model, fed)
    report = retype(model, "fp16")
    assert {v.name: v.dtype for v in model.graph.inputs} == {
        "x": F32, "bank/up": F16, "bank/bias": F16, "task": ir.DataType.INT64,
    }  # fmt: skip
    assert report.cast == 0
    cast = [
        n.inputs[0].name for n in model.graph if n.op_type == "Cast" and n.inputs[0] is not None
    ]
    assert not [name for name in cast if (name or "").startswith("bank")]
    assert report.islands == {"Add": 1, "Unsqueeze": 1}  # a head's bias is of the tail
    halves = {n: v.astype(np.float16) if n.startswith("bank") else v for n, v in fed.items()}
    same(run_onnx(model, halves)[0], before[0])


# norms


@pytest.mark.parametrize("stash", [None, 1])
def test_a_layer_norm_takes_half_and_keeps_its_statistics(
    stash: int | None, typed: Callable[..., Any]
) -> None:
    attributes = {} if stash is None else {"stash_type": stash}
    nodes = [PRODUCT, ("LayerNormalization", ["p", "b", "b"], ["z"], attributes), LAST]
    model, report = typed(X, nodes, W, ["end"])
    assert set(reads(model, "z")) == {F16}
    assert report.islands == {}


@pytest.mark.parametrize("precision", HALF)
def test_a_layer_norm_whose_statistics_are_in_half_is_refused(
    precision: str, hand: Callable[..., ir.Model]
) -> None:
    nodes = [PRODUCT, ("LayerNormalization", ["p", "b", "b"], ["z"], {"stash_type": 16}), LAST]
    with pytest.raises(BuildFailed, match="statistics in half precision") as caught:
        retype(hand(X, nodes, W, ["end"]), precision)
    assert caught.value.details["where"] == "LayerNormalization_1"
    assert caught.value.exit_code == 6


# answers


def test_an_answer_that_another_node_reads_leaves_under_its_own_name(
    typed: Callable[..., Any],
) -> None:
    model, _ = typed(
        X,
        [("MatMul", ["x", "W"], ["first"]), ("MatMul", ["first", "V"], ["end"])],
        W,
        ["end", "first"],
    )
    assert reads(model, "end.half") == [F16, F16]
    assert types(model)["first.half"] == F16


def test_an_answer_that_is_float32_already_is_not_cast(typed: Callable[..., Any]) -> None:
    model, _ = typed(X, [PRODUCT, ("Softmax", ["p"], ["end"])], W, ["end"])
    (node,) = (v.producer() for v in model.graph.outputs)
    assert node is not None
    assert node.op_type == "Softmax"
