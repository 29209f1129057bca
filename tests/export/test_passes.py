"""Every rewrite is exact where it applies, and leaves alone what it must not touch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_ir.passes import common
from torch import nn
from torch.nn import functional as F

from utune_deploy.export.engine import IMAGES, LOGITS
from utune_deploy.export.graph import Inputs, clean, serialise, trace
from utune_deploy.export.passes import CPU_PASSES, CUDA_PASSES, PASSES, rewrite
from utune_deploy.export.passes.widen_hidden import SCALE
from utune_deploy.merge import methods
from utune_deploy.merge.attach import restore
from utune_deploy.merge.bank import stack
from utune_deploy.merge.lower import lower
from utune_deploy.merge.mixed import Single

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

EXACT = 1e-6  # of the largest value: other summation orders in float32, nothing else
C, N, HEADS = 12, 5, 3  # channels, tokens, heads
NODES = tuple[Any, ...]


class Attention(nn.Module):
    """timm's attention: `qkv` cut by reshape, permute and unbind."""

    def __init__(
        self, *, mask: bool = False, scale: float | None = None, order: str = "qkv"
    ) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)
        self.proj = nn.Linear(C, C)
        self.scale, self.order = scale, order
        self.register_buffer("mask", torch.randn(1, 1, N, N) if mask else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        parts = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        named = dict(zip("qkv", parts, strict=True))
        q, k, v = (named[letter] for letter in self.order)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=self.scale)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class NormedKeys(Attention):
    """The keys go through a norm behind the cut: they are no third of `qkv` any more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, F.layer_norm(k, (c // HEADS,)), v)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class Unjoined(Attention):
    """The heads are read before they are joined, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, c)) + y.sum((1, 3))[..., None]


class Tokenwise(Attention):
    """The heads are joined over the tokens: three axes as usual, other numbers in them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).reshape(b, HEADS, n * c // HEADS)


class TwoSources(Attention):
    """Query and key of one tensor, value of another."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(C, 3 * C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def cut(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            b, n, _ = y.shape
            return y.reshape(b, n, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4).unbind(0)

        q, k, _ = cut(self.qkv(x))
        y = F.scaled_dot_product_attention(q, k, cut(self.other(x))[2])
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class LoraQkv(Attention):
    """LoRA on `qkv`: behind `flat_heads` its down-projection is a sibling, its up-projection is added."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(C, 2, bias=False), nn.Linear(2, 3 * C, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x) + self.up(self.down(x))
        q, k, v = qkv.reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class ParallelAdapter(Attention):
    """An adapter beside the attention: it reads what `qkv` reads and is added where `proj` ends."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(C, 2), nn.Linear(2, C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.up(torch.relu(self.down(x))) + x


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32)


def feeds(model: ir.Model, batch: int = 2) -> dict[str, np.ndarray]:
    return {
        value.name or "": weights(
            *(d if isinstance(d, int) else batch for d in value.shape or ()), seed=i
        )
        for i, value in enumerate(model.graph.inputs)
    }


def text(model: ir.Model) -> str:
    """Everything of a graph but the values in it."""
    return str(ir.to_proto(model).graph.node) + str(sorted(model.graph.initializers))


@pytest.fixture
def apply(run_onnx: Callable[..., list[np.ndarray]]) -> Callable[[ir.Model, str], int]:
    """Run one pass, hold the model to what it was, and the second run to doing nothing."""

    def apply(model: ir.Model, name: str) -> int:
        ends = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
        given = feeds(model)
        before = run_onnx(model, given)
        untouched = text(model)
        times = ALL[name](model)
        if not times:
            assert text(model) == untouched
        common.RemoveUnusedNodesPass()(model)
        assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == ends
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        for found, wanted in zip(run_onnx(model, given), before, strict=True):
            assert found.shape == wanted.shape
            np.testing.assert_allclose(found, wanted, rtol=0, atol=EXACT * np.abs(wanted).max())
        again = text(model)
        assert ALL[name](model) == 0
        assert text(model) == again
        return times

    return apply


def traced(module: nn.Module) -> ir.Model:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return trace(module.eval(), Inputs(torch.randn(2, N, C)))


