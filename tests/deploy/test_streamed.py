"""Many tasks into one engine without holding them: the same bytes, one row at a time, every value looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from utune_deploy.deploy.bank_inputs import bank_inputs
from utune_deploy.deploy.check import check_engine
from utune_deploy.deploy.files import write_bank, write_graph
from utune_deploy.deploy.graphs import finish, graph_of
from utune_deploy.deploy.numerics import Numerics
from utune_deploy.deploy.plan import make_plan
from utune_deploy.deploy.reference import Evidence
from utune_deploy.export.engine import Device
from utune_deploy.export.engine_file import EngineFile
from utune_deploy.export.graph import serialise
from utune_deploy.export.precision import Losses
from utune_deploy.export.streamed import fill, write_engine
from utune_deploy.export.targets.onnxruntime import OnnxRuntimeSession
from utune_deploy.merge.bank import stack
from utune_deploy.merge.delta import load_delta, save_delta
from utune_deploy.merge.errors import BuildFailed, IncompatibleArtefact
from utune_deploy.merge.rows import Rows

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from utune_deploy.deploy.graphs import Made
    from utune_deploy.export.parity import Verdict
    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

IDENTITY = {"utune.identity": "0" * 64}
HELD = "every task's tensors in the bank, value by value"


class Counted(Mapping[str, Mapping[str, "Tensor"]]):
    """A delta's tensors that say whose branches are asked for."""

    def __init__(self, task: str, tensors: Mapping[str, Mapping[str, Tensor]], seen: list[str]):
        self.task, self.tensors, self.seen = task, tensors, seen

    def __getitem__(self, branch: str) -> Mapping[str, Tensor]:
        self.seen.append(self.task)
        return self.tensors[branch]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@pytest.fixture
def made(vit: Backbone, deltas: dict[str, Delta], sites_of: Any) -> Any:
    """A finished mixed graph of all kinds: `(bank, streamed) -> Made`."""

    def made(bank: str, streamed: bool) -> Made:
        given, sites = list(deltas.values()), sites_of(vit)
        plan = make_plan(given, vit, sites, bank=bank)
        graph = graph_of(plan, vit, given, sites, (), "fp32", streamed=streamed)
        finish(graph.model, "fp32")
        return graph

    return made


def test_a_streamed_engine_is_the_whole_one_to_the_byte(made: Any, tmp_path: Path) -> None:
    write_graph(made("constants", True), tmp_path / "streamed.onnx", IDENTITY, Losses("fp32"))
    whole = serialise(made("constants", False).model, IDENTITY)
    assert (tmp_path / "streamed.onnx").read_bytes() == whole


def test_a_streamed_bank_is_the_whole_one_to_the_byte(made: Any, tmp_path: Path) -> None:
    streamed, whole = made("inputs", True), made("inputs", False)
    write_bank(streamed, tmp_path / "streamed", {"tasks": "é"}, "fp32", Losses("fp32"))
    save_file(bank_inputs(whole.bank.tensors, "fp32"), tmp_path / "whole", metadata={"tasks": "é"})
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "whole").read_bytes()
    write_graph(streamed, tmp_path / "streamed.onnx", IDENTITY, Losses("fp32"))
    assert (tmp_path / "streamed.onnx").read_bytes() == serialise(whole.model, IDENTITY)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("bank", ["constants", "inputs"])
def test_a_bank_that_is_written_row_by_row_in_half_is_the_whole_one(
    bank: str,
    precision: str,
    vit: Backbone,
    deltas: dict[str, Delta],
    sites_of: Any,
    tmp_path: Path,
) -> None:
    """To the byte, audited on the same values, with the same losses counted; a value is below the half."""
    name, branch = next(iter(deltas["lora"].tensors.items()))
    up = branch["up"].clone()
    up[0, 0] = 1e-12
    odd = replace(deltas["lora"], tensors={**deltas["lora"].tensors, name: {**branch, "up": up}})
    given, sites = [*deltas.values(), replace(odd, task="odd")], sites_of(vit)
    plan = make_plan(given, vit, sites, bank=bank)
    numerics = Numerics(keep=("auto",)).with_examples(
        precision, vit, Evidence(), [d.task for d in given]
    )
    found = []
    for streamed in (True, False):
        made = graph_of(plan, vit, given, sites, (), precision, streamed=streamed)
        held = bank_inputs(made.bank.tensors, "fp32") if bank == "inputs" and made.bank else {}
        typing = finish(made.model, precision, numerics=numerics, bank=made.streamed or held).typing
        folder, losses = tmp_path / str(streamed), Losses(precision)
        folder.mkdir()
        write_graph(made, folder / "engine.onnx", IDENTITY, losses)
        if bank == "inputs":
            write_bank(made, folder / "bank", IDENTITY, precision, losses)
        assert (made.streamed is not None) == streamed
        found.append((typing.with_losses(losses), folder))
    (streamed, a), (whole, b) = found
    for file in a.iterdir():
        assert file.read_bytes() == (b / file.name).read_bytes(), file.name
    assert streamed.audit == whole.audit
    assert streamed.kept == whole.kept
    assert any(n.endswith("/up") for n in streamed.flushed) == (precision == "fp16")
    if bank == "constants":
        assert streamed == whole


