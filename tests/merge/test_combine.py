"""Combined tasks against the formulas of their papers, written out, in float64."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import permutations

import pytest
import timm
import torch

from utune_deploy.merge.attach import restore
from utune_deploy.merge.backbone import wrap
from utune_deploy.merge.combine import METHODS, RANDOM, SPARSE
from utune_deploy.merge.combine.algebra import disjoint_mean, drop, kept, trim, weighted_sum
from utune_deploy.merge.combine.recipe import DENSITY, RANK, Recipe
from utune_deploy.merge.combine.tasks import AVERAGE, combine
from utune_deploy.merge.delta import load_delta, save_delta
from utune_deploy.merge.differences import Ranks
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.merge.fold import fold
from utune_deploy.merge.methods import (
    bitfit,
    deep_prompt,
    lora,
    parallel_adapter,
    prefix,
    serial_adapter,
)
from utune_deploy.merge.tuner import Branch, Point
from utune_deploy.merge.tuners.bias import Bias
from utune_deploy.merge.tuners.bottleneck import Bottleneck
from utune_deploy.merge.tuners.difference import Difference
from utune_deploy.merge.tuners.gain import Gain
from utune_deploy.merge.tuners.norm import Norm


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def plain(backbone, tensors, classes):
    """The tensors in a model that timm alone makes."""
    model = timm.create_model(
        backbone.identity.architecture, **backbone.identity.arguments, num_classes=classes
    )
    model.double().load_state_dict(dict(tensors), strict=True)
    return model.eval()


@torch.no_grad()
def logits(model, images):
    return model(images)


def changes(backbone, delta):
    """What a delta changes in the trunk, through fold: by name, float64, zeros where nothing."""
    frozen = backbone.model.state_dict()
    merged = fold(delta, backbone, dtype=torch.float64).tensors
    return {n: merged[n] - t.double() for n, t in frozen.items() if not backbone.is_classifier(n)}


@pytest.fixture(scope="module")
def loras(vit64, random_delta):
    """Three tasks with LoRA of other ranks, scales and places."""
    return [
        random_delta(vit64, lora(2), task="a", seed=1),
        random_delta(vit64, lora(3, alpha=7), lora(2, at="mlp.fc1"), task="b", seed=2, classes=4),
        random_delta(vit64, lora(1), bitfit(), task="c", seed=3, classes=3),
    ]


WEIGHTS = (0.5, -0.25, 2.0)


# The formulas


def test_trim_keeps_the_largest():
    found = trim(vector(0.1, -3.0, 0.2, 2.0, -0.3), 0.4)
    assert found.tolist() == [0.0, -3.0, 0.0, 2.0, 0.0]


def test_trim_breaks_ties_by_place():
    assert trim(vector(1, -1, 1, -1), 0.5).tolist() == [1, -1, 0, 0]
    assert trim(vector(0, 2, -1, 1, 1), 0.6).tolist() == [0, 2, -1, 1, 0]
    assert trim(torch.zeros(2, 3).double(), 0.5).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("density", [0.001, 0.2, 0.29, 0.5, 0.999, 1.0])
def test_trim_keeps_as_many_as_it_says(density):
    for seed in range(5):
        x = torch.randn(10, 10, generator=torch.Generator().manual_seed(seed)).double()
        found = trim(x, density)
        count = max(1, round(100 * density))
        assert int((found != 0).sum()) == count == kept(density, 100)
        order = x.flatten().abs().argsort(descending=True)[:count]
        wanted = torch.zeros(100).double()
        wanted[order] = x.flatten()[order]
        assert torch.equal(found.flatten(), wanted)


def test_ties_by_hand():
    """Figure 1 of the paper: an influential value survives, redundant and conflicting ones do not.

    Mass per value: 3 - 1 = 2, so +; 2 - 5 = -3, so -; 1 + 2 = 3, both agree; 1 - 1 = 0, nobody; 0 + 4.
    """
    one, other = vector(3, 2, 1, 1, 0), vector(-1, -5, 2, -1, 4)
    assert disjoint_mean([one, other], [1, 1]).tolist() == [3, -5, 1.5, 0, 4]
    assert disjoint_mean([one, other], [0.5, 0.5]).tolist() == [1.5, -2.5, 0.75, 0, 2]  # lambda
    assert disjoint_mean([one, other], [2, 1]).tolist() == [6, -5, 2, 2, 4]


def ties(taus, density, lam):
    """Algorithm 1 of arXiv 2306.01708, value by value, in Python."""
    trimmed = []
    for tau in taus:
        values = tau.flatten().tolist()
        count = max(1, round(density * len(values)))
        top = sorted(range(len(values)), key=lambda p: (-abs(values[p]), p))[:count]
        trimmed.append([v if p in top else 0.0 for p, v in enumerate(values)])
    merged = []
    for p in range(len(trimmed[0])):
        mass = sum(tau[p] for tau in trimmed)
        gamma = (mass > 0) - (mass < 0)
        agree = [tau[p] for tau in trimmed if tau[p] * gamma > 0]
        merged.append(lam * sum(agree) / len(agree) if agree else 0.0)
    return torch.tensor(merged, dtype=torch.float64).reshape(taus[0].shape)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_against_the_algorithm(density):
    generator = torch.Generator().manual_seed(0)
    taus = [torch.randn(6, 7, generator=generator, dtype=torch.float64) for _ in range(4)]
    recipe = Recipe("ties", density)
    for lam in (1.0, 0.3):
        found = recipe.merge(taus, [lam] * 4, list("abcd"))
        assert torch.allclose(found, ties(taus, density, lam), rtol=0, atol=1e-14)


def test_magnitude_does_not_rescale():
    taus = [vector(4, 1, -2, 0.5), vector(-1, 8, 0, 3)]
    found = Recipe("magnitude", 0.5).merge(taus, [0.5, 2], ["a", "b"])
    assert found.tolist() == [2, 16, -1, 6]


def test_drop_rescales_and_is_right_on_average():
    x = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = torch.stack([drop(x, 0.3, seed) for seed in range(4000)])
    assert torch.equal(draws != 0, draws.div(x).isclose(torch.tensor(1 / 0.3).double()))
    deviation = x.abs() * math.sqrt(0.7 / 0.3 / 4000)
    assert ((draws.mean(0) - x).abs() < 4.5 * deviation).all()
    assert float((draws != 0).double().mean()) == pytest.approx(0.3, abs=0.005)
    assert torch.equal(drop(x, 1.0, 0), x)


def test_drop_draws_by_its_seed_alone():
    x = torch.ones(64, dtype=torch.float64)
    first = drop(x, 0.5, 0, "task", "tensor")
    torch.rand(100)
    assert torch.equal(drop(x, 0.5, 0, "task", "tensor"), first)
    for seed in ((1, "task", "tensor"), (0, "other", "tensor"), (0, "task", "another")):
        assert not torch.equal(drop(x, 0.5, *seed), first)


def test_the_draw_is_pinned():
    """The same file for the same seed, on every machine and in every version."""
    found = drop(torch.ones(8, dtype=torch.float64), 0.5, 0, "task", "tensor")
    assert found.tolist() == [0.0, 2.0, 2.0, 0.0, 0.0, 2.0, 0.0, 0.0]


# The sums, through fold


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_the_formula_on_folded_weights(method, vit64, loras, error):
    """Differences by hand, combined by hand, loaded into timm's model: the same logits."""
    recipe = Recipe(
        method, 0.5 if method in SPARSE else None, ranks=Ranks(99) if method == "svd" else None
    )
    tasks = loras
    found = combine(tasks, vit64, recipe, task="sum", weights=WEIGHTS, head="b")
    own = [changes(vit64, delta) for delta in tasks]
    wanted = {}
    for name in own[0]:
        taus = [d[name] for d in own]
        if method in ("ties", "magnitude"):
            taus = [trim(tau, 0.5) for tau in taus]
        if method in RANDOM:
            continue
        if method == "ties":
            wanted[name] = disjoint_mean(taus, WEIGHTS)
        else:
            wanted[name] = sum(w * tau for w, tau in zip(WEIGHTS, taus, strict=True))
    result = changes(vit64, found.delta)
    for name, tensor in wanted.items():
        assert float((result[name] - tensor).norm()) <= 1e-12 * max(1, float(tensor.norm())), name
    images = vit64.example(2)
    state = {**vit64.model.state_dict()}
    state |= {name: state[name] + tensor for name, tensor in (wanted or result).items()}
    head = tasks[1].tensors["head/head"]
    state |= {"head.weight": head["weight"], "head.bias": head["bias"]}
    by_hand = logits(plain(vit64, state, 4), images)
    assert error(logits(restore(vit64, found.delta), images), by_hand) < 1e-10
    assert found.delta.labels == tasks[1].labels


