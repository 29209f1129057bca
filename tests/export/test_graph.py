"""The traced graph: a free batch axis, names that can be traced back, one file that tells nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from utune_deploy.export import graph as graphs
from utune_deploy.export.engine import IMAGES, LOGITS, TASK
from utune_deploy.export.engine import Tensor as Spec
from utune_deploy.export.graph import OPSET, Inputs, clean, serialise, specs, trace
from utune_deploy.export.passes import rewrite
from utune_deploy.merge import methods
from utune_deploy.merge.bank import Bank, stack
from utune_deploy.merge.errors import BuildFailed
from utune_deploy.merge.lower import lower
from utune_deploy.merge.mixed import Mixed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import onnx_ir as ir

    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

TASKS = 3
BATCHES = (1, 2, 3, 17)


@pytest.fixture(scope="module")
def bank(vit: Backbone, sites_of: Callable[..., Any], random_delta: Callable[..., Delta]) -> Bank:
    """Three tasks that differ by nothing but their heads' sizes: equal tensors, and many of them zero."""
    first = random_delta(
        vit, methods.lora(2), methods.dual_adapter(2), methods.deep_prompt(2), task="a", seed=1
    )
    tensors = {
        name: {
            key: torch.zeros_like(value)
            if key in ("up", "up_bias", "down_bias")
            else torch.ones_like(value)
            for key, value in named.items()
        }
        for name, named in first.tensors.items()
    }
    first = replace(first, tensors=tensors)
    fewer = {key: value[:3] for key, value in first.tensors[first.head].items()}
    last = replace(
        first, task="c", labels=first.labels[:3], tensors={**first.tensors, first.head: fewer}
    )
    deltas = (first, replace(first, task="b"), last)
    return stack([lower(vit, delta, sites_of(vit)) for delta in deltas])


@pytest.fixture(scope="module", params=["constants", "inputs"])
def traced(request: pytest.FixtureRequest, vit: Backbone, bank: Bank) -> Iterator[ir.Model]:
    """The same tasks with the bank inside the engine, and as inputs of it, through every pass."""
    task = torch.tensor([0, 1])
    module = Mixed(vit, bank).eval()
    if request.param == "constants":
        rename = {f"bank_{i}": f"bank/{key}" for i, key in enumerate(bank.tensors)}
        model = trace(module, Inputs(vit.example(batch=2), task), rename=rename)
    else:
        given = {f"bank/{key}": tensor for key, tensor in bank.tensors.items()}
        model = trace(module, Inputs(vit.example(batch=2), task, given))
    rewrite(model)
    return clean(model)


def names(model: ir.Model) -> dict[str, list[str]]:
    return {
        "initializers": [name for name in model.graph.initializers if name.startswith("bank/")],
        "inputs": [v.name for v in model.graph.inputs if (v.name or "").startswith("bank/")],
    }


def kept_as(model: ir.Model) -> str:
    return "inputs" if names(model)["inputs"] else "constants"


@pytest.mark.parametrize("batch", BATCHES)
def test_the_batch_axis_is_free(
    batch: int,
    traced: ir.Model,
    bank: Bank,
    vit: Backbone,
    run_onnx: Callable[..., list[np.ndarray]],
) -> None:
    images = vit.example(batch=batch)
    task = torch.arange(batch) % TASKS
    given = {f"bank/{key}": tensor.numpy() for key, tensor in bank.tensors.items()}
    found = run_onnx(traced, {IMAGES: images.numpy(), TASK: task.numpy(), **given})[0]
    with torch.no_grad():
        wanted = Mixed(vit, bank).eval()(images, task).numpy()
    assert found.shape == wanted.shape == (batch, 5)
    real = wanted > np.finfo(np.float32).min / 2
    assert ((found > np.finfo(np.float32).min / 2) == real).all()
    np.testing.assert_allclose(
        found[real], wanted[real], rtol=0, atol=1e-5 * np.abs(wanted[real]).max()
    )


def test_every_tensor_of_the_bank_is_there_once_with_a_row_per_task(
    traced: ir.Model, bank: Bank
) -> None:
    wanted = sorted(f"bank/{key}" for key in bank.tensors)
    found = names(traced)
    if kept_as(traced) == "constants":
        assert sorted(found["initializers"]) == wanted
        for key, tensor in bank.tensors.items():
            kept = traced.graph.initializers[f"bank/{key}"]
            assert kept.const_value is not None
            np.testing.assert_array_equal(kept.const_value.numpy(), tensor.numpy())
            assert kept.const_value.shape[0] == TASKS
            assert kept.uses(), f"{key} is in the file and read by nothing"
    else:
        assert sorted(found["inputs"]) == wanted
        assert not found["initializers"]


def test_the_proto_names_each_tensor_once(traced: ir.Model, bank: Bank) -> None:
    proto = onnx.load_from_string(serialise(traced, {}))
    if kept_as(traced) == "constants":
        kept = [tensor.name for tensor in proto.graph.initializer]
        assert len(kept) == len(set(kept))
    outputs = [name for node in proto.graph.node for name in node.output]
    assert len(outputs) == len(set(outputs))


