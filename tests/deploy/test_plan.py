"""The form of a bundle, and the sentence that says why."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from utune_deploy.deploy.plan import BANKS, MODES, make_plan
from utune_deploy.merge import methods
from utune_deploy.merge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

FOLDS = ("lora", "bias")


@pytest.mark.parametrize("kind", FOLDS)
def test_one_task_that_folds_is_merged(kind: str, vit: Backbone, deltas: dict[str, Delta]) -> None:
    plan = make_plan([deltas[kind]], vit)
    assert (plan.mode, plan.bank) == ("merged", "none")
    assert "folds exactly" in plan.why
    (task,) = plan.tasks
    assert (task.task, task.form, task.why) == (kind, "merged", "all branches fold exactly")
    assert sum(task.branches.values()) == len(deltas[kind].branches)
    assert task.branches["head"] == 1


@pytest.mark.parametrize("kind", ["dual", "serial", "prefix", "prompt"])
def test_one_task_that_does_not_fold_stays_parallel_and_says_why(
    kind: str, vit: Backbone, deltas: dict[str, Delta]
) -> None:
    plan = make_plan([deltas[kind]], vit)
    assert (plan.mode, plan.bank) == ("parallel", "none")
    (task,) = plan.tasks
    assert task.form == "parallel"
    first = next(iter(deltas[kind].branches))
    assert task.why.startswith(f"{first}: ")
    assert "more branches)" in task.why
    assert ("deep prompts become constant prefixes" in task.why) == (kind == "prompt")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("dual", "a relu between down and up"),
        ("serial", "a gelu between down and up"),
        ("prefix", "keys and values are added, and no weight of the backbone holds them"),
        ("prompt", "tokens are added, and no weight of the backbone holds them"),
    ],
)
def test_the_reason_is_the_first_branchs_own(
    kind: str, reason: str, vit: Backbone, deltas: dict[str, Delta]
) -> None:
    assert reason in make_plan([deltas[kind]], vit).tasks[0].why


def test_a_task_that_would_fold_may_be_asked_to_stay_parallel(
    vit: Backbone, deltas: dict[str, Delta]
) -> None:
    plan = make_plan([deltas["lora"]], vit, mode="parallel")
    assert plan.mode == "parallel"
    assert plan.tasks[0].why == "asked for; it would fold exactly"


def test_several_tasks_share_one_engine(vit: Backbone, deltas: dict[str, Delta]) -> None:
    plan = make_plan(list(deltas.values()), vit)
    assert (plan.mode, plan.bank) == ("multi", "constants")
    assert [task.task for task in plan.tasks] == list(deltas)
    assert {task.form for task in plan.tasks} == {"parallel"}
    why = {task.task: task.why for task in plan.tasks}
    assert (
        why["lora"]
        == why["bias"]
        == ("it would fold alone, but folded weights serve one task per engine")
    )
    assert "relu between down and up" in why["dual"]
    assert why["prompt"].endswith("deep prompts become constant prefixes")


@pytest.mark.parametrize(
    ("bank", "why"), [("constants", "part of the engine"), ("inputs", "added without a rebuild")]
)
def test_the_bank_says_what_it_costs(
    bank: str, why: str, vit: Backbone, deltas: dict[str, Delta]
) -> None:
    plan = make_plan([deltas["lora"], deltas["dual"]], vit, bank=bank)
    assert plan.bank == bank
    assert why in plan.why


def test_one_task_may_be_asked_to_be_multi(vit: Backbone, deltas: dict[str, Delta]) -> None:
    assert make_plan([deltas["lora"]], vit, mode="multi", bank="inputs").bank == "inputs"


def test_a_linear_probe_is_merged(vit: Backbone, random_delta: Callable[..., Delta]) -> None:
    plan = make_plan([random_delta(vit)], vit)
    assert plan.mode == "merged"
    assert plan.tasks[0].branches == {"head": 1}


def test_one_branch_that_does_not_fold_keeps_the_whole_task_parallel(
    vit: Backbone, random_delta: Callable[..., Delta]
) -> None:
    mixed = random_delta(vit, methods.lora(2), methods.serial_adapter(2, blocks=(1,)))
    plan = make_plan([mixed], vit)
    assert plan.mode == "parallel"
    assert plan.tasks[0].why == ("blocks.1.mlp/serial: the branch has a gelu between down and up")


def test_a_plan_is_json(vit: Backbone, deltas: dict[str, Delta]) -> None:
    plan = make_plan(list(deltas.values()), vit, bank="inputs")
    written = json.loads(json.dumps(plan.to_json()))
    assert set(written) == {"mode", "bank", "why", "tasks"}
    assert written["tasks"][0]["task"] == "lora"


# refusals


@pytest.mark.parametrize("kind", ["dual", "serial", "prefix", "prompt"])
def test_merging_what_does_not_fold_is_refused_with_its_reason(
    kind: str, vit: Backbone, deltas: dict[str, Delta]
) -> None:
    with pytest.raises(UsageError, match=f"task {kind} cannot be merged exactly") as caught:
        make_plan([deltas[kind]], vit, mode="merged")
    assert next(iter(deltas[kind].branches)) in caught.value.details["found"]
    assert caught.value.details["do"] == "use --mode parallel"


@pytest.mark.parametrize("mode", ["merged", "parallel"])
def test_one_engine_of_these_forms_holds_one_task(
    mode: str, vit: Backbone, deltas: dict[str, Delta]
) -> None:
    with pytest.raises(UsageError, match=f"mode {mode} holds one task") as caught:
        make_plan([deltas["lora"], deltas["bias"]], vit, mode=mode)
    assert caught.value.details == {"found": "2 deltas", "do": "use --mode multi"}


def test_no_task_is_refused(vit: Backbone) -> None:
    with pytest.raises(UsageError, match="no task to export"):
        make_plan([], vit)


@pytest.mark.parametrize("choice", [{"mode": "dense"}, {"bank": "attic"}])
def test_an_unknown_mode_or_bank_is_refused(
    choice: dict[str, str], vit: Backbone, deltas: dict[str, Delta]
) -> None:
    with pytest.raises(UsageError, match="unknown mode or bank") as caught:
        make_plan([deltas["lora"]], vit, **choice)
    assert caught.value.exit_code == 2
    assert str(MODES) in caught.value.details["wanted"]
    assert str(BANKS) in caught.value.details["wanted"]


def test_a_full_difference_has_no_place_in_a_bank(vit, random_delta):
    from utune_deploy.merge.methods import full

    delta = random_delta(vit, full())
    assert make_plan([delta], vit).mode == "merged"
    for options in ({"mode": "multi"}, {"bank": "inputs"}):
        with pytest.raises(UsageError, match="cannot share a batch"):
            make_plan([delta], vit, **options)
