"""A delta laid out for a bank that is served: the row that a bundle would ship, and torch's own answers beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

from utune_deploy.deploy.add import add_tasks
from utune_deploy.deploy.build import export_bundle
from utune_deploy.deploy.pack import PROBE_ROWS, Layout, pack
from utune_deploy.export.engine import Device
from utune_deploy.merge import methods
from utune_deploy.merge.errors import CheckFailed, IncompatibleArtefact, UsageError
from utune_deploy.serving.service import Service
from utune_deploy.serving.tasks.packed import read_packed, write_packed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from utune_deploy.export.bundle import Bundle
    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta
    from utune_deploy.serving.tasks.packed import Packed

ONE = Device(threads=1)
KINDS = {
    "lora": methods.lora(1),
    "dual": methods.dual_adapter(2),
    "serial": methods.serial_adapter(3),
    "prefix": methods.prefix(1),
    "prompt": methods.deep_prompt(2),
    "bias": methods.bitfit(),
}
PLAIN = [kind for kind in KINDS if kind != "prompt"]  # laid out without the backbone


@pytest.fixture(scope="module")
def later(vit: Backbone, random_delta: Callable[..., Delta]) -> dict[str, Delta]:
    """A further task of every kind, smaller than the slots."""
    return {
        kind: random_delta(vit, method, task=f"later {kind}", classes=2 + seed % 3, seed=60 + seed)
        for seed, (kind, method) in enumerate(KINDS.items())
    }


@pytest.fixture(scope="module")
def layout(bundles: Callable[[str], Bundle]) -> Layout:
    return Layout.of(bundles("inputs"))


@pytest.fixture(scope="module")
def packed(
    vit: Backbone, later: dict[str, Delta], layout: Layout, as_task: Any
) -> Callable[[str], Packed]:
    """Each of them laid out with the backbone at hand."""
    made: dict[str, Packed] = {}

    def packed(kind: str) -> Packed:
        if kind not in made:
            made[kind] = pack(as_task(later[kind]), layout, vit)
        return made[kind]

    return packed


@pytest.fixture(scope="module")
def grown(
    bundles: Callable[[str], Bundle],
    vit: Backbone,
    later: dict[str, Delta],
    as_task: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    """The bundle that ships them as well."""
    folder = tmp_path_factory.mktemp("grown") / "bundle"
    return add_tasks(
        bundles("inputs"), vit, [as_task(d) for d in later.values()], folder, device=ONE
    )


@pytest.fixture
def service(bundles: Callable[[str], Bundle]) -> Iterator[Service]:
    opened = Service.open(bundles("inputs"), ONE)
    yield opened
    opened.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_task_is_the_row_that_a_bundle_would_ship(
    kind: str, packed: Callable[[str], Packed], grown: Bundle
) -> None:
    found = packed(kind)
    (shipped,) = (task for task in grown.tasks if task.name == f"later {kind}")
    assert found.task == replace(shipped, row=0)
    assert (found.identity, found.fingerprint) == (grown.identity, grown.backbone["fingerprint"])
    bank = grown.read_bank()
    assert set(found.tensors) == set(bank)
    for name, value in found.tensors.items():
        assert value.dtype == bank[name].dtype
        np.testing.assert_array_equal(value, bank[name][shipped.row])


@pytest.mark.parametrize("kind", PLAIN)
def test_it_is_the_same_without_the_backbone_but_for_the_probe(
    kind: str,
    packed: Callable[[str], Packed],
    later: dict[str, Delta],
    layout: Layout,
    as_task: Any,
) -> None:
    plain, whole = pack(as_task(later[kind]), layout), packed(kind)
    assert plain.probe is None
    assert whole.probe is not None
    assert write_packed(plain) == write_packed(replace(whole, probe=None))


@pytest.mark.parametrize("kind", KINDS)
def test_a_running_server_answers_a_packed_task_as_torch_does(
    kind: str,
    packed: Callable[[str], Packed],
    later: dict[str, Delta],
    service: Service,
    alone: Any,
    images: Any,
) -> None:
    batch = images(3, seed=6)
    before = service.answer(batch, ["lora", "prompt", "bias"])
    version = service.add(write_packed(packed(kind)))
    assert version.labels == later[kind].labels
    wanted = alone(later[kind], batch)
    found = service.answer(batch, [version.name] * 3)
    own = found.logits[:, : wanted.shape[1]]
    np.testing.assert_allclose(own, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    assert found.labels == tuple(version.labels[k] for k in wanted.argmax(axis=1))
    assert (found.logits[:, wanted.shape[1] :] < -1e37).all()
    again = service.answer(batch, ["lora", "prompt", "bias"])
    np.testing.assert_array_equal(again.logits, before.logits)


def test_an_update_takes_a_shipped_tasks_place_and_a_rollback_brings_it_back(
    vit: Backbone, deltas: dict[str, Delta], layout: Layout, as_task: Any,
    later: dict[str, Delta], service: Service, alone: Any, images: Any,
) -> None:  # fmt: skip
    batch = images(2, seed=7)
    new = replace(later["serial"], task="lora")
    service.add(write_packed(pack(as_task(new), layout, vit)), update=True)
    for number, delta in ((2, new), (1, deltas["lora"])):
        service.require_tasks().use("lora", number)
        wanted = alone(delta, batch)
        found = service.answer(batch, ["lora"] * 2).logits[:, : wanted.shape[1]]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_is_torchs_answer_in_float64(
    kind: str, packed: Callable[[str], Packed], later: dict[str, Delta], alone: Any
) -> None:
    probe = read_packed(write_packed(packed(kind))).probe
    assert probe is not None
    (rows,) = probe.inputs.values()
    assert probe.logits.dtype == np.float64
    assert probe.logits.shape == (PROBE_ROWS, len(later[kind].labels))
    assert 0 < probe.budget < 1e-3
    wanted = alone(later[kind], np.array(rows))
    np.testing.assert_allclose(probe.logits, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_an_engine_that_answers_otherwise_is_found_out(
    packed: Callable[[str], Packed], service: Service
) -> None:
    good = packed("dual")
    wrong = {n: v * np.where(abs(v) < 1e30, np.float32(1.01), 1) for n, v in good.tensors.items()}
    with pytest.raises(CheckFailed, match="does not answer as the task does in torch"):
        service.add(write_packed(replace(good, tensors=wrong)))
    assert good.task.name not in service.registry.names
    service.add(write_packed(good))


def test_deep_prompts_need_the_backbone(
    later: dict[str, Delta], layout: Layout, as_task: Any
) -> None:
    with pytest.raises(UsageError, match="the backbone is needed to lay this task out: its deep"):
        pack(as_task(later["prompt"]), layout)


def test_tasks_without_labels_need_the_backbone(
    later: dict[str, Delta], layout: Layout, as_task: Any
) -> None:
    with pytest.raises(UsageError, match="without labels, only a run says how wide"):
        pack(as_task(replace(later["lora"], labels=())), layout)


@pytest.mark.parametrize("with_backbone", [False, True])
@pytest.mark.parametrize(
    ("method", "classes", "sentence"),
    [
        (methods.lora(3), 4, "a branch is larger than its slot"),
        (methods.dual_adapter(4), 4, "a branch is larger than its slot"),
        (methods.lora(2), 8, "a branch is larger than its slot"),
        (methods.lora(2, at="mlp.fc2"), 4, "the bank has no slot for a branch"),
    ],
    ids=["rank", "bottleneck", "classes", "place"],
)
def test_a_task_without_a_slot_is_refused(
    method: Any, classes: int, sentence: str, with_backbone: bool,
    vit: Backbone, layout: Layout, random_delta: Any, as_task: Any,
) -> None:  # fmt: skip
    task = as_task(random_delta(vit, method, task="large", classes=classes))
    with pytest.raises(IncompatibleArtefact, match=sentence):
        pack(task, layout, vit if with_backbone else None)


@pytest.mark.parametrize("with_backbone", [False, True])
def test_a_task_of_another_backbone_is_refused(
    with_backbone: bool, vit: Backbone, later: dict[str, Delta], layout: Layout, as_task: Any
) -> None:
    other = replace(later["lora"], backbone=replace(vit.identity, fingerprint="0" * 64))
    with pytest.raises(IncompatibleArtefact, match="belongs to another backbone than the server's"):
        pack(as_task(other), layout, vit if with_backbone else None)


def test_a_backbone_that_is_not_the_tasks_is_refused(
    swin: Backbone, later: dict[str, Delta], layout: Layout, as_task: Any
) -> None:
    with pytest.raises(IncompatibleArtefact):
        pack(as_task(later["lora"]), layout, swin)


@pytest.mark.parametrize("form", ["merged"])
def test_a_bundle_of_constants_has_no_layout(form: str, bundles: Callable[[str], Bundle]) -> None:
    with pytest.raises(UsageError, match="constants of its engine, so none can be added"):
        Layout.of(bundles(form))


def test_a_server_says_all_that_there_is_to_know(service: Service, layout: Layout) -> None:
    said = json.loads(json.dumps(service.description()))
    assert replace(Layout.from_json(said, source="a server"), source=layout.source) == layout


@pytest.mark.parametrize(
    "change",
    [
        *({field: "GONE"} for field in ("identity", "fingerprint", "precision", "slots")),
        *({field: None} for field in ("identity", "fingerprint", "precision", "slots")),
        {"slots": 1},
        {"slots": [1]},
        {"slots": [{}]},
        {"slots": ["text"]},
    ],
    ids=str,
)
def test_what_a_server_says_and_cannot_be_read_is_one_sentence(
    change: dict[str, Any], service: Service
) -> None:
    said = {**service.description(), **change}
    said = {field: value for field, value in said.items() if value != "GONE"}
    with pytest.raises(IncompatibleArtefact):
        Layout.from_json(said, source="a server")


@pytest.mark.parametrize("said", [[], None, "text", 1])
def test_a_reply_that_is_no_object_is_one_sentence(said: Any) -> None:
    with pytest.raises(IncompatibleArtefact, match="what the server says of its bank"):
        Layout.from_json(said, source="a server")


@pytest.mark.parametrize("with_backbone", [False, True])
def test_a_bank_of_bfloat16_gets_rows_of_bfloat16(
    with_backbone: bool, vit: Backbone, later: dict[str, Delta], layout: Layout, as_task: Any
) -> None:
    made = pack(
        as_task(later["lora"]), replace(layout, precision="bf16"), vit if with_backbone else None
    )
    found = read_packed(write_packed(made))
    assert {value.dtype for value in found.tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert all(np.isfinite(value.astype(np.float32)).all() for value in found.tensors.values())
    if found.probe is not None:
        assert found.probe.logits.dtype == np.float64
        assert found.probe.budget > 1e-3  # the precision's own, not float32's


def test_a_bank_in_half_gets_rows_in_half_and_answers_within_its_budget(
    wide_vit: Backbone, random_delta: Any, as_task: Any, tmp_path: Path, images: Any
) -> None:
    import torch

    from utune_deploy.merge.attach import restore
    from utune_deploy.merge.sites import measure

    torch.set_num_threads(1)
    first, later = (
        random_delta(wide_vit, methods.lora(3), task=name, classes=4, seed=seed)
        for seed, name in enumerate(("first", "later"))
    )
    bundle = export_bundle(
        tmp_path / "half", wide_vit, [as_task(first)],
        precision="fp16", bank="inputs", max_batch=2, device=ONE,
    )  # fmt: skip
    service = Service.open(bundle, ONE)
    made = pack(as_task(later), Layout.of(bundle), wide_vit)
    assert {value.dtype.name for value in made.tensors.values()} == {"float16"}
    assert {n: v.shape for n, v in made.tensors.items()} == {
        n: v.shape[1:] for n, v in bundle.read_bank().items()
    }
    service.add(write_packed(made))
    batch = images(2, seed=8)
    with torch.no_grad():
        wanted = restore(wide_vit, later, measure(wide_vit)).eval()(torch.from_numpy(batch)).numpy()
    found = service.answer(batch, ["later"] * 2).logits[:, : wanted.shape[1]]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-2 * np.abs(wanted).max())
    service.close()
