"""Fused nodes stand where they mean what was written, and nowhere else; without a kernel they run as functions."""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_ir.passes import common

from utune_deploy.deploy.graphs import finish
from utune_deploy.export.engine import IMAGES, LOGITS, TASK
from utune_deploy.export.graph import Inputs, serialise, trace
from utune_deploy.export.parity import budget, relative_error
from utune_deploy.export.passes import CUDA_PASSES
from utune_deploy.export.passes.gathered import RANKS
from utune_deploy.export.passes.outline_norms import WIDEST
from utune_deploy.merge import methods
from utune_deploy.merge.attach import restore
from utune_deploy.merge.bank import stack
from utune_deploy.merge.lower import lower
from utune_deploy.merge.mixed import Alone, Mixed

if TYPE_CHECKING:
    from collections.abc import Callable

    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.bank import Bank
    from utune_deploy.merge.delta import Delta

EXACT = 2e-6  # of the largest value: other summation orders in float32, nothing else
C, N, R, T = 64, 5, 16, 3  # channels, tokens, rank, tasks
ORDER = np.array([2, 0], np.int64)  # a task that is not the first, and the first
ACTIVATIONS = {
    "Identity": (), "Relu": ("Relu", {}), "Gelu": ("Gelu", {}), "GeluTanh": ("Gelu", {"approximate": "tanh"}),
    "Tanh": ("Tanh", {}), "Sigmoid": ("Sigmoid", {}),
}  # fmt: skip
NODES = list[tuple[Any, ...]]


