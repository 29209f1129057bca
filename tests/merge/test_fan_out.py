"""One example, every task: each task's answer is its own, and the trunk runs once as far as tasks agree."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from utune_deploy.export.graph import Inputs, clean, serialise, trace
from utune_deploy.export.passes import rewrite
from utune_deploy.export.targets.onnxruntime import OnnxRuntimeSession
from utune_deploy.merge.attach import attach, restore
from utune_deploy.merge.backbone import create
from utune_deploy.merge.bank import require_same_values, stack
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.merge.fan_out import FanOut, share
from utune_deploy.merge.lower import lower
from utune_deploy.merge.methods import (
    bitfit,
    bypass,
    deep_prompt,
    full,
    ladder,
    lora,
    norm_tuning,
    parallel_adapter,
    prefix,
    shallow_prompt,
    side_tuning,
    unipt,
)
from utune_deploy.merge.mixed import Mixed
from utune_deploy.merge.no_class import NO_CLASS
from utune_deploy.merge.parallel import Fork, joined
from utune_deploy.merge.sites import measure
from utune_deploy.merge.tuner import Branch, Point
from utune_deploy.merge.tuners.bias import Bias

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta
    from utune_deploy.merge.fan_out import Group

TOLERANCE = 1e-5
KINDS: dict[str, tuple[list[Any], str | None]] = {
    "late": ([lora(2, blocks=(2,))], "blocks.2:input"),
    "probe": ([], "head:output"),
    "unipt": ([unipt(6)], "head:input"),
    "lora": ([lora(2)], "blocks.0:input"),
    "full": ([full()], None),
    "ladder": ([ladder(8)], "head:input"),
    "side": ([side_tuning()], "head:input"),
    "vector": ([unipt(7, norm="none", pool="mean")], "head:input"),
    "bypass": ([bypass(3)], "norm:input"),
    "prefix": ([prefix(3)], "blocks.0:input"),
    "deep": ([deep_prompt(2)], "blocks.0:input"),
    "shallow": ([shallow_prompt(2)], "blocks.0:input"),
    "adapter": ([parallel_adapter(3, blocks=(1, 2))], "blocks.1:input"),
    "biases": ([bitfit()], "patch_embed.proj:output"),
    "norms": ([norm_tuning()], "blocks.0:input"),
    "both": ([lora(3, blocks=(2,)), unipt(5)], "blocks.2:input"),
}
"""Methods on the ViT, and where examples fork for them."""


@pytest.fixture(scope="module")
def made(random_delta) -> Callable[..., list[Delta]]:
    """Random deltas, each with another number of classes: `(backbone, methods by name) -> deltas`."""

    def made(backbone: Backbone, named: dict[str, list[Any]]) -> list[Delta]:
        return [
            random_delta(backbone, *methods, task=name, classes=2 + number % 4, seed=number)
            for number, (name, methods) in enumerate(named.items())
        ]

    return made


@pytest.fixture(scope="module")
def fanned(made, sites_of) -> Callable[..., tuple[list[Delta], tuple[Group, ...], FanOut]]:
    """The tasks and the module of all: `(backbone, methods by name) -> deltas, groups, module`."""

    def fanned(backbone: Backbone, named: dict[str, list[Any]]):
        sites = sites_of(backbone)
        deltas = made(backbone, named)
        groups = share(backbone, [lower(backbone, d, sites) for d in deltas], sites)
        return deltas, groups, FanOut(backbone, groups).eval()

    return fanned


def forks(groups: Sequence[Group]) -> dict[str, str | None]:
    """By task where its examples fork."""
    return {
        task: None if group.fork is None else str(group.fork)
        for group in groups
        for task in group.bank.tasks
    }


@torch.no_grad()
def require_each(backbone: Backbone, deltas, module: FanOut, run, error, batch: int) -> None:
    """Every task's answer is its own, in the order of the tasks; a class too many is none."""
    images = backbone.example(batch)
    found = module(images)
    widest = max(len(delta.labels) for delta in deltas)
    assert found.shape == (batch, len(deltas), widest)
    for number, delta in enumerate(deltas):
        count = len(delta.labels)
        alone = run(backbone, delta, images)
        assert error(found[:, number, :count], alone) < TOLERANCE, delta.task
        assert (found[:, number, count:] <= NO_CLASS).all(), delta.task


