"""Each formula of the law against the same formula written plainly."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utune_deploy.merge.bank import stack
from utune_deploy.merge.lower import lower
from utune_deploy.merge.methods import deep_prompt, lora, prefix
from utune_deploy.merge.mixed import Mixed
from utune_deploy.merge.ops import patches, reads_patches
from utune_deploy.merge.parallel import joined
from utune_deploy.merge.tuner import Branch, CannotFold, Point
from utune_deploy.merge.tuners.bias import Bias
from utune_deploy.merge.tuners.bottleneck import Bottleneck
from utune_deploy.merge.tuners.bypass import Bypass
from utune_deploy.merge.tuners.gain import Gain
from utune_deploy.merge.tuners.kronecker import Kronecker
from utune_deploy.merge.tuners.norm import Norm
from utune_deploy.merge.tuners.prompt import Prompt
from utune_deploy.merge.tuners.rotation import Rotation
from utune_deploy.merge.tuners.side_network import SideNetwork

if TYPE_CHECKING:
    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

IN, OUT = Point("0", "input"), Point("0", "output")


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@torch.no_grad()
def tuned(op: nn.Module, branch: Branch, w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The op with one branch."""
    model = nn.Sequential(op)
    with joined(model, [(branch, w)]):
        return model(x)


# Bottleneck


@pytest.mark.parametrize("norm", ["in", "out"])
def test_a_bottleneck_with_a_norm(norm, random_weights, error):
    """AdaptFormer's `adapter_layernorm_option`, with modules of torch."""
    tuner = Bottleneck("relu", bias=True, norm=norm, eps=1e-3)
    w = random_weights(tuner, {"in": 6, "out": 4, "r": 3}, 1, torch.float64)
    layer = nn.LayerNorm(6 if norm == "in" else 4, eps=1e-3).double()
    down, up = nn.Linear(6, 3).double(), nn.Linear(3, 4).double()
    with torch.no_grad():
        layer.weight.copy_(w["norm_weight"])
        layer.bias.copy_(w["norm_bias"])
        down.weight.copy_(w["down"])
        down.bias.copy_(w["down_bias"])
        up.weight.copy_(w["up"])
        up.bias.copy_(w["up_bias"])
        x = noise(2, 5, 6)
        y = up(torch.relu(down(layer(x) if norm == "in" else x))) * w["scale"]
        wanted = layer(y) if norm == "out" else y
    assert error(tuner.branch(x, w), wanted) < 1e-14


# Rotation


def shuffle(channels: int, blocks: int, block: int, level: int) -> list[int]:
    """BOFT's permutation (arXiv 2311.06243, section 3.2), half block by half block."""
    groups, half = blocks // 2**level, block // 2
    size = channels // groups
    order = []
    for start in range(0, channels, size):
        halves = [list(range(start + i, start + i + half)) for i in range(0, size, half)]
        order += [c for part in (*halves[0::2], *halves[1::2]) for c in part]
    return order


@pytest.mark.parametrize(
    ("blocks", "block", "level"),
    [(4, 3, 0), (4, 4, 1), (4, 4, 2), (8, 2, 1), (8, 2, 2), (8, 2, 3), (6, 2, 1), (1, 5, 0)],
)
def test_a_rotation_is_a_permuted_block_diagonal(blocks, block, level, error):
    """`x (1 + P T P^T)` for a row vector x."""
    tuner = Rotation(blocks, block, level)
    channels = blocks * block
    turn = noise(blocks, block, block)
    p = torch.eye(channels, dtype=torch.float64)
    if level:
        p = p[shuffle(channels, blocks, block, level)]
    matrix = p @ torch.block_diag(*turn) @ p.T
    x = noise(2, 3, channels, seed=1)
    assert error(tuner.branch(x, {"turn": turn}), x @ matrix) < 1e-14
    both = torch.stack([turn, -2 * turn])
    wanted = torch.stack([x[0] @ matrix, -2 * x[1] @ matrix])
    assert error(tuner.branch(x, {"turn": both}), wanted) < 1e-14
    op = nn.Linear(channels, 5).double()
    with torch.no_grad():
        folded = tuner.fold({"turn": turn}, op, "before")
        assert error(x @ folded["weight"].T + op.bias, op(x + x @ matrix)) < 1e-13
        found = tuned(op, Branch(tuner, IN, IN), {"turn": turn}, x)
        assert error(found, op(x + x @ matrix)) < 1e-13