def test_a_graph_with_all_its_tensors_is_written_as_protobuf_writes_it(
    made: Any, tmp_path: Path
) -> None:
    model = made("constants", False).model
    assert write_engine(model, tmp_path / "engine.onnx", IDENTITY) == {}
    assert (tmp_path / "engine.onnx").read_bytes() == serialise(model, IDENTITY)


def test_the_bank_is_asked_for_one_task_at_a_time_and_once(made: Any, tmp_path: Path) -> None:
    graph = made("constants", True)
    assert graph.bank is None
    seen: list[str] = []
    counted = [
        replace(delta, tensors=Counted(delta.task, delta.tensors, seen))
        for delta in graph.rows.deltas
    ]
    write_graph(
        graph._replace(rows=replace(graph.rows, deltas=counted)),
        tmp_path / "e.onnx",
        IDENTITY,
        Losses("fp32"),
    )
    assert seen == [delta.task for delta in counted for _ in delta.branches]


def test_the_zeros_that_are_traced_take_one_row(deltas: dict[str, Delta]) -> None:
    given = [deltas["lora"], deltas["dual"]]
    shaped = Rows(stack(given).slots, given).shaped(1000)
    for name, tensor in shaped.tensors.items():
        assert len(tensor) == 1000, name
        assert tensor.untyped_storage().nbytes() == 4 * tensor[0].numel(), name


