"""The budget follows torch's own error; a verdict fails on what a wrong engine would show."""

from __future__ import annotations

import json

import numpy as np
import pytest

from utune_deploy.export.parity import (
    FLOOR,
    ROUNDINGS,
    SLACK,
    UNIT,
    Comparison,
    Verdict,
    budget,
    compare,
    relative_error,
)

REFERENCE = np.array([[4.0, 1.0, -2.0], [0.5, 0.4999, -8.0]])  # the second row is nearly undecided


def test_the_error_is_relative_to_the_largest_logit() -> None:
    found = REFERENCE + np.array([[0, 0.04, 0], [0, 0, -0.08]])
    assert relative_error(found, REFERENCE) == pytest.approx(0.01)


def test_a_reference_of_zeros_has_an_absolute_error() -> None:
    assert relative_error(np.full((1, 2), 0.25), np.zeros((1, 2))) == 0.25


def test_float32_is_compared_in_float64() -> None:
    assert relative_error(REFERENCE.astype(np.float32), REFERENCE) < UNIT["fp32"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_infinitely_wrong(value: float) -> None:
    found = REFERENCE.copy()
    found[1, 2] = value
    assert relative_error(found, REFERENCE) == np.inf
    outcome = compare("broken", found, REFERENCE, allowed=1e9)
    assert not outcome.passed
    assert outcome.to_json()["error"] is None
    json.dumps(outcome.to_json(), allow_nan=False)


@pytest.mark.parametrize("found", [REFERENCE[:1], REFERENCE[:, :2], REFERENCE[0], REFERENCE[None]])
def test_another_shape_is_infinitely_wrong(found: np.ndarray) -> None:
    outcome = compare("shape", found, REFERENCE, allowed=1e9)
    assert not outcome.passed
    assert outcome.error == np.inf
    assert outcome.flips == 0


@pytest.mark.parametrize("precision", UNIT)
def test_the_budget_is_a_multiple_of_torchs_error_with_a_floor(precision: str) -> None:
    slack, units = (SLACK, FLOOR) if precision == "fp32" else (ROUNDINGS, ROUNDINGS)
    assert budget(REFERENCE, REFERENCE, precision) == units * UNIT[precision]
    off = REFERENCE + np.array([[0.08, 0, 0], [0, 0, 0]])
    assert budget(off, REFERENCE, precision) == pytest.approx(
        slack * 0.01 + units * UNIT[precision]
    )


def test_coarser_precisions_have_wider_budgets() -> None:
    fp32, fp16, bf16 = (budget(REFERENCE, REFERENCE, p) for p in ("fp32", "fp16", "bf16"))
    assert fp32 < fp16 < bf16


def test_the_verdict_turns_at_the_budget() -> None:
    reference = np.array([[8.0, 0.0]])
    found = np.array([[8.0 + 0.125, 0.0]])  # an error of exactly 1/64
    assert compare("at", found, reference, allowed=1 / 64).passed
    assert not compare("above", found, reference, allowed=1 / 65).passed


def test_a_flip_counts_where_the_reference_is_decided() -> None:
    found = REFERENCE.copy()
    found[0] = [1.0, 4.0, -2.0]
    outcome = compare("flip", found, REFERENCE, allowed=1e-3)
    assert (outcome.flips, outcome.passed) == (1, False)


def test_a_flip_of_an_undecided_row_is_no_flip() -> None:
    found = REFERENCE.copy()
    found[1, :2] = [0.4999, 0.5]
    outcome = compare("tie", found, REFERENCE, allowed=1e-3)
    assert (outcome.flips, outcome.passed) == (0, True)


def test_one_class_cannot_flip() -> None:
    assert compare("one", np.array([[1.0]]), np.array([[1.0]]), allowed=0.0).passed


def test_a_verdict_passes_when_all_comparisons_do_and_there_is_one() -> None:
    good = compare("good", REFERENCE, REFERENCE, allowed=0.0, note="identical")
    bad = compare("bad", REFERENCE + 1, REFERENCE, allowed=1e-3)
    assert not Verdict(()).passed
    assert Verdict((good,)).passed
    verdict = Verdict((good, bad))
    assert not verdict.passed
    assert verdict.failures == [bad]
    written = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert [c["passed"] for c in written["comparisons"]] == [True, False]
    assert written["comparisons"][0]["note"] == "identical"
    assert set(written["comparisons"][0]) == set(Comparison.__dataclass_fields__)
