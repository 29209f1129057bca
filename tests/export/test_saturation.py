"""The audit before half: what leaves the range is found, named, and float32 only where that was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest

from utune_deploy.export.islands import matched
from utune_deploy.export.saturation import Examples, magnitudes, retype_audited
from utune_deploy.merge.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

F32, F16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
N, C = 3, 4
X = {"x": ["batch", N, C]}
NODES = [
    ("MatMul", ["x", "W"], ["p"]),
    ("MatMul", ["p", "V"], ["big"]),  # of ones, 1e4 times
    ("MatMul", ["big", "S"], ["small"]),
    ("MatMul", ["small", "W"], ["end"]),
]
ONE = np.eye(C, dtype=np.float32)
CONSTANTS = {"W": ONE, "V": 1e4 * ONE, "S": 1e-4 * ONE}


def batches(*sizes: float) -> list[dict[str, np.ndarray]]:
    return [{"x": np.full((2, N, C), size, np.float32)} for size in sizes]


def examples(*sizes: float) -> Examples:
    return Examples("planted examples", 2 * len(sizes), batches(*sizes))


@pytest.fixture
def model(hand: Callable[..., ir.Model]) -> ir.Model:
    return hand(X, NODES, CONSTANTS, ["end"])


def types(model: ir.Model, node: str) -> set[Any]:
    (found,) = (n for n in model.graph if n.name == node)
    return {v.dtype for v in (*found.inputs, *found.outputs) if v is not None}


def test_magnitudes_are_the_largest_of_all_batches(model: ir.Model) -> None:
    before = ir.to_proto(model).SerializeToString()
    found = magnitudes(model, batches(1.0, -3.0, 2.0))
    wanted = {"x": 3.0, "p": 3.0, "big": 3e4, "small": 3.0, "end": 3.0}
    assert found == pytest.approx(wanted, rel=1e-6)
    assert ir.to_proto(model).SerializeToString() == before


def test_masks_are_no_magnitudes(hand: Callable[..., ir.Model]) -> None:
    constants = {"m": np.array([0, -np.inf, -3e38, 5], np.float32)}
    model = hand(X, [("Add", ["x", "m"], ["end"])], constants, ["end"])
    assert magnitudes(model, batches(1.0))["end"] == 6.0


def test_planted_saturation_is_refused_by_name(model: ir.Model) -> None:
    with pytest.raises(CheckFailed, match="leave the range of fp16") as caught:
        retype_audited(model, "fp16", [], examples(1.0, 8.0))
    said = caught.value.details
    assert "MatMul_1 (MatMul): big reaches 8e+04" in str(said["found"])
    assert "MatMul_2 (MatMul): big" in str(said["found"])
    assert "MatMul_0" not in str(said["found"])
    assert "planted examples, 4 examples" in str(said["wanted"])
    assert "--keep-fp32" in str(said["do"])
    assert types(model, "MatMul_1") == {F32}  # nothing was changed


@pytest.mark.parametrize("patterns", [["auto"], ["MatMul_[12]"], ["MatMul_1", "MatMul_2"]])
def test_kept_nodes_compute_in_float32_and_the_answer_is_right(
    patterns: list[str], model: ir.Model, run_onnx: Callable[..., list[np.ndarray]]
) -> None:
    report = retype_audited(model, "fp16", patterns, examples(8.0))
    assert [types(model, f"MatMul_{n}") for n in range(4)] == [{F16}, {F32}, {F32}, {F16}]
    assert [name for names in report.kept.values() for name in names] == ["MatMul_1", "MatMul_2"]
    assert list(report.kept) == patterns
    np.testing.assert_allclose(run_onnx(model, batches(8.0)[0])[0], 8.0, rtol=2e-3)
    assert report.audit == {
        "inputs": "planted examples", "rows": 2, "limit": 65504.0, "largest": 8.0, "near": {},
    }  # fmt: skip


def test_what_comes_near_is_mentioned(model: ir.Model) -> None:
    report = retype_audited(model, "fp16", [], examples(3.0))
    assert report.audit is not None
    assert report.audit["near"] == {"big": pytest.approx(3e4)}
    assert report.kept == {}


def test_bf16_has_the_range_of_float32(model: ir.Model) -> None:
    assert retype_audited(model, "bf16", [], examples(8.0)).audit["near"] == {}  # type: ignore[index]


def test_weights_that_lose_are_counted_by_name(hand: Callable[..., ir.Model]) -> None:
    weight = ONE.copy()
    weight[0] = [1e6, 1e-9, 1e-6, 1]
    model = hand(X, [("MatMul", ["x", "W"], ["a"]), ("MatMul", ["a", "V"], ["end"])], {"W": weight, "V": ONE}, ["end"])  # fmt: skip
    report = retype_audited(model, "fp16", [], examples(1e-3))
    assert (report.clipped, report.flushed, report.subnormal) == ({"W": 1}, {"W": 1}, {"W": 1})


def test_a_pattern_that_names_nothing_is_an_error(model: ir.Model) -> None:
    assert [n.name for n in matched(model, ["MatMul"])["MatMul"]] == [
        f"MatMul_{n}" for n in range(4)
    ]
    with pytest.raises(UsageError, match="names none") as caught:
        retype_audited(model, "fp16", ["Softmax"], examples(1.0))
    assert caught.value.details["where"] == "--keep-fp32 Softmax"