def test_an_engine_of_more_than_protobuf_reads_is_refused_before_it_is_written(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utune_deploy.export.graph.LARGEST", 1000)
    with pytest.raises(BuildFailed, match="too large") as caught:
        write_graph(made("constants", True), tmp_path / "e.onnx", IDENTITY, Losses("fp32"))
    assert "--bank inputs" in caught.value.details["do"]
    assert not (tmp_path / "e.onnx").exists()


# deltas that stay in their files


def test_tensors_that_are_not_kept_are_those_of_the_file(
    deltas: dict[str, Delta], tmp_path: Path
) -> None:
    save_delta(tmp_path / "dual.safetensors", deltas["dual"])
    left = load_delta(tmp_path / "dual.safetensors", keep=False)
    assert left.layout == load_delta(tmp_path / "dual.safetensors").layout
    for branch, named in deltas["dual"].tensors.items():
        assert all(torch.equal(left.tensors[branch][name], t) for name, t in named.items())


def test_a_file_that_changes_meanwhile_is_refused(deltas: dict[str, Delta], tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    save_delta(path, deltas["dual"])
    left = load_delta(path, keep=False)
    save_delta(path, replace(deltas["lora"], task="dual"), force=True)
    with pytest.raises(IncompatibleArtefact, match="changed while its tensors were in use"):
        left.tensors[left.head]


# the engine where it lies


def test_an_engine_that_is_opened_from_its_file_answers_as_it_does_whole(
    bundles: Any, images: Any
) -> None:
    bundle = bundles("constants")
    path = bundle.path / bundle.engine.file
    file, one = EngineFile(path), Device(threads=1)
    whole = OnnxRuntimeSession(path, one)
    mapped = OnnxRuntimeSession(file.model(), one, folder=path.parent)
    given = OnnxRuntimeSession(file.with_bank_as_input(), one, bank=file.bank(), folder=path.parent)
    task = np.arange(6)
    wanted = whole.run(images(6), task)
    assert np.array_equal(mapped.run(images(6), task), wanted)
    assert np.array_equal(given.run(images(6), task), wanted)
    assert mapped.metadata == whole.metadata


# every value


@pytest.fixture
def check(vit: Backbone, deltas: dict[str, Delta], sites_of: Any, bundles: Any) -> Any:
    """`check_engine` on a bundle's engine at a path, its bank held to the deltas."""

    def check(engine: Path, form: str = "constants", bank: Any = None) -> Verdict:
        bundle = bundles(form)
        given = [deltas[task.name] for task in bundle.tasks]
        plan = make_plan(given, vit, sites_of(vit), bank=bundle.bank)
        rows = graph_of(plan, vit, given, sites_of(vit), (), "fp32", streamed=True).rows
        return check_engine(
            engine, vit, given, sites_of(vit), mixes=True, bank=bank or {}, max_batch=2,
            evidence=Evidence(), device=Device(threads=1), rows=rows,
        )  # fmt: skip

    return check


def test_every_task_is_asked_and_its_row_compared_where_batches_are_smaller(
    check: Any, bundles: Any
) -> None:
    bundle = bundles("constants")
    verdict = check(bundle.path / bundle.engine.file)
    assert verdict.passed, verdict.failures
    rows = {c.name: c.rows for c in verdict.comparisons}
    assert rows["parity of every task"] == rows[HELD] == len(bundle.tasks)


def test_a_bank_in_a_file_of_its_own_is_read_there(check: Any, bundles: Any) -> None:
    bundle = bundles("inputs")
    verdict = check(bundle.path / bundle.engine.file, "inputs", bundle.path / "bank.safetensors")
    assert verdict.passed, verdict.failures
    assert HELD in {c.name for c in verdict.comparisons}


def test_one_value_that_is_off_by_its_last_bit_fails(
    check: Any, bundles: Any, tmp_path: Path
) -> None:
    bundle = bundles("constants")
    path = tmp_path / "engine.onnx"
    path.write_bytes((bundle.path / bundle.engine.file).read_bytes())
    bank = EngineFile(path).bank()
    name = "bank/blocks.2.mlp/adapter.0/down"
    row = bank[name][1].copy()
    row.flat[-1] = np.nextafter(row.flat[-1], np.float32(np.inf))
    content = path.read_bytes()
    at = content.index(bank[name].tobytes()) + row.nbytes
    del bank
    fill(path, {name: at}, [{name: row}])
    (failure,) = check(path).failures
    assert failure.name == HELD
    assert failure.note == f"not as in the delta: task row 1: {name}"


# many tasks


@pytest.fixture
def many(
    vit: Backbone, deltas: dict[str, Delta], sites_of: Any, tmp_path: Path, monkeypatch: Any
) -> Any:
    """`check_engine` on an engine of five tasks of one layout, of which two are looked at closely: `(wrong) -> Verdict`.

    The engine was made with task `wrong` one percent larger in one tensor; None for as it should be.
    """  # fmt: skip
    monkeypatch.setattr("utune_deploy.deploy.reference.CLOSELY", 2)
    given = [_scaled(deltas["lora"], f"task{n}", 1.0 + 0.1 * n) for n in range(5)]
    sites = sites_of(vit)

    def many(wrong: int | None) -> Verdict:
        built = [_scaled(d, d.task, 1.01) if n == wrong else d for n, d in enumerate(given)]
        graph = graph_of(make_plan(built, vit, sites), vit, built, sites, (), "fp32", streamed=True)
        finish(graph.model, "fp32")
        write_graph(graph, tmp_path / "engine.onnx", IDENTITY, Losses("fp32"))
        return check_engine(
            tmp_path / "engine.onnx", vit, given, sites, mixes=True, bank={}, max_batch=2,
            evidence=Evidence(), device=Device(threads=1),
        )  # fmt: skip

    return many


def _scaled(delta: Delta, task: str, factor: float) -> Delta:
    """A task of the same layout: the first tensor of each branch is larger."""
    tensors = {
        branch: {n: t * factor if i == 0 else t for i, (n, t) in enumerate(named.items())}
        for branch, named in delta.tensors.items()
    }
    return replace(delta, task=task, tensors=tensors)


def test_of_many_tasks_some_are_held_to_float64_and_all_are_asked(many: Any) -> None:
    verdict = many(None)
    assert verdict.passed, verdict.failures
    (every,) = (c for c in verdict.comparisons if c.name == "parity of every task")
    held, _, of = every.note.split()[:3]
    assert 2 <= int(held) < int(of) == every.rows == 5


@pytest.mark.parametrize("wrong", [0, 2, 4])
def test_each_of_many_tasks_that_is_off_fails(many: Any, wrong: int) -> None:
    assert "parity of every task" in {c.name for c in many(wrong).failures}