def test_the_cases_below_cover_every_pass() -> None:
    assert set(APPLIES) == {
        *PASSES,
        *CPU_PASSES,
        "flat_patches",
    }  # the other CUDA_PASSES: test_cuda_passes.py
    assert set(LEFT_ALONE) == set(APPLIES)


def linear(x: str, y: str, *, bias: bool = True) -> list[NODES]:
    """`y = x W_y (+ b_y)`."""
    if not bias:
        return [("MatMul", [x, f"W{y}"], [y])]
    return [("MatMul", [x, f"W{y}"], [f"{y}_"]), ("Add", [f"{y}_", f"b{y}"], [y])]


ALL = {**PASSES, **CPU_PASSES, **CUDA_PASSES}
X = {"x": ["batch", N, 8]}
XT = {"x": ["batch", N, 8], "t": ["batch", N, 2]}
XY = {"x": ["batch", N, 4], "y": ["batch", N, 4]}
XYU = {**XY, "u": ["batch", 1, 4]}
AB = {"Wa": weights(8, 3), "ba": weights(3), "Wb": weights(8, 4), "bb": weights(4)}
SUM = {
    "Wa": weights(8, 16),
    "ba": weights(16),
    "Wb": weights(2, 16, seed=1),
    "bb": weights(16, seed=1),
}
BC = {"b": weights(4), "c": weights(4, seed=1)}
ENDS = [("Relu", ["s"], ["end"])]  # a sum that is an output keeps its name, so it is left alone
QKV = {
    "Wq": weights(8, 24), "bq": weights(24), "thirds": np.array([8, 8, 8]),
    "Wd": weights(8, 2), "bd": weights(2),
}  # fmt: skip
ROW = {"Wa": weights(8, 12), "ba": weights(12), "Wb": weights(12, 4), "bb": weights(4)}
FIRST = ("Gather", ["a", "first"], ["y"], {"axis": 1})
PATCHES = {"images": ["batch", 3, 6, 8]}
PATCH = {"W": weights(5, 3, 2, 4), "b": weights(5), "flat": np.array([-1, 5, 6])}
EMBED = [
    ("Conv", ["images", "W", "b"], ["map"], {"strides": [2, 4]}),
    ("Reshape", ["map", "flat"], ["row"]),
    ("Transpose", ["row"], ["tokens"], {"perm": [0, 2, 1]}),
]
CUT = ("Split", ["q", "thirds"], ["q0", "q1", "q2"], {"axis": -1})
MLPS = {
    "Wh": weights(8, 20), "bh": weights(20), "Wm": weights(20, 8), "bm": weights(8),
    "Wd": weights(8, 3), "bd": weights(3), "Wu": weights(3, 8), "bu": weights(8, seed=1),
}  # fmt: skip


def mlps(
    frozen: Any = ("Gelu",),
    branch: Any = ("Relu",),
    *,
    bias: bool = True,
    of: str = "x",
    swap: bool = False,
) -> list[NODES]:
    """`act(x Wh + bh) Wm + bm + f(x Wd + bd) Wu + bu`."""  # fmt: skip
    return [
        *linear("x", "h", bias=bias), (frozen[0], ["h"], ["g"], *frozen[1:]), *linear("g", "m", bias=bias),
        *linear(of, "d", bias=bias), (branch[0], ["d"], ["r"], *branch[1:]), *linear("r", "u", bias=bias),
        ("Add", ["u", "m"] if swap else ["m", "u"], ["s"]), *ENDS,
    ]  # fmt: skip