@pytest.fixture(scope="module")
def everything(fanned, vit):
    return fanned(vit, {name: methods for name, (methods, _) in KINDS.items()})


@pytest.mark.parametrize("batch", [1, 3])
def test_every_kind_of_task_in_one(batch, everything, vit, run, error):
    deltas, _, module = everything
    require_each(vit, deltas, module, run, error, batch)


def test_tasks_part_from_the_trunk_where_they_first_change_it(everything):
    deltas, groups, _ = everything
    assert forks(groups) == {name: fork for name, (_, fork) in KINDS.items()}
    order = [group.fork for group in groups]
    listed = ["head:output", "head:input", "norm:input", "blocks.2:input", "blocks.1:input"]
    assert [str(fork) for fork in order[:5]] == listed, "the group that shares most comes first"
    assert order[-1] is None
    for group in groups:
        assert group.bank.tasks == tuple(deltas[row].task for row in group.rows)
    assert sorted(row for group in groups for row in group.rows) == list(range(len(deltas)))


def test_tasks_keep_their_order(fanned, vit, run, error):
    """Whatever groups they are in."""
    names = ["lora", "probe", "late", "unipt", "norms"]
    for order in (names, names[::-1]):
        deltas, _, module = fanned(vit, {name: KINDS[name][0] for name in order})
        assert [delta.task for delta in deltas] == order
        require_each(vit, deltas, module, run, error, 2)


FAMILIES: dict[str, dict[str, tuple[list[Any], str | None]]] = {
    "swin": {
        "probe": ([], "head.fc:output"),
        "unipt": ([unipt(6)], "head.fc:input"),
        "lora": ([lora(2)], "layers.0.blocks.0:input"),
        "windows": ([lora(2, blocks=(1,))], "layers.0.blocks.1:input"),
        "late": ([lora(2, blocks=(3,))], "layers.1.blocks.1:input"),
    },
    "resnet": {
        "probe": ([], "fc:output"),
        "unipt": ([unipt(6)], "fc:input"),
        "batch": ([unipt(5, norm="batch")], "fc:input"),
    },
    "convnext": {
        "probe": ([], "head.fc:output"),
        "unipt": ([unipt(6)], "head.fc:input"),
        "other": ([unipt(7)], "head.fc:input"),
    },
    "eva": {
        "probe": ([], "head:output"),
        "unipt": ([unipt(6)], "head:input"),
        "late": ([lora(2, blocks=(2,))], "blocks.2:input"),
        "later": ([lora(3, blocks=(2,))], "blocks.2:input"),
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family, fanned, host, run, error):
    """A branch inside windows, or inside a residual branch, forks in front of its block."""
    backbone = host(family, double=False)
    listed = FAMILIES[family]
    deltas, groups, module = fanned(
        backbone, {name: methods for name, (methods, _) in listed.items()}
    )
    assert forks(groups) == {name: fork for name, (_, fork) in listed.items()}
    require_each(backbone, deltas, module, run, error, 2)


# Once


@pytest.fixture
def rows(vit):
    """How many rows modules of the ViT gave in each of their calls, from now on."""
    seen: dict[str, list[int]] = {}
    handles = []
    for path in ("patch_embed", "blocks.0", "blocks.1", "blocks.2", "head"):
        seen[path] = []

        def note(_, args, value, path=path):
            seen[path].append(value.shape[0])

        handles.append(vit.model.get_submodule(path).register_forward_hook(note))
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("methods", "wanted"),
    [
        ([unipt(6), ladder(8), side_tuning()], [3, 3, 3, 3, 9]),
        ([lora(2, blocks=(2,)), lora(3, blocks=(2,))], [3, 3, 3, 6, 6]),
        ([lora(2, blocks=(1,)), parallel_adapter(2, blocks=(1,))], [3, 3, 6, 6, 6]),
        ([prefix(2), lora(2), norm_tuning()], [3, 9, 9, 9, 9]),
        ([full()], [3, 3, 3, 3, 3]),
        ([lora(2)], [3, 3, 3, 3, 3]),
    ],
    ids=["beside the trunk", "block 2", "block 1", "block 0", "full", "alone"],
)
def test_below_the_fork_there_are_examples_alone(methods, wanted, fanned, vit, rows):
    """Every module is called once, with 3 examples below the fork and 3 times the tasks above."""
    named = {f"{number}": [method] for number, method in enumerate(methods)}
    _, groups, module = fanned(vit, named)
    assert len(groups) == 1
    for seen in rows.values():
        seen.clear()
    with torch.no_grad():
        module(vit.example(3))
    assert list(rows.values()) == [[count] for count in wanted]


