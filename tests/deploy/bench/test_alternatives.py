"""What stands beside a bundle answers its tasks, or is not timed."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from utune_deploy.deploy.bench.alternatives import ALTERNATIVES, open_alternatives
from utune_deploy.deploy.bench.alternatives.agreement import require_same_answers
from utune_deploy.deploy.bench.beside import KINDS, Beside
from utune_deploy.deploy.build import export_bundle
from utune_deploy.deploy.task import Task
from utune_deploy.export.engine import Device
from utune_deploy.merge import methods
from utune_deploy.merge.backbone import save, wrap
from utune_deploy.merge.delta import load_delta, save_delta
from utune_deploy.merge.errors import CheckFailed, IncompatibleArtefact, UsageError
from utune_deploy.merge.files import digest

ONE = Device(threads=1)
COMPILED = {"torch-compiled", "peft-compiled"}  # a compiler at work takes seconds; one test has it


@pytest.fixture(scope="module")
def exported(vit, random_delta, tmp_path_factory):
    """`(method, classes) -> (bundle, its files)` of tasks with as many classes as told."""
    made = {}

    def exported(kind, *classes):
        if (kind, classes) not in made:
            folder = tmp_path_factory.mktemp(kind)
            save(folder / "backbone", vit)
            method = {"lora": methods.lora(2), "serial": methods.serial_adapter(3)}[kind]
            paths = []
            for number, count in enumerate(classes):
                delta = random_delta(vit, method, task=f"t{number}", classes=count, seed=number)
                paths.append(folder / f"t{number}.safetensors")
                save_delta(paths[-1], delta)
            tasks = [Task(load_delta(path), digest(path)) for path in paths]
            bundle = export_bundle(folder / "bundle", vit, tasks, max_batch=4, device=ONE)
            made[kind, classes] = bundle, (folder / "backbone", tuple(paths))
        return made[kind, classes]

    return exported


def opened(bundle, files, *kinds):
    session = bundle.open_session(ONE)
    runs = session.run if bundle.mode == "multi" else lambda rows, task: session.run(rows)
    return open_alternatives(Beside(kinds, *files), bundle, runs, ONE)


def test_what_can_be_asked_for_can_be_made():
    assert list(KINDS) == list(ALTERNATIVES)
    assert len({alternative.name for alternative in ALTERNATIVES.values()}) == len(ALTERNATIVES)


def test_every_kind_answers_lora_tasks_of_as_many_classes(exported):
    bundle, files = exported("lora", 5, 5, 5)
    subjects = opened(bundle, files, *(kind for kind in KINDS if kind not in COMPILED))
    assert [subject.name for subject in subjects] == [
        "unfused", "an engine per task, in turn", "torch, eager", "PEFT, mixed batch"
    ]  # fmt: skip
    assert [subject.provider for subject in subjects] == [
        "CPUExecutionProvider", "CPUExecutionProvider", "torch, cpu", "torch, cpu"
    ]  # fmt: skip
    assert {subject.task_count for subject in subjects} == {3}


def test_adapters_with_a_relu_and_heads_of_any_width_have_all_but_peft(exported):
    bundle, files = exported("serial", 3, 6)
    assert len(opened(bundle, files, "unfused", "in-turn", "torch")) == 3
    with pytest.raises(UsageError, match=r"as many classes each(.|\n)*\[3, 6\] classes"):
        opened(bundle, files, "peft")


def test_a_bundle_of_one_task_has_no_task_input(exported):
    bundle, files = exported("serial", 4)
    assert bundle.mode == "parallel"
    assert len(opened(bundle, files, "unfused", "in-turn", "torch")) == 3


def test_torch_compiles_once_per_batch_size_and_threads_are_those_of_the_engines(
    exported, monkeypatch
):
    bundle, files = exported("lora", 5, 5, 5)
    asked = []

    def compile_(module, *, dynamic):
        asked.append(dynamic)
        return module

    monkeypatch.setattr(torch, "compile", compile_)
    assert len(opened(bundle, files, "torch-compiled", "peft-compiled")) == 2
    assert asked == [False, False]
    assert torch.get_num_threads() == 1


def test_the_deltas_may_stand_among_others_but_must_all_be_there(exported, random_delta, vit):
    bundle, (weights, deltas) = exported("lora", 5, 5, 5)
    other = deltas[0].with_name("other.safetensors")
    save_delta(other, random_delta(vit, methods.lora(2), task="other", classes=5, seed=9))
    assert opened(bundle, (weights, (*deltas[::-1], other)), "torch")
    with pytest.raises(IncompatibleArtefact, match=r"not given(.|\n)*wanted: t2"):
        opened(bundle, (weights, deltas[:2]), "torch")


def test_the_backbone_must_be_that_of_the_bundle(exported, vit, tmp_path):
    bundle, (_, deltas) = exported("lora", 5, 5, 5)
    model = copy.deepcopy(vit.model)
    next(model.parameters()).data += 1
    save(tmp_path / "other", wrap(model, vit.identity.architecture, vit.identity.arguments))
    with pytest.raises(IncompatibleArtefact, match="another backbone"):
        opened(bundle, (tmp_path / "other", deltas), "torch")


def test_another_answer_in_one_row_is_found(exported):
    bundle, _ = exported("lora", 5, 5, 5)
    right = bundle.open_session(ONE).run

    def wrong(rows, task):
        logits = right(rows, task).copy()
        logits[2] = logits[1]
        return logits

    require_same_answers("right", right, bundle, right)
    with pytest.raises(CheckFailed, match="wrong, row 2 of a batch of 4, bank row 2"):
        require_same_answers("wrong", wrong, bundle, right)
    with pytest.raises(CheckFailed, match="inf"):
        require_same_answers("nan", lambda r, t: right(r, t) * np.nan, bundle, right)


def test_an_engine_that_answers_for_every_task_has_no_alternative(exported):
    bundle, files = exported("lora", 5, 5, 5)
    fan_out = replace(bundle, mode="fan-out")
    with pytest.raises(UsageError, match="every task for every row"):
        open_alternatives(Beside(("torch",), *files), fan_out, lambda rows, task: rows, ONE)


@pytest.mark.parametrize(
    ("kinds", "deltas", "told"),
    [
        (("salad",), (1,), "one of unfused, in-turn"),
        (("torch", "torch"), (1,), "named twice"),
        (("torch",), (), "--delta FILE"),
    ],
)
def test_what_stands_beside_is_refused_before_anything_is_read(kinds, deltas, told):
    with pytest.raises(UsageError, match=told):
        Beside(kinds, None, deltas)