def test_an_orthogonal_butterfly_keeps_lengths(error):
    """Three levels of Cayley rotations one after another are orthogonal."""
    op = nn.Linear(16, 16, bias=False).double()
    branches, product = [], torch.eye(16, dtype=torch.float64)
    for level in range(3):
        skew = noise(4, 4, 4, seed=level)
        skew = skew - skew.mT
        one = torch.eye(4, dtype=torch.float64)
        turn = torch.linalg.solve(one - skew, one + skew) - one
        tuner = Rotation(4, 4, level)
        branches.append((Branch(tuner, IN, IN), {"turn": turn}))
        product = product + tuner.branch(product, {"turn": turn})
    assert error(product @ product.T, torch.eye(16)) < 1e-13
    x = noise(2, 3, 16, seed=7)
    with torch.no_grad(), joined(model := nn.Sequential(op), branches):
        assert error(model(x), x @ product @ op.weight.T) < 1e-13


# Kronecker


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (6, 4), (3, 12)])
def test_a_kronecker_product(rows, columns, random_weights, error):
    tuner = Kronecker(rows, columns)
    sizes = {"in": 12, "out": 6, "r": 2}
    ws = [random_weights(tuner, sizes, seed, torch.float64) for seed in range(2)]
    matrices = [w["scale"] * torch.kron(w["left"], w["up"] @ w["down"]) for w in ws]
    x = noise(2, 5, 12)
    assert error(tuner.branch(x, ws[0]), x @ matrices[0].T) < 1e-14
    both = {key: torch.stack([w[key] for w in ws]) for key in ws[0]}
    wanted = torch.stack([x[i] @ matrices[i].T for i in range(2)])
    assert error(tuner.branch(x, both), wanted) < 1e-14
    op = nn.Linear(12, 6).double()
    with torch.no_grad():
        assert error(tuner.fold(ws[0], op, "beside")["weight"], op.weight + matrices[0]) < 1e-14


# Gains and norms


def test_a_norm_with_other_parameters(error):
    """Exact also where the frozen gain is 0, and folded the same."""
    frozen, other = nn.LayerNorm(6, eps=1e-6).double(), nn.LayerNorm(6, eps=1e-6).double()
    with torch.no_grad():
        frozen.weight.copy_(noise(6))
        frozen.weight[[1, 4]] = 0.0
        for seed, parameter in enumerate((frozen.bias, other.weight, other.bias), start=1):
            parameter.copy_(noise(6, seed=seed))
        w = {"gain": other.weight - frozen.weight, "shift": other.bias - frozen.bias}
        x = 3 * noise(2, 5, 6, seed=8) + 1
        tuner = Norm(1e-6)
        assert error(tuned(frozen, Branch(tuner, IN, OUT), w, x), other(x)) < 1e-14
        folded = tuner.fold(w, frozen, "beside")
        assert error(folded["weight"], other.weight) < 1e-14
        assert error(folded["bias"], other.bias) < 1e-14
        with pytest.raises(CannotFold, match="another eps, 1e-06"):
            Norm(1e-5).fold(w, frozen, "beside")


def test_a_gain_is_a_tuned_batch_norm(error):
    """Other parameters and other statistics, exact also where the frozen gain is 0."""
    frozen, other = nn.BatchNorm2d(6).double().eval(), nn.BatchNorm2d(6).double().eval()
    with torch.no_grad():
        for seed, norm in enumerate((frozen, other)):
            norm.weight.copy_(noise(6, seed=seed))
            norm.bias.copy_(noise(6, seed=seed + 2))
            norm.running_mean.copy_(noise(6, seed=seed + 4))
            norm.running_var.copy_(0.5 + noise(6, seed=seed + 6).abs())
        frozen.weight[2] = 0.0
        slopes = [norm.weight / (norm.running_var + norm.eps).sqrt() for norm in (frozen, other)]
        starts = [
            norm.bias - slope * norm.running_mean
            for norm, slope in zip((frozen, other), slopes, strict=True)
        ]
        w = {"gain": slopes[1] - slopes[0], "shift": starts[1] - starts[0]}
        x = noise(2, 6, 4, 5, seed=9)
        tuner = Gain(shift=True)
        assert error(tuned(frozen, Branch(tuner, IN, OUT), w, x), other(x)) < 1e-14
        folded = tuner.fold(w, frozen, "beside")
        frozen.weight.copy_(folded["weight"])
        frozen.bias.copy_(folded["bias"])
        assert error(frozen(x), other(x)) < 1e-13


