"""Tasks of every kind in one batch, and a backbone that is left as it was found."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn
from torch.nn import functional as F

from utune_deploy.merge.attach import restore
from utune_deploy.merge.attention import Attention
from utune_deploy.merge.backbone import wrap
from utune_deploy.merge.bank import Bank, fill_row, stack
from utune_deploy.merge.errors import UsageError
from utune_deploy.merge.lower import lower
from utune_deploy.merge.methods import (
    bitfit,
    bypass,
    deep_prompt,
    dual_adapter,
    ia3,
    lokr,
    lora,
    norm_tuning,
    oft,
    parallel_adapter,
    prefix,
    serial_adapter,
    shallow_prompt,
    side_tuning,
    ssf,
)
from utune_deploy.merge.mixed import Mixed, Single
from utune_deploy.merge.parallel import joined, submodule
from utune_deploy.merge.tokens import Crowd, LongerKeys
from utune_deploy.merge.tuner import Branch, Point
from utune_deploy.merge.tuners.bias import Bias
from utune_deploy.merge.tuners.bottleneck import Bottleneck
from utune_deploy.merge.tuners.head import Head
from utune_deploy.merge.tuners.prefix import Prefix

if TYPE_CHECKING:
    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

FAMILIES = ("vit", "swin")
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def zoo(random_delta):
    """Tasks of unlike kinds, ranks, lengths and class counts on one backbone, lowered."""

    def zoo(backbone: Backbone) -> list[Delta]:
        classifier = backbone.classifiers[0]
        lists = [
            [],
            [lora(4, alpha=8)],
            [lora(2, at="attn.proj"), lora(5, at="mlp.fc1"), lora(1, at="mlp.fc2")],
            [lora(3, blocks=(1,)), prefix(5)],
            [prefix(2, joint_softmax=False)],
            [prefix(1)],
            [bitfit()],
            [serial_adapter(6), serial_adapter(3, at="attn", activation="relu")],
            [dual_adapter(4, activation="gelu", scale=0.3)],
            [
                bitfit(),
                lora(2),
                serial_adapter(2),
                prefix(3),
                parallel_adapter(3, activation="silu"),
            ],
        ]
        lists += [[ssf()], [ia3(), lora(2)], [oft(4), norm_tuning()], [lokr(2, 4)]]
        if classifier == "head":
            lists += [
                [deep_prompt(3)],
                [deep_prompt(2, blocks=(0, 2)), lora(2)],
                [shallow_prompt(2)],
                [shallow_prompt(3, joint_softmax=False), lora(2), prefix(2)],
                [deep_prompt(2, joint_softmax=False), bypass(2)],
                [side_tuning(), shallow_prompt(1)],
            ]
        return [
            random_delta(backbone, *methods, task=f"t{i}", classes=2 + i * 3 % 7, seed=i)
            for i, methods in enumerate(lists)
        ]

    return zoo


@pytest.fixture
def own(family: str, host) -> Backbone:
    return host(family)


@torch.no_grad()
def mixed(backbone: Backbone, bank: Bank, images: torch.Tensor, task: list[int]) -> torch.Tensor:
    return Mixed(backbone, bank)(images, torch.tensor(task))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def modes() -> int:
    return torch._C._len_torch_function_stack()


@families
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_a_mixed_batch_is_every_task_alone(family, dtype, request, zoo, run, sites_of, error):
    backbone = request.getfixturevalue(f"{family}64" if dtype == torch.float64 else family)
    tasks = zoo(backbone)
    bank = stack([lower(backbone, task, sites_of(backbone)) for task in tasks])
    order = [*range(len(tasks)), 3, 1, 3]
    images = backbone.example(len(order))
    together = mixed(backbone, bank, images, order)
    assert together.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for row, number in enumerate(order):
        alone = run(backbone, tasks[number], images[row : row + 1])
        classes = alone.shape[1]
        assert error(together[row : row + 1, :classes], alone) < tolerance, tasks[number].task
        assert (together[row, classes:] == Head.fill["bias"]).all()
    probabilities = together.softmax(-1)
    assert torch.allclose(probabilities.sum(-1), torch.ones(len(order), dtype=dtype))


@families
def test_single_is_tuned(family, own, zoo, run, sites_of, error):
    images = own.example(3)
    for task in zoo(own):
        with torch.no_grad():
            single = Single(own, stack([lower(own, task, sites_of(own))]))(images)
        assert error(single, run(own, task, images)) < 1e-12, task.task


@families
def test_the_order_of_the_tasks_does_not_matter(family, own, zoo, sites_of, error):
    tasks = [lower(own, task, sites_of(own)) for task in zoo(own)]
    images = own.example(len(tasks))
    straight = mixed(own, stack(tasks), images, list(range(len(tasks))))
    order = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(1)).tolist()
    turned = mixed(
        own, stack([tasks[i] for i in order]), images, [order.index(i) for i in range(len(tasks))]
    )
    for row, task in enumerate(tasks):
        classes = len(task.labels)
        assert error(turned[row, :classes], straight[row, :classes]) < 1e-12


@families
@pytest.mark.parametrize("garbage", [1e6, torch.nan, torch.inf])
def test_rows_are_isolated_from_other_tasks(family, own, zoo, sites_of, garbage):
    """Whatever other tasks hold, the answer is the same to the bit."""
    bank = stack([lower(own, task, sites_of(own)) for task in zoo(own)])
    images = own.example(4)
    keep = 3
    before = mixed(own, bank, images, [keep] * 4)
    spoiled = {}
    for name, tensor in bank.tensors.items():
        spoiled[name] = torch.full_like(tensor, garbage)
        spoiled[name][keep] = tensor[keep]
    after = mixed(own, replace(bank, tensors=spoiled), images, [keep] * 4)
    assert torch.equal(after, before)


@families
def test_a_row_does_not_see_its_neighbours(family, own, zoo, sites_of):
    """Another task, another image, or nonsense in the other rows: the same to the bit."""
    bank = stack([lower(own, task, sites_of(own)) for task in zoo(own)])
    images = own.example(3)
    before = mixed(own, bank, images, [1, 4, 6])[1]
    other = images.clone()
    other[[0, 2]] = 7.0
    assert torch.equal(mixed(own, bank, other, [9, 4, 8])[1], before)
    assert torch.equal(mixed(own, bank, images, [-1, 4, 99])[1], before)


@families
def test_a_task_that_is_not_in_the_bank_answers_nan(family, own, random_delta):
    bank = stack([random_delta(own, lora(2), task="a"), random_delta(own, prefix(2), task="b")])
    logits = mixed(own, bank, own.example(5), [0, -1, 1, 2, 10**12])
    assert logits.isnan().all(1).tolist() == [False, True, False, True, True]
    assert logits[[0, 2]].isfinite().all()


def test_a_bank_given_from_outside(vit64, random_delta, run, error):
    """The tensors of `names` replace the module's own: tasks added while running."""
    first = random_delta(vit64, lora(4), prefix(3), task="a", seed=1)
    second = random_delta(vit64, lora(2), task="b", classes=3, seed=2)
    bank = stack([first])
    model = Mixed(vit64, bank)
    row = fill_row(bank.slots, second)
    grown = [torch.cat([bank.tensors[name], row[name][None]]) for name in model.names]
    images = vit64.example(2)
    with torch.no_grad():
        logits = model(images, torch.tensor([1, 0]), *grown)
    assert error(logits[:1, :3], run(vit64, second, images[:1])) < 1e-12
    assert error(logits[1:], run(vit64, first, images[1:])) < 1e-12


