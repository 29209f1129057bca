"""Which requests are taken, and what the others are told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from utune_deploy.export.engine import LOGITS, Tensor
from utune_deploy.merge.errors import IncompatibleArtefact
from utune_deploy.serving.registry import Registry
from utune_deploy.serving.rejections import InvalidRequest, one_line

GOOD = np.zeros((2, 3, 8, 8), np.float32)


def _with(value: float) -> np.ndarray:
    images = GOOD.copy()
    images[1, 0, 0, 0] = value
    return images


@pytest.mark.parametrize(
    ("images", "tasks", "sentence"),
    [
        (GOOD.astype(np.float64), ["pets"] * 2, "wrong dtype"),
        (GOOD[0], ["pets"], "wrong shape"),
        (GOOD[:, :, :7], ["pets"] * 2, "wanted: [n, 3, 8, 8]; found: [2, 3, 7, 8]"),
        (GOOD[:0], [], "no rows"),
        (np.zeros((9, 3, 8, 8), np.float32), ["pets"] * 9, "wanted: 1 to 8 rows; found: 9"),
        (GOOD, ["pets"], "one task per row"),
        (GOOD, None, "names no task"),
        (GOOD, ["pets", "dogs"], "task, row 1; wanted: one of pets, cars, flowers; found: dogs"),
        (GOOD, ["pets", ""], "unknown task"),
        (_with(np.nan), ["pets"] * 2, "images, row 1"),
        (_with(-np.inf), ["pets"] * 2, "not finite"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_its_place(bundle, images, tasks, sentence):
    with pytest.raises(InvalidRequest) as refusal:
        Registry(bundle).check(images, tasks)
    assert sentence in one_line(refusal.value)


def test_a_request_names_rows_of_the_bank(bundle):
    request = Registry(bundle).check(GOOD, ["flowers", "pets"])
    assert request.rows.tolist() == [2, 0]
    assert request.rows.dtype == np.int64
    assert len(request) == 2


def test_an_unaligned_view_is_copied_to_a_boundary(bundle):
    buffer = b"x" + GOOD.tobytes()
    view = np.frombuffer(memoryview(buffer)[1:], "<f4").reshape(GOOD.shape)
    assert Registry(bundle).check(view, ["pets"] * 2).images.flags.aligned


def test_the_only_task_need_not_be_named_but_must_be_right(single):
    registry = Registry(single)
    assert registry.check(GOOD).tasks == ("cars", "cars")
    assert registry.check(GOOD, ["cars", "cars"]).tasks == ("cars", "cars")
    with pytest.raises(InvalidRequest, match="unknown task"):
        registry.check(GOOD, ["cars", "pets"])


@pytest.mark.parametrize("change", ["free width", "no images", "no rows", "labels"])
def test_a_bundle_that_cannot_be_served_is_refused(bundle, change):
    engine, tasks = bundle.engine, bundle.tasks
    if change == "free width":
        engine = replace(engine, outputs=(Tensor(LOGITS, "float32", ("batch", "classes")),))
    elif change == "no images":
        engine = replace(engine, inputs=engine.inputs[1:])
    elif change == "no rows":
        engine = replace(engine, inputs=engine.inputs[:1])
    else:
        tasks = (replace(tasks[0], labels=("x",) * 6),)
    with pytest.raises(IncompatibleArtefact):
        Registry(replace(bundle, engine=engine, tasks=tasks))
