"""The check passes for a right engine, and fails for each kind of wrong one.

Every wrong engine is a right one with one thing changed in its bytes, so what fails is that thing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from utune_deploy.deploy.check import check_engine
from utune_deploy.deploy.held import require_tasks
from utune_deploy.deploy.reference import Evidence
from utune_deploy.export.engine import Device
from utune_deploy.merge import methods
from utune_deploy.merge.errors import IncompatibleArtefact

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from utune_deploy.export.bundle import Bundle
    from utune_deploy.export.parity import Verdict
    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

ROW_ISOLATION = "row isolation: mixed batch == one by one"
PERMUTATION = "permutation of rows and tasks"
OUTSIDE = "task rows outside the bank answer NaN"
TASK_ISOLATION = "isolation from other tasks' tensors, bit for bit"
LIVENESS = "liveness of every tensor"
ROWS = {
    kind: row for row, kind in enumerate(("lora", "dual", "serial", "prefix", "prompt", "bias"))
}


@pytest.fixture
def check(
    vit: Backbone,
    sites_of: Callable[..., Any],
    deltas: dict[str, Delta],
    bundles: Callable[[str], Bundle],
    tmp_path: Path,
) -> Callable[..., Verdict]:
    """`check_engine` on the bundle of all kinds, with what is named replaced."""

    def check(engine: bytes | None = None, form: str = "constants", **changes: Any) -> Verdict:
        bundle = bundles(form)
        settings: dict[str, Any] = {
            "mixes": bundle.mode == "multi", "bank": bundle.read_bank(), "max_batch": 6,
            "evidence": Evidence(), "device": Device(threads=1),
        }  # fmt: skip
        tasks: Sequence[Delta] = changes.pop("deltas", [deltas[task.name] for task in bundle.tasks])
        file = bundle.path / bundle.engine.file
        if engine is not None:
            file = tmp_path / "doctored.onnx"
            file.write_bytes(engine)
        return check_engine(
            file,
            vit, tasks, sites_of(vit), **{**settings, **changes},
        )  # fmt: skip

    return check


def failed(verdict: Verdict) -> set[str]:
    """Names of what failed; all sizes of parity are one."""
    return {"parity" if c.name.startswith("parity") else c.name for c in verdict.failures}


def doctored(engine: bytes, changes: Mapping[str, Callable[[np.ndarray], np.ndarray]]) -> bytes:
    """The engine with some initializers changed; a name may stand for all that contain it."""
    model = onnx.load_from_string(engine)
    touched = 0
    for tensor in model.graph.initializer:
        for part, change in changes.items():
            if part in tensor.name:
                value = change(numpy_helper.to_array(tensor).copy())
                tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
                touched += 1
    assert touched
    return model.SerializeToString()


def rewired(
    engine: bytes, value: str, nodes: Sequence[onnx.NodeProto], constants: Mapping[str, np.ndarray]
) -> bytes:
    """The engine with `nodes` between the input `value` and what reads it; they give `VALUE.new`."""
    model = onnx.load_from_string(engine)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == value:
                node.input[index] = f"{value}.new"
    old = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *old])
    for name, array in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(model)
    return model.SerializeToString()


def finished(
    engine: bytes, nodes: Sequence[onnx.NodeProto], constants: Mapping[str, np.ndarray]
) -> bytes:
    """The engine with `nodes` behind it, from `old` to `logits`."""
    model = onnx.load_from_string(engine)
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == "logits":
                    names[index] = "old"
    model.graph.node.extend(nodes)
    for name, array in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(model)
    return model.SerializeToString()


def zero_row(row: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(value: np.ndarray) -> np.ndarray:
        value[row] = 0
        return value

    return change


# what is right


@pytest.mark.parametrize("form", ["constants", "inputs", "merged", "parallel"])
def test_a_right_engine_passes(form: str, check: Callable[..., Verdict]) -> None:
    verdict = check(form=form, evidence=Evidence(seed=3))
    assert verdict.passed, verdict.failures
    names = [c.name for c in verdict.comparisons]
    assert [n for n in names if n.startswith("parity")] == [
        f"parity, batch {size}, seeded noise" for size in (1, 2, 3, 6)
    ]
    assert {ROW_ISOLATION, LIVENESS} <= set(names)
    assert ({PERMUTATION, OUTSIDE, TASK_ISOLATION} <= set(names)) == (
        form in ("constants", "inputs")
    )


def test_real_pictures_are_compared_besides(check: Callable[..., Verdict], images: Any) -> None:
    verdict = check(form="merged", evidence=Evidence(images={"lora": images(2, seed=8)}))
    assert verdict.passed, verdict.failures
    assert sum("real images" in c.name for c in verdict.comparisons) == 4


def test_a_batch_of_one_has_nothing_to_isolate(check: Callable[..., Verdict]) -> None:
    verdict = check(form="merged", max_batch=1)
    assert verdict.passed, verdict.failures
    assert [c.name for c in verdict.comparisons] == ["parity, batch 1, seeded noise", LIVENESS]


def test_every_tensor_may_be_tried(check: Callable[..., Verdict], deltas: dict[str, Delta]) -> None:
    verdict = check(form="merged", evidence=Evidence(every_tensor=True))
    assert verdict.passed, verdict.failures
    count = sum(len(named) for named in deltas["lora"].tensors.values())
    note = verdict.comparisons[-1].note
    assert verdict.comparisons[-1].rows == count
    assert f"slope of {count} tensors, {count} changed" in note


def test_the_check_leaves_the_deltas_and_the_backbone_alone(
    check: Callable[..., Verdict], vit: Backbone, deltas: dict[str, Delta]
) -> None:
    before = {name: tensor.clone() for name, tensor in vit.model.state_dict().items()}
    stored = {k: t.clone() for named in deltas["lora"].tensors.values() for k, t in named.items()}
    check(form="merged")
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.model.state_dict().items())
    after = {k: t for named in deltas["lora"].tensors.values() for k, t in named.items()}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in after.items())


# what is wrong


@pytest.mark.parametrize("form", ["constants", "merged"])
def test_an_engine_of_another_delta_of_the_same_shapes_fails(
    form: str,
    check: Callable[..., Verdict],
    vit: Backbone,
    deltas: dict[str, Delta],
    random_delta: Callable[..., Delta],
) -> None:
    other = random_delta(vit, methods.lora(2), task="lora", classes=5, seed=99)
    given = [other, *list(deltas.values())[1:]] if form == "constants" else [other]
    verdict = check(form=form, deltas=given)
    assert "parity" in failed(verdict)


def test_an_engine_of_a_delta_that_differs_by_one_percent_of_one_tensor_fails(
    check: Callable[..., Verdict], deltas: dict[str, Delta]
) -> None:
    lora = deltas["lora"]
    name = next(iter(lora.branches))
    tensors = {**lora.tensors, name: {**lora.tensors[name], "up": 1.01 * lora.tensors[name]["up"]}}
    verdict = check(form="merged", deltas=[replace(lora, tensors=tensors)])
    assert "parity" in failed(verdict)


@pytest.mark.parametrize(
    ("kind", "tensor"),
    [
        ("lora", "blocks.1.attn.qkv/lora.0/up"),
        ("lora", "blocks.2.attn.qkv/lora.0/down"),
        ("dual", "blocks.0.attn/adapter.0/up_bias"),
        ("dual", "blocks.2.mlp/adapter.0/down_bias"),
        ("serial", "blocks.1.mlp/serial.0/down"),
        ("prefix", "blocks.0.attn/prefix.0/value"),
        ("bias", "blocks.1.norm1/bias.0/shift"),
        ("bias", "head/head.0/weight"),
        ("dual", "head/head.0/bias"),
    ],
)
def test_one_tensor_of_one_task_that_is_zero_in_the_engine_fails(
    kind: str, tensor: str, check: Callable[..., Verdict], bundles: Callable[[str], Bundle]
) -> None:
    engine = doctored(bundles("constants").read_engine(), {f"bank/{tensor}": zero_row(ROWS[kind])})
    assert "parity" in failed(check(engine))


@pytest.mark.parametrize("tensor", ["key", "value"])
def test_a_lowered_prompt_that_is_zero_in_the_engine_fails(
    tensor: str, check: Callable[..., Verdict], bundles: Callable[[str], Bundle]
) -> None:
    engine = bundles("constants").read_engine()
    row = ROWS["prompt"]
    names = [t.name for t in onnx.load_from_string(engine).graph.initializer]
    slot = [n for n in names if n.startswith("bank/blocks.1.") and n.endswith(f"/{tensor}")]
    held = {
        t.name: numpy_helper.to_array(t)
        for t in onnx.load_from_string(engine).graph.initializer
        if t.name in slot
    }
    filled = [name for name, value in held.items() if value[row].any()]
    assert len(filled) == 1
    assert "parity" in failed(check(doctored(engine, {filled[0]: zero_row(row)})))


def test_two_tasks_with_their_rows_exchanged_fail(
    check: Callable[..., Verdict], bundles: Callable[[str], Bundle]
) -> None:
    def exchange(value: np.ndarray) -> np.ndarray:
        value[[0, 2]] = value[[2, 0]]
        return value

    verdict = check(doctored(bundles("constants").read_engine(), {"bank/": exchange}))
    assert "parity" in failed(verdict)


def test_two_tasks_with_their_rows_exchanged_in_a_bank_of_inputs_fail(
    check: Callable[..., Verdict], bundles: Callable[[str], Bundle]
) -> None:
    bank = {
        name: value[[2, 1, 0, 3, 4, 5]] for name, value in bundles("inputs").read_bank().items()
    }
    assert "parity" in failed(check(form="inputs", bank=bank))


def test_another_backbone_in_the_engine_fails(
    check: Callable[..., Verdict], bundles: Callable[[str], Bundle]
) -> None:
    engine = doctored(
        bundles("constants").read_engine(), {"trunk.blocks.1.norm2.weight": lambda v: 1.001 * v}
    )
    assert "parity" in failed(check(engine))


def test_an_engine_that_ignores_the_task_fails(
    check: Callable[..., Verdict], bundles: Callable[[str], Bundle]
) -> None:
    engine = rewired(
        bundles("constants").read_engine(), "task",
        [helper.make_node("Mul", ["task", "none"], ["task.new"])], {"none": np.array(0)},
    )  # fmt: skip
    assert {"parity", OUTSIDE} <= failed(check(engine))


def test_an_engine_that_gives_all_rows_the_first_ones_task_fails(
    check: Callable[..., Verdict], bundles: Callable[[str], Bundle]
) -> None:
    engine = rewired(
        bundles("constants").read_engine(), "task",
        [
            helper.make_node("Gather", ["task", "first"], ["task.first"]),
            helper.make_node("Shape", ["task"], ["task.shape"]),
            helper.make_node("Expand", ["task.first", "task.shape"], ["task.new"]),
        ],
        {"first": np.array([0])},
    )  # fmt: skip
    assert {"parity", ROW_ISOLATION, PERMUTATION, OUTSIDE} <= failed(check(engine))


def test_an_engine_that_answers_rows_outside_the_bank_fails(
    check: Callable[..., Verdict], bundles: Callable[[str], Bundle]
) -> None:
    engine = rewired(
        bundles("constants").read_engine(), "task",
        [helper.make_node("Clip", ["task", "lowest", "highest"], ["task.new"])],
        {"lowest": np.array(0), "highest": np.array(5)},
    )  # fmt: skip
    assert failed(check(engine)) == {OUTSIDE}


@pytest.mark.parametrize("form", ["constants", "merged"])
def test_rows_that_leak_into_one_another_fail(
    form: str, check: Callable[..., Verdict], bundles: Callable[[str], Bundle]
) -> None:
    engine = rewired(
        bundles(form).read_engine(), "images",
        [
            helper.make_node("ReduceMean", ["images", "batch axis"], ["mean"], keepdims=1),
            helper.make_node("Sub", ["images", "mean"], ["off"]),
            helper.make_node("Mul", ["off", "share"], ["less"]),
            helper.make_node("Add", ["mean", "less"], ["images.new"]),
        ],
        {"batch axis": np.array([0]), "share": np.array(0.999, np.float32)},
    )  # fmt: skip
    verdict = check(engine, form)
    assert {"parity", ROW_ISOLATION} <= failed(verdict)
    assert verdict.comparisons[0].passed  # one image has no neighbour that could leak


def test_a_leak_from_other_tasks_tensors_below_every_tolerance_fails(
    check: Callable[..., Verdict], bundles: Callable[[str], Bundle]
) -> None:
    engine = finished(
        bundles("constants").read_engine(),
        [
            helper.make_node(
                "ReduceSum", ["bank/blocks.0.attn.qkv/lora.0/up"], ["all"], keepdims=0
            ),
            helper.make_node("Mul", ["all", "little"], ["leak"]),
            helper.make_node("Add", ["old", "leak"], ["logits"]),
        ],
        {"little": np.array(2e-8, np.float32)},
    )
    assert failed(check(engine)) == {TASK_ISOLATION}


def test_an_answer_that_depends_on_the_place_in_the_batch_fails(
    check: Callable[..., Verdict], bundles: Callable[[str], Bundle]
) -> None:
    engine = rewired(
        bundles("constants").read_engine(), "images",
        [
            helper.make_node("Shape", ["images"], ["n"], start=0, end=1),
            helper.make_node("Squeeze", ["n"], ["count"]),
            helper.make_node("Range", ["start", "count", "step"], ["place"]),
            helper.make_node("Cast", ["place"], ["place.float"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", ["place.float", "little"], ["shift"]),
            helper.make_node("Unsqueeze", ["shift", "axes"], ["shift4"]),
            helper.make_node("Add", ["images", "shift4"], ["images.new"]),
        ],
        {
            "start": np.array(0), "step": np.array(1), "little": np.array(0.01, np.float32),
            "axes": np.array([1, 2, 3]),
        },
    )  # fmt: skip
    assert {"parity", ROW_ISOLATION, PERMUTATION} <= failed(check(engine))


def test_absent_classes_that_could_win_fail(
    check: Callable[..., Verdict], bundles: Callable[[str], Bundle]
) -> None:
    engine = doctored(
        bundles("constants").read_engine(),
        {"bank/head/head.0/bias": lambda v: np.where(v < -1e30, np.float32(0), v)},
    )
    verdict = check(engine)
    assert "parity" in failed(verdict)
    assert any(np.isinf(c.error) for c in verdict.failures)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_fails(
    value: float, check: Callable[..., Verdict], bundles: Callable[[str], Bundle]
) -> None:
    def spoil(tensor: np.ndarray) -> np.ndarray:
        tensor[ROWS["lora"], 0, 0] = value
        return tensor

    engine = doctored(
        bundles("constants").read_engine(), {"bank/blocks.0.attn.qkv/lora.0/up": spoil}
    )
    verdict = check(engine)
    assert "parity" in failed(verdict)


# liveness


def with_tensors(delta: Delta, branch: str, **changes: float) -> Delta:
    changed = {k: torch.full_like(delta.tensors[branch][k], v) for k, v in changes.items()}
    return replace(delta, tensors={**delta.tensors, branch: {**delta.tensors[branch], **changed}})


def test_a_branch_without_any_effect_fails(
    check: Callable[..., Verdict], bundles: Callable[[str], Bundle], deltas: dict[str, Delta]
) -> None:
    branch = "blocks.1.attn.qkv/lora"
    dead = with_tensors(deltas["lora"], branch, up=0.0, down=0.0)
    engine = doctored(
        bundles("constants").read_engine(),
        {f"bank/{branch}.0/{tensor}": zero_row(ROWS["lora"]) for tensor in ("up", "down")},
    )
    verdict = check(engine, deltas=[dead, *list(deltas.values())[1:]])
    assert failed(verdict) == {LIVENESS}
    assert f"train or drop them: lora: {branch}" in verdict.failures[0].note


def test_a_branch_that_is_not_trained_yet_passes_and_is_named(
    check: Callable[..., Verdict], bundles: Callable[[str], Bundle], deltas: dict[str, Delta]
) -> None:
    branch = "blocks.1.attn.qkv/lora"
    fresh = with_tensors(deltas["lora"], branch, up=0.0)
    engine = doctored(
        bundles("constants").read_engine(), {f"bank/{branch}.0/up": zero_row(ROWS["lora"])}
    )
    verdict = check(engine, deltas=[fresh, *list(deltas.values())[1:]])
    assert verdict.passed, verdict.failures
    note = verdict.comparisons[-1].note
    assert f"lora: {branch}/down" in note
    assert f"lora: {branch}/up" not in note


def test_no_tensor_of_a_trained_task_is_called_inert(check: Callable[..., Verdict]) -> None:
    note = check(form="constants").comparisons[-1].note
    assert "effect" not in note
    assert "inert" not in note


def test_a_prefix_whose_values_are_zero_still_lives_by_its_softmax(
    check: Callable[..., Verdict], bundles: Callable[[str], Bundle], deltas: dict[str, Delta]
) -> None:
    branch = "blocks.0.attn/prefix"
    changed = with_tensors(deltas["prefix"], branch, value=0.0)
    engine = doctored(
        bundles("constants").read_engine(), {f"bank/{branch}.0/value": zero_row(ROWS["prefix"])}
    )
    given = [changed if kind == "prefix" else delta for kind, delta in deltas.items()]
    verdict = check(engine, deltas=given)
    assert verdict.passed, verdict.failures


# which deltas belong to a bundle


def test_the_deltas_of_a_bundle_come_in_row_order(
    bundles: Callable[[str], Bundle], deltas: dict[str, Delta]
) -> None:
    bundle = bundles("constants")
    given = {task.delta: deltas[task.name] for task in reversed(bundle.tasks)}
    assert [delta.task for delta in require_tasks(bundle, given)] == list(deltas)


def test_a_delta_of_another_bundle_is_incompatible(
    bundles: Callable[[str], Bundle], deltas: dict[str, Delta]
) -> None:
    bundle = bundles("merged")
    with pytest.raises(
        IncompatibleArtefact, match="not one that the bundle was exported from"
    ) as caught:
        require_tasks(bundle, {bundle.tasks[0].delta: deltas["lora"], "0" * 64: deltas["dual"]})
    assert caught.value.exit_code == 4
    assert caught.value.details["where"] == "task dual"


def test_a_missing_delta_is_incompatible(
    bundles: Callable[[str], Bundle], deltas: dict[str, Delta]
) -> None:
    bundle = bundles("constants")
    given = {task.delta: deltas[task.name] for task in bundle.tasks if task.name != "serial"}
    with pytest.raises(IncompatibleArtefact, match="deltas of some tasks are not given") as caught:
        require_tasks(bundle, given)
    assert caught.value.details["wanted"] == "serial"