def weights(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    noise = np.random.default_rng(seed + sum(shape)).standard_normal(shape)
    return (scale * noise).astype(np.float32)


def banks(inside: int = C, outside: int = C, rank: int = R) -> dict[str, np.ndarray]:
    return {
        "down": weights(T, rank, inside, scale=inside**-0.5), "up": weights(T, outside, rank, scale=rank**-0.5),
        "down_bias": weights(T, rank), "up_bias": weights(T, outside), "one": np.array([1]),
    }  # fmt: skip


def product(x: str, bank: str, y: str, task: str = "task") -> NODES:
    """`y = x bank[task]^T`."""
    return [
        ("Gather", [bank, task], [f"{y}.rows"]),
        ("Transpose", [f"{y}.rows"], [f"{y}.turned"], {"perm": [0, 2, 1]}),
        ("MatMul", [x, f"{y}.turned"], [y]),
    ]


def shift(x: str, bank: str, y: str, task: str = "task", axes: str = "one") -> NODES:
    """`y = x + bank[task]`, one vector for all tokens of a row."""
    return [
        ("Gather", [bank, task], [f"{y}.rows"]),
        ("Unsqueeze", [f"{y}.rows", axes], [f"{y}.vector"]),
        ("Add", [x, f"{y}.vector"], [y]),
    ]


def branch(
    x: str = "x", activation: str = "Relu", biased: bool = True, tasks: str = "task task task task"
) -> NODES:
    """`u = act(x down^T + down_bias) up^T + up_bias`; `tasks` of down, its bias, up and its bias."""
    down, down_bias, up, up_bias = tasks.split()
    act = ACTIVATIONS[activation]
    hidden = "h" if act else "a"
    nodes = product(x, "down", "h_" if biased else hidden, down)
    nodes += shift("h_", "down_bias", hidden, down_bias) if biased else []
    nodes += [(act[0], ["h"], ["a"], act[1])] if act else []
    nodes += product("a", "up", "u_" if biased else "u", up)
    return nodes + (shift("u_", "up_bias", "u", up_bias) if biased else [])


def linear(x: str, y: str) -> NODES:
    return [("MatMul", [x, "W"], [f"{y}_"]), ("Add", [f"{y}_", "b"], [y])]


def norm(x: str, y: str, **attributes: Any) -> NODES:
    return [("LayerNormalization", [x, "gamma", "beta"], [y], attributes)]


def add(x: str, y: str, z: str) -> NODES:
    return [("Add", [x, y], [z])]


def exchanged(nodes: NODES, found: str, *new: tuple[Any, ...]) -> NODES:
    """Other nodes in the place of the one that gives `found`."""
    at = next(number for number, node in enumerate(nodes) if found in node[2])
    return [*nodes[:at], *new, *nodes[at + 1 :]]


def feeds(model: ir.Model) -> dict[str, np.ndarray]:
    return {
        value.name or "": ORDER if (value.name or "").startswith("task")
        else weights(*(d if isinstance(d, int) else len(ORDER) for d in value.shape or ()), seed=i)
        for i, value in enumerate(model.graph.inputs)
    }  # fmt: skip


def text(model: ir.Model) -> str:
    """Everything of a model but the values in it."""
    proto = ir.to_proto(model)
    return f"{proto.graph.node} {proto.functions} {sorted(model.graph.initializers)}"


def fused(model: ir.Model) -> list[str]:
    """The nodes that are no standard operators."""
    return [node.op_type for node in model.graph if node.domain]


@pytest.fixture
def apply(
    hand: Callable[..., ir.Model], run_onnx: Callable[..., list[np.ndarray]]
) -> Callable[[str, Any], ir.Model]:
    """Run one pass on a graph, hold it to what it was, and the second run to doing nothing."""

    def apply(name: str, given: Any) -> ir.Model:
        model = hand(*given)
        ends = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
        fed = feeds(model)
        before, untouched = run_onnx(model, fed), text(model)
        times = CUDA_PASSES[name](model)
        if not times:
            assert text(model) == untouched
        common.RemoveUnusedNodesPass()(model)
        common.TopologicalSortPass()(model)
        assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == ends
        assert times == len(fused(model))
        after = run_onnx(model, fed)
        for found, wanted in zip(after, before, strict=True):
            assert found.shape == wanted.shape
            np.testing.assert_allclose(found, wanted, rtol=0, atol=EXACT * np.abs(wanted).max())
        again = text(model)
        assert CUDA_PASSES[name](model) == 0
        assert text(model) == again
        return model

    return apply


def test_the_cases_below_cover_every_pass() -> None:
    assert {*APPLIES, "flat_patches"} == set(CUDA_PASSES)  # flat_patches: test_passes.py
    assert set(LEFT_ALONE) == set(APPLIES)


X = {"x": ["batch", N, C]}
XB = {**X, "base": ["batch", N, C], "task": ["batch"]}
XS = {**X, "task": ["batch"]}
BANKS = banks()
LAYER = {"W": weights(C, C, scale=C**-0.5), "b": weights(C)}
NORM = {"gamma": weights(C), "beta": weights(C, seed=1)}
CHANNELWISE = {"factor": weights(N), "shift": weights(N, seed=1)}
ALL = {**BANKS, **LAYER, **NORM}
ENDS = [("Relu", ["y"], ["end"])]
BASED = [*branch(), *add("base", "u", "y")]  # y = base + U(x)
NORMED = [  # x = norm(s); y = s + ((x W + b) + U(x))
    *norm("s", "x"), *branch(), *linear("x", "o"), *add("o", "u", "i"), *add("s", "i", "y"),
]  # fmt: skip
STREAM = {"s": ["batch", N, C], "task": ["batch"]}
SUMMED = {"p": ["batch", N, C], "skip": ["batch", N, C], "task": ["batch"]}
SUM = [("MatMul", ["p", "V"], ["v_"]), ("Add", ["v_", "c"], ["v"]), *add("skip", "v", "s")]
SUMS = {**ALL, "V": weights(C, C, seed=2, scale=C**-0.5), "c": weights(C, seed=2)}
AB = {"a": ["batch", N, C], "skip": ["batch", N, C]}
QKV = {
    "Wq": weights(8, 24), "bq": weights(24), "thirds": np.array([8, 8, 8]), "parts": np.array([8, 12, 4]),
}  # fmt: skip
Q = {"x": ["batch", N, 8]}
PARTS = ["q", "k", "v"]
HEADS = {"q_num_heads": 2, "kv_num_heads": 2}


def attention(parts: list[str] = PARTS, y: str = "y", **attributes: Any) -> NODES:
    return [("Attention", parts, [y], {**HEADS, **attributes})]


CUT = [
    ("MatMul", ["x", "Wq"], ["z_"]), ("Add", ["z_", "bq"], ["z"]),
    ("Split", ["z", "thirds"], PARTS, {"axis": -1}),
]  # fmt: skip


APPLIES: dict[str, dict[str, tuple[Any, list[str]]]] = {
    "outline_branches": {
        **{
            f"a {activation} branch, {'biased' if biased else 'without biases'}": (
                (XB, [*branch(activation=activation, biased=biased), *add("base", "u", "y"), *ENDS], BANKS, ["end"]),
                [f"GroupedBottleneck{activation}{'Biased' * biased}"],
            )
            for activation in ACTIVATIONS for biased in (True, False)
        },
        "the branch first in the sum": (
            (XB, [*branch(), *add("u", "base", "y"), *ENDS], BANKS, ["end"]), ["GroupedBottleneckReluBiased"],
        ),
        "a sum that is an output": ((XB, BASED, BANKS, ["y"]), ["GroupedBottleneckReluBiased"]),
        "a layer, whose bias goes along": (
            (XS, [*branch(), *linear("x", "o"), *add("o", "u", "y")], ALL, ["y"]), ["GroupedBottleneckReluBiased"],
        ),
        "a layer that is read elsewhere": (
            (XS, [*branch(), *linear("x", "o"), *add("o", "u", "y")], ALL, ["y", "o"]), ["GroupedBottleneckReluBiased"],
        ),
        "a residual": (
            (XB, [*branch(), *linear("x", "o"), *add("o", "u", "i"), *add("base", "i", "y")], ALL, ["y"]),
            ["GroupedBottleneckReluBiasedResidual"],
        ),
        "a residual behind the sum": (
            (XB, [*branch(biased=False), *add("u", "x", "i"), *add("i", "base", "y")], BANKS, ["y"]),
            ["GroupedBottleneckReluResidual"],
        ),
        "a residual of one row for all stays outside": (
            (
                {**XB, "row": [1, N, C]}, [*BASED[:-1], *add("base", "u", "i"), *add("row", "i", "y")], BANKS, ["y"],
            ), ["GroupedBottleneckReluBiased"],
        ),
        "a sum that is read twice keeps its residual outside": (
            (XB, [*branch(), *add("base", "u", "i"), *add("x", "i", "y")], BANKS, ["y", "i"]),
            ["GroupedBottleneckReluBiased"],
        ),
        "a sum that is added to itself": (
            (XB, [*branch(), *add("base", "u", "i"), *add("i", "i", "y")], BANKS, ["y"]), ["GroupedBottleneckReluBiased"],
        ),
        "more channels than it reads": (
            ({**XB, "base": ["batch", N, 2 * C]}, BASED, banks(outside=2 * C), ["y"]), ["GroupedBottleneckReluBiased"],
        ),
        "a bank that is an input": (
            (
                {**XB, **{n: list(v.shape) for n, v in BANKS.items() if n != "one"}}, BASED, {"one": BANKS["one"]}, ["y"],
            ), ["GroupedBottleneckReluBiased"],
        ),
        **{
            f"rank {rank}": ((XB, BASED, banks(rank=rank), ["y"]), ["GroupedBottleneckReluBiased"]) for rank in RANKS
        },
    },
    "outline_norms": {
        **{
            f"a {activation} branch": (
                (STREAM, exchanged_branch, ALL, ["y"]), [f"NormedBranch{activation}Biased"],
            )
            for activation in ACTIVATIONS
            for exchanged_branch in [[*norm("s", "x"), *branch(activation=activation), *NORMED[-4:]]]
        },
        "without biases": (
            (STREAM, [*norm("s", "x"), *branch(biased=False), *NORMED[-4:]], ALL, ["y"]), ["NormedBranchRelu"],
        ),
        "sums the other way round": (
            (STREAM, [*NORMED[:-2], *add("u", "o", "i"), *add("i", "s", "y")], ALL, ["y"]), ["NormedBranchReluBiased"],
        ),
        "an epsilon of its own": (
            (STREAM, exchanged(NORMED, "x", *norm("s", "x", epsilon=0.5)), ALL, ["y"]), ["NormedBranchReluBiased"],
        ),
        "the last axis by its number": (
            (STREAM, exchanged(NORMED, "x", *norm("s", "x", axis=2)), ALL, ["y"]), ["NormedBranchReluBiased"],
        ),
        "a norm that is read elsewhere": (
            (STREAM, [*NORMED, ("Relu", ["x"], ["end"])], ALL, ["y", "end"]), ["NormedBranchReluBiased"],
        ),
        "a norm that is an output": ((STREAM, NORMED, ALL, ["y", "x"]), ["NormedBranchReluBiased"]),
        "a stream that is a sum": ((SUMMED, [*SUM, *NORMED], SUMS, ["y"]), ["NormedBranchReluBiasedSkip"]),
        "a sum the other way round": (
            (SUMMED, [*exchanged(SUM, "s", *add("v", "skip", "s")), *NORMED], SUMS, ["y"]), ["NormedBranchReluBiasedSkip"],
        ),
        "a sum without a layer's bias": (
            (SUMMED, [*add("skip", "p", "s"), *NORMED], SUMS, ["y"]), ["NormedBranchReluBiased"],
        ),
        "a sum that is read elsewhere": (
            (SUMMED, [*SUM, *NORMED, ("Relu", ["s"], ["end"])], SUMS, ["y", "end"]), ["NormedBranchReluBiased"],
        ),
        "a sum that is an output": ((SUMMED, [*SUM, *NORMED], SUMS, ["y", "s"]), ["NormedBranchReluBiased"]),
        "a sum with one row for all, such as positions": (
            ({**SUMMED, "skip": [1, N, C]}, [*SUM, *NORMED], SUMS, ["y"]), ["NormedBranchReluBiased"],
        ),
    },
    "skip_norms": {
        "a sum": ((AB, [*add("a", "skip", "s"), *norm("s", "y"), *ENDS], NORM, ["end"]), ["SkipLayerNormalization"]),
        "a norm that is an output": ((AB, [*add("a", "skip", "s"), *norm("s", "y")], NORM, ["y"]), ["SkipLayerNormalization"]),
        "a layer's bias": ((SUMMED, [*SUM, *norm("s", "y"), *ENDS], SUMS, ["end"]), ["SkipLayerNormalization"]),
        "a sum that is read elsewhere": (
            (SUMMED, [*SUM, *norm("s", "n"), *add("s", "n", "y")], SUMS, ["y"]), ["SkipLayerNormalization"],
        ),
        "an epsilon of its own": (
            (AB, [*add("a", "skip", "s"), *norm("s", "y", epsilon=0.5), *ENDS], NORM, ["end"]), ["SkipLayerNormalization"],
        ),
        "the last axis by its number": (
            (AB, [*add("a", "skip", "s"), *norm("s", "y", axis=2), *ENDS], NORM, ["end"]), ["SkipLayerNormalization"],
        ),
        "two in a row": (
            (AB, [*add("a", "skip", "s"), *norm("s", "n"), *add("s", "n", "t"), *norm("t", "y"), *ENDS], NORM, ["end"]),
            ["SkipLayerNormalization"] * 2,
        ),
        "one of two norms of a sum": (
            (AB, [*add("a", "skip", "s"), *norm("s", "n"), *norm("s", "m", epsilon=0.5), *add("n", "m", "y")], NORM, ["y"]),
            ["SkipLayerNormalization"],
        ),
    },
    "packed_attention": {
        "an attention": ((Q, [*CUT, *attention(), *ENDS], QKV, ["end"]), ["Attention"]),
        "an attention that is an output": ((Q, [*CUT, *attention()], QKV, ["y"]), ["Attention"]),
        "the last axis by its number": (
            (Q, [*exchanged(CUT, "q", ("Split", ["z", "thirds"], PARTS, {"axis": 2})), *attention(), *ENDS], QKV, ["end"]),
            ["Attention"],
        ),
        "a layer without a bias": (
            (Q, [("MatMul", ["x", "Wq"], ["z"]), CUT[-1], *attention(), *ENDS], QKV, ["end"]), ["Attention"],
        ),
        "a scale of its own": ((Q, [*CUT, *attention(scale=0.9), *ENDS], QKV, ["end"]), ["Attention"]),
        "fewer channels than it reads": (
            ({"x": ["batch", N, 10]}, [*CUT, *attention(), *ENDS], {**QKV, "Wq": weights(10, 24)}, ["end"]), ["Attention"],
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "case"), [pytest.param(n, c, id=f"{n}: {c}") for n, cs in APPLIES.items() for c in cs]
)
def test_a_pass_is_exact_where_it_applies(
    name: str, case: str, apply: Callable[[str, Any], ir.Model]
) -> None:
    given, wanted = APPLIES[name][case]
    model = apply(name, given)
    assert fused(model) == wanted
    assert sorted({node.op_type for node in model.graph if node.domain == "utune"}) == sorted(
        function[1] for function in model.functions
    )


UNEVEN = [CUT[0], CUT[1], ("Split", ["z", "parts"], PARTS, {"axis": -1})]
ROWS = {"x": ["batch", 3, 8]}
ACROSS = [CUT[0], CUT[1], ("Split", ["z", "ones"], PARTS, {"axis": 1})]
LEFT_ALONE: dict[str, dict[str, Any]] = {
    "outline_branches": {
        **{f"rank {rank}": (XB, BASED, banks(rank=rank), ["y"]) for rank in (8, 24, 256)},
        "channels in that are no multiple of 64": ({**XB, "x": ["batch", N, 96]}, BASED, banks(inside=96), ["y"]),
        "channels out that are no multiple of 64": ({**XB, "base": ["batch", N, 96]}, BASED, banks(outside=96), ["y"]),
        "no bias behind the activation": (
            XB, [*branch()[:7], *product("a", "up", "u"), *add("base", "u", "y")], BANKS, ["y"],
        ),
        "no bias in front of the activation": (
            XB, [*product("x", "down", "h"), *branch()[6:], *add("base", "u", "y")], BANKS, ["y"],
        ),
        **{
            f"another task for {what}": (
                {**XB, "task2": ["batch"]}, [*branch(tasks=tasks), *add("base", "u", "y")], BANKS, ["y"],
            )
            for what, tasks in {
                "down": "task2 task task task", "the first bias": "task task2 task task",
                "up": "task task task2 task2", "the last bias": "task task task task2",
            }.items()
        },
        "a bias for each token": (
            XB, exchanged(exchanged(BASED, "u.vector"), "u", *add("u_", "u.rows", "u")),
            {**BANKS, "up_bias": weights(T, N, C)}, ["y"],
        ),
        "a bias for each token, the same for all channels": (
            XB, exchanged(BASED, "u.vector", ("Unsqueeze", ["u.rows", "two"], ["u.vector"])),
            {**BANKS, "up_bias": weights(T, N), "two": np.array([2])}, ["y"],
        ),
        "a bank on another axis": (
            XB, exchanged(BASED, "h_.rows", ("Gather", ["down", "task"], ["h_.rows"], {"axis": 1})),
            {**BANKS, "down": weights(len(ORDER), R, C), "up": weights(T, C, len(ORDER)), "down_bias": weights(T, len(ORDER))}, ["y"],
        ),
        "a bank that is turned another way": (
            XB, exchanged(BASED, "u_.turned", ("Transpose", ["u_.rows"], ["u_.turned"], {"perm": [0, 1, 2]})),
            banks(rank=C), ["y"],
        ),
        "a bank that lies the other way": (
            XB, exchanged(exchanged(BASED, "u_.turned"), "u_", ("MatMul", ["a", "u_.rows"], ["u_"])),
            {**BANKS, "up": weights(T, R, C)}, ["y"],
        ),
        "a bank that is computed": (
            XB, [("Relu", ["down"], ["r"]), *exchanged(BASED, "h_.rows", ("Gather", ["r", "task"], ["h_.rows"]))],
            BANKS, ["y"],
        ),
        "an activation that no kernel has": (XB, exchanged(BASED, "a", ("LeakyRelu", ["h"], ["a"])), BANKS, ["y"]),
        **{
            f"{what} that is an output": (XB, BASED, BANKS, ["y", value])
            for what, value in {"a branch": "u", "a product": "u_", "a hidden value": "h", "an activation": "a"}.items()
        },
        "a hidden value that is read elsewhere": (XB, [*BASED, ("Neg", ["h"], ["end"])], BANKS, ["y", "end"]),
        "a branch that is added twice": (XB, [*branch(), *add("u", "u", "y")], BANKS, ["y"]),
        "a branch that is taken away": (XB, exchanged(BASED, "y", ("Sub", ["base", "u"], ["y"])), BANKS, ["y"]),
        "rows without tokens": ({**XB, "x": [N, C]}, BASED, BANKS, ["y"]),
        "a base of four axes": ({**XB, "base": [2, "batch", N, C]}, BASED, BANKS, ["y"]),
        "a base of one row for all": ({**XB, "base": [1, N, C]}, BASED, BANKS, ["y"]),
        "a base that is a vector": (XS, [*branch(), *add("b", "u", "y")], ALL, ["y"]),
    },
    "outline_norms": {
        "another stream": ({**STREAM, "other": ["batch", N, C]}, [*NORMED[:-1], *add("other", "i", "y")], ALL, ["y"]),
        "a norm without a shift": (
            STREAM, exchanged(NORMED, "x", ("LayerNormalization", ["s", "gamma"], ["x"])), ALL, ["y"],
        ),
        "a norm over tokens": (
            STREAM, exchanged(NORMED, "x", *norm("s", "x", axis=1)),
            {**ALL, "gamma": weights(N, C), "beta": weights(N, C, seed=1)}, ["y"],
        ),
        "another norm": (STREAM, exchanged(NORMED, "x", ("InstanceNormalization", ["s", "factor", "shift"], ["x"])), {**ALL, **CHANNELWISE}, ["y"]),
        "no norm": (STREAM, exchanged(NORMED, "x", ("Tanh", ["s"], ["x"])), ALL, ["y"]),
        "a sum of base and branch that is read elsewhere": (STREAM, [*NORMED, ("Relu", ["i"], ["end"])], ALL, ["y", "end"]),
        "a sum of base and branch that is an output": (STREAM, NORMED, ALL, ["y", "i"]),
        "a product with the stream": (STREAM, exchanged(NORMED, "y", ("Mul", ["s", "i"], ["y"])), ALL, ["y"]),
        "rank 24": (STREAM, NORMED, {**ALL, **banks(rank=24)}, ["y"]),
        "more channels than the kernel takes": (
            {**STREAM, "s": ["batch", 2, WIDEST + C], "o": ["batch", 2, WIDEST + C]}, [*NORMED[:-4], *NORMED[-2:]],
            {**banks(WIDEST + C, WIDEST + C), "gamma": weights(WIDEST + C), "beta": weights(WIDEST + C)}, ["y"],
        ),
    },
    "skip_norms": {
        "no sum": (AB, [("Mul", ["a", "skip"], ["s"]), *norm("s", "y")], NORM, ["y"]),
        "an input": (AB, norm("a", "y"), NORM, ["y"]),
        "a sum that is an output": (AB, [*add("a", "skip", "s"), *norm("s", "y")], NORM, ["y", "s"]),
        "a norm over tokens": (
            AB, [*add("a", "skip", "s"), *norm("s", "y", axis=1)], {"gamma": weights(N, C), "beta": weights(N, C, seed=1)}, ["y"],
        ),
        "a norm without a shift": (
            AB, [*add("a", "skip", "s"), ("LayerNormalization", ["s", "gamma"], ["y"])], NORM, ["y"],
        ),
        "another norm": (AB, [*add("a", "skip", "s"), ("InstanceNormalization", ["s", "factor", "shift"], ["y"])], CHANNELWISE, ["y"]),
        "one row for all": ({**AB, "skip": [1, N, C]}, [*add("a", "skip", "s"), *norm("s", "y")], NORM, ["y"]),
        "one token for all": ({**AB, "skip": ["batch", 1, C]}, [*add("a", "skip", "s"), *norm("s", "y")], NORM, ["y"]),
        "one vector for all": (AB, [*add("a", "b", "s"), *norm("s", "y")], ALL, ["y"]),
        "two axes": ({"a": ["batch", C], "skip": ["batch", C]}, [*add("a", "skip", "s"), *norm("s", "y")], NORM, ["y"]),
        "four axes": (
            {"a": ["batch", 2, N, C], "skip": ["batch", 2, N, C]}, [*add("a", "skip", "s"), *norm("s", "y", axis=-1)], NORM, ["y"],
        ),
    },
    "packed_attention": {
        "a mask": (Q, [*CUT, *attention([*PARTS, "mask"])], {**QKV, "mask": weights(N, N)}, ["y"]),
        "a causal mask": (Q, [*CUT, *attention(is_causal=1)], QKV, ["y"]),
        "scores that are capped": (Q, [*CUT, *attention(softcap=2.0)], QKV, ["y"]),
        "fewer heads of keys": (
            Q, [*UNEVEN[:2], ("Split", ["z", "parts"], PARTS, {"axis": -1}), *attention(q_num_heads=4)],
            {**QKV, "parts": np.array([12, 6, 6])}, ["y"],
        ),
        "keys and queries exchanged": (Q, [*CUT, *attention(["k", "q", "v"])], QKV, ["y"]),
        "unequal parts": (Q, [*UNEVEN, *attention()], {**QKV, "parts": np.array([10, 10, 4])}, ["y"]),
        "parts of the tokens": (ROWS, [*ACROSS, *attention()], {**QKV, "ones": np.array([1, 1, 1])}, ["y"]),
        "queries that are read elsewhere": (Q, [*CUT, *attention(), ("Relu", ["q"], ["end"])], QKV, ["y", "end"]),
        "a layer that is read elsewhere": (Q, [*CUT, *attention(), ("Relu", ["z"], ["end"])], QKV, ["y", "end"]),
        "a product that is read elsewhere": (Q, [*CUT, *attention(), ("Relu", ["z_"], ["end"])], QKV, ["y", "end"]),
        "a layer that is an output": (Q, [*CUT, *attention()], QKV, ["y", "z"]),
        "values that are an output": (Q, [*CUT, *attention()], QKV, ["y", "v"]),
        "a sum behind the layer": (
            {**Q, "u": ["batch", N, 24]}, [*CUT[:1], *add("z_", "u", "z"), CUT[2], *attention()], QKV, ["y"],
        ),
        "a weight that is an input": ({**Q, "Wq": [8, 24]}, [*CUT, *attention()], {"bq": QKV["bq"], "thirds": QKV["thirds"]}, ["y"]),
        "keys of another layer": (
            Q, [*CUT, ("MatMul", ["x", "Wk"], ["k2"]), *attention(["q", "k2", "v"])], {**QKV, "Wk": weights(8, 8)}, ["y"],
        ),
        "one token": ({"x": ["batch", 8]}, [*CUT, *((("Unsqueeze", [p, "one"], [f"{p}1"])) for p in PARTS), *attention(["q1", "k1", "v1"])], {**QKV, "one": np.array([1])}, ["y"]),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(n, c, id=f"{n}: {c}") for n, cs in LEFT_ALONE.items() for c in cs],
)
def test_a_pass_leaves_alone_what_it_must_not_touch(
    name: str, case: str, apply: Callable[[str, Any], ir.Model]
) -> None:
    assert fused(apply(name, LEFT_ALONE[name][case])) == []


def test_what_a_node_takes_along_is_its_own(apply: Callable[[str, Any], ir.Model]) -> None:
    given, _ = APPLIES["outline_branches"]["a layer, whose bias goes along"]
    (node,) = (node for node in apply("outline_branches", given).graph if node.domain)
    assert [value and value.name for value in node.inputs] == [
        "x", "o_", "task", "down", "up", "b", "down_bias", "up_bias",
    ]  # fmt: skip
    given, _ = APPLIES["outline_norms"]["a stream that is a sum"]
    (node,) = (node for node in apply("outline_norms", given).graph if node.domain)
    assert [value and value.name for value in node.inputs] == [
        "v_", "c", "skip", "gamma", "beta", "task", "down", "up", "down_bias", "up_bias",
    ]  # fmt: skip
    given, _ = APPLIES["skip_norms"]["a layer's bias"]
    (node,) = (node for node in apply("skip_norms", given).graph if node.domain)
    assert [value and value.name for value in node.inputs] == ["v_", "skip", "gamma", "beta", "c"]


def test_a_branch_without_a_layer_gets_a_bias_of_zeros(
    apply: Callable[[str, Any], ir.Model],
) -> None:
    (node,) = (node for node in apply("outline_branches", (XB, BASED, BANKS, ["y"])).graph if node.domain)  # fmt: skip
    bias = node.inputs[5]
    assert bias is not None
    assert bias.const_value is not None
    assert bias.const_value.numpy().tolist() == [0.0] * C


def test_two_branches_of_one_form_are_one_function(
    hand: Callable[..., ir.Model], run_onnx: Callable[..., list[np.ndarray]]
) -> None:
    second = [
        (op, *([f"{n}2" if n in ("h_", "h", "a", "u_", "u") or "." in n else n for n in names] for names in ends), *rest)
        for op, *ends, rest in (node if len(node) == 4 else (*node, {}) for node in branch("y"))
        for rest in [[rest] if rest else []]
    ]  # fmt: skip
    model = hand(XB, [*BASED, *second, *add("y", "u2", "z")], BANKS, ["z"])
    before = run_onnx(model, feeds(model))[0]
    assert CUDA_PASSES["outline_branches"](model) == 2
    assert [function[1] for function in model.functions] == ["GroupedBottleneckReluBiased"]
    assert model.opset_imports["utune"] == 1
    after = run_onnx(model, feeds(model))[0]
    np.testing.assert_allclose(after, before, rtol=0, atol=EXACT * np.abs(before).max())


# end to end

BLOCKS = 2
METHODS: dict[str, tuple[Any, Counter[str]]] = {
    "dual": (
        lambda rank: methods.dual_adapter(rank),
        Counter({  # in the last block one branch is of one token, and the norm in front of it of all
            "NormedBranchReluBiased": 2, "NormedBranchReluBiasedSkip": 1, "GroupedBottleneckReluBiasedResidual": 1,
            "SkipLayerNormalization": 2, "Attention": BLOCKS,
        }),
    ),
    "parallel": (
        lambda rank: methods.parallel_adapter(rank),
        Counter({"NormedBranchReluBiasedSkip": 2, "SkipLayerNormalization": 2, "Attention": BLOCKS}),
    ),
    "lora": (  # what it adds to queries, keys and values stands before the attention
        lambda rank: methods.lora(rank),
        Counter({"GroupedBottleneckIdentity": BLOCKS, "SkipLayerNormalization": 2 * BLOCKS}),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(
    wide_vit: Backbone, random_delta: Callable[..., Delta]
) -> Callable[[str, int], list[Delta]]:
    """Two tasks of one method and rank, of unlike class counts."""

    def tasks(method: str, rank: int = R) -> list[Delta]:
        return [
            random_delta(wide_vit, METHODS[method][0](rank), task=name, classes=classes, seed=classes)
            for name, classes in (("a", 3), ("b", 5))
        ]  # fmt: skip

    return tasks


@torch.no_grad()
def in_torch(
    backbone: Backbone, delta: Delta, sites: Any, dtype: torch.dtype, images: torch.Tensor
) -> np.ndarray:
    """One task alone in a dtype."""
    tuned = copy.deepcopy(restore(backbone, delta, sites)).eval().to(dtype)
    return tuned(images.to(dtype)).double().numpy()


def traced(backbone: Backbone, bank: Bank, *, mixes: bool = True) -> ir.Model:
    names = {f"bank_{number}": f"bank/{key}" for number, key in enumerate(bank.tensors)}
    rows = Inputs(backbone.example(batch=2), torch.tensor([0, 1]) if mixes else None)
    return trace((Mixed if mixes else Alone)(backbone, bank).eval(), rows, rename=names)


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_small_vit_is_fused_block_by_block_and_answers_as_torch_does(
    method: str,
    precision: str,
    wide_vit: Backbone,
    tasks: Callable[..., list[Delta]],
    sites_of: Callable[..., Any],
    run_onnx: Callable[..., list[np.ndarray]],
) -> None:
    sites, deltas = sites_of(wide_vit), tasks(method)
    bank = stack([lower(wide_vit, d, sites) for d in deltas], torch.float32, ranks=RANKS)
    model = traced(wide_vit, bank)
    done = finish(model, precision).rewritten
    wanted = METHODS[method][1]
    assert Counter(fused(model)) == wanted
    assert done["flat_patches"] == 1
    assert done["outline_norms"] + done["outline_branches"] == sum(
        count for name, count in wanted.items() if name.startswith(("Normed", "Grouped"))
    )
    engine = serialise(model, {})
    proto = onnx.load_from_string(engine)
    names = [function.name for function in proto.functions]
    assert sorted(names) == sorted(n for n in wanted if n.startswith(("Normed", "Grouped")))
    stored = {t.data_type for t in proto.graph.initializer if t.name.startswith("bank/blocks")}
    assert stored == {onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.FLOAT}
    images = wide_vit.example(batch=6)
    order = np.array([1, 0, 0, 1, 1, 0])
    (found,) = run_onnx(engine, {IMAGES: images.numpy(), TASK: order})
    dtype = torch.float16 if precision == "fp16" else torch.float32
    judged = precision if precision == "fp16" else "fp32"  # the CPU has no TF32
    for row, delta in enumerate(deltas):
        own = images[order == row]
        exact, plain = (in_torch(wide_vit, delta, sites, d, own) for d in (torch.float64, dtype))
        mine = found[order == row][:, : len(delta.labels)]
        assert relative_error(mine, exact) < budget(plain, exact, judged)


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_ranks_between_those_of_the_kernels_are_padded_to_one(
    precision: str,
    wide_vit: Backbone,
    tasks: Callable[..., list[Delta]],
    sites_of: Callable[..., Any],
    run_onnx: Callable[..., list[np.ndarray]],
) -> None:
    (delta, _), sites = tasks("parallel", 5), sites_of(wide_vit)
    bank = stack([lower(wide_vit, delta, sites)], torch.float32, ranks=RANKS)
    model = traced(wide_vit, bank, mixes=False)
    finish(model, precision)
    assert Counter(fused(model)) == METHODS["parallel"][1]
    images = wide_vit.example(batch=3)
    (found,) = run_onnx(serialise(model, {}), {IMAGES: images.numpy()})
    dtype = torch.float16 if precision == "fp16" else torch.float32
    exact, plain = (in_torch(wide_vit, delta, sites, d, images) for d in (torch.float64, dtype))
    assert relative_error(found, exact) < budget(
        plain, exact, precision if precision == "fp16" else "fp32"
    )
    unpadded = traced(wide_vit, stack([lower(wide_vit, delta, sites)], torch.float32), mixes=False)
    finish(unpadded, precision)
    assert not any(name.startswith(("Normed", "Grouped")) for name in fused(unpadded))


def test_a_model_that_ends_in_a_norm_keeps_the_name_of_its_answer(
    run_onnx: Callable[..., list[np.ndarray]],
) -> None:
    class Ends(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = torch.nn.Linear(C, C), torch.nn.LayerNorm(C)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x + self.layer(x))

    module, x = Ends().eval(), torch.randn(2, N, C)
    model = trace(module, Inputs(x))
    assert finish(model, "tf32").rewritten["skip_norms"] == 1
    assert [value.name for value in model.graph.outputs] == [LOGITS]
    (found,) = run_onnx(serialise(model, {}), {IMAGES: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, module(x).numpy(), rtol=0, atol=1e-5)