def test_dare_keeps_a_value_rescaled_or_not_at_all(vit64, loras):
    found = changes(vit64, combine(loras[:1], vit64, Recipe("dare", 0.25), task="m").delta)
    for name, tau in changes(vit64, loras[0]).items():
        stays = found[name] != 0
        assert torch.allclose(found[name][stays], 4 * tau[stays], rtol=0, atol=1e-13)
        if tau.any():
            assert float(stays.double().mean()) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(("drops", "same"), [("dare", "linear"), ("dare-ties", "ties")])
def test_dare_that_drops_nothing(drops, same, vit64, loras):
    recipes = [Recipe(drops, 1.0), Recipe(same, 1.0 if same == "ties" else None)]
    one, other = (
        changes(vit64, combine(loras, vit64, recipe, task="m", weights=WEIGHTS, head="a").delta)
        for recipe in recipes
    )
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_factors_are_never_averaged(vit64, random_delta):
    """`(A1 + A2)(B1 + B2) / 4` is another matrix."""
    one, other = (random_delta(vit64, lora(2), task=t, seed=s) for t, s in (("a", 1), ("b", 2)))
    found = changes(vit64, combine([one, other], vit64, Recipe("linear"), task="m", head="a").delta)
    name = "blocks.0.attn.qkv"
    w = [delta.tensors[f"{name}/lora"] for delta in (one, other)]
    right = sum(0.5 * t["scale"] * t["up"] @ t["down"] for t in w)
    wrong = sum(t["scale"] * t["up"] for t in w) @ sum(t["down"] for t in w) / 4
    assert torch.allclose(found[f"{name}.weight"], right, rtol=0, atol=1e-14)
    assert not torch.allclose(found[f"{name}.weight"], wrong, rtol=0, atol=1e-3)


