"""Answers: logits, the best of the task's own classes, and its softmax."""

from __future__ import annotations

import numpy as np
import pytest

from utune_deploy.export.engine import Device
from utune_deploy.merge.errors import UsageError
from utune_deploy.merge.no_class import NO_CLASS
from utune_deploy.serving.answers import Answers
from utune_deploy.serving.rejections import EngineFailed, InvalidRequest
from utune_deploy.serving.service import Service

LOWEST = np.float32(NO_CLASS)
CLASSES = {"pets": 5, "cars": 3, "flowers": 2}


class BrokenSession:
    """Raises, or answers NaN, whenever a marked image is in the batch."""

    provider = "broken"

    def __init__(self, inner, *, raises: bool) -> None:
        self.inner, self.raises = inner, raises

    def run(self, inputs, task=None):
        marked = inputs["images"][:, 0, 0, 0] == 99
        if self.raises and marked.any():
            raise RuntimeError("the kernel failed\nand said more")
        logits = self.inner.run(inputs, task).copy()
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

        def run(self, inputs, task=None):
            return np.full((len(inputs["images"]), 5), LOWEST, np.float32)

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
    answers = Service.open(single, Device(threads=1)).answer(images)
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
    service = Service.open(bundle, Device(threads=1))
    images, tasks = rows(4)
    service.answer(images, tasks)
    with pytest.raises(InvalidRequest):
        service.answer(images, ["dogs"] * 4)
    totals = service.counters.read()
    assert (totals.answered, totals.failed, totals.rows, totals.batches) == (1, 1, 4, 1)
    assert totals.rows_by_task == {"pets": 2, "cars": 1, "flowers": 1}
    assert totals.request_ns >= totals.engine_ns > 0


def test_named_inputs_are_summed_as_numpy_sums_them(text, sentences):
    service = Service.open(text, Device(threads=1))
    given, tasks = sentences(4), ["pets", "cars", "flowers", "pets"]
    answers = service.answer(given, tasks)
    reordered = {name: given[name] for name in reversed(given)}
    assert service.answer(reordered, tasks).logits.tobytes() == answers.logits.tobytes()
    unseen = {**given, "input_ids": np.where(given["attention_mask"], given["input_ids"], 0)}
    np.testing.assert_allclose(service.answer(unseen, tasks).logits, answers.logits, rtol=1e-5)
    louder = {**given, "visual_feats": given["visual_feats"] + 1}
    assert not np.allclose(service.answer(louder, tasks).logits, answers.logits)


def test_tasks_without_labels_answer_with_arrays(arrays, rows):
    images, _ = rows(3)
    answers = Service.open(arrays, Device(threads=1)).answer(images, ["cars", "pets", "cars"])
    assert answers.logits.shape == (3, 2, 5)
    assert (answers.labels, answers.scores.shape, len(answers)) == ((), (0,), 3)


@pytest.mark.parametrize("kind", ["two_engines", "fan_out"])
def test_every_task_answers_every_row_as_it_answers_alone(request, service, rows, kind):
    both = Service.open(request.getfixturevalue(kind), Device(threads=1))
    images, _ = rows(4)
    answered = both.answer_all(images)
    assert len(answered) == 4
    for row, answers in enumerate(answered):
        assert answers.tasks == tuple(CLASSES)
        assert answers.logits.shape == (3, 5)
        for place, task in enumerate(CLASSES):
            alone = service.answer(images[row : row + 1], [task])
            np.testing.assert_allclose(answers.logits[place], alone.logits[0], rtol=1e-5, atol=1e-4)
            assert answers.labels[place] == alone.labels[0]
            np.testing.assert_allclose(answers.scores[place], alone.scores[0], rtol=1e-4)


def test_an_engine_of_all_tasks_answers_each_row_with_its_own(fan_out, service, rows):
    images, tasks = rows(6, seed=2)
    picked = Service.open(fan_out, Device(threads=1)).answer(images, tasks)
    wanted = service.answer(images, tasks)
    np.testing.assert_allclose(picked.logits, wanted.logits, rtol=1e-5, atol=1e-4)
    assert (picked.labels, picked.tasks) == (wanted.labels, wanted.tasks)


def test_requests_of_all_tasks_share_an_engine_call(two_engines, rows):
    every = Service.open(two_engines, Device(threads=1)).every
    requests = [every.registry.check(rows(count, seed=count)[0]) for count in (1, 3, 2)]
    together = every.run(requests)
    assert [len(answers) for answers in together] == [3, 9, 6]
    assert every.counters.read().batches == 1
    for request, answers in zip(requests, together, strict=True):
        alone = every.answer(request.inputs)
        np.testing.assert_allclose(answers.logits, alone.logits, rtol=1e-5, atol=1e-4)
        assert answers.labels == alone.labels


def test_the_second_engine_is_opened_when_it_is_asked_for(two_engines, fan_out, bundle):
    service = Service.open(two_engines, Device(threads=1))
    assert "every" not in vars(service)
    assert service.every is service.every
    assert service.every.every is service.every
    assert service.every.session is not service.session
    one = Service.open(fan_out, Device(threads=1))
    assert one.every.session is one.session
    assert Service.open(bundle, Device(threads=1)).every is None


def test_counters_are_per_model_and_count_rows_once(two_engines, rows):
    service = Service.open(two_engines, Device(threads=1))
    service.answer_all(rows(4)[0])
    totals = service.every.counters.read()
    assert (totals.answered, totals.rows) == (1, 4)
    assert totals.rows_by_task == {"pets": 4, "cars": 4, "flowers": 4}
    assert service.counters.read().answered == 0


def test_a_bundle_without_an_engine_of_all_tasks_says_so(bundle, rows):
    with pytest.raises(UsageError, match="no engine that answers every task"):
        Service.open(bundle, Device(threads=1)).answer_all(rows(1)[0])
    with pytest.raises(UsageError, match="no engine that answers every task"):
        Service.open(bundle, Device(threads=1), all_tasks=True)


def test_named_inputs_arrays_and_all_tasks_meet_in_one_bundle(everything, sentences):
    service = Service.open(everything, Device(threads=1))
    given = sentences(3)
    answered = service.answer_all(given)
    assert [answers.logits.shape for answers in answered] == [(2, 2, 3)] * 3
    picked = service.answer(given, ["flowers", "cars", "flowers"])
    wanted = [answered[0].logits[1], answered[1].logits[0], answered[2].logits[1]]
    np.testing.assert_array_equal(picked.logits, wanted)


def test_a_value_that_is_not_finite_spoils_only_the_tasks_that_it_is_of(fan_out, rows):
    class Spoilt:
        provider = "spoilt"

        def run(self, inputs, task=None):
            assert task is None
            logits = np.zeros((len(inputs["images"]), 3, 5), np.float32)
            logits[:, 1] = np.nan
            return logits

    service = Service(fan_out, Spoilt())
    images, _ = rows(2)
    assert service.answer(images, ["pets", "flowers"]).labels == ("pets-0", "flowers-0")
    with pytest.raises(EngineFailed, match="not finite"):
        service.answer(images, ["pets", "cars"])
    with pytest.raises(EngineFailed, match="not finite"):
        service.answer_all(images)