@pytest.mark.parametrize("where", ["behind", "before"])
@pytest.mark.parametrize(
    "op",
    [
        nn.Linear(6, 6),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.LayerNorm(6),
        nn.GroupNorm(2, 6),
    ],
    ids=lambda op: type(op).__name__,
)
@pytest.mark.parametrize("tuner", [Gain(shift=True), Gain(shift=False), Bias()], ids=str)
def test_a_gain_or_shift_at_an_op(tuner, op, where, random_weights, error):
    """`op(x) (1 + gain) + shift`, or `op(x (1 + gain) + shift)`; folded to the same or refused."""
    op = op.double().eval().requires_grad_(requires_grad=False)
    first = not isinstance(op, nn.Linear | nn.LayerNorm)
    w = random_weights(tuner, {"in": 6, "out": 6}, 3, torch.float64)
    x = noise(2, 6, 4, 5) if first else noise(2, 7, 6)
    shape = (6, 1, 1) if first else (6,)
    gain = (1 + w["gain"]).reshape(shape) if "gain" in w else 1.0
    shift = w["shift"].reshape(shape) if "shift" in w else 0.0
    wanted = op(x) * gain + shift if where == "behind" else op(x * gain + shift)
    point = OUT if where == "behind" else IN
    assert error(tuned(op, Branch(tuner, point, point), w, x), wanted) < 1e-14
    scales = isinstance(op, nn.Linear) or (isinstance(op, nn.Conv2d) and tuner == Gain(shift=False))
    if where == "before" and not scales:
        with pytest.raises(CannotFold):
            tuner.fold(w, op, where)
        return
    for name, value in tuner.fold(w, op, where).items():
        getattr(op, name).copy_(value)
    assert error(op(x), wanted) < 1e-13


# Patches


CONVOLUTIONS = {
    "apart": (nn.Conv2d(3, 4, 4, stride=4), (8, 12)),
    "apart, oblong": (nn.Conv2d(3, 4, (2, 3), stride=(2, 3)), (8, 9)),
    "one by one": (nn.Conv2d(3, 4, 1), (5, 7)),
    "one by one, in steps": (nn.Conv2d(3, 4, 1, stride=2), (5, 8)),
    "overlapping": (nn.Conv2d(3, 4, 7, stride=4, padding=3), (13, 16)),
    "overlapping, not padded": (nn.Conv2d(3, 4, 3, stride=2), (9, 10)),
    "apart, padded": (nn.Conv2d(3, 4, 4, stride=4, padding=2), (8, 12)),
    "apart, with a rest": (nn.Conv2d(3, 4, 4, stride=4), (9, 11)),
    "dilated": (nn.Conv2d(3, 4, 3, padding=2, dilation=2), (9, 10)),
    "dilated, in steps of the kernel": (nn.Conv2d(3, 4, 2, stride=2, dilation=3), (8, 9)),
    "steps beyond the kernel": (nn.Conv2d(3, 4, 2, stride=3), (9, 12)),
    "clips": (nn.Conv3d(3, 4, (2, 4, 4), stride=(2, 4, 4)), (4, 8, 12)),
    "clips, with a rest": (nn.Conv3d(3, 4, (2, 4, 4), stride=(2, 4, 4)), (5, 9, 12)),
}


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_are_what_a_convolution_reads(name, rows, error):
    """A bottleneck on them is a second convolution, and folds into the first."""
    op, size = CONVOLUTIONS[name]
    op = op.double().requires_grad_(requires_grad=False)
    assert reads_patches(op)
    x = noise(2, 3, *size)
    width = op.weight[0].numel()
    w = {"down": noise(2, width, seed=1), "up": noise(4, 2, seed=2), "scale": noise(seed=3)}
    second = type(op)(3, 4, op.kernel_size, op.stride, op.padding, op.dilation, bias=False).double()
    second.weight.data.copy_((w["scale"] * w["up"] @ w["down"]).reshape(op.weight.shape))
    with torch.no_grad():
        wanted = op(x) + second(x)
        assert error(patches(x, op) @ second.weight.flatten(1).T, second(x).flatten(2).mT) < 1e-13
        tuner = Bottleneck("identity", bias=False)
        branch = Branch(tuner, Point("0", "patches"), OUT)
        weights = w if rows is None else {k: t.expand(rows, *t.shape) for k, t in w.items()}
        model = nn.Sequential(op)
        with joined(model, [(branch, weights)], rows=rows):
            assert error(model(x), wanted) < 1e-13
        assert branch.place == "over"
        second.weight.copy_(tuner.fold(w, op, "over")["weight"])
        assert (
            error(op(x) + second(x) - op(x), wanted - op.bias.reshape(4, *[1] * len(size))) < 1e-13
        )