def test_inputs_and_outputs_have_their_names_and_free_axes(traced: ir.Model, bank: Bank) -> None:
    given = {spec.name: spec for spec in specs(traced.graph.inputs)}
    assert given[IMAGES] == Spec(IMAGES, "float32", ("batch", 3, 32, 32))
    assert given[TASK] == Spec(TASK, "int64", ("batch",))
    assert specs(traced.graph.outputs) == (Spec(LOGITS, "float32", ("batch", 5)),)
    for key, tensor in bank.tensors.items():
        if kept_as(traced) == "inputs":
            wanted = Spec(f"bank/{key}", "float32", ("tasks", *tensor.shape[1:]))
            assert given[f"bank/{key}"] == wanted


def test_other_initializers_keep_the_path_of_their_parameter(traced: ir.Model) -> None:
    kept = traced.graph.initializers
    for path in ("trunk.patch_embed.proj.bias", "trunk.blocks.0.norm1.weight", "trunk.pos_embed"):
        assert path in kept


@pytest.mark.parametrize("traced", ["inputs"], indirect=True)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_bank_of_inputs_may_have_any_number_of_tasks(
    rows: int,
    traced: ir.Model,
    bank: Bank,
    vit: Backbone,
    run_onnx: Callable[..., list[np.ndarray]],
) -> None:
    noise = torch.Generator().manual_seed(rows)
    tensors = {
        key: 0.1 * torch.randn(rows, *tensor.shape[1:], generator=noise)
        for key, tensor in bank.tensors.items()
    }
    other = Bank(tuple("abcde"[:rows]), bank.slots, tensors)
    images, task = vit.example(batch=4), torch.tensor([rows - 1, 0, rows, -1])
    given = {f"bank/{key}": tensor.numpy() for key, tensor in tensors.items()}
    found = run_onnx(traced, {IMAGES: images.numpy(), TASK: task.numpy(), **given})[0]
    with torch.no_grad():
        wanted = Mixed(vit, other).eval()(images, task).numpy()
    assert np.isnan(found[2:]).all()
    np.testing.assert_allclose(found[:2], wanted[:2], rtol=0, atol=1e-5 * np.abs(wanted[:2]).max())


def test_the_file_has_one_operator_set_and_no_data_beside_it(traced: ir.Model) -> None:
    proto = onnx.load_from_string(serialise(traced, {"utune.identity": "me"}))
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": OPSET}
    assert not proto.functions
    assert all(not onnx.external_data_helper.uses_external_data(t) for t in proto.graph.initializer)
    assert {entry.key: entry.value for entry in proto.metadata_props} == {"utune.identity": "me"}
    onnx.checker.check_model(proto, full_check=True)


def test_the_file_says_nothing_about_the_machine_that_made_it(traced: ir.Model) -> None:
    engine = serialise(traced, {})
    for word in (b"site-packages", b"stack_trace", b".py", b"/tmp", b"/home", b"pkg.torch"):
        assert word not in engine, word


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("gain", torch.full((3,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.gain + (torch.ones(3) + torch.ones(3))


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return Scaled().eval()


def test_the_same_module_gives_the_same_bytes() -> None:
    inputs = Inputs(torch.ones(2, 5, 4))
    first, second = (serialise(trace(tiny(), inputs), {"k": "v"}) for _ in range(2))
    assert first == second


def test_initializers_are_renamed_by_their_path_and_unknown_paths_are_no_error() -> None:
    model = trace(
        tiny(), Inputs(torch.ones(2, 5, 4)), rename={"gain": "bank/gain", "nothing": "bank/nothing"}
    )
    assert "bank/gain" in model.graph.initializers
    assert not {"gain", "bank/nothing"} & set(model.graph.initializers)


def test_constants_are_folded_and_lifted() -> None:
    model = trace(tiny(), Inputs(torch.ones(2, 5, 4)))
    assert [node.op_type for node in model.graph] == ["MatMul", "Add", "Mul", "Add"]


def test_cleaning_twice_changes_nothing() -> None:
    model = trace(tiny(), Inputs(torch.ones(2, 5, 4)))
    before = serialise(model, {})
    assert serialise(clean(model), {}) == before


def test_tracing_leaves_the_module_and_the_logs_alone(capfd: pytest.CaptureFixture[str]) -> None:
    module = tiny()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    trace(module, Inputs(torch.ones(2, 5, 4)))
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert capfd.readouterr() == ("", "")


class Undecided(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_a_module_that_torch_cannot_export_is_a_failed_build() -> None:
    with pytest.raises(BuildFailed, match="torch cannot export the model to ONNX") as caught:
        trace(Undecided(), Inputs(torch.ones(2, 3)))
    assert caught.value.exit_code == 6
    assert caught.value.details["where"] == "Undecided"
    assert caught.value.__cause__ is not None


def test_a_model_over_the_limit_of_protobuf_is_a_failed_build(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = trace(tiny(), Inputs(torch.ones(2, 5, 4)))

    size = len(serialise(model, {}))
    monkeypatch.setattr(graphs, "LARGEST", size)
    assert len(serialise(model, {})) == size
    monkeypatch.setattr(graphs, "LARGEST", size - 1)
    with pytest.raises(BuildFailed, match="too large for one ONNX file"):
        serialise(model, {})