# The backbone afterwards


@families
def test_nothing_stays_behind(family, own, zoo, sites_of, run):
    images = own.example(2)
    with torch.no_grad():
        before = own.model(images)
    state = {name: t.clone() for name, t in own.model.state_dict().items()}
    tasks = zoo(own)
    for task in tasks:
        run(own, task, images)
    mixed(own, stack([lower(own, t, sites_of(own)) for t in tasks]), images, [9, 3])
    assert hooks(own.model) == 0
    assert modes() == 0
    with torch.no_grad():
        assert torch.equal(own.model(images), before)
    assert all(torch.equal(t, state[name]) for name, t in own.model.state_dict().items())


@families
@pytest.mark.parametrize("inside", ["attn.proj", "attn", "mlp.fc2", "norm1"])
def test_nothing_stays_behind_when_the_forward_raises(
    family, inside, own, zoo, sites_of, monkeypatch
):
    task = zoo(own)[-5 if family == "vit" else 9]
    block = "blocks.1" if family == "vit" else "layers.0.blocks.1"
    module = own.model.get_submodule(f"{block}.{inside}")
    images = own.example(2)
    with torch.no_grad():
        before = own.model(images)

    def stop(*_, **__):
        raise RuntimeError("stopped on purpose")

    tuned = restore(own, task, sites_of(own))
    bank = Mixed(own, stack([lower(own, task, sites_of(own))]))
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(module, "forward", stop)
        for call in (
            lambda: tuned(images),
            lambda: bank(images, torch.tensor([0, 0])),
        ):
            with pytest.raises(RuntimeError, match="on purpose"):
                call()
            assert hooks(own.model) == 0
            assert modes() == 0
    with torch.no_grad():
        assert torch.equal(own.model(images), before)


