"""Engines in half precision, from deltas to answers: laid out for CUDA, checked on any provider."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from utune_deploy.deploy.add import add_tasks
from utune_deploy.deploy.bank_inputs import bank_inputs
from utune_deploy.deploy.bench.report import TIMED, TIMED_ON_DEVICE
from utune_deploy.deploy.bench.subject import Resident, open_subject
from utune_deploy.deploy.build import export_bundle
from utune_deploy.deploy.check import check_engine
from utune_deploy.deploy.reference import Evidence
from utune_deploy.export.bundle import open_bundle
from utune_deploy.export.engine import Device
from utune_deploy.export.passes import CPU_PASSES, CUDA_PASSES, HALF_PASSES, PASSES
from utune_deploy.merge import methods
from utune_deploy.merge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from utune_deploy.export.bundle import Bundle
    from utune_deploy.export.parity import Verdict
    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

ONE = Device(threads=1)
MAX_BATCH = 4
CLASSES = {"dual": 3, "lora": 5, "parallel": 2}
CLOSE = 1e-2  # of the largest logit, two blocks in float16; the check itself judges by torch


@pytest.fixture(scope="module")
def trained(wide_vit: Backbone, random_delta: Callable[..., Delta]) -> dict[str, Delta]:
    """Three tasks whose ranks are not those of the kernels, by method."""
    made = {
        "dual": methods.dual_adapter(5),
        "lora": methods.lora(3),
        "parallel": methods.parallel_adapter(4),
    }
    return {
        task: random_delta(wide_vit, method, task=task, classes=CLASSES[task], seed=seed)
        for seed, (task, method) in enumerate(made.items())
    }


@pytest.fixture(scope="module")
def exported(
    wide_vit: Backbone,
    trained: dict[str, Delta],
    as_task: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Bundle]:
    """Bundles by form and precision, each made when it is first asked for."""
    made: dict[tuple[str, str], Bundle] = {}
    forms: dict[str, tuple[list[str], dict[str, str]]] = {
        "constants": (list(CLASSES), {}),
        "inputs": (list(CLASSES), {"bank": "inputs"}),
        "parallel": (["dual"], {}),
        "merged": (["lora"], {}),
    }

    def exported(form: str, precision: str = "fp16") -> Bundle:
        if (form, precision) not in made:
            tasks, settings = forms[form]
            made[form, precision] = export_bundle(
                tmp_path_factory.mktemp(form) / "bundle", wide_vit, [as_task(trained[t]) for t in tasks],
                precision=precision, max_batch=MAX_BATCH, device=ONE, **settings,
            )  # fmt: skip
        return made[form, precision]

    return exported


@pytest.fixture(scope="module")
def alike(
    wide_vit: Backbone, sites_of: Any, trained: dict[str, Delta]
) -> Callable[[str, np.ndarray, np.ndarray], None]:
    """Hold logits to a task alone in torch, in float32."""
    import torch

    from utune_deploy.merge.attach import restore

    def alike(task: str, found: np.ndarray, images: np.ndarray) -> None:
        delta = trained[task]
        with torch.no_grad():
            tuned = restore(wide_vit, delta, sites_of(wide_vit)).eval()
            wanted = tuned(torch.from_numpy(images)).numpy()
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=0, atol=CLOSE * np.abs(wanted).max())

    return alike


def fused(bundle: Bundle) -> set[str]:
    model = onnx.load_from_string(bundle.read_engine())
    return {node.op_type for node in model.graph.node if node.domain == "utune"}


# what is written


@pytest.mark.parametrize("form", ["constants", "inputs", "parallel", "merged"])
def test_a_bundle_in_half_says_what_was_done_and_has_passed(
    form: str, exported: Callable[..., Bundle]
) -> None:
    bundle = exported(form)
    assert bundle.engine.precision == "fp16"
    assert bundle.check["passed"]
    typing = bundle.plan["typing"]
    assert typing["precision"] == "fp16"
    assert typing["cast"] > 10
    assert ("Add" in typing["islands"]) == (
        form != "merged"
    )  # the classifier's bias, if not in a Gemm
    assert (typing["clipped"], typing["flushed"]) == ({}, {})  # nor are classes that a task lacks
    assert 0 < typing["error"] < 2.0**-11
    assert set(bundle.plan["rewritten"]) == {*HALF_PASSES, *CUDA_PASSES}
    assert bundle.plan["rewritten"]["packed_attention"] == (2 if len(bundle.tasks) == 1 else 0)
    assert open_bundle(bundle.path) == bundle
    (answer,) = bundle.engine.outputs
    assert answer.dtype == "float32"
    assert answer.shape[-1] == max(CLASSES[task.name] for task in bundle.tasks)


@pytest.mark.parametrize("form", ["constants", "inputs", "parallel", "merged"])
def test_rows_answer_with_their_own_task_in_half(
    form: str, exported: Callable[..., Bundle], alike: Any, images: Any
) -> None:
    bundle = exported(form)
    batch, task = images(MAX_BATCH), np.arange(MAX_BATCH)[::-1] % len(bundle.tasks)
    found = bundle.open_session(ONE).run(batch, task if bundle.mode == "multi" else None)
    for row, number in enumerate(task):
        name = bundle.tasks[number].name
        alike(name, found[row : row + 1, : CLASSES[name]], batch[row : row + 1])


def test_a_task_alone_is_fused_as_many_are(exported: Callable[..., Bundle]) -> None:
    alone, many = exported("parallel"), exported("constants")
    assert alone.mode == "parallel"
    assert [tensor.name for tensor in alone.engine.inputs] == ["images"]
    assert {"NormedBranchReluBiased", "GroupedBottleneckReluBiasedResidual"} <= fused(alone)
    assert "GroupedBottleneckIdentity" in fused(many)
    assert fused(exported("merged")) == fused(exported("constants", "fp32")) == set()


@pytest.mark.parametrize("form", ["constants", "parallel"])
def test_the_identity_tells_precisions_apart(form: str, exported: Callable[..., Bundle]) -> None:
    full, half = exported(form, "fp32"), exported(form, "fp16")
    assert full.identity != half.identity
    assert (full.engine.precision, half.engine.precision) == ("fp32", "fp16")
    assert full.plan["typing"]["islands"] == {}
    assert set(full.plan["rewritten"]) == {*PASSES, *CPU_PASSES}


# the bank


def test_a_bank_of_inputs_is_stored_and_read_in_half(exported: Callable[..., Bundle]) -> None:
    bundle = exported("inputs")
    assert {value.dtype.name for value in bundle.read_bank().values()} == {"float16"}
    types = {t.name: t.dtype for t in bundle.engine.inputs}
    assert {name: types[name] for name in ("images", "task")} == {
        "images": "float32",
        "task": "int64",
    }
    assert {types[name] for name in bundle.read_bank()} == {"float16"}
    model = onnx.load_from_string(bundle.read_engine())
    given = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
    assert {given[name] for name in bundle.read_bank()} == {TensorProto.FLOAT16}


def test_values_of_a_bank_beyond_the_range_of_half_are_its_largest() -> None:
    import torch

    given = {"a/up": torch.tensor([1e9, -1e9, 0.1], dtype=torch.float64)}
    half, full = bank_inputs(given, "fp16"), bank_inputs(given, "tf32")
    assert half["bank/a/up"].tolist() == [65504, -65504, np.float16(0.1)]
    assert full["bank/a/up"].dtype == np.float32


def test_a_task_is_added_to_a_bank_in_half(
    exported: Callable[..., Bundle],
    wide_vit: Backbone,
    random_delta: Any,
    as_task: Any,
    trained: dict[str, Delta],
    alike: Any,
    images: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = exported("inputs")
    later = random_delta(wide_vit, methods.lora(16), task="later", classes=4, seed=31)
    new = add_tasks(old, wide_vit, [as_task(later)], tmp_path / "grown", device=ONE)
    assert new.read_engine() == old.read_engine()
    assert {value.dtype.name for value in new.read_bank().values()} == {"float16"}
    assert [verdict["passed"] for verdict in new.check["added"]] == [True]
    batch, task = images(MAX_BATCH), np.array([3, 1, 0, 3])
    before, after = (b.open_session(ONE).run(batch, task) for b in (old, new))
    np.testing.assert_array_equal(after[1:3], before[1:3])
    assert np.isnan(before[[0, 3]]).all()
    monkeypatch.setitem(trained, "later", later)
    alike("later", after[[0, 3]][:, :4], batch[[0, 3]])


# what is refused


@pytest.fixture(scope="module")
def files(
    wide_vit: Backbone, trained: dict[str, Delta], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with the backbone and the deltas."""
    from utune_deploy.merge.backbone import save
    from utune_deploy.merge.delta import save_delta

    root = tmp_path_factory.mktemp("files")
    save(root / "backbone", wide_vit)
    for task, delta in trained.items():
        save_delta(root / f"{task}.safetensors", delta)
    return root