def test_cat_is_linear_in_the_tasks_own_ranks(vit64, loras):
    cat = combine(loras, vit64, Recipe("cat"), task="m", weights=WEIGHTS, head="a")
    linear = combine(loras, vit64, Recipe("linear"), task="m", weights=WEIGHTS, head="a")
    one, other = changes(vit64, cat.delta), changes(vit64, linear.delta)
    for name, tensor in other.items():
        assert float((one[name] - tensor).abs().max()) < 1e-12, name
    assert cat.delta.tensors["blocks.0.attn.qkv/lora"]["down"].shape == (2 + 3 + 1, 48)
    assert cat.delta.tensors["blocks.0.mlp.fc1/lora"]["down"].shape == (2, 48)
    assert cat.whole == ()
    assert cat.truncations == ()
    assert linear.whole
    assert all(name.endswith(".weight/difference") for name in linear.whole)


def adorned(backbone, delta, seed=0):
    """The delta with a branch of every kind that cat sums in its own form."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)

    branches, tensors = dict(delta.branches), dict(delta.tensors)

    def plant(name, tuner, tap, add, **w):
        branches[name] = Branch(tuner, Point.parse(tap), Point.parse(add))
        tensors[name] = w

    plant("n", Norm(1e-6), "norm:input", "norm:output", gain=noise(48), shift=noise(48))
    plant("d", Difference("cls_token", (1, 1, 48)), ":weights", ":weights", shift=noise(1, 1, 48))
    proj = "blocks.0.attn.proj"
    shift = {"shift": noise(48)} if seed % 2 else {}
    plant("g", Gain(shift=bool(shift)), f"{proj}:input", f"{proj}:output", gain=noise(48), **shift)
    plant(
        "s", Gain(shift=False), "blocks.1.mlp.fc2:output", "blocks.1.mlp.fc2:output", gain=noise(48)
    )
    return replace(delta, branches=branches, tensors=tensors)


def test_cat_sums_other_branches_in_their_own_form(vit64, random_delta, error):
    dense = parallel_adapter(2, at="attn.qkv", activation="identity", scale=1.5)
    tasks = [
        adorned(vit64, random_delta(vit64, dense, task="a", seed=1), 1),
        adorned(vit64, random_delta(vit64, lora(3), task="b", seed=2), 2),
        random_delta(vit64, lora(1, blocks=(0,)), task="c", seed=3),
    ]
    cat = combine(tasks, vit64, Recipe("cat"), task="m", weights=WEIGHTS, head="a")
    linear = combine(tasks, vit64, Recipe("linear"), task="m", weights=WEIGHTS, head="a")
    kinds = {branch.tuner.kind for branch in cat.delta.branches.values()}
    assert kinds == {"bottleneck", "norm", "difference", "gain", "head"}
    one, other = changes(vit64, cat.delta), changes(vit64, linear.delta)
    for name, tensor in other.items():
        assert float((one[name] - tensor).abs().max()) < 1e-12, name
    images = vit64.example(2)
    wanted = logits(restore(vit64, linear.delta), images)
    assert error(logits(restore(vit64, cat.delta), images), wanted) < 1e-9


@pytest.mark.parametrize(
    ("branch", "reason"),
    [
        (serial_adapter(2, at="attn.qkv", activation="identity"), "beside its op"),
        (Gain(shift=False), "scales what other branches"),
    ],
)
def test_cat_refuses_cross_terms_by_name(branch, reason, vit64, random_delta):
    one = random_delta(vit64, lora(2), task="a")
    if isinstance(branch, Gain):
        point = Point("blocks.1.attn.qkv", "output")
        other = random_delta(vit64, task="b")
        other = replace(
            other,
            branches={**other.branches, "g": Branch(branch, point, point)},
            tensors={**other.tensors, "g": {"gain": torch.ones(144).double()}},
        )
    else:
        other = random_delta(vit64, branch, task="b")
    with pytest.raises(UsageError, match="no exact place in method cat") as caught:
        combine([one, other], vit64, Recipe("cat"), task="m", head="a")
    assert "task b: " in caught.value.details["where"]
    assert reason in caught.value.details["found"]
    assert "--method linear" in caught.value.details["do"]
    assert combine([one, other], vit64, Recipe("linear"), task="m", head="a").whole


def scaled(backbone, delta, **points):
    """The delta with gains and shifts at points of one layer: `(name=(tuner, point))`."""
    branches, tensors = dict(delta.branches), dict(delta.tensors)
    for name, (tuner, at) in points.items():
        point = Point.parse(at)
        branches[name] = Branch(tuner, point, point)
        (key,) = tuner.shapes
        width = 144 if at.endswith("output") else 48
        tensors[name] = {key: torch.linspace(0.1, 0.3, width, dtype=torch.float64)}
    return replace(delta, branches=branches, tensors=tensors)


def on_a_convolution(backbone, task, seed):
    """A task with LoRA of a bias on the patch embedding's convolution."""
    generator = torch.Generator().manual_seed(seed)
    point = Point("patch_embed.proj", "output")
    branch = Branch(Bottleneck("identity", bias=True), Point(point.module, "patches"), point)
    sizes = {"in": 3 * 8 * 8, "out": 48, "r": seed}
    tensors = {
        name: torch.randn([sizes[axis] for axis in axes], generator=generator).double()
        for name, axes in branch.tuner.shapes.items()
    }
    return replace(
        task,
        branches={**task.branches, "conv": branch},
        tensors={**task.tensors, "conv": tensors},
    )