def test_nothing_stays_behind_when_a_module_is_missing(vit64):
    at = Point("blocks.9.mlp", "output")
    with (
        pytest.raises(UsageError, match="no such module"),
        joined(
            vit64.model,
            [
                (Branch(Bias(), Point("blocks.0", "output"), Point("blocks.0", "output")), {}),
                (Branch(Bias(), at, at), {}),
            ],
        ),
    ):
        pass
    assert hooks(vit64.model) == 0
    with pytest.raises(UsageError, match="no such module"):
        submodule(vit64.model, "blocks.0.nothing")


def test_gradients_reach_the_branches_and_not_the_backbone(vit, random_delta, sites_of):
    delta = random_delta(vit, lora(2), prefix(2), bitfit(), serial_adapter(2), deep_prompt(2))
    tuned = restore(vit, delta, sites_of(vit)).train()
    assert not tuned.trunk.training
    tuned(vit.example(2)).square().sum().backward()
    for name, parameters in zip(tuned.branches, tuned.weights, strict=True):
        for key, parameter in parameters.items():
            if key == "scale":  # a constant of the method
                assert parameter.grad is None
                continue
            assert parameter.grad is not None, f"{name}/{key}"
            assert parameter.grad.abs().max() > 0, f"{name}/{key}"
    assert all(p.grad is None for p in tuned.trunk.parameters())
    scales = sum("scale" in w for w in tuned.weights)
    assert len(list(tuned.trainable())) == sum(len(w) for w in tuned.weights) - scales


@pytest.mark.parametrize("family", ["dinov3", "eva", "beit", "swinv2", "deit"])
def test_layers_that_are_read_meet_every_branch_at_once(
    family, host, random_delta, run, sites_of, error
):
    """Branches on a weight that its parent reads, together with those of the attention around it."""
    backbone = host(family)
    extra = [] if family == "swinv2" else [prefix(2)]
    tasks = [
        random_delta(backbone, *methods, task=f"t{i}", classes=2 + i, seed=i)
        for i, methods in enumerate(
            [[], [lora(2), ssf(), *extra], [oft(4), lokr(2, 4), ia3()], [*extra, lora(3)]]
        )
    ]
    bank = stack([lower(backbone, task, sites_of(backbone)) for task in tasks])
    images = backbone.example(5)
    order = [3, 1, 0, 2, 1]
    together = mixed(backbone, bank, images, order)
    for row, number in enumerate(order):
        alone = run(backbone, tasks[number], images[row : row + 1])
        assert error(together[row : row + 1, : alone.shape[1]], alone) < 1e-12
    assert hooks(backbone.model) == 0
    assert modes() == 0


# Order


def stages(random_weights):
    """Three branches at `blocks.1.mlp:output` that do not commute."""
    point, start = Point("blocks.1.mlp", "output"), Point("blocks.1.mlp", "input")
    sizes = {"in": 48, "out": 48, "r": 3}
    found = {}
    for seed, (name, tuner, tap) in enumerate(
        (
            ("parallel", Bottleneck("relu", bias=True), start),
            ("serial", Bottleneck("gelu", bias=False), point),
            ("shift", Bias(), point),
        )
    ):
        weights = random_weights(tuner, sizes, seed, torch.float64)
        found[name] = Branch(tuner, tap, point), weights
    return found


def by_hand(names, found, x, y):
    """The value after the branches in this order, written out."""
    for name in names:
        _, w = found[name]
        if name == "parallel":
            hidden = torch.relu(x @ w["down"].T + w["down_bias"])
            y = y + w["scale"] * (hidden @ w["up"].T + w["up_bias"])
        elif name == "serial":
            y = y + w["scale"] * (F.gelu(y @ w["down"].T) @ w["up"].T)
        else:
            y = y + w["shift"]
    return y