@pytest.mark.parametrize(
    "op",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv3d(4, 4, 3, stride=2),
        nn.ConvTranspose2d(4, 4, 2, stride=2),
        nn.Linear(4, 4),
    ],
    ids=str,
)
def test_ops_without_patches(op):
    assert not reads_patches(op)


# Side networks


def plain_network(name: str) -> nn.Sequential:
    """The networks of side-tuning in modelscope, in modules of torch."""
    if name == "fcn4":
        layers = []
        for given, taken, stride, padding in (
            (3, 16, 1, 1),
            (16, 16, 2, 0),
            (16, 32, 2, 0),
            (32, 64, 1, 0),
        ):
            layers += [
                nn.Conv2d(given, taken, 3, stride, padding, bias=False),
                nn.GroupNorm(2, taken),
                nn.ReLU(),
            ]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    pool = nn.MaxPool2d(3, 2)
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), pool,
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), pool,
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), pool,
        nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Linear(256 * 36, 10),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "size"),
    [*(("fcn4", s) for s in ((32, 32), (33, 33), (31, 50), (224, 224), (15, 18)))]
    + [("alexnet", s) for s in ((63, 63), (64, 97), (225, 200))],
)
def test_a_side_network(name, size, error):
    """Its parameters in the network's order, for one image after another and with a batch axis."""
    torch.manual_seed(0)
    networks = [plain_network(name).double() for _ in range(2)]
    tuner = SideNetwork(name)
    ws = []
    for network in networks:
        for parameter in network.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        names = [n for n in tuner.shapes if n != "scale"]
        w = dict(zip(names, (p.detach() for p in network.parameters()), strict=True))
        ws.append({**w, "scale": torch.tensor(0.7, dtype=torch.float64)})
    x = noise(2, 3, *size)
    with torch.no_grad():
        for network, w in zip(networks, ws, strict=True):
            wanted = 0.7 * network(x)
            assert error(tuner.branch(x, w), wanted[:, None]) < 1e-12
            assert error(tuner.branch(x, tuner.settle(w)), wanted[:, None]) < 1e-12
        both = {key: torch.stack([w[key] for w in ws]) for key in ws[0]}
        wanted = torch.cat([0.7 * n(x[i : i + 1]) for i, n in enumerate(networks)])
        assert error(tuner.branch(x, both), wanted[:, None]) < 1e-12


# Bypass


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_bypass_is_a_ladder(depth, random_weights, error):
    """Res-Tuning-Bypass (arXiv 2310.19859), block by block beside a trunk of linear layers."""
    tuner = Bypass(depth, "gelu")
    w = random_weights(tuner, {"in": 6, "out": 6, "r": 2}, 5, torch.float64)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(depth)), nn.Identity()).double()

    def adapter(rung: str, level: int, x: Tensor) -> Tensor:
        down, up = w[f"{rung}_down"][level], w[f"{rung}_up"][level]
        hidden = F.gelu(x @ down.T + w[f"{rung}_down_bias"][level])
        return x + hidden @ up.T + w[f"{rung}_up_bias"][level]

    x = noise(2, 5, 6)
    stem = b = x
    with torch.no_grad():
        for level, block in enumerate(list(model)[:-1]):
            stem = block(stem)
            b = adapter("lateral", level, stem) + adapter("vertical", level, b)
        taps = tuple(Point(str(i), "output") for i in range(depth))
        branch = Branch(tuner, IN, Point(str(depth), "input"), taps)
        for weights in (w, tuner.settle(w)):
            with joined(model, [(branch, weights)]):
                assert error(model(x), b) < 1e-13
        absent = {**tuner.settle(w), "present": torch.tensor(0.0).double()}
        with joined(model, [(branch, absent)]):
            assert error(model(x), stem) < 1e-14


# Prompts


def with_prompts(
    plain: Delta, spans: list[tuple[int, int, Tensor]], *, joint: bool = True
) -> Delta:
    """Tokens that enter one block and leave behind another."""
    branches, tensors = {}, {}
    for number, (first, last, token) in enumerate(spans):
        at = Point(f"blocks.{first}", "tokens"), Point(f"blocks.{last}", "tokens")
        branches[f"p{number}"] = Branch(Prompt(joint_softmax=joint), *at)
        tensors[f"p{number}"] = {"token": token}
    return replace(
        plain, branches={**branches, **plain.branches}, tensors={**tensors, **plain.tensors}
    )