def test_cat_keeps_the_ranks_of_a_convolution(vit64, random_delta, error):
    tasks = [
        on_a_convolution(vit64, random_delta(vit64, task=name), seed)
        for name, seed in (("a", 2), ("b", 3))
    ]
    cat = combine(tasks, vit64, Recipe("cat"), task="m", weights=[0.5, -2], head="a")
    linear = combine(tasks, vit64, Recipe("linear"), task="m", weights=[0.5, -2], head="a")
    tensors = cat.delta.tensors["patch_embed.proj/lora"]
    assert tensors["down"].shape == (5, 192)
    images = vit64.example(2)
    wanted = logits(restore(vit64, linear.delta), images)
    assert error(logits(restore(vit64, cat.delta), images), wanted) < 1e-9


QKV = "blocks.1.attn.qkv"
BEHIND, BEFORE = (Gain(shift=False), f"{QKV}:output"), (Gain(shift=False), f"{QKV}:input")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"g": BEHIND}, {"g": BEFORE}),
        ({"g": BEHIND, "h": BEHIND}, {}),
        ({"s": (Bias(), f"{QKV}:input")}, {"g": BEHIND}),
        ({"s": (Bias(), f"{QKV}:input")}, {}),
        ({"g": BEHIND}, {"s": (Bias(), f"{QKV}:output")}),
    ],
)
def test_cat_refuses_what_scales_or_is_scaled(one, other, vit64, random_delta):
    tasks = [random_delta(vit64, task=t, seed=ord(t)) for t in "ab"]
    tasks = [scaled(vit64, t, **p) for t, p in zip(tasks, (one, other), strict=True)]
    with pytest.raises(UsageError, match="no exact place in method cat"):
        combine(tasks, vit64, Recipe("cat"), task="m", head="a")


