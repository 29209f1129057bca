"""From deltas to a bundle: right numbers for every kind in every form, whole or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from utune_deploy.deploy import build, graphs
from utune_deploy.deploy.build import export_bundle
from utune_deploy.deploy.graphs import backbone_engine
from utune_deploy.deploy.plan import make_plan
from utune_deploy.deploy.reference import Evidence
from utune_deploy.export.bundle import IDENTITY, MANIFEST, open_bundle
from utune_deploy.export.engine import Device
from utune_deploy.export.graph import OPSET
from utune_deploy.export.passes import CPU_PASSES, PASSES
from utune_deploy.export.targets.onnxruntime import OnnxRuntimeSession
from utune_deploy.merge import methods
from utune_deploy.merge.bank import fill_row, stack
from utune_deploy.merge.calls import calls_of
from utune_deploy.merge.errors import BuildFailed, CheckFailed, IncompatibleArtefact, UsageError
from utune_deploy.merge.lower import lower
from utune_deploy.merge.no_class import NO_CLASS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from utune_deploy.deploy.task import Task
    from utune_deploy.export.bundle import Bundle
    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

TOLERANCE = 2e-5  # of the largest logit: three blocks in float32, two summation orders
LOWEST = np.float32(NO_CLASS)
STEPS = ["measure", "trace", "rewrite", "serialise", "check", "write", "done"]


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


# the numbers


@pytest.mark.parametrize("form", ["constants", "inputs"])
def test_one_engine_answers_for_every_kind_of_task(
    form: str, bundles: Callable[[str], Bundle], deltas: dict[str, Delta], alone: Any, images: Any
) -> None:
    bundle = bundles(form)
    assert [task.name for task in bundle.tasks] == list(deltas)
    session = bundle.open_session(Device(threads=1))
    task = np.array([5, 0, 3, 1, 4, 2, 0, 4, 3, 2, 1, 5])
    batch = images(len(task), seed=4)
    found = session.run(batch, task)
    assert found.shape == (len(task), max(len(delta.labels) for delta in deltas.values()))
    for row, number in enumerate(task):
        delta = list(deltas.values())[number]
        classes = len(delta.labels)
        close(found[row, :classes], alone(delta, batch[row : row + 1])[0])
        assert (found[row, classes:] == LOWEST).all()


@pytest.mark.parametrize("form", ["merged", "parallel"])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_an_engine_of_one_task_takes_images_only(
    form: str,
    batch: int,
    bundles: Callable[[str], Bundle],
    deltas: dict[str, Delta],
    alone: Any,
    images: Any,
) -> None:
    bundle = bundles(form)
    assert [tensor.name for tensor in bundle.engine.inputs] == ["images"]
    given = images(batch, seed=batch)
    found = bundle.open_session(Device(threads=1)).run(given)
    close(found, alone(deltas[bundle.tasks[0].name], given))


def test_constants_and_inputs_answer_alike(bundles: Callable[[str], Bundle], images: Any) -> None:
    batch, task = images(6, seed=6), np.arange(6)
    first, second = (
        bundles(form).open_session(Device(threads=1)).run(batch, task)
        for form in ("constants", "inputs")
    )
    np.testing.assert_array_equal(first == LOWEST, second == LOWEST)
    real = first != LOWEST
    close(first[real], second[real])


def test_a_merged_engine_is_the_bare_backbone(
    bundles: Callable[[str], Bundle], vit: Backbone
) -> None:
    def operators(engine: bytes) -> list[str]:
        return sorted(node.op_type for node in onnx.load_from_string(engine).graph.node)

    assert operators(bundles("merged").read_engine()) == operators(backbone_engine(vit))


def test_the_bare_backbone_answers_as_in_torch(vit: Backbone, images: Any) -> None:
    session = OnnxRuntimeSession(backbone_engine(vit), Device(threads=1))
    with torch.no_grad():
        close(session.run(images(3)), vit.model(torch.from_numpy(images(3))).numpy())


@pytest.mark.parametrize("form", ["constants", "inputs", "merged", "parallel"])
def test_the_plan_counts_products_and_keeps_attentions_whole(
    form: str, bundles: Callable[[str], Bundle], vit: Backbone
) -> None:
    found = bundles(form).plan["products"]
    assert found["backbone"] == calls_of(vit)._asdict()
    assert found["engine"]["attentions"] == found["backbone"]["attentions"] == len(vit.model.blocks)
    assert found["engine"]["gemms"] >= found["backbone"]["gemms"]
    if form == "merged":
        assert found["engine"] == found["backbone"]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_fused_task_has_no_product_more_than_the_backbone(
    activation: str, vit: Backbone, random_delta: Any, as_task: Any, tmp_path: Path
) -> None:
    delta = random_delta(vit, methods.dual_adapter(3, activation=activation))
    bundle = export_bundle(
        tmp_path / "one", vit, [as_task(delta)], max_batch=2, device=Device(threads=1)
    )
    assert bundle.plan["products"]["engine"] == bundle.plan["products"]["backbone"]


def test_an_attention_that_fell_apart_is_refused(vit: Backbone) -> None:
    whole = calls_of(vit)
    engine = ir.from_proto(onnx.load_from_string(backbone_engine(vit)))
    assert graphs.require_whole_attentions(engine, whole)
    for block in vit.model.blocks:
        block.attn.fused_attn = False
    try:
        pieces = ir.from_proto(onnx.load_from_string(backbone_engine(vit)))
    finally:
        for block in vit.model.blocks:
            block.attn.fused_attn = True
    with pytest.raises(BuildFailed, match="fell apart") as caught:
        graphs.require_whole_attentions(pieces, whole)
    assert caught.value.details["found"] == "0 in the graph"


# what is written


@pytest.mark.parametrize(
    ("form", "mode", "bank"),
    [
        ("constants", "multi", "constants"),
        ("inputs", "multi", "inputs"),
        ("merged", "merged", "none"),
        ("parallel", "parallel", "none"),
    ],
)
def test_the_bundle_says_what_it_is(
    form: str,
    mode: str,
    bank: str,
    bundles: Callable[[str], Bundle],
    vit: Backbone,
    deltas: dict[str, Delta],
) -> None:
    bundle = bundles(form)
    assert (bundle.mode, bundle.bank, bundle.name) == (mode, bank, form)
    assert bundle.backbone == vit.identity.to_json()
    assert (bundle.engine.opset, bundle.engine.precision, bundle.engine.max_batch) == (
        OPSET,
        "fp32",
        6,
    )
    assert bundle.check["passed"]
    assert bundle.plan["mode"] == mode
    assert bundle.plan["lowered"] == (
        ["prompt"] if any(t.name == "prompt" for t in bundle.tasks) else []
    )
    assert set(bundle.plan["rewritten"]) == {*PASSES, *CPU_PASSES}
    for row, task in enumerate(bundle.tasks):
        assert task.row == row
        assert task.labels == deltas[task.name].labels
        assert task.preprocessing == deltas[task.name].preprocessing
    expected = {MANIFEST, "model.onnx"} | ({"bank.safetensors"} if bank == "inputs" else set())
    assert {path.name for path in bundle.path.iterdir()} == expected
    assert bundle.open_session().metadata[IDENTITY] == bundle.identity
    assert open_bundle(bundle.path) == bundle


def test_the_bank_of_inputs_is_not_in_the_engine(bundles: Callable[[str], Bundle]) -> None:
    bundle = bundles("inputs")
    held = bundle.read_bank()
    names = [tensor.name for tensor in bundle.engine.inputs]
    assert sorted(names) == sorted(["images", "task", *held])
    assert all(len(value) == len(bundle.tasks) for value in held.values())
    inside = [t.name for t in onnx.load_from_string(bundle.read_engine()).graph.initializer]
    assert not [name for name in inside if name.startswith("bank")]


# tasks that come later


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("lora", methods.lora(1)),
        ("dual", methods.dual_adapter(2)),
        ("prompt", methods.deep_prompt(3)),
        ("prompt", methods.deep_prompt(1)),
        ("prefix", methods.prefix(1)),
        ("probe", methods.together()),
    ],
    ids=["lora", "dual", "prompt of 3", "prompt of 1", "prefix", "no tuner"],
)
def test_a_task_is_added_to_a_bank_of_inputs_without_a_rebuild(
    kind: str,
    method: Any,
    bundles: Callable[[str], Bundle],
    vit: Backbone,
    deltas: dict[str, Delta],
    sites_of: Any,
    random_delta: Any,
    alone: Any,
    images: Any,
) -> None:
    bundle, sites = bundles("inputs"), sites_of(vit)
    slots = stack([lower(vit, delta, sites) for delta in deltas.values()]).slots
    later = random_delta(vit, method, task="later", classes=4, seed=77)
    row = fill_row(slots, lower(vit, later, sites))
    old = bundle.read_bank()
    new = {
        name: np.concatenate([value, row[name.removeprefix("bank/")][None].numpy()])
        for name, value in old.items()
    }
    session = bundle.open_session(Device(threads=1))
    batch, task = images(7, seed=9), np.array([0, 1, 2, 3, 4, 5, 6])
    before = session.run(batch, task)
    assert np.isnan(before[6]).all()
    session.replace_bank(new)
    after = session.run(batch, task)
    np.testing.assert_array_equal(after[:6], before[:6])
    close(after[6, :4], alone(later, batch[6:])[0])
    assert (after[6, 4:] == LOWEST).all()
    session.replace_bank(old)
    np.testing.assert_array_equal(session.run(batch, task), before)


@pytest.mark.parametrize(
    ("method", "classes", "sentence"),
    [
        (methods.lora(3), 4, "a branch is larger than its slot in the bank"),
        (methods.lora(2), 8, "a branch is larger than its slot in the bank"),
        (methods.lora(2, at="mlp.fc1"), 4, "the bank has no slot for a branch"),
        (methods.parallel_adapter(2, activation="silu"), 4, "the bank has no slot for a branch"),
    ],
    ids=["rank", "classes", "place", "activation"],
)
def test_a_task_without_room_in_the_bank_is_refused(
    method: Any,
    classes: int,
    sentence: str,
    vit: Backbone,
    deltas: dict[str, Delta],
    sites_of: Any,
    random_delta: Any,
) -> None:
    slots = stack([lower(vit, delta, sites_of(vit)) for delta in deltas.values()]).slots
    with pytest.raises(IncompatibleArtefact, match=sentence) as caught:
        fill_row(slots, random_delta(vit, method, task="later", classes=classes))
    assert caught.value.exit_code == 4
    assert "export the bundle again" in caught.value.details["do"]


# whole or not at all


@pytest.fixture(scope="module")
def traced(vit: Backbone, deltas: dict[str, Delta], sites_of: Any) -> bytes:
    """The graph of the merged `lora` task, as it is traced."""
    plan = make_plan([deltas["lora"]], vit)
    model = graphs.graph_of(plan, vit, [deltas["lora"]], sites_of(vit), (), "fp32").model
    return ir.to_proto(model).SerializeToString()


@pytest.fixture
def export(
    traced: bytes,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    vit: Backbone,
    deltas: dict[str, Delta],
    as_task: Callable[[Delta], Task],
) -> Iterator[Callable[..., Bundle]]:
    """`export_bundle` of the `lora` task to `tmp_path/out`, traced once for all tests here."""

    def graph(*_: Any, **__: Any) -> Any:
        return graphs.Made(ir.from_proto(onnx.load_from_string(traced)))

    def export(**settings: Any) -> Bundle:
        return export_bundle(
            tmp_path / "out",
            vit,
            [as_task(deltas["lora"])],
            **{"max_batch": 2, "device": Device(threads=1), **settings},
        )

    monkeypatch.setattr(build, "graph_of", graph)
    yield export
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left in ([], ["out"]), "something temporary was left behind"


def standing(tmp_path: Path) -> dict[str, bytes]:
    """An older bundle where the new one is to go."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST).write_bytes(b"old")
    (tmp_path / "out" / "old.txt").write_bytes(b"old")
    return {MANIFEST: b"old", "old.txt": b"old"}