@torch.no_grad()
def explicit(backbone: Backbone, delta: Delta, images: Tensor, steps) -> Tensor:
    """The ViT with a step in front of each block, `(number, x) -> x`."""
    model = backbone.model
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for number, block in enumerate(model.blocks):
        x = block(steps(number, x))
    features = model.forward_head(model.norm(x), pre_logits=True)
    head = delta.tensors[delta.head]
    return features @ head["weight"].T + head["bias"]


SPANS = {
    "shallow": [(0, 2, 3)],
    "two blocks": [(0, 1, 2)],
    "from the second": [(1, 2, 2)],
    "one inside the other": [(0, 2, 2), (1, 1, 3)],
    "one after the other": [(0, 0, 2), (1, 2, 3)],
    "together, one longer": [(0, 2, 1), (0, 0, 2)],
    "across each other": [(0, 1, 2), (1, 2, 3)],
    "across, listed backwards": [(1, 2, 3), (0, 1, 2)],
}


@pytest.mark.parametrize("name", SPANS)
def test_spans_of_prompts(name, vit64, random_delta, run, sites_of, error):
    """Alone, lowered, and in a mixed batch with a task that has none and one of other lengths."""
    plain = random_delta(vit64, task="p")
    spans = [(a, b, noise(n, 48, seed=i)) for i, (a, b, n) in enumerate(SPANS[name])]
    delta = with_prompts(plain, spans)
    images = vit64.example(3)
    length = 17

    standing: list[Tensor] = []  # the tokens behind the image's, in order

    def steps(number: int, x: Tensor) -> Tensor:
        behind = x[:, length:].split([len(token) for token in standing], dim=1)
        parts, kept = [], []
        for first, last, token in spans:
            if first < number <= last:
                parts.append(behind[next(i for i, t in enumerate(standing) if t is token)])
                kept.append(token)
            elif first == number:
                parts.append(token.expand(len(x), *token.shape))
                kept.append(token)
        standing[:] = kept
        return torch.cat([x[:, :length], *parts], dim=1)

    wanted = explicit(vit64, delta, images, steps)
    assert error(run(vit64, delta, images), wanted) < 1e-12
    lowered = lower(vit64, delta, sites_of(vit64))
    assert error(run(vit64, lowered, images), wanted) < 1e-10
    longer = [(a, b, noise(n + 2, 48, seed=7 + i)) for i, (a, b, n) in enumerate(SPANS[name])]
    tasks = [delta, random_delta(vit64, lora(2), prefix(3), task="none", seed=4)]
    tasks.append(with_prompts(random_delta(vit64, lora(2), task="longer", seed=5), longer))
    bank = stack([lower(vit64, task, sites_of(vit64)) for task in tasks])
    with torch.no_grad():
        together = Mixed(vit64, bank)(images, torch.tensor([0, 1, 2]))
    for row, task in enumerate(tasks):
        alone = run(vit64, task, images[row : row + 1])
        assert error(together[row : row + 1], alone) < 1e-12


@pytest.mark.parametrize("lengths", [(3, 2, 1), (1, 2, 3), (2, 3, 2), (2, 0, 1)])
def test_unequal_lengths_that_replace_the_last_tokens(
    lengths, vit64, random_delta, run, sites_of, error
):
    """A block that takes fewer tokens out than the one before it put in leaves the rest there.

    As modelscope writes it: `x = cat([x[:, :-P_i], prompt_i])`, with every token a span of its own.
    """
    plain = random_delta(vit64, lora(2))
    prompts = [noise(n, 48, seed=i) for i, n in enumerate(lengths)]
    spans, present = [], []
    for number, prompt in enumerate(prompts):
        for born, token in present[max(0, len(present) - len(prompt)) :] if number else ():
            spans.append((born, number - 1, token))
        present = present[: max(0, len(present) - len(prompt))] if number else []
        present += [(number, prompt[i : i + 1]) for i in range(len(prompt))]
    spans += [(born, len(lengths) - 1, token) for born, token in present]
    by_span: dict[tuple[int, int], list[Tensor]] = {}
    for born, died, token in sorted(spans, key=lambda s: (s[0], -s[1])):
        by_span.setdefault((born, died), []).append(token)
    delta = with_prompts(plain, [(a, b, torch.cat(t)) for (a, b), t in by_span.items()])
    images = vit64.example(2)
    others = [(b, delta.tensors[n]) for n, b in plain.branches.items() if b.tuner.join == "add"]

    def steps(number: int, x: Tensor) -> Tensor:
        prompt = prompts[number]
        kept = x if number == 0 or not len(prompt) else x[:, : max(17, x.shape[1] - len(prompt))]
        return torch.cat([kept, prompt.expand(len(x), *prompt.shape)], dim=1)

    with joined(vit64.model, others):
        wanted = explicit(vit64, delta, images, steps)
    assert error(run(vit64, delta, images), wanted) < 1e-12
    assert error(run(vit64, lower(vit64, delta, sites_of(vit64)), images), wanted) < 1e-10