def test_two_tasks_of_one_name_have_their_own_gains(vit64, random_delta):
    tasks = [scaled(vit64, random_delta(vit64, task="a", seed=s), g=BEHIND) for s in (1, 2)]
    one, other = (
        changes(vit64, combine(tasks, vit64, Recipe(m), task="m", head=AVERAGE).delta)
        for m in ("cat", "linear")
    )
    for name, tensor in other.items():
        assert float((one[name] - tensor).abs().max()) < 1e-12, name


def test_every_task_and_tensor_has_a_draw_of_its_own(vit64, random_delta):
    one = random_delta(vit64, lora(2), task="a", seed=1)
    tasks = [one, replace(one, task="b")]
    masks = []
    for task in tasks:
        found = changes(vit64, combine([task], vit64, Recipe("dare", 0.5), task="m").delta)
        masks += [found[f"blocks.{i}.attn.qkv.weight"] != 0 for i in range(3)]
    for i, j in ((0, 1), (1, 2), (0, 3), (1, 4)):
        assert float((masks[i] == masks[j]).double().mean()) == pytest.approx(0.5, abs=0.05)


def test_bitfit_stays_mixable(vit64, random_delta):
    tasks = [random_delta(vit64, bitfit(), task=t, seed=ord(t)) for t in "ab"]
    for method in ("linear", "ties", "dare"):
        found = combine(tasks, vit64, Recipe(method), task="m", head="a")
        assert {b.tuner.kind for b in found.delta.branches.values()} == {"bias", "head"}
        assert found.whole == ()


@pytest.mark.parametrize("method", ["svd", "linear", "ties", "dare-ties"])
def test_a_low_rank_says_its_error(method, vit64, loras):
    recipe = Recipe(method, ranks=Ranks(2))
    found = combine(loras, vit64, recipe, task="m", weights=WEIGHTS, head="a")
    base = "linear" if method == "svd" else method
    whole = changes(
        vit64, combine(loras, vit64, Recipe(base), task="m", weights=WEIGHTS, head="a").delta
    )
    result = changes(vit64, found.delta)
    lost = size = 0.0
    for cut in found.truncations:
        singular = torch.linalg.svdvals(whole[cut.tensor])
        tail = float(singular[2:].norm())
        assert float((result[cut.tensor] - whole[cut.tensor]).norm()) == pytest.approx(
            tail, abs=1e-12
        )
        assert cut.error == pytest.approx(tail / float(whole[cut.tensor].norm()), abs=1e-12)
        lost, size = lost + tail**2, size + float(whole[cut.tensor].norm()) ** 2
    assert len(found.truncations) == 6
    assert found.error == pytest.approx((lost / size) ** 0.5)
    assert found.whole == ()
    assert f"{found.error:.3e}" in found.delta.provenance["truncation error"]


def test_svd_with_ranks_to_spare_is_exact(vit64, loras):
    """The ranks of a sum are at most the sum of the ranks; no more are kept."""
    found = combine(loras, vit64, Recipe("svd"), task="m", weights=WEIGHTS, head="a")
    assert Recipe("svd").cut == Ranks(RANK)
    assert {cut.rank for cut in found.truncations} == {6, 2}
    assert found.error < 1e-12