def content(tmp_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def wrong_rewrite(model: ir.Model, passes: object = None) -> dict[str, int]:
    """A pass that is not exact: one weight is off by one percent."""
    matrices = (
        v for v in model.graph.initializers.values() if v.shape is not None and len(v.shape) == 2
    )
    weight = next(matrices)
    assert weight.const_value is not None
    weight.const_value = ir.tensor(1.01 * weight.const_value.numpy(), name=weight.name)
    return {}


def test_the_steps_are_told_in_order(export: Callable[..., Bundle]) -> None:
    told: list[str] = []
    export(progress=told.append)
    assert told == STEPS


def test_the_same_tasks_give_the_same_bundle(export: Callable[..., Bundle], tmp_path: Path) -> None:
    export()
    first = content(tmp_path)
    export(force=True)
    assert content(tmp_path) == first


def test_a_bundle_has_the_name_that_it_is_given(export: Callable[..., Bundle]) -> None:
    assert export(name="served").name == "served"


def test_real_pictures_enter_the_check(export: Callable[..., Bundle], images: Any) -> None:
    bundle = export(evidence=Evidence(images={"lora": images(1)}))
    assert any("real images" in c["name"] for c in bundle.check["comparisons"])


def test_nothing_is_written_when_the_check_fails(
    export: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(graphs, "rewrite", wrong_rewrite)
    told: list[str] = []
    with pytest.raises(CheckFailed, match="no bundle was written") as caught:
        export(progress=told.append)
    assert caught.value.exit_code == 3
    assert "parity, batch 1" in caught.value.details["found"]
    assert told[-1] == "check"
    assert not list(tmp_path.iterdir())


def test_a_failed_check_leaves_what_was_there(
    export: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = standing(tmp_path)
    monkeypatch.setattr(graphs, "rewrite", wrong_rewrite)
    with pytest.raises(CheckFailed):
        export(force=True)
    assert content(tmp_path) == before


def test_an_output_that_is_there_is_refused_before_any_work(
    export: Callable[..., Bundle], tmp_path: Path
) -> None:
    before = standing(tmp_path)
    told: list[str] = []
    with pytest.raises(UsageError, match="the output already exists") as caught:
        export(progress=told.append)
    assert "--force" in caught.value.details["do"]
    assert told == []
    assert content(tmp_path) == before


def test_force_replaces_what_was_there(export: Callable[..., Bundle], tmp_path: Path) -> None:
    standing(tmp_path)
    bundle = export(force=True)
    assert set(content(tmp_path)) == {MANIFEST, "model.onnx"}
    assert open_bundle(tmp_path / "out") == bundle


def test_force_never_replaces_what_is_not_ours(
    export: Callable[..., Bundle], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_bytes(b"mine")
    with pytest.raises(UsageError, match="other things than a bundle"):
        export(force=True)
    assert content(tmp_path) == {"thesis.tex": b"mine"}


def test_an_empty_folder_is_no_output(export: Callable[..., Bundle], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert set(content(tmp_path)) == set()
    export()
    assert set(content(tmp_path)) == {MANIFEST, "model.onnx"}


@pytest.mark.parametrize("name", ["my model/1", "b one", "-x"])
def test_a_name_that_cannot_be_served_is_refused(
    name: str, export: Callable[..., Bundle], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="could not be served"):
        export(name=name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("there", [False, True])
def test_a_crash_while_writing_leaves_all_as_it_was(
    there: bool, export: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = standing(tmp_path) if there else {}

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(build.bundles, "write_manifest", full)
    with pytest.raises(OSError, match="no space left"):
        export(force=there)
    assert (tmp_path / "out").exists() == there
    if there:
        assert content(tmp_path) == before


def test_the_written_manifest_is_that_of_the_bundle(
    export: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = export()
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["identity"] == bundle.identity
    assert str(tmp_path) not in json.dumps(manifest)


# what is refused


def test_a_delta_of_another_backbone_is_refused(
    vit: Backbone, deltas: dict[str, Delta], as_task: Any, tmp_path: Path
) -> None:
    other = replace(deltas["lora"], backbone=replace(vit.identity, fingerprint="0" * 64))
    with pytest.raises(IncompatibleArtefact, match="belongs to another backbone") as caught:
        export_bundle(tmp_path / "out", vit, [as_task(other)])
    assert caught.value.exit_code == 4
    assert not list(tmp_path.iterdir())


def test_two_tasks_of_one_name_are_refused(
    vit: Backbone, deltas: dict[str, Delta], as_task: Any, tmp_path: Path
) -> None:
    twin = replace(deltas["dual"], task="lora")
    with pytest.raises(UsageError, match="two deltas have one task name"):
        export_bundle(tmp_path / "out", vit, [as_task(deltas["lora"]), as_task(twin)])
    assert not list(tmp_path.iterdir())


def test_a_mode_that_does_not_fit_is_refused(
    vit: Backbone, deltas: dict[str, Delta], as_task: Any, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="cannot be merged exactly"):
        export_bundle(tmp_path / "out", vit, [as_task(deltas["prefix"])], mode="merged")
    assert not list(tmp_path.iterdir())
