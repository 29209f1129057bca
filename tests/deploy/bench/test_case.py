from __future__ import annotations

import numpy as np
import pytest

from utune_deploy.deploy.bench.case import MIXES, Case
from utune_deploy.export.engine import Tensor
from utune_deploy.merge.errors import UsageError

ROWS = (0, 2, 5)


def test_one_asks_for_the_first_task_only():
    assert Case(4, "one").task_rows(ROWS, 0).tolist() == [0, 0, 0, 0]


def test_uniform_cycles_through_the_rows_of_the_bank():
    assert Case(7, "uniform").task_rows(ROWS, 0).tolist() == [0, 2, 5, 0, 2, 5, 0]


def test_zipf_prefers_the_first_tasks():
    rows = Case(6000, "zipf").task_rows(ROWS, 0)
    shares = [float((rows == row).mean()) for row in ROWS]
    assert shares == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.02)


@pytest.mark.parametrize(
    ("batch", "wanted"),
    [
        (1, [0]),
        (2, [0, 2]),
        (4, [0, 0, 0, 2]),
        (8, [0] * 6 + [2, 5]),
        (16, [0] * 12 + [2, 5, 2, 5]),
    ],
)
def test_hot_asks_for_the_first_task_and_for_others_beside_it(batch, wanted):
    assert Case(batch, "hot").task_rows(ROWS, 0).tolist() == wanted
    assert Case(batch, "hot").task_rows((4,), 0).tolist() == [4] * batch


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("tasks", [1, 2, 7])
def test_the_shares_of_a_mix_are_those_of_many_rows(mix, tasks):
    shares = MIXES[mix].shares(tasks)
    assert shares.shape == (tasks,)
    assert shares.sum() == pytest.approx(1)
    rows = Case(20_000, mix).task_rows(range(tasks), 0)
    assert np.bincount(rows, minlength=tasks) / 20_000 == pytest.approx(shares, abs=0.01)


@pytest.mark.parametrize("mix", MIXES)
def test_rows_are_seeded_and_fit_the_task_input(mix):
    rows = Case(64, mix).task_rows(ROWS, 1)
    assert rows.dtype == np.int64
    assert rows.shape == (64,)
    assert set(rows.tolist()) <= set(ROWS)
    np.testing.assert_array_equal(rows, Case(64, mix).task_rows(ROWS, 1))


def test_another_seed_draws_other_rows():
    case = Case(64, "zipf")
    assert case.task_rows(ROWS, 1).tolist() != case.task_rows(ROWS, 2).tolist()


def test_pictures_are_seeded_noise_of_the_asked_shape():
    images = Case(2).rows([Tensor("images", "float32", ("batch", 3, 4, 5))], 0)
    assert isinstance(images, np.ndarray)
    assert images.dtype == np.float32
    assert images.shape == (2, 3, 4, 5)
    again = Case(2, "one").rows([Tensor("images", "float32", ("batch", 3, 4, 5))], 0)
    np.testing.assert_array_equal(images, again)


def test_several_inputs_are_drawn_as_an_engine_may_read_them():
    inputs = [
        Tensor("ids", "int64", ("batch", 50), 7),
        Tensor("mask", "int64", ("batch", 50)),
        Tensor("feats", "float32", ("batch", 2, 3)),
    ]
    rows = Case(4).rows(inputs, 0)
    assert isinstance(rows, dict)
    assert {name: (array.dtype.name, array.shape) for name, array in rows.items()} == {
        "ids": ("int64", (4, 50)),
        "mask": ("int64", (4, 50)),
        "feats": ("float32", (4, 2, 3)),
    }
    assert set(rows["ids"].ravel().tolist()) == set(range(7))
    assert set(rows["mask"].ravel().tolist()) == {1}
    for name, array in Case(4).rows(inputs, 0).items():
        np.testing.assert_array_equal(array, rows[name])
    assert (Case(4).rows(inputs, 1)["ids"] != rows["ids"]).any()


@pytest.mark.parametrize(("batch", "mix"), [(0, "one"), (1, "some")])
def test_a_case_that_makes_no_sense_is_refused(batch, mix):
    with pytest.raises(UsageError):
        Case(batch, mix)