@pytest.mark.parametrize(("precision", "code"), [("bf16", 5), ("tf32", 2)])
def test_a_precision_is_refused_where_it_cannot_be_checked(
    precision: str, code: int, cli: Any, files: Path, tmp_path: Path
) -> None:
    said = cli(
        "export", files / "lora.safetensors", "--weights", files / "backbone", "-o", tmp_path / "out",
        "--precision", precision, "--max-batch", 1,
    )  # fmt: skip
    assert (said.code, said.out) == (code, "")
    assert "--provider cuda" in said.err
    assert not list(tmp_path.iterdir())


def test_export_says_what_became_half(cli: Any, files: Path, tmp_path: Path) -> None:
    arguments = (
        "export", files / "dual.safetensors", "--weights", files / "backbone",
        "--max-batch", 2, "--threads", 1,
    )  # fmt: skip
    half = cli(*arguments, "-o", tmp_path / "half", "--precision", "fp16")
    assert half.code == 0
    typing = open_bundle(tmp_path / "half").plan["typing"]
    islands = sum(typing["islands"].values())
    assert f"fp16: {typing['cast']} tensors cast, {islands} nodes stay float32\n" in half.out
    full = cli(*arguments, "-o", tmp_path / "full")
    assert full.code == 0
    assert "nodes stay float32" not in full.out


