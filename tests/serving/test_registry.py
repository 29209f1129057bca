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
        (
            np.zeros((9, 3, 8, 8), np.float32),
            ["pets"] * 9,
            "must be <= 8 for 'tiny' (where: images; found: 9 rows",
        ),
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
    assert [version.place for version in request.versions] == [2, 0]
    assert len(request) == 2


def test_an_unaligned_view_is_copied_to_a_boundary(bundle):
    buffer = b"x" + GOOD.tobytes()
    view = np.frombuffer(memoryview(buffer)[1:], "<f4").reshape(GOOD.shape)
    assert Registry(bundle).check(view, ["pets"] * 2).inputs["images"].flags.aligned


def test_the_only_task_need_not_be_named_but_must_be_right(single):
    registry = Registry(single)
    assert registry.check(GOOD).tasks == ("cars", "cars")
    assert registry.check(GOOD, ["cars", "cars"]).tasks == ("cars", "cars")
    with pytest.raises(InvalidRequest, match="unknown task"):
        registry.check(GOOD, ["cars", "pets"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda g: g["input_ids"], "arrays by name: input_ids, attention_mask, visual_feats"),
        (lambda g: {"input_ids": g["input_ids"]}, "found: input_ids"),
        (lambda g: {}, "found: none"),
        (lambda g: {**g, "task": g["input_ids"]}, "not those that the engine reads"),
        (
            lambda g: {**g, "input_ids": g["input_ids"].astype(np.int32)},
            "where: input_ids; wanted: int64; found: int32",
        ),
        (
            lambda g: {**g, "visual_feats": g["visual_feats"].astype(np.float64)},
            "where: visual_feats; wanted: float32; found: float64",
        ),
        (
            lambda g: {**g, "attention_mask": g["attention_mask"][:, :5]},
            "where: attention_mask; wanted: [n, 6]; found: [2, 5]",
        ),
        (
            lambda g: {**g, "visual_feats": g["visual_feats"][:1]},
            "where: visual_feats; wanted: 2, as input_ids has; found: 1",
        ),
        (
            lambda g: {**g, "input_ids": g["input_ids"] + [[0], [11]]},
            "input_ids, row 1; wanted: 0 to 10",
        ),
        (
            lambda g: {**g, "input_ids": g["input_ids"] - 11},
            "input_ids, row 0; wanted: 0 to 10; found: -",
        ),
        (
            lambda g: {**g, "visual_feats": g["visual_feats"] + np.float32([[[0]], [[np.inf]]])},
            "visual_feats, row 1; wanted: finite float32; found: 8 NaN or infinite values",
        ),
        (lambda g: {k: v[:0] for k, v in g.items()}, "no rows"),
        (
            lambda g: {k: np.repeat(v, 5, 0) for k, v in g.items()},
            "must be <= 8 for 'tiny' (where: input_ids; found: 10 rows",
        ),
    ],
)
def test_a_named_input_that_is_wrong_is_named(text, sentences, change, sentence):
    given = change(sentences(2))
    with pytest.raises(InvalidRequest) as refusal:
        Registry(text).check(given, ["pets"] * 2)
    assert sentence in one_line(refusal.value)


def test_named_inputs_come_in_the_engines_order_and_masks_may_hold_anything(text, sentences):
    given = sentences(2)
    given["attention_mask"] = given["attention_mask"] - 7
    request = Registry(text).check(dict(reversed(given.items())), ["pets", "cars"])
    assert list(request.inputs) == ["input_ids", "attention_mask", "visual_feats"]
    assert len(request) == 2


@pytest.mark.parametrize("kind", ["two_engines", "fan_out"])
def test_a_request_of_all_tasks_names_none(request, kind):
    registry = Registry(request.getfixturevalue(kind), all_tasks=True)
    assert registry.name == "tiny.all"
    checked = registry.check(GOOD)
    assert checked.tasks == ("pets", "cars", "flowers") * 2
    assert len(checked) == 2
    with pytest.raises(InvalidRequest) as refusal:
        registry.check(GOOD, ["pets", "pets"])
    assert "ask the model tiny" in one_line(refusal.value)


def test_tasks_stand_in_the_answer_in_the_order_of_their_rows(fan_out):
    """Whatever numbers the rows have."""
    tasks = tuple(replace(task, row=3 * task.row) for task in fan_out.tasks)
    registry = Registry(replace(fan_out, tasks=tasks))
    assert [v.place for v in registry.check(GOOD, ["flowers", "cars"]).versions] == [2, 1]


def _logits(*sizes) -> tuple[Tensor, ...]:
    return (Tensor(LOGITS, "float32", ("batch", *sizes)),)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("fan_out", {"outputs": _logits(2, 5)}),
        ("fan_out", {"outputs": _logits("tasks", 5)}),
        ("fan_out", {"outputs": _logits(5)}),
        ("fan_out", {"outputs": _logits(3, 2, 5)}),
        ("fan_out", {"inputs": (Tensor("images", "float32", ("batch", 3, 8, 8)), Tensor("task", "int64", ("batch",)))}),
        ("arrays", {"outputs": _logits(2, 4)}),
        ("arrays", {"outputs": _logits("queries", 5)}),
        ("text", {"inputs": (Tensor("input_ids", "int32", ("batch", 6)), Tensor("task", "int64", ("batch",)))}),
        ("text", {"inputs": (Tensor("input_ids", "int64", ("batch", "length")), Tensor("task", "int64", ("batch",)))}),
        ("text", {"inputs": (Tensor("input_ids", "int64", ("batch",)), Tensor("task", "int64", ("batch",)))}),
    ],
)  # fmt: skip
def test_an_engine_of_another_form_is_refused(request, kind, changes):
    bundle = request.getfixturevalue(kind)
    with pytest.raises(IncompatibleArtefact):
        Registry(replace(bundle, engine=replace(bundle.engine, **changes)))


def test_the_axis_of_tasks_may_grow_with_a_bank_that_is_an_input(fan_out):
    bank = Tensor("bank/head", "float32", ("tasks", 192, 5))
    grows = replace(
        fan_out.engine, inputs=(*fan_out.engine.inputs, bank), outputs=_logits("tasks", 5)
    )
    registry = Registry(replace(fan_out, engine=grows))
    assert list(registry.inputs) == ["images"]
    assert registry.answer_shape == (5,)


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
