"""Which weights of a graph are the tasks': by value, alone, and all that depends on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from utune_deploy.export.targets.tensorrt.tuner_names import require_nothing_else, tuner_names
from utune_deploy.merge.errors import BuildFailed, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

NOISE = np.random.default_rng(0)
UP, DOWN, TRUNK = (NOISE.standard_normal(s).astype(np.float32) for s in ((3, 4), (4, 3), (4, 4)))


@pytest.fixture
def graph(hand: Callable[..., ir.Model]) -> Callable[..., ir.Model]:
    """`x W + x down up`, with more or other constants: `(**constants) -> model`."""

    def graph(**constants: np.ndarray) -> ir.Model:
        return hand(
            {"x": ["batch", 4]},
            [
                ("MatMul", ["x", "W"], ["xW"]),
                ("MatMul", ["x", "down"], ["xd"]),
                ("MatMul", ["xd", "up"], ["u"]),
                ("Add", ["xW", "u"], ["logits"]),
            ],
            {"W": TRUNK, "down": DOWN, "up": UP, **constants},
            ["logits"],
        )

    return graph


def test_tensors_are_found_by_value_under_any_name(graph: Any) -> None:
    names = tuner_names(graph(), {"bank/up": UP, "bank/down": DOWN})
    assert names == {"bank/up": "up", "bank/down": "down"}


@pytest.mark.parametrize("changed", [DOWN.T, DOWN * 2, DOWN.astype(np.float16), DOWN[None]])
def test_a_tensor_that_was_folded_away_is_named(graph: Any, changed: np.ndarray) -> None:
    with pytest.raises(UsageError, match="folded into other weights") as caught:
        tuner_names(graph(), {"bank/up": UP, "bank/down": changed})
    assert caught.value.details["where"] == "bank/down"


def test_two_weights_of_one_value_are_told_apart_by_name_or_not_at_all(graph: Any) -> None:
    model = graph(W=np.eye(4, dtype=np.float32))
    twice = graph(W=TRUNK)
    twice.graph.initializers["W"].const_value = ir.tensor(UP, name="W")
    assert tuner_names(twice, {"up": UP}) == {"up": "up"}
    with pytest.raises(UsageError, match="cannot be replaced") as caught:
        tuner_names(twice, {"bank/up": UP})
    assert caught.value.details["found"] == "W, up"
    with pytest.raises(UsageError, match="share one weight"):
        tuner_names(model, {"a": UP, "b": UP.copy()})


def test_equal_means_equal_to_the_bit(graph: Any) -> None:
    zero, negative = np.zeros((3, 4), np.float32), -np.zeros((3, 4), np.float32)
    assert tuner_names(graph(up=zero), {"a": zero}) == {"a": "up"}
    with pytest.raises(UsageError):
        tuner_names(graph(up=zero), {"a": negative})
    nan = np.full((3, 4), np.nan, np.float32)
    assert tuner_names(graph(up=nan), {"a": nan}) == {"a": "up"}


def test_half_weights_are_compared_as_they_are() -> None:
    half = UP.astype(ml_dtypes.bfloat16)
    value = ir.val("up", const_value=ir.tensor(half, name="up"))
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=[value]), ir_version=10)
    assert tuner_names(model, {"a": half}) == {"a": "up"}


def test_nothing_but_the_named_weights_may_depend_on_the_tensors(graph: Any, hand: Any) -> None:
    names = {"bank/up": "up", "bank/down": "down"}
    require_nothing_else(graph(), graph(up=UP + 1, down=DOWN * 2), names)
    with pytest.raises(UsageError, match="half of one") as caught:
        require_nothing_else(graph(), graph(up=UP + 1, W=TRUNK + 1), names)
    assert caught.value.details["where"] == "W"
    other = hand(
        {"x": ["batch", 4]}, [("MatMul", ["x", "W"], ["logits"])], {"W": TRUNK}, ["logits"]
    )
    with pytest.raises(BuildFailed, match="nodes depend"):
        require_nothing_else(graph(), other, names)
