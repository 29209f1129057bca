"""The law `y = OP(x) + U(x)`, for every tuner type of the table at every kind of place.

A new tuner type is tested by being listed in `TUNERS`; its settings are listed in `SETTINGS` here.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

from utune_deploy.merge.bank import stack
from utune_deploy.merge.delta import Delta, load_delta, save_delta
from utune_deploy.merge.errors import UsageError
from utune_deploy.merge.fold import fold, refusals
from utune_deploy.merge.lower import lower
from utune_deploy.merge.methods import head_branch
from utune_deploy.merge.mixed import Mixed, Single
from utune_deploy.merge.parallel import joined
from utune_deploy.merge.preprocessing import Preprocessing
from utune_deploy.merge.tuner import Branch, Point, Tuner, bind
from utune_deploy.merge.tuners import TUNERS
from utune_deploy.merge.tuners.bias import Bias
from utune_deploy.merge.tuners.bottleneck import ACTIVATIONS, Bottleneck
from utune_deploy.merge.tuners.head import Head
from utune_deploy.merge.tuners.prefix import Prefix
from utune_deploy.merge.tuners.prompt import Prompt

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from utune_deploy.merge.backbone import Backbone

SETTINGS: dict[str, list[Tuner]] = {
    "bottleneck": [Bottleneck(a, bias=b) for a in ACTIVATIONS for b in (False, True)],
    "prefix": [Prefix(joint_softmax=True), Prefix(joint_softmax=False)],
    "prompt": [Prompt()],
    "bias": [Bias()],
    "head": [Head()],
}


class Place(NamedTuple):
    """Where a tuner is tried: two blocks of a backbone, or its classifier.

    `linear` says whether the op is one linear layer and the tap stands at it.
    """

    family: str
    tap: str
    add: str
    linear: bool = False


VIT_BLOCKS = ("blocks.0", "blocks.2")
SWIN_BLOCKS = ("layers.0.blocks.1", "layers.1.blocks.0")  # one with shifted windows

PLACES: dict[str, list[Place]] = {
    "add": [
        Place("vit", "attn.qkv:input", "attn.qkv:output", linear=True),
        Place("vit", "mlp.fc2:output", "mlp.fc2:output", linear=True),
        Place("vit", "attn:input", "mlp:output"),
        Place("vit", "mlp:output", "mlp:output"),
        Place("vit", "norm1:input", "norm1:input"),
        Place("swin", "attn.qkv:input", "attn.qkv:output", linear=True),
        Place("swin", "attn:output", "attn:output"),
        Place("swin", "mlp:input", "mlp:output"),
    ],
    "extend": [Place("vit", "attn:keys", "attn:keys"), Place("swin", "attn:keys", "attn:keys")],
    "tokens": [Place("vit", ":tokens", ":tokens")],  # Swin's blocks work on a map, not a sequence
    "replace": [Place("vit", "head", "head"), Place("swin", "head.fc", "head.fc")],
}


def settings_of(kind: str, listed: Mapping[str, list[Tuner]]) -> list[Tuner]:
    if not listed.get(kind):
        pytest.fail(
            f"the tuner kind {kind!r} is in TUNERS and has no settings to be tested with: "
            "add a list of its points to SETTINGS in tests/merge/test_law.py"
        )
    return listed[kind]


FULL = (Bottleneck("identity", bias=True), Bottleneck("gelu", bias=True))


def places_of(tuner: Tuner) -> list[Place]:
    """All places; for the other points of the bottleneck one parallel and one serial say enough."""
    if tuner not in SETTINGS["bottleneck"] or tuner in FULL:
        return PLACES[tuner.join]
    return [place for place in PLACES["add"] if place.add in ("mlp:output", "attn:output")][:2]


CASES = [
    pytest.param(tuner, place, id=f"{tuner}-{place.family}-{place.tap}-{place.add}")
    for kind in TUNERS
    for tuner in SETTINGS.get(kind, [])
    for place in places_of(tuner)
]
ONE_PLACE = [
    pytest.param(tuner, PLACES[tuner.join][0], id=str(tuner))
    for kind in TUNERS
    for tuner in SETTINGS.get(kind, [])
]
all_cases = pytest.mark.parametrize(("tuner", "place"), CASES)


@pytest.fixture
def backbone(place: Place, request: pytest.FixtureRequest) -> Backbone:
    return request.getfixturevalue(f"{place.family}64")


@pytest.fixture
def make(sites_of, random_weights):
    """A delta with the tuner in two blocks, and a head."""

    def make(backbone, tuner, place, *, rank=3, classes=5, task="a", seed=0) -> Delta:
        sites = sites_of(backbone)
        dtype = next(backbone.model.parameters()).dtype
        branches: dict[str, Branch] = {}
        if tuner.join != "replace":
            for block in VIT_BLOCKS if place.family == "vit" else SWIN_BLOCKS:
                tap, add = (
                    Point.parse(f"{block}.{text}".replace(".:", ":"))
                    for text in (place.tap, place.add)
                )
                branches[f"{block}/{tuner.kind}"] = Branch(tuner, tap, add)
        name, branch = head_branch(backbone.classifier)
        if tuner.join == "replace":
            branch = replace(branch, tuner=tuner)
        branches[name] = branch
        tensors = {}
        for number, (name, branch) in enumerate(branches.items()):
            sizes = {
                "in": sites.require(branch.tap),
                "out": sites.require(branch.add),
                "r": classes if branch.tuner.join == "replace" else rank,
            }
            tensors[name] = random_weights(branch.tuner, sizes, 100 * seed + number, dtype)
        return Delta(
            task,
            tuple(f"{task}{i}" for i in range(classes)),
            Preprocessing(backbone.image_size),
            backbone.identity,
            branches,
            tensors,
        )

    return make


def forward(backbone: Backbone, weighted, images: Tensor, rows: int | None = None) -> Tensor:
    with torch.no_grad(), joined(backbone.model, weighted, rows=rows):
        return backbone.model(images)


def folds(tuner: Tuner, place: Place) -> bool:
    """What has an exact place in the frozen weights, by hand."""
    if isinstance(tuner, Bottleneck):
        return tuner.activation == "identity" and place.linear
    if isinstance(tuner, Bias):
        return place.linear
    return tuner.join == "replace"


@pytest.mark.parametrize("kind", TUNERS)
def test_every_kind_of_the_table_has_settings(kind):
    for tuner in settings_of(kind, SETTINGS):
        assert type(tuner) is TUNERS[kind]
        assert tuner.kind == kind
        assert tuner.source
        assert PLACES[tuner.join], "the join has no place to be tested at"
    assert set(SETTINGS) <= set(TUNERS), "SETTINGS names a kind that is not in the table"


def test_a_kind_without_settings_fails_and_says_where_to_add_them():
    with pytest.raises(pytest.fail.Exception, match=r"'side'.*SETTINGS in tests/merge/test_law.py"):
        settings_of("side", SETTINGS)


FORMULAS = {
    "identity": lambda x: x,
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_their_formulas(activation):
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    assert activation in FORMULAS, "add the formula of the activation to FORMULAS"
    wanted = torch.tensor([FORMULAS[activation](float(v)) for v in x], dtype=torch.float64)
    assert torch.allclose(ACTIVATIONS[activation](x), wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("tuner", SETTINGS["bottleneck"], ids=str)
def test_the_bottleneck_is_its_formula(tuner, random_weights):
    """`scale * (up act(down x + down_bias) + up_bias)`, number by number."""
    w = random_weights(tuner, {"in": 4, "out": 3, "r": 2}, 1, torch.float64)
    x = torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    act = FORMULAS[tuner.activation]
    hidden = [
        act(float(w["down"][j] @ x[0, 0]) + (float(w["down_bias"][j]) if tuner.bias else 0.0))
        for j in range(2)
    ]
    for i, found in enumerate(tuner.branch(x, w)[0, 0].tolist()):
        y = sum(float(w["up"][i, j]) * hidden[j] for j in range(2))
        y += float(w["up_bias"][i]) if tuner.bias else 0.0
        assert found == pytest.approx(float(w["scale"]) * y, rel=1e-13)


@pytest.mark.parametrize(("tuner", "place"), ONE_PLACE)
def test_settings_survive_json(tuner, place):
    assert type(tuner).from_settings(tuner.settings(), where="here") == tuner
    hash(tuner)


@pytest.mark.parametrize(("tuner", "place"), ONE_PLACE)
def test_initial_weights_have_the_declared_shapes(tuner, place):
    sizes = {"in": 6, "out": 10, "r": 4}
    first, again = (tuner.init(sizes, torch.Generator().manual_seed(3)) for _ in range(2))
    assert set(first) == set(tuner.shapes)
    for name, axes in tuner.shapes.items():
        assert tuple(first[name].shape) == tuple(sizes[axis] for axis in axes)
        assert first[name].dtype == torch.float32
        assert torch.equal(first[name], again[name])
    bind(tuner.shapes, first, where="init")
    assert set(tuner.fill) <= set(tuner.served)


@all_cases
def test_a_batch_axis_on_the_weights_is_a_run_per_row(tuner, place, backbone, make, error):
    """Stored and served weights may both carry `[B, ...]`."""
    deltas = [make(backbone, tuner, place, seed=seed) for seed in range(3)]
    images = backbone.example(3)
    alone = torch.cat(
        [forward(backbone, d.weighted(), images[i : i + 1]) for i, d in enumerate(deltas)]
    )
    for served in (False, True):
        weighted = []
        for name, branch in deltas[0].branches.items():
            settle = branch.tuner.settle if served else dict
            of_tasks = [settle(d.tensors[name]) for d in deltas]
            stacked = {key: torch.stack([w[key] for w in of_tasks]) for key in of_tasks[0]}
            weighted.append((branch, stacked))
        together = forward(backbone, weighted, images, rows=3)
        assert error(together, alone) < 1e-12


@pytest.mark.parametrize(
    ("tuner", "place"), [case for case in CASES if case.values[0].join != "tokens"]
)
def test_neutral_weights_are_the_frozen_op(tuner, place, backbone, make, error):
    """What a bank holds for a task without the branch: exactly the untuned backbone.

    Attention with a mask may run in another order of summation, so `extend` is exact to rounding.
    A prompt has no neutral element: a bank holds it as the prefix that `lower` makes of it.
    """
    delta = make(backbone, tuner, place, classes=6)
    images = backbone.example(2)
    neutral = []
    for name, branch in delta.branches.items():
        if branch.tuner.join == "replace" and tuner.join != "replace":
            continue
        sizes = bind(branch.tuner.shapes, delta.tensors[name], where=name)
        weights = {
            key: torch.full(
                [2, *(sizes[axis] for axis in axes)], tuner.fill.get(key, 0.0), dtype=torch.float64
            )
            for key, axes in tuner.served.items()
        }
        neutral.append((branch, weights))
    found = forward(backbone, neutral, images, rows=2)
    frozen = forward(backbone, [], images)
    if tuner.join == "replace":  # a class that a task does not have
        assert found.shape == (2, 6)
        assert (found == tuner.fill["bias"]).all()
    elif tuner.join == "extend":
        assert error(found, frozen) < 1e-14
    else:
        assert torch.equal(found, frozen)


@all_cases
def test_fold_is_the_branch_or_is_refused_with_a_reason(
    tuner, place, backbone, make, moved, run, sites_of, error, request
):
    delta = make(backbone, tuner, place)
    names = [n for n, b in delta.branches.items() if b.tuner == tuner]
    if not folds(tuner, place):
        refused = refusals(delta, backbone)
        assert [r.branch for r in refused] == names
        assert all(r.reason and r.alternative for r in refused)
        with pytest.raises(UsageError, match="nothing was merged") as caught:
            fold(delta, backbone, sites=sites_of(backbone))
        assert refused[0].reason in str(caught.value)
        return
    assert refusals(delta, backbone) == []
    for host, tolerance in ((backbone, 1e-11), (request.getfixturevalue(place.family), 1e-5)):
        task = moved(delta, host)
        merged = fold(task, host, sites=sites_of(host))
        plain = copy.deepcopy(host.model)
        plain.reset_classifier(len(task.labels))
        plain.load_state_dict(merged.tensors, strict=True, assign=True)
        images = host.example(2)
        with torch.no_grad():
            assert error(plain(images), run(host, task, images)) < tolerance


@all_cases
def test_padded_is_the_same_as_alone(tuner, place, backbone, make, run, sites_of, error):
    """In one bank with a larger rank and a task that has no such branch."""
    small = make(backbone, tuner, place, rank=2, classes=3, task="small", seed=1)
    large = make(backbone, tuner, place, rank=6, classes=9, task="large", seed=2)
    head = {small.head: large.branches[large.head]}
    none = replace(
        large, task="none", branches=head, tensors={small.head: large.tensors[large.head]}
    )
    tasks = [small, large, none]
    images = backbone.example(5)
    order = [0, 1, 2, 0, 1]
    bank = stack([lower(backbone, d, sites_of(backbone)) for d in tasks])
    with torch.no_grad():
        mixed = Mixed(backbone, bank)(images, torch.tensor(order))
    assert mixed.shape == (5, 9)
    for row, number in enumerate(order):
        task = tasks[number]
        alone = run(backbone, task, images[row : row + 1])
        assert error(mixed[row : row + 1, : len(task.labels)], alone) < 1e-12
        assert (mixed[row, len(task.labels) :] == Head.fill["bias"]).all()
    with torch.no_grad():
        single = Single(backbone, stack([lower(backbone, small, sites_of(backbone))]))(images)
    assert error(single, run(backbone, small, images)) < 1e-12


@all_cases
def test_every_stored_tensor_is_alive(tuner, place, backbone, make, run):
    """Perturbing any stored tensor changes the logits; nothing is inert at these places.

    `test_inert_values` lists what is inert elsewhere.
    """
    delta = make(backbone, tuner, place)
    images = backbone.example(2)
    before = run(backbone, delta, images)
    for name, named in delta.tensors.items():
        for key, tensor in named.items():
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(9))
            changed = {**delta.tensors, name: {**named, key: tensor + 0.1 * noise}}
            after = run(backbone, replace(delta, tensors=changed), images)
            assert (after - before).abs().max() > 1e-6, f"{name}/{key} does nothing"


@pytest.mark.parametrize("inert", ["key_bias", "lone_key", "lone_query_of_the_last_block"])
def test_inert_values(inert, vit64, random_delta, run, error):
    """What mathematically does nothing, and what brings it to life.

    - A shift of the keys adds the same number to all scores of a query, and softmax drops it; a
      prefix, which is not shifted, sees the difference.
    - A prefix of one key with a softmax of its own has the weight 1 whatever the key is.
    - The head reads the class token, so in the last block the queries of the patches do nothing.
    """
    from utune_deploy.merge.methods import bitfit, lora, prefix

    images = vit64.example(2)
    if inert == "key_bias":
        for methods, alive in (([bitfit()], False), ([bitfit(), prefix(2)], True)):
            delta = random_delta(vit64, *methods)
            name = "blocks.1.attn.qkv/bias"
            shift = delta.tensors[name]["shift"].clone()
            shift[48:96] += 1.0
            changed = replace(delta, tensors={**delta.tensors, name: {"shift": shift}})
            difference = error(run(vit64, changed, images), run(vit64, delta, images))
            assert difference > 1e-6 if alive else difference < 1e-13
    elif inert == "lone_key":
        for methods, alive in (
            ([prefix(1, joint_softmax=False)], False),
            ([prefix(2, joint_softmax=False)], True),
            ([prefix(1, joint_softmax=True)], True),
        ):
            delta = random_delta(vit64, *methods)
            name = "blocks.1.attn/prefix"
            key = delta.tensors[name]["key"].clone()
            key[0] += 1.0
            changed = {**delta.tensors, name: {**delta.tensors[name], "key": key}}
            difference = error(
                run(vit64, replace(delta, tensors=changed), images), run(vit64, delta, images)
            )
            assert difference > 1e-6 if alive else difference < 1e-13
    else:
        delta = random_delta(vit64, lora(2, blocks=(2,)))
        full = run(vit64, delta, images)
        attn = vit64.model.get_submodule("blocks.2.attn")
        length = vit64.model.get_submodule("blocks.2.attn.qkv").out_features // 3

        def clobber(_, args, value):
            value = value.clone()
            value[:, 1:, :length] = 7.0  # the patches' queries
            return value

        handle = attn.qkv.register_forward_hook(clobber)
        try:
            assert error(run(vit64, delta, images), full) < 1e-13
        finally:
            handle.remove()


@all_cases
def test_settle_keeps_the_numbers(tuner, place, backbone, make, error):
    delta = make(backbone, tuner, place)
    images = backbone.example(2)
    settled = [(b, b.tuner.settle(w)) for b, w in delta.weighted()]
    for branch, weights in settled:
        assert set(weights) == set(branch.tuner.served)
        bind(branch.tuner.served, weights, where="served")
    stored = forward(backbone, delta.weighted(), images)
    assert error(forward(backbone, settled, images), stored) < 1e-14


@pytest.mark.parametrize(("tuner", "place"), ONE_PLACE)
def test_round_trip_through_a_file(tuner, place, backbone, make, run, tmp_path: Path):
    delta = make(backbone, tuner, place)
    save_delta(tmp_path / "a.safetensors", delta)
    loaded = load_delta(tmp_path / "a.safetensors")
    assert loaded.branches == delta.branches
    assert list(loaded.branches) == list(delta.branches)
    images = backbone.example(2)
    assert torch.equal(run(backbone, loaded, images), run(backbone, delta, images))
