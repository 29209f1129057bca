"""Answers: logits, the best of the task's own classes, and its softmax."""

from __future__ import annotations

import numpy as np
import pytest

from utune_deploy.serving.rejections import EngineFailed, InvalidRequest
from utune_deploy.serving.service import Answers, Service

LOWEST = np.finfo(np.float32).min
CLASSES = {"pets": 5, "cars": 3, "flowers": 2}


class BrokenSession:
    """Raises, or answers NaN, whenever a marked image is in the batch."""

    provider = "broken"

    def __init__(self, inner, *, raises: bool) -> None:
        self.inner, self.raises = inner, raises

    def run(self, images, task=None):
        marked = images[:, 0, 0, 0] == 99
        if self.raises and marked.any():
            raise RuntimeError("the kernel failed\nand said more")
        logits = self.inner.run(images, task).copy()
        logits[marked] = np.nan
        return logits


def test_labels_and_scores_come_from_the_tasks_own_classes(service, rows):
    images, tasks = rows(6)
    answers = service.answer(images, tasks)
    assert answers.logits.shape == (6, 5)
    for row, task in enumerate(tasks):
        own = answers.logits[row, : CLASSES[task]].astype(np.float64)
        assert (answers.logits[row, CLASSES[task] :] == LOWEST).all()
        assert answers.labels[row] == f"{task}-{own.argmax()}"
        softmax = np.exp(own - own.max()) / np.exp(own - own.max()).sum()
        assert answers.scores[row] == np.float32(softmax.max())


def test_padding_never_wins_however_low_the_own_logits(bundle):
    class Low:
        provider = "low"

        def run(self, images, task=None):
            return np.full((len(images), 5), LOWEST, np.float32)

    answers = Service(bundle, Low()).answer(np.zeros((1, 3, 8, 8), np.float32), ["flowers"])
    assert answers.labels == ("flowers-0",)
    assert answers.scores.tolist() == [0.5]


def test_a_mixed_batch_answers_as_each_row_alone(service, rows):
    images, tasks = rows(6, seed=3)
    together = service.answer(images, tasks)
    for row in range(6):
        alone = service.answer(images[row : row + 1], tasks[row : row + 1])
        # One float32 matmul may sum 192 products in another order at another batch size.
        np.testing.assert_allclose(alone.logits[0], together.logits[row], rtol=1e-5, atol=1e-4)
        assert alone.labels[0] == together.labels[row]


def test_a_single_task_engine_takes_no_rows(single, rows):
    images, _ = rows(2)
    answers = Service.open(single, threads=1).answer(images)
    assert answers.logits.shape == (2, 3)
    assert answers.tasks == ("cars", "cars")


@pytest.mark.parametrize("raises", [True, False])
def test_the_request_that_breaks_the_engine_fails_alone(service, bundle, rows, raises):
    broken = Service(bundle, BrokenSession(service.session, raises=raises))
    images, tasks = rows(3)
    bad = images.copy()
    bad[1, 0, 0, 0] = 99
    requests = [broken.registry.check(part, tasks) for part in (images, bad, images)]
    first, second, third = broken.run(requests)
    assert isinstance(first, Answers)
    assert isinstance(third, Answers)
    assert isinstance(second, EngineFailed)
    assert "\n" not in second.what
    with pytest.raises(EngineFailed):
        broken.answer(bad, tasks)


def test_counters_count_rows_by_task_and_failures(bundle, rows):
    service = Service.open(bundle, threads=1)
    images, tasks = rows(4)
    service.answer(images, tasks)
    with pytest.raises(InvalidRequest):
        service.answer(images, ["dogs"] * 4)
    totals = service.counters.read()
    assert (totals.answered, totals.failed, totals.rows, totals.batches) == (1, 1, 4, 1)
    assert totals.rows_by_task == {"pets": 2, "cars": 1, "flowers": 1}
    assert totals.request_ns >= totals.engine_ns > 0