ORDERS = [
    ("parallel", "serial", "shift"),
    ("serial", "parallel"),
    ("shift", "serial", "parallel"),
    ("serial", "shift"),
    ("shift", "serial"),
    ("serial",),
]


def with_branches(random_delta, backbone, names, found, task) -> Delta:
    plain = random_delta(backbone, task=task)
    return replace(
        plain,
        branches={**{n: found[n][0] for n in names}, **plain.branches},
        tensors={**{n: found[n][1] for n in names}, **plain.tensors},
    )


@pytest.mark.parametrize("names", ORDERS)
def test_branches_at_one_point_join_in_their_order(
    names, vit64, random_delta, random_weights, run, error
):
    found = stages(random_weights)
    delta = with_branches(random_delta, vit64, names, found, "a")
    images = vit64.example(2)
    mlp = vit64.model.get_submodule("blocks.1.mlp")
    frozen = type(mlp).forward

    def forward(x):
        return by_hand(names, found, x, frozen(mlp, x))

    head = delta.tensors[delta.head]
    mlp.forward = forward
    try:
        with torch.no_grad():
            features = vit64.model.forward_head(
                vit64.model.forward_features(images), pre_logits=True
            )
    finally:
        del mlp.forward
    wanted = features @ head["weight"].T + head["bias"]
    assert error(run(vit64, delta, images), wanted) < 1e-13


@pytest.mark.parametrize("turn", range(3))
def test_a_bank_keeps_the_order_of_every_task(
    turn, vit64, random_delta, random_weights, run, error
):
    """Tasks whose branches at one point stand in different orders share slots where they can."""
    found = stages(random_weights)
    orders = [*ORDERS[turn * 2 :], *ORDERS[: turn * 2]]
    tasks = [with_branches(random_delta, vit64, o, found, f"t{i}") for i, o in enumerate(orders)]
    bank = stack(tasks)
    images = vit64.example(len(tasks))
    together = mixed(vit64, bank, images, list(range(len(tasks))))
    for row, task in enumerate(tasks):
        assert error(together[row : row + 1], run(vit64, task, images[row : row + 1])) < 1e-13
    for number, task in enumerate(tasks):  # a task added later finds the places it was given
        for name, tensor in fill_row(bank.slots, task).items():
            assert torch.equal(tensor, bank.tensors[name][number])


def test_a_tap_reads_what_is_joined_at_its_point(vit64, random_delta, random_weights, run, error):
    """A branch that taps a point sees the value after all branches there."""
    sizes = {"in": 48, "out": 48, "r": 2}
    first, second = Point("blocks.0.norm2", "output"), Point("blocks.0.mlp", "output")
    tuner = Bottleneck("tanh", bias=True)
    weights = random_weights(tuner, sizes, 5, torch.float64)
    shift = random_weights(Bias(), sizes, 6, torch.float64)
    plain = random_delta(vit64)
    branches = {"late": Branch(tuner, first, second), "early": Branch(Bias(), first, first)}
    delta = replace(
        plain,
        branches=branches | plain.branches,
        tensors={"late": weights, "early": shift, **plain.tensors},
    )
    block = vit64.model.get_submodule("blocks.0")
    images = vit64.example(2)
    seen = {}

    def norm2(_, args, value):
        seen["tap"] = value + shift["shift"]
        return seen["tap"]

    def mlp(_, args, value):
        hidden = torch.tanh(seen["tap"] @ weights["down"].T + weights["down_bias"])
        return value + weights["scale"] * (hidden @ weights["up"].T + weights["up_bias"])

    handles = [
        block.norm2.register_forward_hook(norm2),
        block.mlp.register_forward_hook(mlp),
    ]
    try:
        wanted = run(vit64, plain, images)
    finally:
        for handle in handles:
            handle.remove()
    assert error(run(vit64, delta, images), wanted) < 1e-13


# Attention