def test_a_trunk_that_cannot_fork_runs_for_every_task(fanned, vit, monkeypatch, rows, run, error):
    monkeypatch.setattr("utune_deploy.merge.fan_out._works", lambda *_: False)
    deltas, groups, module = fanned(vit, {"a": [lora(2)], "b": [unipt(6)], "c": []})
    assert [group.fork for group in groups] == [None]
    for seen in rows.values():
        seen.clear()
    with torch.no_grad():
        module(vit.example(2))
    assert list(rows.values()) == [[6]] * 5
    require_each(vit, deltas, module, run, error, 2)


def test_a_fork_in_front_of_a_join_is_exact_at_every_point(vit64, random_delta, run, error):
    """The same tasks forked at the images, or at any block before they are tuned."""
    deltas = [random_delta(vit64, lora(2, blocks=(2,)), task=f"{n}", seed=n) for n in range(3)]
    bank = stack(deltas)
    weighted = [
        (s.branch, {n: bank.tensors[f"{s.name}/{n}"] for n in s.branch.tuner.served})
        for s in bank.slots
    ]
    images = vit64.example(2)
    wanted = torch.stack([run(vit64, delta, images) for delta in deltas], dim=1).flatten(0, 1)
    for place in ("patch_embed.proj:output", "blocks.0:input", "blocks.1:input", "blocks.2:input"):
        with torch.no_grad(), joined(vit64.model, weighted, fork=Fork(Point.parse(place), 3)):
            assert error(vit64.model(images), wanted) < 1e-12, place


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shape", ["output", "input"])
def test_a_bias_differs_from_task_to_task_behind_a_fork(shape, batch, vit64, error):
    """A tuner that does not look at what it reads still gives one value per row."""
    point = Point("blocks.1.mlp.fc1", shape)
    width = 192 if shape == "output" else 48
    shift = torch.randn(3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = vit64.example(batch)
    branch = Branch(Bias(), point, point)
    with torch.no_grad():
        with joined(
            vit64.model, [(branch, {"shift": shift})], fork=Fork(Point("blocks.1", "input"), 3)
        ):
            found = vit64.model(images).unflatten(0, (-1, 3))
        for number in range(3):
            with joined(vit64.model, [(branch, {"shift": shift[number]})]):
                assert error(found[:, number], vit64.model(images)) < 1e-12


def test_two_tasks_of_one_name(made, vit, sites_of):
    deltas = made(vit, {"a": [lora(2)]})
    with pytest.raises(UsageError, match="two deltas have one task name"):
        share(vit, [*deltas, *deltas], sites_of(vit))


# Exported


def test_the_engine_gives_the_same(fanned, vit):
    """Of unlike tasks; what groups share stands in the graph once."""
    named = {name: KINDS[name][0] for name in ("late", "probe", "unipt", "full")}
    _, groups, module = fanned(vit, named)
    assert len(groups) == 4
    model = trace(module, Inputs(vit.example(2)))
    rewrite(model)
    model = clean(model)
    session = OnnxRuntimeSession(serialise(model, {}))
    for batch in (1, 3):
        images = vit.example(batch)
        with torch.no_grad():
            wanted = module(images).numpy()
        found = session.run(images.numpy())
        assert found.shape == wanted.shape
        there = wanted > NO_CLASS
        assert (found[~there] <= NO_CLASS).all()
        assert np.abs(found - wanted)[there].max() < TOLERANCE * np.abs(wanted[there]).max()
    ops = Counter(node.op_type for node in model.graph)
    assert ops["Conv"] == 2, "the trunk's, and that of the task with all parameters of its own"


def test_a_shift_inside_a_text_trunk_is_not_spread_over_tokens():
    """Biases join in front of every place where examples could part, whatever the number of tokens."""
    backbone = create("bert", {**SMALL_BERT, "length": 8})
    deltas = [_tuned(backbone, [bitfit()], number) for number in range(2)]
    _agree(backbone, deltas)


@pytest.mark.parametrize("length", [3, 4])
def test_networks_beside_an_encoder_and_a_decoder(length):
    backbone = create(
        "t5",
        {"length": 8, "answer_length": length, "vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48,
         "num_layers": 2, "num_heads": 4},
    )  # fmt: skip
    groups = _agree(backbone, [_tuned(backbone, [unipt(6)], n, classes=None) for n in range(2)])
    assert [str(group.fork) for group in groups] == ["features:output"]


def test_a_network_that_reads_in_front_of_the_fork_and_behind_it():
    backbone = create("vit_base_patch16_224", SMALL_VIT)
    both = [lora(2, blocks=(1,)), unipt(6)]
    groups = _agree(backbone, [_tuned(backbone, both, number) for number in range(2)])
    assert [str(group.fork) for group in groups] == ["blocks.1:input"]


SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
SMALL_BERT = {
    "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 32, "max_position_embeddings": 16,
}  # fmt: skip


def _tuned(backbone, methods, seed, classes=3):
    """A task whose every tensor was drawn."""
    tuned = attach(backbone, *methods, classes=classes, seed=seed)
    drawn = torch.Generator().manual_seed(seed)
    for parameter in tuned.trainable():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=drawn)
    return tuned.delta(f"task{seed}", [f"class {k}" for k in range(classes or 0)])


