"""Eight bits: which products, with which scales, and that nothing else changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from utune_deploy.export.agreement import Least, agreement
from utune_deploy.export.quantise import FORMATS, choose, digests, quantise, step
from utune_deploy.export.ranges import METHODS, ranges
from utune_deploy.export.targets.onnxruntime import OnnxRuntimeSession
from utune_deploy.merge.errors import BuildFailed, IncompatibleArtefact, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

ORT, TRT, FP8 = (FORMATS[key] for key in (("int8", "onnxruntime"), ("int8", "tensorrt"), ("fp8", "tensorrt")))  # fmt: skip
N, C = 5, 8
X = {"images": ["batch", N, C]}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


CONSTANTS = {
    "W": noise(C, C, seed=1), "down": noise(C, 2, seed=2), "up": noise(2, C, seed=3),
    "V": noise(4, C, seed=4), "c": noise(4, seed=5), "head": noise(4, 3, seed=6), "b": noise(3, seed=7),
}  # fmt: skip
NODES = [
    ("MatMul", ["images", "W"], ["frozen"]),
    ("MatMul", ["images", "down"], ["thin"]),
    ("Relu", ["thin"], ["bent"]),
    ("MatMul", ["bent", "up"], ["branch"]),
    ("Add", ["frozen", "branch"], ["sum"]),
    ("ReduceMax", ["sum", "axes"], ["pooled"], {"keepdims": 0}),
    ("Gemm", ["pooled", "V", "c"], ["hidden"], {"transB": 1}),
    ("Relu", ["hidden"], ["r"]),
    ("MatMul", ["r", "head"], ["h"]),
    ("Add", ["h", "b"], ["logits"]),
]
FROZEN = digests([CONSTANTS["W"].T, CONSTANTS["V"]])
BATCHES = [{"images": noise(4, N, C, seed=seed)} for seed in (10, 11, 12)]
CHOSEN = {"MatMul_0", "Gemm_6"}


@pytest.fixture
def model(hand: Callable[..., ir.Model]) -> ir.Model:
    return hand(X, NODES, {**CONSTANTS, "axes": np.array([1])}, ["logits"])


def around(proto: onnx.ModelProto) -> dict[str, tuple[str, str]]:
    """What gives the two inputs of each product."""
    gives = {output: node.op_type for node in proto.graph.node for output in node.output}
    return {
        node.name: (gives.get(node.input[0], ""), gives.get(node.input[1], ""))
        for node in proto.graph.node
        if node.op_type in ("MatMul", "Gemm")
    }


@pytest.mark.parametrize("form", [ORT, TRT, FP8], ids=lambda form: form.name)
def test_exactly_the_frozen_products_are_quantised(form: Any, model: ir.Model) -> None:
    report = quantise(model, form, BATCHES, frozen=FROZEN)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert set(report.products) == CHOSEN
    assert report.kept == {
        "MatMul_1": "not a weight of the backbone alone: a tuner's, or folded with one",
        "MatMul_3": "not a weight of the backbone alone: a tuner's, or folded with one",
        "MatMul_8": "a head",
    }
    found = around(proto)
    both = ("DequantizeLinear", "DequantizeLinear")
    assert {name for name, given in found.items() if given == both} == CHOSEN
    assert not any("DequantizeLinear" in found[name] for name in report.kept)
    assert sum(n.op_type == "QuantizeLinear" for n in proto.graph.node) == 2
    assert report.scales == 2 + C + 4


def test_scales_are_those_of_plain_arithmetic(model: ir.Model) -> None:
    seen = np.concatenate([batch["images"] for batch in BATCHES])
    low, high = float(seen.min()), float(seen.max())
    report = quantise(model, ORT, BATCHES, frozen=FROZEN)
    first = report.products["MatMul_0"]
    assert first["activation"] == "images"
    assert first["scale"] == pytest.approx((high - low) / 255, rel=1e-6)
    assert first["zero"] == round(-low / ((high - low) / 255))
    stored = {t.name: numpy_helper.to_array(t) for t in ir.to_proto(model).graph.initializer}
    scales = np.abs(CONSTANTS["W"]).max(axis=0) / 127
    np.testing.assert_allclose(stored["W.scales"], scales, rtol=1e-6)
    np.testing.assert_array_equal(stored["W.int8"], np.rint(CONSTANTS["W"] / scales))
    assert "W" not in stored
    assert stored["head"].dtype == stored["down"].dtype == stored["c"].dtype == np.float32


def test_scales_are_those_of_the_runtime_s_own_quantiser(model: ir.Model) -> None:
    from onnxruntime.quantization.quant_utils import (
        QuantType,
        compute_scale_zp,
        get_qmin_qmax_for_qType,
    )

    low, high = np.float32(-1.5), np.float32(4.0)
    bottom, top = get_qmin_qmax_for_qType(QuantType.QUInt8.tensor_type)
    zero, scale = compute_scale_zp(low, high, bottom, top)
    found = step(float(low), float(high), ORT)
    assert found.scale == pytest.approx(float(np.asarray(scale).item()), rel=1e-6)
    assert found.zero == int(np.asarray(zero).item())


def test_symmetric_formats_have_no_zero_point() -> None:
    assert step(-1.0, 0.5, TRT) == (np.float32(1 / 127), 0)
    assert step(-1.0, 0.5, FP8) == (np.float32(1 / 448), 0)
    assert step(0.0, 0.0, ORT) == (1.0, 0)
    assert step(2.0, 4.0, ORT) == (np.float32(4 / 255), 0)  # zero is one of the numbers


@pytest.mark.parametrize("form", [ORT, TRT, FP8], ids=lambda form: form.name)
def test_the_answer_is_near_and_what_is_computed_is_eight_bits(
    form: Any, model: ir.Model, run_onnx: Callable[..., list[np.ndarray]]
) -> None:
    images = BATCHES[0]["images"]
    (wanted,) = run_onnx(model, {"images": images})
    quantise(model, form, BATCHES, frozen=FROZEN)
    engine = ir.to_proto(model).SerializeToString()
    found = OnnxRuntimeSession(engine, as_written=form is FP8).run(images)
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert 0 < error < (0.1 if form is FP8 else 0.03)


def test_the_runtime_refuses_float8_that_it_fuses_unless_it_is_told_not_to(model: ir.Model) -> None:
    quantise(model, FP8, BATCHES, frozen=FROZEN)
    engine = ir.to_proto(model).SerializeToString()
    assert ml_dtypes.float8_e4m3fn(448) == 448
    with pytest.raises(IncompatibleArtefact):  # once it does not, `as_written` can go
        OnnxRuntimeSession(engine)


def test_calibration_is_deterministic(hand: Callable[..., ir.Model]) -> None:
    made = []
    for _ in range(2):
        model = hand(X, NODES, {**CONSTANTS, "axes": np.array([1])}, ["logits"])
        quantise(model, ORT, BATCHES, frozen=FROZEN)
        made.append(ir.to_proto(model).SerializeToString())
    assert made[0] == made[1]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_calibration_stays_within_what_was_seen(
    method: str, model: ir.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = np.concatenate([batch["images"] for batch in BATCHES])
    before = ir.to_proto(model).SerializeToString()
    low, high = ranges(model, ["images"], BATCHES, method)["images"]
    assert float(seen.min()) - 1e-5 <= low < high <= float(seen.max()) + 1e-5
    assert ir.to_proto(model).SerializeToString() == before
    assert capsys.readouterr().out == ""


def test_products_are_kept_by_name_or_operator(model: ir.Model) -> None:
    report = quantise(model, ORT, BATCHES, frozen=FROZEN, keep=["Gemm*"])
    assert set(report.products) == {"MatMul_0"}
    assert report.kept["Gemm_6"] == "kept by --keep-fp32 Gemm*"


def test_of_a_merged_engine_all_but_the_head_is_frozen(model: ir.Model) -> None:
    report = quantise(model, ORT, BATCHES, frozen=None)
    assert set(report.kept) == {"MatMul_8"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keep": ["nothing*"]}, "names none"),
        ({"keep": ["MatMul*", "Gemm*"]}, "no product is left"),
        ({"frozen": frozenset()}, "no product is left"),
        ({"method": "guess"}, "unknown method"),
    ],
)
def test_what_cannot_be_done_is_refused(
    settings: dict[str, Any], said: str, model: ir.Model
) -> None:
    with pytest.raises(UsageError, match=said):
        quantise(model, ORT, BATCHES, **{"frozen": FROZEN, **settings})


def test_values_that_are_not_finite_have_no_range(model: ir.Model) -> None:
    with pytest.raises(BuildFailed, match="not finite"):
        ranges(model, ["images"], [{"images": np.full((1, N, C), np.inf, np.float32)}])


def test_a_product_of_two_activations_is_left_alone(hand: Callable[..., ir.Model]) -> None:
    model = hand({"images": ["batch", N, N]}, [("MatMul", ["images", "images"], ["s"]), ("MatMul", ["s", "W"], ["t"]), ("Relu", ["t"], ["end"])], {"W": noise(N, 2)}, ["end"])  # fmt: skip
    chosen, kept = choose(model, None)
    assert [node.name for node in chosen] == ["MatMul_1"]
    assert kept == {"MatMul_0": "its weight is no constant: a task's, or another activation"}


# agreement


def test_agreement_counts_rows_and_allows_the_share_that_was_said() -> None:
    wanted = np.eye(4, dtype=np.float32)[np.arange(100) % 4] + 3.0
    found = wanted.copy()
    assert agreement("a", found, wanted, Least(), classes=True).passed
    found[0] = found[0][::-1]
    one = agreement("a", found, wanted, Least(), classes=True)
    assert (one.passed, one.flips, one.rows, one.error) == (True, 1, 100, 0.01)
    found[1] = found[1][::-1]
    assert not agreement("a", found, wanted, Least(), classes=True).passed
    assert agreement("a", found, wanted, Least(agreement=0.98), classes=True).passed
    assert not agreement("a", found[:50], wanted[:50], Least(0.98), classes=True).passed


def test_agreement_is_also_of_direction() -> None:
    wanted = noise(40, 6)
    turned = wanted + 0.3 * noise(40, 6, seed=1)
    low = agreement("a", turned, wanted, Least(cosine=0.999), classes=False)
    assert (low.passed, low.flips) == (False, 0)
    assert low.error > low.budget == pytest.approx(0.001)
    assert agreement("a", 2 * wanted, wanted, Least(), classes=False).passed
    assert not agreement("a", np.full_like(wanted, np.nan), wanted, Least(), classes=False).passed