APPLIES: dict[str, dict[str, tuple[Any, int]]] = {
    "flat_heads": {
        "an attention": (Attention, 1),
        "an attention with an additive mask": (lambda: Attention(mask=True), 1),
        "an attention with a scale of its own": (lambda: Attention(scale=0.3), 1),
        "two attentions in a row": (lambda: nn.Sequential(Attention(), Attention()), 2),
    },
    "flat_patches": {
        "patches of a picture": ((PATCHES, [*EMBED, ("Relu", ["tokens"], ["end"])], PATCH, ["end"]), 1),
        "without a bias": (
            (PATCHES, [("Conv", ["images", "W"], ["map"], {"strides": [2, 4]}), *EMBED[1:], ("Relu", ["tokens"], ["end"])], PATCH, ["end"]), 1,
        ),
        "tokens that are an output": ((PATCHES, EMBED, PATCH, ["tokens"]), 1),
    },
    "narrow_tokens": {  # more in test_narrow_tokens.py
        "a layer in front of one token": ((X, [*linear("x", "a"), FIRST], {**AB, "first": np.array(0)}, ["y"]), 2),
    },
    "collapse_linears": {  # more in test_collapse_linears.py
        "two layers in a row": ((X, [*linear("x", "a"), *linear("a", "b")], ROW, ["b"]), 1),
    },
    "widen_hidden": {
        "a ReLU beside a GELU": ((X, mlps(), MLPS, ["end"]), 1),
        "a GELU beside a GELU": ((X, mlps(branch=("Gelu",)), MLPS, ["end"]), 1),
        "a ReLU beside a ReLU": ((X, mlps(frozen=("Relu",)), MLPS, ["end"]), 1),
        "a ReLU beside a GELU by tanh": ((X, mlps(frozen=("Gelu", {"approximate": "tanh"})), MLPS, ["end"]), 1),
        "the branch first": ((X, mlps(swap=True), MLPS, ["end"]), 1),
        "no bias": ((X, mlps(bias=False), MLPS, ["end"]), 1),
        "as wide as a vector": (
            (X, mlps(), {**MLPS, "Wd": weights(8, 16), "bd": weights(16), "Wu": weights(16, 8)}, ["end"]), 1,
        ),
        "two branches": (
            (
                X,
                [*mlps()[:-1], *linear("x", "e"), ("Relu", ["e"], ["f"]), *linear("f", "v"), ("Add", ["s", "v"], ["s2"]), ("Relu", ["s2"], ["end"])],
                {**MLPS, "We": weights(8, 5), "be": weights(5), "Wv": weights(5, 8), "bv": weights(8)}, ["end"],
            ), 2,
        ),
    },
    "join_siblings": {
        "two narrow layers": ((X, [*linear("x", "a"), *linear("x", "b")], AB, ["a", "b"]), 1),
        "one layer without a bias": (
            (X, [*linear("x", "a", bias=False), *linear("x", "b")], AB, ["a", "b"]), 1,
        ),
        "no layer with a bias": (
            (X, [*linear("x", "a", bias=False), *linear("x", "b", bias=False)], AB, ["a", "b"]), 1,
        ),
        "an output that is read twice": (
            (X, [*linear("x", "a"), *linear("x", "b"), ("Mul", ["a", "a"], ["c"])], AB, ["c", "b"]), 1,
        ),
        "a layer that is cut apart anyway": (
            (X, [*linear("x", "q"), CUT, *linear("x", "d")], QKV, ["q0", "q1", "q2", "d"]), 1,
        ),
        "narrow layers behind a wide one": (
            (
                X, [*linear("x", "w"), *linear("x", "a"), *linear("x", "b")],
                {**AB, "Ww": weights(8, 32), "bw": weights(32)}, ["w", "a", "b"],
            ), 1,
        ),
    },
    "join_added": {
        "two layers": (
            (XT, [*linear("x", "a"), *linear("t", "b"), ("Add", ["a", "b"], ["s"]), *ENDS], SUM, ["end"]), 1,
        ),
        "one bias": (
            (XT, [*linear("x", "a"), *linear("t", "b", bias=False), ("Add", ["b", "a"], ["s"]), *ENDS], SUM, ["end"]), 1,
        ),
        "no bias": (
            (
                XT, [*linear("x", "a", bias=False), *linear("t", "b", bias=False), ("Add", ["a", "b"], ["s"]), *ENDS],
                SUM, ["end"],
            ), 1,
        ),
        "a sum that is read twice": (
            (
                XT, [*linear("x", "a"), *linear("t", "b"), ("Add", ["a", "b"], ["s"]), ("Mul", ["s", "s"], ["end"])],
                SUM, ["end"],
            ), 1,
        ),
    },
    "join_biases": {
        "both sides": (
            (XY, [("Add", ["x", "b"], ["u"]), ("Add", ["y", "c"], ["v"]), ("Add", ["u", "v"], ["s"]), *ENDS], BC, ["end"]), 1,
        ),
        "constants in front": (
            (XY, [("Add", ["b", "x"], ["u"]), ("Add", ["c", "y"], ["v"]), ("Add", ["v", "u"], ["s"]), *ENDS], BC, ["end"]), 1,
        ),
        "a constant with leading axes": (
            (
                XY, [("Add", ["x", "b"], ["u"]), ("Add", ["y", "c"], ["v"]), ("Add", ["u", "v"], ["s"]), *ENDS],
                {"b": weights(1, 1, 4), "c": weights(4)}, ["end"],
            ), 1,
        ),
        "three sums": (
            (
                XY,
                [
                    ("Add", ["x", "b"], ["u"]), ("Add", ["y", "c"], ["v"]), ("Add", ["u", "v"], ["s"]),
                    ("Relu", ["x"], ["r"]), ("Add", ["r", "b"], ["w"]), ("Add", ["s", "w"], ["z"]),
                    ("Relu", ["z"], ["end"]),
                ],
                BC, ["end"],
            ), 2,
        ),
    },
    "row_biases": {
        "a bias of the row beside a constant": (
            (XYU, [("Add", ["x", "b"], ["p"]), ("Add", ["y", "u"], ["q"]), ("Add", ["p", "q"], ["s"]), *ENDS], BC, ["end"]), 1,
        ),
        "in front": (
            (XYU, [("Add", ["u", "x"], ["p"]), ("Add", ["c", "y"], ["q"]), ("Add", ["q", "p"], ["s"]), *ENDS], BC, ["end"]), 1,
        ),
        "two of the row": (
            ({**XYU, "w": ["batch", 1, 4]}, [("Add", ["x", "w"], ["p"]), ("Add", ["y", "u"], ["q"]), ("Add", ["p", "q"], ["s"]), *ENDS], {}, ["end"]), 1,
        ),
        "products whose shape the exporter left off": (
            (
                {"x": ["batch", N, 8], **{k: XYU[k] for k in "yu"}},
                [("MatMul", ["x", "W"], ["m"]), ("Add", ["m", "b"], ["p"]), ("Add", ["y", "u"], ["q"]), ("Add", ["p", "q"], ["s"]), *ENDS],
                {"W": weights(8, 4), "b": weights(4)}, ["end"],
            ), 1,
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "case"), [pytest.param(n, c, id=f"{n}: {c}") for n, cs in APPLIES.items() for c in cs]
)
def test_a_pass_is_exact_where_it_applies(
    name: str, case: str, hand: Callable[..., ir.Model], apply: Callable[[ir.Model, str], int]
) -> None:
    given, times = APPLIES[name][case]
    model = hand(*given) if isinstance(given, tuple) else traced(given())
    assert apply(model, name) == times


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("size", [1e-10, 1e-3, 1.0, 1e3, 1e6])
def test_a_scaled_gelu_is_a_relu_in_float32(
    approximate: str, size: float, hand: Callable[..., ir.Model], run_onnx: Callable[..., Any]
) -> None:
    model = hand(
        {"x": ["batch", 64]}, [("Gelu", ["x"], ["y"], {"approximate": approximate})], {}, ["y"]
    )
    values = np.float32(size) * weights(3, 64)
    found = run_onnx(model, {"x": values * np.float32(SCALE)})[0] / np.float32(SCALE)
    np.testing.assert_allclose(found, np.maximum(values, 0), rtol=2**-24, atol=0.17 / SCALE)


LEFT_ALONE: dict[str, dict[str, Any]] = {
    "flat_heads": {
        "keys behind a norm": NormedKeys,
        "query and value exchanged": lambda: Attention(order="vkq"),
        "query and key the same": lambda: Attention(order="qqv"),
        "heads read before they are joined": Unjoined,
        "heads joined over the tokens": Tokenwise,
        "two tensors": TwoSources,
    },
    "flat_patches": {
        "patches that overlap": (
            {"images": ["batch", 3, 6, 8]},
            [("Conv", ["images", "W", "b"], ["map"], {"strides": [1, 4]}), *EMBED[1:]], {**PATCH, "flat": np.array([-1, 5, 10])}, ["tokens"],
        ),
        "a border": (
            {"images": ["batch", 3, 4, 8]},
            [("Conv", ["images", "W", "b"], ["map"], {"strides": [2, 4], "pads": [1, 0, 1, 0]}), *EMBED[1:]], PATCH, ["tokens"],
        ),
        "pixels that are left over": ({"images": ["batch", 3, 7, 8]}, EMBED, PATCH, ["tokens"]),
        "a map that is read, too": (PATCHES, EMBED, PATCH, ["tokens", "map"]),
        "groups of channels": (
            {"images": ["batch", 5, 6, 8]},
            [("Conv", ["images", "W", "b"], ["map"], {"strides": [2, 4], "group": 5}), *EMBED[1:]], {**PATCH, "W": weights(5, 1, 2, 4)}, ["tokens"],
        ),
        "tokens in another order": (
            PATCHES, [EMBED[0], EMBED[1], ("Transpose", ["row"], ["tokens"], {"perm": [2, 0, 1]})], PATCH, ["tokens"],
        ),
    },
    "narrow_tokens": {
        "a layer that is read whole, too": (X, [*linear("x", "a"), FIRST], {**AB, "first": np.array(0)}, ["y", "a"]),
    },
    "collapse_linears": {
        "an activation between": (X, [*linear("x", "a"), ("Relu", ["a"], ["r"]), ("MatMul", ["r", "Wb"], ["b"])], ROW, ["b"]),
    },
    "widen_hidden": {
        "a GELU beside a ReLU": (X, mlps(("Relu",), ("Gelu",)), MLPS, ["end"]),
        "another GELU": (X, mlps(branch=("Gelu", {"approximate": "tanh"})), MLPS, ["end"]),
        "another input": ({**X, "y": ["batch", N, 8]}, mlps(of="y"), MLPS, ["end"]),
        "an output": (X, mlps()[:-1], MLPS, ["s"]),
        "hidden units that are read elsewhere": (X, [*mlps(), ("Relu", ["g"], ["o"])], MLPS, ["end", "o"]),
        "a branch that is read elsewhere": (X, [*mlps(), ("Relu", ["u"], ["o"])], MLPS, ["end", "o"]),
        "what goes into the activation is read elsewhere": (X, [*mlps(), ("Relu", ["d"], ["o"])], MLPS, ["end", "o"]),
    },
    "join_siblings": {
        "one layer": (X, linear("x", "a"), AB, ["a"]),
        "two inputs": (XT, [*linear("x", "a"), *linear("t", "c", bias=False)], {**AB, "Wc": weights(2, 2)}, ["a", "c"]),
        "two wide layers": (
            X, [*linear("x", "w", bias=False), *linear("x", "v", bias=False)],
            {"Ww": weights(8, 32), "Wv": weights(8, 16)}, ["w", "v"],
        ),
        "a narrow layer beside a wide one that is read whole": (
            X, [*linear("x", "w", bias=False), *linear("x", "a")], {**AB, "Ww": weights(8, 32)}, ["w", "a"],
        ),
        "a weight that is an input": (
            {**X, "Wb": [8, 4]}, [*linear("x", "a"), *linear("x", "b")],
            {k: v for k, v in AB.items() if k != "Wb"}, ["a", "b"],
        ),
        "a weight that an input may replace": (
            {**X, "Wb": [8, 4]}, [*linear("x", "a"), *linear("x", "b")], AB, ["a", "b"],
        ),
        "a weight per row": (
            {"x": [2, N, 8]}, [*linear("x", "a"), *linear("x", "b", bias=False)],
            {**AB, "Wb": weights(2, 8, 4)}, ["a", "b"],
        ),
        "a weight on the left": (
            {"x": ["batch", 3, 8]}, [*linear("x", "a"), ("MatMul", ["Wl", "x"], ["l"])],
            {**AB, "Wl": weights(3, 3)}, ["a", "l"],
        ),
        "a cut along another axis": (
            {"x": ["batch", 24, 8]},
            [*linear("x", "q"), ("Split", ["q", "thirds"], ["q0", "q1", "q2"], {"axis": 1}), *linear("x", "d")],
            QKV, ["q0", "q1", "q2", "d"],
        ),
        "a cut layer that is read whole, too": (
            X, [*linear("x", "q"), CUT, ("Relu", ["q"], ["r"]), *linear("x", "d")], QKV, ["q0", "q1", "q2", "r", "d"],
        ),
        "a cut layer that is an output, too": (
            X, [*linear("x", "q"), CUT, *linear("x", "d")], QKV, ["q0", "q1", "q2", "q", "d"],
        ),
    },
    "join_added": {
        "an output": (XT, [*linear("x", "a"), *linear("t", "b"), ("Add", ["a", "b"], ["s"])], SUM, ["s"]),
        "a shared side": (
            XT, [*linear("x", "a"), *linear("t", "b"), ("Add", ["a", "b"], ["s"]), *ENDS, ("Relu", ["b"], ["r"])],
            SUM, ["end", "r"],
        ),
        "a side that is an output": (
            XT, [*linear("x", "a"), *linear("t", "b"), ("Add", ["a", "b"], ["s"]), *ENDS], SUM, ["end", "a"],
        ),
        "a product inside that is an output": (
            XT, [*linear("x", "a"), *linear("t", "b"), ("Add", ["a", "b"], ["s"]), *ENDS], SUM, ["end", "a_"],
        ),
        "one token for all": (
            {"x": ["batch", N, 8], "t": ["batch", 1, 2]},
            [*linear("x", "a"), *linear("t", "b"), ("Add", ["a", "b"], ["s"]), *ENDS], SUM, ["end"],
        ),
        "axes without a name, which may differ": (
            {"x": [None, N, 8], "t": [None, N, 2]},
            [*linear("x", "a"), *linear("t", "b"), ("Add", ["a", "b"], ["s"]), *ENDS], SUM, ["end"],
        ),
        "fewer axes": (
            {"x": ["batch", N, 8], "t": [N, 2]},
            [*linear("x", "a"), *linear("t", "b"), ("Add", ["a", "b"], ["s"]), *ENDS], SUM, ["end"],
        ),
        "one channel for all": (
            XT, [*linear("x", "a"), *linear("t", "b", bias=False), ("Add", ["a", "b"], ["s"]), *ENDS],
            {**SUM, "Wb": weights(2, 1)}, ["end"],
        ),
        "a wide input": (
            {"x": ["batch", N, 32], "t": ["batch", N, 2]},
            [*linear("x", "a"), *linear("t", "b"), ("Add", ["a", "b"], ["s"]), *ENDS],
            {"Wa": weights(32, 8), "ba": weights(8), "Wb": weights(2, 8), "bb": weights(8)}, ["end"],
        ),
        "a layer added to itself": (XT, [*linear("x", "a"), ("Add", ["a", "a"], ["s"]), *ENDS], SUM, ["end"]),
        "something that is no layer": (
            {"x": ["batch", N, 8], "z": ["batch", N, 16]}, [*linear("x", "a"), ("Add", ["a", "z"], ["s"]), *ENDS], SUM, ["end"],
        ),
        "a weight that is an input": (
            {**XT, "Wb": [2, 16]}, [*linear("x", "a"), *linear("t", "b"), ("Add", ["a", "b"], ["s"]), *ENDS],
            {k: v for k, v in SUM.items() if k != "Wb"}, ["end"],
        ),
    },
    "join_biases": {
        "one side": (XY, [("Add", ["x", "b"], ["u"]), ("Add", ["u", "y"], ["s"]), *ENDS], BC, ["end"]),
        "a shared side": (
            XY,
            [("Add", ["x", "b"], ["u"]), ("Add", ["y", "c"], ["v"]), ("Add", ["u", "v"], ["s"]), *ENDS, ("Relu", ["u"], ["r"])],
            BC, ["end", "r"],
        ),
        "a side that is an output": (
            XY, [("Add", ["x", "b"], ["u"]), ("Add", ["y", "c"], ["v"]), ("Add", ["u", "v"], ["s"]), *ENDS], BC, ["end", "u"],
        ),
        "an output": (XY, [("Add", ["x", "b"], ["u"]), ("Add", ["y", "c"], ["v"]), ("Add", ["u", "v"], ["s"])], BC, ["s"]),
        "one side twice": (XY, [("Add", ["x", "b"], ["u"]), ("Add", ["u", "u"], ["s"]), *ENDS], BC, ["end"]),
        "a constant per token": (
            XY, [("Add", ["x", "b"], ["u"]), ("Add", ["y", "c"], ["v"]), ("Add", ["u", "v"], ["s"]), *ENDS],
            {"b": weights(1, N, 4), "c": weights(4)}, ["end"],
        ),
        "a constant that is an input": (
            {**XY, "c": [4]}, [("Add", ["x", "b"], ["u"]), ("Add", ["y", "c"], ["v"]), ("Add", ["u", "v"], ["s"]), *ENDS],
            {"b": weights(4)}, ["end"],
        ),
    },
    "row_biases": {
        "two constants": (XY, [("Add", ["x", "b"], ["p"]), ("Add", ["y", "c"], ["q"]), ("Add", ["p", "q"], ["s"]), *ENDS], BC, ["end"]),
        "one side": (XYU, [("Add", ["x", "u"], ["p"]), ("Add", ["p", "y"], ["s"]), *ENDS], {}, ["end"]),
        "a side that is read elsewhere": (
            XYU,
            [("Add", ["x", "b"], ["p"]), ("Add", ["y", "u"], ["q"]), ("Add", ["p", "q"], ["s"]), *ENDS, ("Relu", ["q"], ["r"])],
            BC, ["end", "r"],
        ),
        "a side that is an output": (
            XYU, [("Add", ["x", "b"], ["p"]), ("Add", ["y", "u"], ["q"]), ("Add", ["p", "q"], ["s"]), *ENDS], BC, ["end", "q"],
        ),
        "an output": (XYU, [("Add", ["x", "b"], ["p"]), ("Add", ["y", "u"], ["q"]), ("Add", ["p", "q"], ["s"])], BC, ["s"]),
        "one side twice": (XYU, [("Add", ["x", "u"], ["p"]), ("Add", ["p", "p"], ["s"]), *ENDS], {}, ["end"]),
        "a value per token": (
            {**XY, "u": ["batch", N, 4]}, [("Add", ["x", "b"], ["p"]), ("Add", ["y", "u"], ["q"]), ("Add", ["p", "q"], ["s"]), *ENDS], BC, ["end"],
        ),
        "one token": (
            {"x": ["batch", 1, 4], "y": ["batch", 1, 4], "u": ["batch", 1, 4]},
            [("Add", ["x", "b"], ["p"]), ("Add", ["y", "u"], ["q"]), ("Add", ["p", "q"], ["s"]), *ENDS], BC, ["end"],
        ),
        "two axes": (
            {"x": ["batch", 4], "y": ["batch", 4], "u": ["batch", 4]},
            [("Add", ["x", "b"], ["p"]), ("Add", ["y", "u"], ["q"]), ("Add", ["p", "q"], ["s"]), *ENDS], BC, ["end"],
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(n, c, id=f"{n}: {c}") for n, cs in LEFT_ALONE.items() for c in cs],
)
def test_a_pass_leaves_alone_what_it_must_not_touch(
    name: str, case: str, hand: Callable[..., ir.Model], apply: Callable[[ir.Model, str], int]
) -> None:
    given = LEFT_ALONE[name][case]
    model = hand(*given) if isinstance(given, tuple) else traced(given())
    assert apply(model, name) == 0


@pytest.mark.parametrize(
    ("name", "given"),
    [
        pytest.param(
            "join_added",
            (
                {"x": ["batch", 8], "t": ["batch", 2]},
                [*linear("x", "a"), *linear("t", "b"), ("Add", ["a", "b"], ["s"]), *ENDS],
                {**SUM, "ba": weights(1, 1, 16)},
                ["end"],
            ),
            id="join_added: a bias with more axes than the product",
        ),
        pytest.param(
            "join_siblings",
            (
                {"x": ["batch", 8]},
                [*linear("x", "a"), *linear("x", "b")],
                {**AB, "ba": weights(1, 1, 3)},
                ["a", "b"],
            ),
            id="join_siblings: a bias with more axes than the product",
        ),
        pytest.param(
            "join_biases",
            (
                {"x": ["batch", 4], "y": ["batch", 4]},
                [
                    ("Add", ["x", "b"], ["u"]),
                    ("Add", ["y", "c"], ["v"]),
                    ("Add", ["u", "v"], ["s"]),
                    *ENDS,
                ],
                {"b": weights(1, 1, 4), "c": weights(4)},
                ["end"],
            ),
            id="join_biases: a constant with more axes than the sum",
        ),
        pytest.param(
            "join_biases",
            (
                {"x": ["batch", N, 1], "y": ["batch", N, 1]},
                [
                    ("Add", ["x", "b"], ["u"]),
                    ("Add", ["y", "c"], ["v"]),
                    ("Add", ["u", "v"], ["s"]),
                    *ENDS,
                ],
                BC,
                ["end"],
            ),
            id="join_biases: constants that widen what they are added to",
        ),
    ],
)
def test_a_pass_keeps_the_shape_of_odd_broadcasts(
    name: str, given: Any, hand: Callable[..., ir.Model], apply: Callable[[ir.Model, str], int]
) -> None:
    apply(hand(*given), name)


@pytest.mark.parametrize(
    ("module", "applied"),
    [
        (LoraQkv, {"flat_heads": 1, "join_added": 1}),
        (ParallelAdapter, {"flat_heads": 1, "join_siblings": 1, "join_added": 1}),
    ],
)
def test_a_tuner_is_fused_into_its_op(
    module: type[nn.Module], applied: dict[str, int], run_onnx: Callable[..., list[np.ndarray]]
) -> None:
    model = traced(module())
    given = feeds(model)
    before = run_onnx(model, given)[0]
    gemms = sum(node.op_type == "MatMul" for node in model.graph)
    wanted = {**dict.fromkeys(PASSES, 0), **applied}
    assert rewrite(model) == wanted
    fewer = wanted["join_siblings"] + wanted["join_added"]
    assert sum(node.op_type == "MatMul" for node in model.graph) == gemms - fewer
    after = run_onnx(clean(model), given)[0]
    np.testing.assert_allclose(after, before, rtol=0, atol=EXACT * np.abs(before).max())


KINDS: dict[str, Sequence[Any]] = {
    "lora everywhere": [
        methods.lora(2, at=at) for at in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ],
    "dual": [methods.dual_adapter(3)],
    "serial": [methods.serial_adapter(3)],
    "prefix": [methods.prefix(3)],
    "prefix beside": [methods.prefix(3, joint_softmax=False)],
    "prompt": [methods.deep_prompt(3)],
    "bias": [methods.bitfit()],
    "everything": [
        methods.lora(2), methods.dual_adapter(3), methods.serial_adapter(2, activation="silu"),
        methods.prefix(2), methods.bitfit(),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_pipeline_is_exact_for_every_kind_of_tuner(
    kind: str,
    vit: Backbone,
    sites_of: Callable[..., Any],
    random_delta: Callable[..., Delta],
    run_onnx: Callable[..., list[np.ndarray]],
) -> None:
    delta = random_delta(vit, *KINDS[kind], task=kind)
    sites = sites_of(vit)
    model = trace(
        Single(vit, stack([lower(vit, delta, sites)])).eval(), Inputs(vit.example(batch=2))
    )
    images = vit.example(batch=3).numpy()
    before = run_onnx(model, {IMAGES: images})[0]
    done = rewrite(model)
    engine = serialise(clean(model), {})
    after = run_onnx(engine, {IMAGES: images})[0]
    scale = np.abs(before).max()
    np.testing.assert_allclose(after, before, rtol=0, atol=4 * EXACT * scale)  # 3 blocks in a row
    with torch.no_grad():
        wanted = restore(vit, delta, sites)(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(after, wanted, rtol=0, atol=10 * EXACT * scale)
    assert list(done) == list(PASSES)
    assert done["flat_heads"] == (0 if kind.startswith(("prefix", "prompt", "every")) else 3)
    if kind != "everything":  # there the sums that join_biases reorders are new work for join_added
        assert not any(rewrite(model).values())
    assert [value.name for value in model.graph.outputs] == [LOGITS]