def test_batch_norms_and_whole_models(host, error, random_delta):
    """Two full fine-tunes of a ResNet: the sum of what folds, and a plain model says the same."""
    from utune_deploy.merge.differences import carry

    backbone = host("resnet")
    deltas = []
    for task, seed in (("a", 1), ("b", 2)):
        generator = torch.Generator().manual_seed(seed)
        shifts = {
            n: 0.1 * torch.rand(t.shape, generator=generator, dtype=torch.float64)
            for n, t in backbone.model.state_dict().items()
            if t.is_floating_point() and not backbone.is_classifier(n)
        }
        carried = carry(backbone, shifts)
        probe = random_delta(backbone, task=task, seed=seed)
        deltas.append(
            replace(
                probe,
                branches=carried.branches | dict(probe.branches),
                tensors=carried.tensors | dict(probe.tensors),
            )
        )
    found = combine(deltas, backbone, Recipe("linear"), task="m", weights=(0.7, 0.5), head="b")
    folded = [fold(delta, backbone).tensors for delta in deltas]
    state = {
        n: t + 0.7 * (folded[0][n] - t) + 0.5 * (folded[1][n] - t) if t.is_floating_point() else t
        for n, t in backbone.model.state_dict().items()
        if not backbone.is_classifier(n)
    }
    state |= {f"fc.{k}": t for k, t in deltas[1].tensors["fc/head"].items()}
    images = backbone.example(2)
    wanted = logits(plain(backbone, state, 5), images)
    assert error(logits(restore(backbone, found.delta), images), wanted) < 1e-9


# Reproducibility


@pytest.mark.parametrize("method", METHODS)
def test_any_order_gives_the_same_bytes(method, vit64, loras, tmp_path):
    digests = set()
    for number, order in enumerate(permutations(range(3))):
        found = combine(
            [loras[i] for i in order], vit64, Recipe(method),
            task="m", weights=[WEIGHTS[i] for i in order], head="c",
        )  # fmt: skip
        digests.add(save_delta(tmp_path / f"{number}.safetensors", found.delta))
        assert [share.task for share in found.shares] == ["a", "b", "c"]
    assert len(digests) == 1


@pytest.mark.parametrize("method", RANDOM)
def test_the_seed_is_the_only_chance(method, vit64, loras, tmp_path):
    recipes = [Recipe(method), Recipe(method, DENSITY, 0), Recipe(method, seed=1)]
    found = [combine(loras, vit64, recipe, task="m", head="a") for recipe in recipes]
    digests = [
        save_delta(tmp_path / f"{number}.safetensors", one.delta)
        for number, one in enumerate(found)
    ]
    assert digests[0] == digests[1] != digests[2]
    assert found[2].delta.provenance["seed"] == "1"


def test_a_combined_delta_is_an_ordinary_delta(vit64, loras, tmp_path, error):
    found = combine(
        loras, vit64, Recipe("dare-ties", 0.4, 5), task="m", head="a", weights=(1, 2, 3)
    )
    save_delta(tmp_path / "m.safetensors", found.delta)
    loaded = load_delta(tmp_path / "m.safetensors")
    images = vit64.example(2)
    wanted = logits(restore(vit64, found.delta), images)
    assert error(logits(restore(vit64, loaded), images), wanted) == 0
    assert loaded.provenance == {
        "method": "dare-ties",
        "density": "0.4",
        "seed": "5",
        "combined from": "a * 1.0, b * 2.0, c * 3.0",
        "head": "a",
        "truncation error": "none",
    }
    again = combine([loaded, loras[1]], vit64, Recipe("linear"), task="again", head="m")
    assert again.delta.labels == loaded.labels


# What is reported


def test_shares_and_pairs(vit64, random_delta):
    one = random_delta(vit64, lora(2), task="a", seed=1)
    opposite = replace(
        one,
        task="b",
        tensors={
            n: {**w, "scale": -2 * w["scale"]} if "scale" in w else w
            for n, w in one.tensors.items()
        },
    )
    probe = random_delta(vit64, task="c")
    found = combine([one, opposite, probe], vit64, Recipe("linear"), task="m", head="a")
    a, b, c = found.shares
    norm = math.sqrt(sum(float(d.square().sum()) for d in changes(vit64, one).values()))
    assert (a.tensors, b.tensors, c.tensors) == (3, 3, 0)
    assert (a.norm, b.norm, c.norm) == (pytest.approx(norm), pytest.approx(2 * norm), 0)
    assert a.weight == 1 / 3
    pairs = {(p.one, p.other): p for p in found.pairs}
    assert pairs["a", "b"].cosine == pytest.approx(-1)
    assert pairs["a", "b"].conflict == 1
    assert (pairs["a", "c"].cosine, pairs["a", "c"].conflict) == (None, None)