@pytest.mark.parametrize("at", ["blocks.1", "blocks.1.attn"])
def test_prompts_with_a_softmax_of_their_own(at, vit64, random_delta, run, sites_of, error):
    """`softmax(q K^T) V + softmax(q K_p^T) V_p`, written out; the prompts query too, and are cut."""
    plain = random_delta(vit64)
    token = noise(4, 48)
    point = Point(at, "tokens")
    delta = replace(
        plain,
        branches={"p": Branch(Prompt(joint_softmax=False), point, point), **plain.branches},
        tensors={"p": {"token": token}, **plain.tensors},
    )
    block = vit64.model.get_submodule("blocks.1")
    attn = block.attn

    def forward(x, **_):
        prompts = block.norm1(token) if at == "blocks.1" else token
        both = torch.cat([x, prompts.expand(len(x), 4, 48)], 1)
        q, k, v = attn.qkv(both).reshape(*both.shape[:2], 3, 4, 12).permute(2, 0, 3, 1, 4)
        scores = q[:, :, :17] @ k.mT * 12**-0.5
        y = (
            scores[..., :17].softmax(-1) @ v[:, :, :17]
            + scores[..., 17:].softmax(-1) @ v[:, :, 17:]
        )
        return attn.proj(y.transpose(1, 2).flatten(2))

    images = vit64.example(2)
    attn.forward = forward
    try:
        wanted = run(vit64, plain, images)
    finally:
        del attn.forward
    assert error(run(vit64, delta, images), wanted) < 1e-13
    lowered = lower(vit64, delta, sites_of(vit64))
    assert error(run(vit64, lowered, images), wanted) < 1e-10


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("span", [(0, 2), (1, 1)])
def test_a_row_without_prompts_does_not_see_them(span, joint, vit64, random_delta, run, error):
    """Whatever is in the padding: masked tokens have no weight in any softmax."""
    plain = random_delta(vit64)
    length, images = 3, vit64.example(3)
    branch = Branch(Prompt(joint_softmax=joint), *(Point(f"blocks.{n}", "tokens") for n in span))
    token = noise(3, length, 48)
    mask = torch.full((3, length), Prompt.fill["mask"], dtype=torch.float64)
    mask[1, :2] = 0.0
    mask[2] = 0.0
    head = (plain.branches[plain.head], plain.tensors[plain.head])
    frozen = run(vit64, plain, images)
    for factor in (0.0, 1.0, 100.0):
        w = {"token": factor * token, "mask": mask}
        with torch.no_grad(), joined(vit64.model, [(branch, w), head], rows=3):
            found = vit64.model(images)
        assert error(found[:1], frozen[:1]) < 1e-14
        for row, count in ((1, 2), (2, 3)):
            own = {"token": factor * token[row, :count]}
            with torch.no_grad(), joined(vit64.model, [(branch, own), head]):
                alone = vit64.model(images[row : row + 1])
            assert error(found[row : row + 1], alone) < 1e-13


def test_prompts_of_blocks_and_of_attentions(vit64, random_delta, run, error):
    """At an attention the tokens are not normed and not read by the FFN."""
    delta = random_delta(vit64, deep_prompt(3, at="attn"))
    images = vit64.example(2)
    model = vit64.model
    handles = []
    for number, block in enumerate(model.blocks):
        token = delta.tensors[f"blocks.{number}.attn/prompt"]["token"]
        handles.append(
            block.attn.register_forward_pre_hook(
                lambda _, args, token=token: (
                    torch.cat([args[0], token.expand(2, 3, 48)], 1),
                    *args[1:],
                )
            )
        )
        handles.append(block.attn.register_forward_hook(lambda _, args, y: y[:, :17]))
    try:
        wanted = explicit(vit64, delta, images, lambda _, x: x)
    finally:
        for handle in handles:
            handle.remove()
    assert error(run(vit64, delta, images), wanted) < 1e-13