@pytest.fixture
def check(
    wide_vit: Backbone,
    sites_of: Any,
    trained: dict[str, Delta],
    exported: Callable[..., Bundle],
    tmp_path: Path,
) -> Callable[..., Verdict]:
    """`check_engine` in half on the bundle of constants, one tensor changed first."""

    def check(part: str, change: Callable[[np.ndarray], None]) -> Verdict:
        model = onnx.load_from_string(exported("constants").read_engine())
        (tensor,) = (t for t in model.graph.initializer if part in t.name)
        value = numpy_helper.to_array(tensor).copy()
        assert value.dtype == np.float16
        change(value)
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        engine = tmp_path / "doctored.onnx"
        engine.write_bytes(model.SerializeToString())
        return check_engine(
            engine, wide_vit, list(trained.values()), sites_of(wide_vit),
            mixes=True, bank={}, max_batch=MAX_BATCH, evidence=Evidence(), device=ONE, precision="fp16",
        )  # fmt: skip

    return check


def test_an_engine_that_is_left_as_it_was_passes(check: Callable[..., Verdict]) -> None:
    assert check("blocks.1.attn.qkv/lora.0/up", lambda value: None).passed


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.25])
def test_a_tuner_weight_that_is_another_fails_the_check(
    factor: float, check: Callable[..., Verdict]
) -> None:
    def change(value: np.ndarray) -> None:
        value[1] *= np.float16(factor)  # of the task `lora` alone

    failures = check("blocks.1.attn.qkv/lora.0/up", change).failures
    assert any(c.name.startswith("parity") for c in failures)