def _agree(backbone, deltas):
    """Every task of a fan-out equals the task alone; the groups."""
    sites = measure(backbone)
    groups = share(backbone, deltas, sites)
    inputs = backbone.draw(3)
    with torch.no_grad():
        found = FanOut(backbone, groups).eval()(*inputs)
        for row, delta in enumerate(deltas):
            wanted = restore(backbone, delta, sites).eval()(*inputs)
            assert (found[:, row] - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    return groups


def test_values_of_unlike_channels_at_one_place_are_refused():
    backbone = create(
        "t5",
        {"length": 8, "answer_length": 3, "vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48,
         "num_layers": 2, "num_heads": 4},
    )  # fmt: skip
    deltas = [_tuned(backbone, [unipt(width)], width, classes=None) for width in (5, 6)]
    with pytest.raises(IncompatibleArtefact, match="side_memory:output has unlike channels"):
        require_same_values(deltas, measure(backbone))


def test_vectors_of_unlike_heads_do_not_read_one_another():
    """One task at unit length, one as it is: each head reads what stood there before any head."""
    backbone = create("states", {"shapes": [[6, 24], [6, 24], [6, 16]]})
    deltas = []
    for number, unit in enumerate((True, False)):
        delta = _tuned(backbone, [unipt(8)], number, classes=None)
        branches = dict(delta.branches)
        head = branches["head/head"]
        branches["head/head"] = replace(head, tuner=replace(head.tuner, unit=unit))
        deltas.append(replace(delta, branches=branches))
    _agree(backbone, deltas)
    module = Mixed(backbone, stack(deltas)).eval()
    inputs = backbone.draw(2)
    with torch.no_grad():
        found = module(*inputs, torch.tensor([0, 1]))
        for row, delta in enumerate(deltas):
            wanted = restore(backbone, delta).eval()(*inputs)[row]
            assert torch.allclose(found[row], wanted, atol=1e-5)