def test_default_weights(vit64, loras):
    for method, weight in (("linear", 1 / 3), ("dare", 1 / 3), ("ties", 1), ("dare-ties", 1)):
        found = combine(loras, vit64, Recipe(method), task="m", head="a")
        assert {share.weight for share in found.shares} == {weight}


# Heads


def test_without_a_choice_the_heads_are_named(vit64, loras):
    with pytest.raises(UsageError, match="head of its own") as caught:
        combine(loras, vit64, Recipe("linear"), task="m")
    assert caught.value.details["wanted"] == "--head a or --head b or --head c or --head average"
    alone = combine(loras[:1], vit64, Recipe("svd", ranks=Ranks(1)), task="m").delta
    assert alone.labels == loras[0].labels


def test_the_average_of_heads(vit64, random_delta):
    one, other = (random_delta(vit64, lora(2), task="a", seed=seed) for seed in (1, 2))
    found = combine(
        [one, other], vit64, Recipe("linear"), task="soup", weights=(1.5, 0.5), head=AVERAGE
    )
    weights = {float(o.tensors["head/head"]["bias"][0]): w for o, w in ((one, 0.75), (other, 0.25))}
    for key in ("weight", "bias"):
        wanted = sum(
            weights[float(o.tensors["head/head"]["bias"][0])] * o.tensors["head/head"][key]
            for o in (one, other)
        )
        assert torch.allclose(found.delta.tensors["head/head"][key], wanted, rtol=0, atol=1e-15)
    assert found.delta.labels == one.labels


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"head": AVERAGE}, "no average"),
        ({"head": "z"}, "no single one"),
        ({"head": "a", "weights": (1, 2)}, "weights do not fit"),
        ({"head": "a", "weights": (1, 2, math.nan)}, "weights do not fit"),
    ],
)
def test_heads_and_weights_that_do_not_fit(settings, sentence, vit64, loras):
    with pytest.raises(UsageError, match=sentence) as caught:
        combine(loras, vit64, Recipe("linear"), task="m", **settings)
    assert caught.value.exit_code == 2


def test_an_average_needs_a_positive_sum(vit64, random_delta):
    tasks = [random_delta(vit64, lora(2), task="a", seed=seed) for seed in (1, 2)]
    with pytest.raises(UsageError, match="no positive sum"):
        combine(tasks, vit64, Recipe("linear"), task="m", weights=(1, -1), head=AVERAGE)
    with pytest.raises(UsageError, match="no single one"):
        combine(tasks, vit64, Recipe("linear"), task="m", head="a")


def test_labels_in_place_of_the_heads_own(vit64, loras):
    found = combine(loras, vit64, Recipe("cat"), task="m", head="c", labels=("x", "y", "z"))
    assert found.delta.labels == ("x", "y", "z")
    for labels in (("x", "y"), ()):
        with pytest.raises(IncompatibleArtefact, match="labels do not name"):
            combine(loras, vit64, Recipe("cat"), task="m", head="c", labels=labels)


def test_two_classifiers(host, random_delta):
    """DeiT's distilled models have two heads; both are averaged, each with its own."""
    backbone = host("deit")
    tasks = [random_delta(backbone, lora(2), task="a", seed=seed) for seed in (1, 2)]
    found = combine(tasks, backbone, Recipe("linear"), task="m", head=AVERAGE).delta
    assert len(found.heads) == 2
    for name in found.heads:
        wanted = sum(task.tensors[name]["weight"] for task in tasks) / 2
        assert torch.allclose(found.tensors[name]["weight"], wanted, rtol=0, atol=1e-15)


def at_the_head(task, seed):
    """The task with a gain on what its head reads, and a LoRA beside the head."""
    generator = torch.Generator().manual_seed(seed)
    into, out = Point("head", "input"), Point("head", "output")
    gain, low = Gain(shift=True), Bottleneck("identity", bias=True)
    sizes = {"in": 48, "r": 2}
    added = {
        "gain": (Branch(gain, into, into), {**sizes, "out": 48}),
        "lora": (Branch(low, into, out), {**sizes, "out": len(task.labels)}),
    }
    tensors = {
        name: {
            key: torch.randn([own[axis] for axis in axes], generator=generator).double()
            for key, axes in branch.tuner.shapes.items()
        }
        for name, (branch, own) in added.items()
    }
    return replace(
        task,
        branches={**task.branches, **{name: branch for name, (branch, _) in added.items()}},
        tensors={**task.tensors, **tensors},
    )