# runs that copy nothing


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("form", ["constants", "inputs", "parallel"])
def test_a_bound_batch_answers_as_a_run_does(
    form: str, precision: str, exported: Callable[..., Bundle], images: Any
) -> None:
    bundle = exported(form, precision)
    session = bundle.open_session(ONE)
    batch, other, task = images(3, seed=1), images(3, seed=2), np.array([2, 0, 1])
    rows = (task,) if bundle.mode == "multi" else ()
    bound = session.bind(batch, *rows)
    bound.run()
    first = bound.fetch()
    np.testing.assert_array_equal(first, session.run(batch, *rows))
    bound.feed({"images": other})
    bound.run()
    np.testing.assert_array_equal(bound.fetch(), session.run(other, *rows))
    np.testing.assert_array_equal(first, session.run(batch, *rows))  # a copy, not the memory itself
    if rows:
        bound.feed({"task": task[::-1]})
        bound.run()
        np.testing.assert_array_equal(bound.fetch(), session.run(other, task[::-1].copy()))


def test_a_bound_batch_keeps_the_rows_and_the_bank_that_it_was_bound_with(
    exported: Callable[..., Bundle], images: Any
) -> None:
    bundle = exported("inputs")
    session = bundle.open_session(ONE)
    batch, task = images(2), np.array([2, 0])
    wanted = session.run(batch, task)
    bound = session.bind(batch, task)
    batch[:], task[:] = 0, 1
    session.replace_bank({name: np.zeros_like(value) for name, value in bundle.read_bank().items()})
    bound.run()
    np.testing.assert_array_equal(bound.fetch(), wanted)
    assert not np.array_equal(session.run(images(2), np.array([2, 0])), wanted)


def test_a_batch_without_tasks_is_not_bound(exported: Callable[..., Bundle], images: Any) -> None:
    with pytest.raises(UsageError, match="needs a task row"):
        exported("constants").open_session(ONE).bind(images(2))


# the benchmark


def test_what_lies_on_the_device_is_timed_with_the_tasks_that_are_asked_for(
    exported: Callable[..., Bundle], images: Any
) -> None:
    session = exported("constants").open_session(ONE)
    subject = open_subject("half", "", lambda: session, resident=True)
    batch = images(3)
    for task in (np.zeros(3, np.int64), np.arange(3), np.arange(2)):
        for _ in range(2):
            wanted = session.run(batch[: len(task)], task)
            np.testing.assert_array_equal(subject.run(batch[: len(task)], task), wanted)


def test_what_lies_on_the_device_is_bound_once_and_computed_each_time() -> None:
    log: list[str] = []

    class Bound:
        def run(self) -> None:
            log.append("run")

        def fetch(self) -> np.ndarray:
            log.append("fetch")
            return np.zeros((2, 1), np.float32)

    class Session:
        def bind(self, inputs: Any, task: Any = None) -> Bound:
            log.append("bind without task" if task is None else "bind")
            return Bound()

    task = np.arange(2)
    takes: Any = Resident(Session(), takes_task=True)  # type: ignore[arg-type]
    for rows in (task, task, task[::-1]):
        takes(np.zeros(2), rows)
    assert log == ["bind", "run", "fetch", "run", "run", "bind", "run", "fetch", "run"]
    log.clear()
    takes = Resident(Session(), takes_task=False)  # type: ignore[arg-type]
    for rows in (task, task[::-1]):
        takes(np.zeros(2), rows)
    assert log == ["bind without task", "run", "fetch", "run", "run"]


def test_bench_says_where_what_it_timed_lay(
    cli: Any, exported: Callable[..., Bundle], tmp_path: Path
) -> None:
    arguments = (
        "bench", exported("constants").path, "-b", 2, "-m", "one", "-m", "uniform", "--rounds", 2,
        "--warmup", 1, "--seconds", 0, "--threads", 1, "--json",
    )  # fmt: skip
    resident = cli(*arguments, "--resident", "-o", tmp_path)
    assert resident.code == 0
    assert resident.json["timed"] == TIMED_ON_DEVICE
    assert TIMED_ON_DEVICE in (tmp_path / "report.html").read_text()
    assert cli(*arguments).json["timed"] == TIMED
