"""Tasks that join a bundle later: the same engine, the old answers to the bit, the new ones right."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from utune_deploy.deploy import add
from utune_deploy.deploy.add import add_tasks
from utune_deploy.deploy.build import export_bundle
from utune_deploy.export.bundle import BANK, MANIFEST, open_bundle
from utune_deploy.export.engine import Device
from utune_deploy.merge import methods
from utune_deploy.merge.bank import Room
from utune_deploy.merge.errors import CheckFailed, IncompatibleArtefact, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from utune_deploy.export.bundle import Bundle
    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta


@pytest.fixture(scope="module")
def later(vit: Backbone, random_delta: Callable[..., Delta]) -> list[Delta]:
    """Two tasks that fit the slots of the six, one of them with deep prompts."""
    return [
        random_delta(vit, methods.lora(1), task="later", classes=4, seed=51),
        random_delta(vit, methods.deep_prompt(2), task="last", classes=2, seed=52),
    ]


def test_added_tasks_answer_and_the_old_ones_do_not_notice(
    bundles: Callable[[str], Bundle],
    vit: Backbone,
    later: list[Delta],
    as_task: Any,
    alone: Any,
    images: Any,
    tmp_path: Path,
) -> None:
    old = bundles("inputs")
    new = add_tasks(old, vit, [as_task(delta) for delta in later], tmp_path / "grown")
    assert new.read_engine() == old.read_engine()
    assert new.identity == old.identity
    assert new.tasks[: len(old.tasks)] == old.tasks
    assert [(t.name, t.row) for t in new.tasks[-2:]] == [("later", 6), ("last", 7)]
    assert new.tasks[-1].labels == later[1].labels
    assert all(verdict["passed"] for verdict in new.check["added"])
    assert {path.name for path in new.path.iterdir()} == {MANIFEST, "model.onnx", BANK}
    assert open_bundle(tmp_path / "grown") == new
    batch, task = images(8, seed=2), np.arange(8)
    before = old.open_session(Device(threads=1)).run(batch, task)
    after = new.open_session(Device(threads=1)).run(batch, task)
    assert np.isnan(before[6:]).all()
    np.testing.assert_array_equal(after[:6], before[:6])
    for row, delta in zip((6, 7), later, strict=True):
        wanted = alone(delta, batch[row : row + 1])[0]
        found = after[row, : len(wanted)]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_tasks_may_be_added_one_after_the_other_in_place(
    bundles: Callable[[str], Bundle],
    vit: Backbone,
    later: list[Delta],
    as_task: Any,
    tmp_path: Path,
) -> None:
    first = add_tasks(bundles("inputs"), vit, [as_task(later[0])], tmp_path / "b")
    second = add_tasks(first, vit, [as_task(later[1])], tmp_path / "b", force=True)
    assert [task.name for task in second.tasks[-2:]] == ["later", "last"]
    assert len(second.check["added"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize(
    ("form", "change", "error", "sentence"),
    [
        ("constants", {}, UsageError, "only where the bank is an input"),
        ("merged", {}, UsageError, "only where the bank is an input"),
        ("inputs", {"task": "dual"}, UsageError, "a task of that name is there already"),
    ],
)
def test_tasks_that_cannot_be_added_are_refused(
    form: str,
    change: dict[str, str],
    error: type[Exception],
    sentence: str,
    bundles: Callable[[str], Bundle],
    vit: Backbone,
    later: list[Delta],
    as_task: Any,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=sentence):
        add_tasks(bundles(form), vit, [as_task(replace(later[0], **change))], tmp_path / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "classes", "sentence"),
    [
        (methods.lora(3), 4, "a branch is larger than its slot"),
        (methods.lora(2), 8, "a branch is larger than its slot"),
        (methods.lora(2, at="mlp.fc2"), 4, "the bank has no slot for a branch"),
    ],
    ids=["rank", "classes", "place"],
)
def test_a_task_without_a_slot_is_refused(
    method: Any,
    classes: int,
    sentence: str,
    bundles: Callable[[str], Bundle],
    vit: Backbone,
    random_delta: Any,
    as_task: Any,
    tmp_path: Path,
) -> None:
    delta = random_delta(vit, method, task="large", classes=classes)
    with pytest.raises(IncompatibleArtefact, match=sentence):
        add_tasks(bundles("inputs"), vit, [as_task(delta)], tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_a_task_of_another_backbone_is_refused(
    bundles: Callable[[str], Bundle],
    vit: Backbone,
    later: list[Delta],
    as_task: Any,
    tmp_path: Path,
) -> None:
    other = replace(later[0], backbone=replace(vit.identity, fingerprint="0" * 64))
    with pytest.raises(IncompatibleArtefact, match="belongs to another backbone"):
        add_tasks(bundles("inputs"), vit, [as_task(other)], tmp_path / "b")


def test_nothing_is_written_when_the_check_fails(
    bundles: Callable[[str], Bundle],
    vit: Backbone,
    later: list[Delta],
    as_task: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = add.bank_inputs

    def wrong(*bank: Any) -> Any:
        return {name: np.float32(0.99) * value for name, value in right(*bank).items()}

    monkeypatch.setattr(add, "bank_inputs", wrong)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / MANIFEST).write_text("mine")
    with pytest.raises(CheckFailed, match="nothing was written") as caught:
        add_tasks(bundles("inputs"), vit, [as_task(later[0])], tmp_path / "b", force=True)
    assert caught.value.exit_code == 3
    assert [path.name for path in (tmp_path / "b").iterdir()] == [MANIFEST]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_output_that_is_there_is_refused(
    bundles: Callable[[str], Bundle],
    vit: Backbone,
    later: list[Delta],
    as_task: Any,
    tmp_path: Path,
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="the output already exists"):
        add_tasks(bundles("inputs"), vit, [as_task(later[0])], tmp_path)


def test_room_takes_tasks_that_are_larger_than_those_that_were_exported(
    vit: Backbone,
    random_delta: Callable[..., Delta],
    as_task: Any,
    alone: Any,
    images: Any,
    tmp_path: Path,
) -> None:
    small = random_delta(vit, methods.lora(2), methods.prefix(2), task="small", classes=2, seed=1)
    large = random_delta(vit, methods.lora(5), methods.prefix(4), task="large", classes=7, seed=6)
    room = Room(rank=5, classes=7, keys=4)
    old = export_bundle(
        tmp_path / "roomy", vit, [as_task(small)], bank="inputs", max_batch=4, room=room
    )
    new = add_tasks(old, vit, [as_task(large)], tmp_path / "grown")
    batch = images(2, seed=3)
    found = new.open_session(Device(threads=1)).run(batch, np.arange(2))
    assert found.shape == (2, 7)
    for row, delta in enumerate((small, large)):
        wanted = alone(delta, batch[row : row + 1])[0]
        error = np.abs(found[row, : len(wanted)] - wanted).max()
        assert error <= 2e-5 * np.abs(wanted).max()
    with pytest.raises(IncompatibleArtefact, match="larger than its slot"):
        add_tasks(
            new,
            vit,
            [as_task(random_delta(vit, methods.lora(6), task="more", classes=2, seed=3))],
            tmp_path / "no",
        )


def test_room_is_for_a_bank_that_is_an_input(
    vit: Backbone, later: list[Delta], as_task: Any, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--bank inputs"):
        export_bundle(tmp_path / "b", vit, [as_task(later[0])], room=Room(rank=8))