@pytest.mark.parametrize("joint", [True, False])
def test_a_prefix_by_hand(joint, vit64, random_delta, random_weights, run, error):
    """`softmax(q [K; Kp]^T) [V; Vp]`, or the sum of two attentions, written out."""
    sizes = {"in": 48, "out": 48, "r": 5}
    weights = random_weights(Prefix(joint_softmax=joint), sizes, 8, torch.float64)
    point = Point("blocks.1.attn", "keys")
    plain = random_delta(vit64)
    delta = replace(
        plain,
        branches={"p": Branch(Prefix(joint_softmax=joint), point, point), **plain.branches},
        tensors={"p": weights, **plain.tensors},
    )
    attn = vit64.model.get_submodule("blocks.1.attn")

    def forward(x, **_):
        q, k, v = attn.qkv(x).reshape(*x.shape[:2], 3, 4, 12).permute(2, 0, 3, 1, 4)
        extra_k, extra_v = (
            weights[n].reshape(5, 4, 12).transpose(0, 1).expand(len(x), 4, 5, 12)
            for n in ("key", "value")
        )
        scores = q @ k.mT * 12**-0.5
        more = q @ extra_k.mT * 12**-0.5
        if joint:
            p = torch.cat([scores, more], -1).softmax(-1)
            y = p @ torch.cat([v, extra_v], 2)
        else:
            y = scores.softmax(-1) @ v + more.softmax(-1) @ extra_v
        return attn.proj(y.transpose(1, 2).flatten(2))

    images = vit64.example(2)
    attn.forward = forward
    try:
        wanted = run(vit64, plain, images)
    finally:
        del attn.forward
    assert error(run(vit64, delta, images), wanted) < 1e-13


def test_attention_arguments():
    """A masked key has the weight 0 even where its score would win by hundreds."""
    q, k, v = torch.randn(3, 1, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    q = q * 300
    mask = torch.tensor([[True, False, True, True]])
    call = Attention.of((q, k, v), {"attn_mask": mask, "scale": 0.5})
    assert call.options == {"scale": 0.5}
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5)
    assert torch.allclose(call.run(), wanted, atol=1e-7)
    with pytest.raises(UsageError, match="causal"):
        LongerKeys([], None, Crowd(None)).attend(Attention.of((q, k, v, None, 0.0, True), {}))


@pytest.mark.parametrize("rows", [None, 2])
def test_a_bias_on_every_layout(rows, error):
    """A shift joins a convolution's map, a sequence and a map with channels last alike."""
    generator = torch.Generator().manual_seed(0)
    cases = [
        (nn.Conv2d(3, 4, 1), torch.randn(2, 3, 5, 6, generator=generator), (1, 4, 1, 1)),
        (nn.BatchNorm2d(4).eval(), torch.randn(2, 4, 5, 6, generator=generator), (1, 4, 1, 1)),
        (nn.GroupNorm(2, 4), torch.randn(2, 4, 5, 6, generator=generator), (1, 4, 1, 1)),
        (LayerNorm2d(4), torch.randn(2, 4, 5, 6, generator=generator), (1, 4, 1, 1)),
        (nn.Linear(3, 4), torch.randn(2, 7, 3, generator=generator), (1, 1, 4)),
        (nn.Linear(3, 4), torch.randn(2, 5, 6, 3, generator=generator), (1, 1, 1, 4)),
        (nn.Linear(3, 4), torch.randn(2, 3, generator=generator), (1, 4)),
        (nn.Linear(3, 4), torch.randn(2 * 9, 5, 3, generator=generator), (1, 1, 4)),
    ]
    point = Point("0", "output")
    shift = torch.randn(4, generator=generator)
    with torch.no_grad():
        for op, x, shape in cases:
            weights = {"shift": shift if rows is None else shift.expand(2, 4)}
            model = nn.Sequential(op)
            with joined(model, [(Branch(Bias(), point, point), weights)], rows=rows):
                found = model(x)
            assert error(found, op(x) + shift.reshape(shape)) < 1e-6


def test_half_precision_backbones_and_deltas(vit, random_delta, run):
    """Masks and absent classes stay within the range of the type."""
    for dtype in (torch.float16, torch.bfloat16):
        model = copy.deepcopy(vit.model).to(dtype)
        backbone = wrap(model, vit.identity.architecture, vit.identity.arguments)
        tasks = [
            random_delta(backbone, prefix(2, joint_softmax=joint), task=f"p{joint}", classes=2)
            for joint in (True, False)
        ] + [random_delta(backbone, prefix(5), lora(2), task="l", classes=4)]
        images = backbone.example(3)
        logits = mixed(backbone, stack(tasks), images, [0, 1, 2])
        assert logits.isfinite().all()
        for row, task in enumerate(tasks):
            alone = run(backbone, task, images[row : row + 1])[0]
            found = logits[row, : len(task.labels)]
            assert torch.allclose(found, alone, rtol=0, atol=0.1 * float(alone.abs().max()))
            assert logits[row].softmax(-1)[len(task.labels) :].sum() == 0
