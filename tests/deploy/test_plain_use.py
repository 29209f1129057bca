"""What a person might plausibly do, each once found to go wrong silently."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import timm
import torch

from utune_deploy.deploy.build import export_bundle
from utune_deploy.deploy.check import check_engine
from utune_deploy.deploy.plan import make_plan
from utune_deploy.deploy.reference import Evidence
from utune_deploy.deploy.task import Task
from utune_deploy.export.engine import Device
from utune_deploy.export.parity import compare
from utune_deploy.merge.attach import attach, restore
from utune_deploy.merge.backbone import create, wrap
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.merge.fold import fold
from utune_deploy.merge.methods import (
    bitfit,
    deep_prompt,
    dual_adapter,
    lora,
    parallel_adapter,
    prefix,
)
from utune_deploy.merge.preprocessing import Preprocessing
from utune_deploy.merge.sites import measure

if TYPE_CHECKING:
    from pathlib import Path


def random_task(backbone, *methods, name="task", classes=3, scale=0.3, seed=0):
    tuned = attach(backbone, *methods, classes=classes)
    noise = torch.Generator().manual_seed(seed)
    for parameter in tuned.trainable():
        parameter.data.normal_(std=scale, generator=noise)
    return tuned.delta(name, [f"class {i}" for i in range(classes)])


def test_a_backbone_of_other_arguments_is_refused_although_its_tensors_are_the_same(vit):
    """The number of heads leaves no trace in the tensors."""
    delta = random_task(vit, lora(2))
    arguments = {**vit.identity.arguments, "num_heads": 2}
    other = timm.create_model(vit.identity.architecture, **arguments, num_classes=0)
    other.load_state_dict(vit.model.state_dict(), strict=False)
    twin = wrap(other, vit.identity.architecture, arguments)
    assert twin.identity.fingerprint == vit.identity.fingerprint
    with pytest.raises(IncompatibleArtefact, match="created in another way"):
        restore(twin, delta)


def test_every_task_is_compared_even_where_no_batch_has_room_for_all(vit, tmp_path: Path):
    deltas = [random_task(vit, lora(2), name=f"t{i}", seed=i) for i in range(5)]
    tasks = [Task(delta, "0" * 64) for delta in deltas]
    bundle = export_bundle(tmp_path / "b", vit, tasks, bank="inputs", max_batch=2)
    bank = {name: value.copy() for name, value in bundle.read_bank().items()}

    def verdict(tensors):
        return check_engine(
            bundle.path / bundle.engine.file, vit, deltas, measure(vit), mixes=True, bank=tensors,
            max_batch=2, evidence=Evidence(), device=Device(threads=1),
        )  # fmt: skip

    assert verdict(bank).passed
    for tensor in bank.values():
        tensor[4] = 1.5 * tensor[3]
    assert {"parity of every task"} <= {c.name for c in verdict(bank).failures}


def test_a_loud_task_does_not_hide_the_error_of_a_quiet_one(vit, tmp_path: Path):
    loud, quiet = (
        random_task(vit, lora(2), name=n, seed=i) for i, n in enumerate(("loud", "quiet"))
    )
    for delta, factor in ((loud, 100.0), (quiet, 0.01)):
        for tensor in delta.tensors[delta.head].values():
            tensor.mul_(factor)
    tasks = [Task(delta, "0" * 64) for delta in (loud, quiet)]
    bundle = export_bundle(tmp_path / "b", vit, tasks, bank="inputs", max_batch=4)
    bank = {name: value.copy() for name, value in bundle.read_bank().items()}
    for name in bank:
        if name.endswith("/up"):
            bank[name][1] *= 1.002
    verdict = check_engine(
        bundle.path / bundle.engine.file, vit, [loud, quiet], measure(vit), mixes=True, bank=bank,
        max_batch=4, evidence=Evidence(), device=Device(threads=1),
    )  # fmt: skip
    assert any(c.name.startswith("parity") for c in verdict.failures)
    assert compare("alone", np.ones((1, 2)), np.ones((1, 2)), 1e-6).passed


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "regnety_002"])
def test_biases_in_front_of_an_activation_are_no_shift_of_an_output(name):
    with pytest.raises(UsageError, match="added inside a module"):
        attach(create(name), bitfit(), classes=2)


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto"])
def test_values_with_their_channels_at_an_unknown_axis_are_refused(name):
    backbone = create(name, {"num_classes": 0})
    with pytest.raises((IncompatibleArtefact, UsageError)) as caught:
        attach(backbone, parallel_adapter(2), classes=2)
    assert "axis" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "method", [dual_adapter(3, scale=0.1), deep_prompt(2)], ids=["dual", "prompt"]
)
def test_a_half_precision_delta_exports(dtype, method, vit, tmp_path: Path):
    delta = random_task(vit, method)
    halved = {n: {k: t.to(dtype) for k, t in w.items()} for n, w in delta.tensors.items()}
    bundle = export_bundle(
        tmp_path / "b", vit, [Task(replace(delta, tensors=halved), "0" * 64)], max_batch=2
    )
    assert bundle.check["passed"]


def test_one_task_with_its_bank_as_an_input_can_be_grown(vit):
    delta = random_task(vit, lora(2))
    assert make_plan([delta], vit, bank="inputs").mode == "multi"
    with pytest.raises(UsageError, match="no bank"):
        make_plan([delta], vit, mode="merged", bank="inputs")


def test_a_backbone_that_is_not_float32_is_refused_by_name(tmp_path: Path, vit):
    half = create(vit.identity.architecture, vit.identity.arguments)
    half = wrap(half.model.double(), vit.identity.architecture, vit.identity.arguments)
    delta = random_task(half, lora(2))
    with pytest.raises(UsageError, match="float32 backbone"):
        export_bundle(tmp_path / "b", half, [Task(delta, "0" * 64)])


def test_preprocessing_that_does_not_make_what_the_backbone_reads(vit):
    delta = random_task(vit, lora(2))
    with pytest.raises(IncompatibleArtefact, match="preprocessing"):
        restore(vit, replace(delta, preprocessing=Preprocessing((224, 224))))


def test_biases_of_normalised_keys_are_inert_and_ship(tmp_path: Path):
    backbone = create(
        "vit_base_patch16_224",
        {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 48,
            "depth": 2,
            "num_heads": 4,
            "qk_norm": True,
        },
    )
    bundle = export_bundle(
        tmp_path / "b", backbone, [Task(random_task(backbone, bitfit()), "0" * 64)],
        mode="parallel", max_batch=2,
    )  # fmt: skip
    assert bundle.check["passed"]
    assert "k_norm" in str(bundle.check)


def test_gradient_checkpointing_is_refused(vit):
    tuned = attach(vit, lora(2), classes=2)
    vit.model.set_grad_checkpointing(True)
    try:
        with pytest.raises(UsageError, match="gradient checkpointing"):
            tuned(vit.example(2))
    finally:
        vit.model.set_grad_checkpointing(False)


def test_a_trunk_left_in_train_mode_is_set_back(vit):
    vit.model.train()
    restore(vit, random_task(vit, lora(2)))
    assert not vit.model.training


@pytest.mark.parametrize(
    ("name", "what"), [("resnetv2_50", "not one linear layer"), ("samvit_base_patch16", None)]
)
def test_backbones_that_cannot_carry_it_say_why(name, what):
    with pytest.raises((UsageError, IncompatibleArtefact), match=what):
        attach(create(name, {"img_size": 64} if "sam" in name else {}), prefix(2), classes=2)


def test_a_task_of_no_class_is_refused(vit):
    with pytest.raises(UsageError, match="at least one class"):
        attach(vit, lora(2), classes=0)


def test_norms_and_convolutions_fold_their_biases(vit):
    delta = random_task(vit, bitfit(), scale=0.1)
    merged = fold(delta, vit)
    plain = timm.create_model(
        vit.identity.architecture, **vit.identity.arguments, num_classes=3
    ).eval()
    plain.load_state_dict(merged.tensors)
    with torch.no_grad():
        images = vit.example(2)
        assert torch.allclose(plain(images), restore(vit, delta)(images), rtol=1e-4, atol=1e-5)