@pytest.mark.parametrize("method", METHODS)
def test_what_stands_at_the_classifier_is_in_the_head(method, vit64, random_delta, error):
    task = at_the_head(random_delta(vit64, lora(2), task="a", classes=7), 1)
    density = 1.0 if method in SPARSE else None
    recipe = Recipe(method, density, ranks=Ranks(99) if method == "svd" else None)
    found = combine([task], vit64, recipe, task="m", weights=[1.0]).delta
    images = vit64.example(2)
    wanted = logits(restore(vit64, task), images)
    assert error(logits(restore(vit64, found), images), wanted) < 1e-9
    bare = {name: task.branches[name] for name in task.branches if name not in ("gain", "lora")}
    bare = replace(task, branches=bare, tensors={name: task.tensors[name] for name in bare})
    assert error(logits(restore(vit64, bare), images), wanted) > 1e-3, "they act"


def test_the_average_is_of_the_heads_as_they_answer(vit64, random_delta):
    tasks = [
        at_the_head(random_delta(vit64, task="a", classes=7, seed=1), 1),
        random_delta(vit64, task="a", classes=7, seed=2),
    ]
    found = combine(tasks, vit64, Recipe("cat"), task="m", head=AVERAGE).delta
    heads = [fold(task, vit64, dtype=torch.float64).tensors for task in tasks]
    for key in ("weight", "bias"):
        wanted = sum(head[f"head.{key}"] for head in heads) / 2
        assert torch.allclose(found.tensors[found.head][key], wanted, rtol=0, atol=1e-14)
    assert list(found.branches) == list(found.heads)


def test_a_head_where_nothing_else_stands_keeps_its_bytes(vit, random_delta):
    task = random_delta(vit, lora(2), task="a")
    found = combine([task], vit, Recipe("linear"), task="m").delta
    assert found.tensors[found.head]["weight"].dtype == torch.float32
    assert torch.equal(found.tensors[found.head]["weight"], task.tensors[task.head]["weight"])


# Refusals


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        (serial_adapter(2), "gelu between down and up"),
        (prefix(2), "no weight of the backbone holds them"),
        (deep_prompt(2), "no weight of the backbone holds them"),
    ],
)
def test_what_does_not_fold_is_refused_with_its_reason(listed, reason, vit64, loras, random_delta):
    with pytest.raises(UsageError, match="task z is not a difference of weights") as caught:
        combine(
            [loras[0], random_delta(vit64, listed, task="z")],
            vit64, Recipe("linear"), task="m", head="a",
        )  # fmt: skip
    assert reason in caught.value.details["found"]


def test_one_preprocessing_and_one_backbone(vit64, vit, loras, random_delta):
    other = replace(loras[1], preprocessing=replace(loras[1].preprocessing, crop=0.5))
    with pytest.raises(UsageError, match="prepare their pictures differently"):
        combine([loras[0], other], vit64, Recipe("linear"), task="m", head="a")
    model = copy.deepcopy(vit64.model)
    model.norm.bias.data.add_(1)
    moved = wrap(model, vit64.identity.architecture, vit64.identity.arguments)
    with pytest.raises(IncompatibleArtefact, match="another backbone"):
        combine(loras, moved, Recipe("linear"), task="m", head="a")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "mean"}, "no such method"),
        ({"method": "linear", "density": 0.5}, "a density means nothing"),
        ({"method": "ties", "seed": 1}, "a seed means nothing"),
        ({"method": "ties", "density": 0.0}, "out of range"),
        ({"method": "ties", "density": 1.1}, "out of range"),
        ({"method": "cat", "ranks": Ranks(3)}, "keeps every rank"),
    ],
)
def test_recipes_that_make_no_sense(settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        Recipe(**settings)


def test_no_task_is_no_sum(vit64):
    with pytest.raises(UsageError, match="no task to combine"):
        combine([], vit64, Recipe("linear"), task="m")


def test_weighted_sum():
    assert weighted_sum([vector(1, 2), vector(3, -1)], [2, 0.5]).tolist() == [3.5, 3.5]
