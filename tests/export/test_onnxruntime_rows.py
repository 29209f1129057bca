"""Rows of a bank that are written one at a time, beside the calls that run."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper

from utune_deploy.export.engine import Device
from utune_deploy.export.targets import target
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = 5
WEIGHT, BIAS = "bank/head/weight", "bank/head/bias"


@pytest.fixture
def session(tiny_engine: Callable[..., bytes]) -> Any:
    """An engine of ROWS rows that nobody has written to."""
    opened = target("onnxruntime").open_session(tiny_engine(), Device(threads=1), bank=None)
    opened.reserve(ROWS)
    return opened


def row(bank: dict[str, np.ndarray], place: int) -> dict[str, np.ndarray]:
    return {name: tensor[place] for name, tensor in bank.items()}


def expected(bank: dict[str, np.ndarray], images: np.ndarray, task: np.ndarray) -> np.ndarray:
    flat = images.reshape(len(images), 1, -1)
    return (flat @ bank[WEIGHT][task] + bank[BIAS][task])[:, 0]


def test_rows_are_read_where_they_were_written(session, tiny_bank, pictures) -> None:
    bank, places = tiny_bank(3), [4, 0, 2]
    for place, here in enumerate(places):
        session.write_row(here, row(bank, place))
    images, task = pictures(6), np.arange(6) % 3
    found = session.run(images, np.array(places)[task])
    np.testing.assert_allclose(found, expected(bank, images, task), rtol=0, atol=1e-5)


def test_a_row_is_written_over_and_the_others_stay_to_the_bit(session, tiny_bank, pictures) -> None:
    bank, images = tiny_bank(ROWS), pictures(ROWS)
    for place in range(ROWS):
        session.write_row(place, row(bank, place))
    before = session.run(images, np.arange(ROWS))
    session.write_row(3, row(tiny_bank(1, seed=8), 0))
    after = session.run(images, np.arange(ROWS))
    kept = np.arange(ROWS) != 3
    np.testing.assert_array_equal(after[kept], before[kept])
    assert not np.allclose(after[3], before[3])


def test_a_row_is_copied_and_so_may_come_from_memory_that_goes_away(
    session, tiny_bank, pictures
) -> None:
    bank, images = tiny_bank(1), pictures(2)
    given = {name: np.array(value, order="F") for name, value in row(bank, 0).items()}
    session.write_row(1, given)
    for value in given.values():
        value[:] = np.nan
    found = session.run(images, np.array([1, 1]))
    np.testing.assert_allclose(found, expected(bank, images, np.array([0, 0])), rtol=0, atol=1e-5)


def test_rows_outside_the_bank_answer_nan(session, tiny_bank, pictures) -> None:
    session.write_row(0, row(tiny_bank(1), 0))
    found = session.run(pictures(3), np.array([0, ROWS, -1]))
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1:]).all()


@pytest.mark.parametrize("place", [-1, ROWS, ROWS + 100])
def test_a_row_that_is_not_there_is_refused(session, tiny_bank, place) -> None:
    with pytest.raises(UsageError, match="the bank has no such row"):
        session.write_row(place, row(tiny_bank(1), 0))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: {WEIGHT: r[WEIGHT]}, "does not hold the tensors"),
        (lambda r: {**r, "bank/more": r[BIAS]}, "does not hold the tensors"),
        (lambda r: {}, "does not hold the tensors"),
        (lambda r: {**r, BIAS: r[BIAS].astype(np.float64)}, "not as the engine reads it"),
        (lambda r: {**r, BIAS: r[BIAS].astype(np.float16)}, "not as the engine reads it"),
        (lambda r: {**r, BIAS: r[BIAS][0]}, "not as the engine reads it"),
        (lambda r: {**r, WEIGHT: r[WEIGHT][None]}, "not as the engine reads it"),
        (lambda r: {**r, WEIGHT: r[WEIGHT][:, :1]}, "not as the engine reads it"),
    ],
)
def test_a_row_of_other_tensors_is_refused_and_changes_nothing(
    session, tiny_bank, pictures, change, sentence
) -> None:
    session.write_row(2, row(tiny_bank(1), 0))
    before = session.run(pictures(1), np.array([2]))
    with pytest.raises(IncompatibleArtefact, match=sentence):
        session.write_row(2, change(row(tiny_bank(1, seed=5), 0)))
    np.testing.assert_array_equal(session.run(pictures(1), np.array([2])), before)


def test_engines_without_a_bank_of_rows_say_so(tiny_engine, tiny_bank) -> None:
    opens = target("onnxruntime").open_session
    constants = opens(tiny_engine(tiny_bank(2)))
    with pytest.raises(UsageError, match="constants of this engine"):
        constants.reserve(3)
    whole = opens(tiny_engine(), bank=tiny_bank(2))
    for session in (constants, whole):
        with pytest.raises(UsageError, match="no rows of its own"):
            session.write_row(0, row(tiny_bank(1), 0))


def test_a_bank_may_be_reserved_anew_or_replaced_as_a_whole(session, tiny_bank, pictures) -> None:
    bank, images, task = tiny_bank(2), pictures(2), np.array([0, 1])
    session.reserve(8)
    session.write_row(7, row(bank, 1))
    np.testing.assert_allclose(
        session.run(images[1:], np.array([7])), expected(bank, images, task)[1:], rtol=0, atol=1e-5
    )
    session.replace_bank(bank)
    np.testing.assert_allclose(
        session.run(images, task), expected(bank, images, task), rtol=0, atol=1e-5
    )
    with pytest.raises(UsageError, match="no rows of its own"):
        session.write_row(0, row(bank, 0))


@pytest.mark.parametrize(
    ("onnx_type", "dtype"),
    [
        (onnx.TensorProto.FLOAT, np.float32),
        (onnx.TensorProto.FLOAT16, np.float16),
        (onnx.TensorProto.BFLOAT16, ml_dtypes.bfloat16),
    ],
    ids=["float32", "float16", "bfloat16"],
)
def test_rows_of_every_type_are_read_to_the_bit(onnx_type: int, dtype: Any) -> None:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["bank/a", "task"], ["row"]),
            helper.make_node("Cast", ["row"], ["wide"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Add", ["wide", "images"], ["logits"]),
        ],
        "rows",
        [
            info("images", onnx.TensorProto.FLOAT, ["batch", 7]),
            info("task", onnx.TensorProto.INT64, ["batch"]),
            info("bank/a", onnx_type, ["tasks", 7]),
        ],
        [info("logits", onnx.TensorProto.FLOAT, ["batch", 7])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    session = target("onnxruntime").open_session(model.SerializeToString(), Device(threads=1))
    session.reserve(4)
    values = np.random.default_rng(2).standard_normal((4, 7)).astype(dtype)
    for place in (2, 0, 3, 1):
        session.write_row(place, {"bank/a": values[place]})
    found = session.run(np.zeros((4, 7), np.float32), np.arange(4))
    np.testing.assert_array_equal(found, values.astype(np.float32))


def test_calls_with_other_rows_do_not_notice_what_is_written(session, tiny_bank, pictures) -> None:
    bank, images, task = tiny_bank(3), pictures(6), np.arange(6) % 3
    for place in range(3):
        session.write_row(place, row(bank, place))
    wanted = session.run(images, task).tobytes()
    done = threading.Event()
    wrong: list[object] = []

    def ask() -> None:
        while not done.is_set():
            if session.run(images, task).tobytes() != wanted:
                wrong.append("another answer")

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    others = tiny_bank(50, seed=3)
    for number in range(400):
        session.write_row(3 + number % 2, row(others, number % 50))
    done.set()
    for asker in askers:
        asker.join()
    assert not wrong
    np.testing.assert_allclose(
        session.run(images[:2], np.array([3, 4])),
        expected(others, images[:2], np.array([398 % 50, 399 % 50])),
        rtol=0, atol=1e-5,
    )  # fmt: skip
