"""UniPT, its pyramid and GPO against the formulas of their papers, written plainly with modules of torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from utune_deploy.merge.attach import attach
from utune_deploy.merge.errors import IncompatibleArtefact
from utune_deploy.merge.methods import unipt
from utune_deploy.merge.tuners.embedding import Embedding
from utune_deploy.merge.tuners.gpo import LOWEST, Gpo, sinusoids
from utune_deploy.merge.tuners.ladder import Ladder
from utune_deploy.merge.tuners.perceptron import Perceptron
from utune_deploy.merge.tuners.unipt import UniPT, fold_batch_norms
from utune_deploy.merge.tuners.unipt_pyramid import UniPTPyramid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from utune_deploy.merge.tuner import Tuner

QUICK = settings(deadline=None, derandomize=True, max_examples=200)
HALF = [torch.float16, torch.bfloat16]
LENGTHS = (5, 3)  # valid tokens of the two examples
MEMORY = (2, 4)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def random_weights(tuner: Tuner) -> dict[str, Tensor]:
    sizes = {"in": 6, "r": 4}
    w = {}
    for name, axes in tuner.shapes.items():
        value = noise(*(axis if isinstance(axis, int) else sizes[axis] for axis in axes))
        w[name] = 0.5 + value.abs() if name.endswith("_var") else value / max(1, value.dim()) ** 2
    return w


def valid(lengths: tuple[int, ...], room: int) -> Tensor:
    """A mask `[B, 1, room]`."""
    return (torch.arange(room) < torch.tensor(lengths)[:, None]).double()[:, None]


def taps(tuner: UniPT, room: int = 5) -> tuple[Tensor, ...]:
    """Random values for every tap of two examples."""
    x = [noise(2, room, wide) for wide in tuner.widths]
    x.append(noise(2, 1 if tuner.vector else room, tuner.anchor))
    x += [valid(LENGTHS, room)] * tuner.masked
    x += [F.one_hot(torch.tensor([4, 1]), room).double()[:, None]] * (tuner.own == "end")
    if tuner.crossed:
        x += [noise(2, 4, tuner.width), valid(MEMORY, 4)]
    return tuple(x)


def plain(
    t: UniPT, x: tuple[Tensor, ...], w: Mapping[str, Tensor], gate_bias: float = 0.0
) -> Tensor:
    """The paper's formula for one example after another, layer after layer, without any mask."""

    def linear(name: str, h: Tensor, norm: str) -> Tensor:
        y = F.linear(h, w[f"{name}_weight"], w[f"{name}_bias"])
        own = {part: w.get(f"{name}_norm_{part}") for part in ("weight", "bias", "mean", "var")}
        if norm == "layer":
            return F.layer_norm(y, y.shape[-1:], own["weight"], own["bias"], t.norm_eps)
        if norm == "batch":
            return F.batch_norm(y, own["mean"], own["var"], own["weight"], own["bias"], eps=1e-5)
        return y

    def attend(query: Tensor, rows: Tensor) -> Tensor:
        a = torch.relu(query @ rows.T)
        total = a.sum(1, keepdim=True)
        return a / (total + t.eps if t.guard == "add" else torch.clamp(total, min=t.eps)) @ rows

    def example(b: int) -> Tensor:
        depth = len(t.widths)
        rest = [value[b] for value in x[depth + 1 :]]
        keep = rest.pop(0)[0].bool() if t.masked else torch.ones(x[0].shape[1]).bool()
        end = rest.pop(0)[0].argmax() if t.own == "end" else None
        anchor = x[depth][b] if t.vector else x[depth][b][keep]
        first = torch.relu if t.relu_first else nn.Identity()
        q = linear("anchor", first(anchor), t.norm)
        found, evidence = [], []
        for number in range(depth):
            rows = linear(f"target{number}", first(x[number][b][keep]), t.norm)
            if t.crossed:
                memory = rest[0][rest[1][0].bool()]
                rows = rows + linear(f"cross{number}", attend(rows, memory), t.norm)
            taken = attend(q, rows)
            if t.own == "query":
                taken = taken + rows
            elif t.own != "none":
                taken = taken + rows[end if end is not None else 0]
            found.append(taken)
            evidence.append((q.mean(0) * rows.mean(0)) @ w["gate"] + gate_bias)
        c = torch.stack(evidence).softmax(0)
        y = torch.stack([share * taken for share, taken in zip(c, found, strict=True)]).sum(0)
        if t.project == "mlp":
            y = torch.relu(linear("project_in", y, "none"))
        if t.project != "none":
            y = q + linear("project", y, t.norm)
        if t.up != "none":
            y = torch.relu(y) if t.up == "relu" else y
            y = linear("up", y, "layer" if t.up_norm else "none")
        if t.onto == "anchor":
            y = anchor + y
        return {"first": y[:1], "mean": y.mean(0, keepdim=True), "tokens": y}[t.gives]

    rows = [example(b) for b in range(2)]
    longest = x[0].shape[1] if t.gives == "tokens" and not t.vector else 1
    return torch.stack([F.pad(y, (0, 0, 0, longest - len(y)), value=torch.nan) for y in rows])


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    """Equal where something is wanted: padded tokens may hold anything."""
    assert found.shape == wanted.shape
    asked = ~wanted.isnan()
    assert asked.any()
    difference = (found - wanted)[asked].abs().max()
    assert difference <= tolerance * wanted[asked].abs().max()


@st.composite
def networks(draw: Any, **fixed: Any) -> UniPT:
    """Any variant."""

    def one(name: str, *choices: Any) -> Any:
        return fixed[name] if name in fixed else draw(st.sampled_from(choices), label=name)

    vector = one("vector", False, True)
    onto = one("onto", "query", "anchor")
    project = "none" if onto == "anchor" else one("project", "linear", "mlp")
    up = one("up", "relu", "linear", "none")
    width = 4
    out = width if up == "none" else 5
    alike = [(6, 6, 6), (6,)]
    return UniPT(
        widths=one("widths", *alike, (6, 3)),
        anchor=out if onto == "anchor" else 7,
        width=width,
        out=out,
        norm=one("norm", "layer", "batch", "none"),
        norm_eps=one("norm_eps", 1e-5, 1e-3),
        relu_first=one("relu_first", False, True),
        vector=vector,
        own=one("own", *(() if vector else ("query",)), "first", "end", "none"),
        guard=one("guard", "add", "clamp"),
        eps=one("eps", 1e-8, 0.3),
        project=project,
        inner=3 if project == "mlp" else 0,
        up=up,
        up_norm=one("up_norm", False, True),
        onto=onto,
        gives=one("gives", "tokens", "first", "mean"),
        masked=one("masked", False, True),
        crossed=one("crossed", False, True),
    )


def require_formula(tuner: UniPT) -> None:
    w, x = random_weights(tuner), taps(tuner)
    wanted = plain(tuner, x, w)
    close(tuner.branch(x, w), wanted)
    close(tuner.branch(x, tuner.settle(w)), wanted)
    close(tuner.as_written(x, w), wanted)


@QUICK
@given(tuner=networks())
def test_the_branch_is_the_formula(tuner):
    """In its cheaper order, in its own order, and one example after another without masks."""
    require_formula(tuner)


@QUICK
@given(tuner=networks(vector=True, norm="none", crossed=False, widths=(6, 6, 6)))
def test_targets_that_are_never_made(tuner):
    assert tuner.contracted
    require_formula(tuner)


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
@pytest.mark.parametrize("own", ["query", "first", "end", "none"])
@pytest.mark.parametrize("guard", ["add", "clamp"])
@pytest.mark.parametrize("gives", ["tokens", "first", "mean"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_choice_with_every_other(norm, own, guard, gives, masked):
    shared: dict[str, Any] = {"own": own, "guard": guard, "gives": gives, "masked": masked}
    require_formula(UniPT((6, 6), 7, 4, 5, norm, project="mlp", inner=3, **shared))
    require_formula(
        UniPT((6, 3), 5, 4, 5, norm, project="none", up="linear", onto="anchor", **shared)
    )
    if own != "query":
        require_formula(UniPT((6, 6), 7, 4, 5, norm, vector=True, up_norm=True, **shared))


@QUICK
@given(tuner=networks(), shift=st.sampled_from([-20.0, 3.0]))
def test_a_bias_of_the_gate_cancels(tuner, shift):
    w, x = random_weights(tuner), taps(tuner)
    close(tuner.branch(x, w), plain(tuner, x, w, gate_bias=shift), 1e-11)


@QUICK
@given(tuner=networks(masked=True), room=st.sampled_from([5, 9]))
def test_padding_changes_nothing(tuner, room):
    """Whatever stands in padded tokens, and however many there are."""
    w, x = random_weights(tuner), taps(tuner)
    wanted = tuner.branch(x, w)
    depth = len(tuner.widths)

    def padded(value: Tensor, mask: Tensor, room: int) -> Tensor:
        longer = F.pad(value, (0, 0, 0, room - value.shape[1]))
        keep = F.pad(mask, (0, room - mask.shape[-1])).mT.bool()
        return torch.where(keep, longer, 1e3 * noise(*longer.shape))

    mask = x[depth + 1]
    changed = [padded(value, mask, room) for value in x[:depth]]
    changed.append(x[depth] if tuner.vector else padded(x[depth], mask, room))
    changed.append(F.pad(mask, (0, room - 5)))
    rest = list(x[depth + 2 :])
    if tuner.own == "end":
        changed.append(F.pad(rest.pop(0), (0, room - 5)))
    if tuner.crossed:
        memory, there = rest
        changed += [padded(memory, there, room), F.pad(there, (0, room - 4))]
    found = tuner.branch(tuple(changed), w)
    for row, length in enumerate(LENGTHS):
        count = length if tuner.gives == "tokens" and not tuner.vector else 1
        close(found[row, :count], wanted[row, :count], 1e-11)


def test_an_example_of_padding_alone_is_finite():
    tuner = UniPT((6, 6), 7, 4, 5, masked=True, gives="mean")
    x = (*taps(tuner)[:3], torch.zeros(2, 1, 5).double())
    assert torch.isfinite(tuner.branch(x, random_weights(tuner))).all()


# Batch norms


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_batch_norm_goes_into_the_layer_in_front(batched, dtype, error):
    layers = []
    for _ in range(3):
        norm = nn.BatchNorm1d(4).double().eval()
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.data.copy_(noise(4))
        norm.running_var.copy_(0.1 + noise(4).abs())
        layers.append(nn.Sequential(nn.Linear(6, 4).double(), norm).to(dtype))

    def weights(layer: nn.Sequential) -> dict[str, Tensor]:
        linear, norm = layer
        return {
            "up_weight": linear.weight,
            "up_bias": linear.bias,
            "up_norm_weight": norm.weight,
            "up_norm_bias": norm.bias,
            "up_norm_mean": norm.running_mean,
            "up_norm_var": norm.running_var,
        }

    w = [weights(layer) for layer in layers]
    stacked = {k: torch.stack([one[k] for one in w]) for k in w[0]} if batched else w[0]
    x = noise(3, 5, 6).to(dtype)
    with torch.no_grad():
        folded = fold_batch_norms(stacked)
        assert set(folded) == {"up_weight", "up_bias"}
        found = x @ folded["up_weight"].mT + folded["up_bias"][..., None, :]
        own = layers if batched else [layers[0]] * 3
        wanted = torch.stack([layer(x[b]) for b, layer in enumerate(own)])
    assert found.dtype == dtype
    assert error(found, wanted) < (1e-14 if dtype == torch.float64 else 1e-6)


def test_settled_tensors_hold_no_statistics():
    tuner = UniPT((6, 6), 7, 4, 5, "batch", project="mlp", inner=3, up_norm=True)
    served = tuner.settle(random_weights(tuner))
    norms = {name for name in served if "norm" in name}
    assert norms == {"up_norm_weight", "up_norm_bias"}
    assert served["target_weight"].shape == (2, 4, 6)
    unlike = replace(tuner, widths=(6, 3))
    assert {"target0_weight", "target1_weight"} <= set(unlike.settle(random_weights(unlike)))


# The pyramid


def published(
    t: UniPTPyramid, maps: list[Tensor], anchor: Tensor, w: Mapping[str, Tensor]
) -> list[Tensor]:
    """The targets' tokens by unfold, fold and interpolate, `[B, h w, C]` each."""
    tokens = []
    for number, (value, side) in enumerate(zip(maps, t.cells, strict=True)):
        weight, bias = w[f"cell{number}_weight"], w[f"cell{number}_bias"]
        wanted = torch.relu(F.conv2d(anchor, weight[..., None, None], bias))
        wanted = F.interpolate(wanted, scale_factor=side, mode="nearest")
        scores = torch.relu((wanted * value).sum(1, keepdim=True))
        cells = F.unfold(scores, side, stride=side)
        cells = cells / (cells.sum(1, keepdim=True) + t.eps) + 1 / side**2
        shares = F.fold(cells, value.shape[2:], side, stride=side)
        pooled = F.avg_pool2d(value * shares, side, divisor_override=1)
        tokens.append(pooled.flatten(2).mT)
    return tokens


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("gives", ["tokens", "mean", "first"])
@pytest.mark.parametrize("own", ["query", "none"])
def test_cells_are_the_paper_s(last, gives, own):
    """Nearest interpolation, products, cells of their own sum, and sum pooling; then UniPT on tokens."""
    pyramid = UniPTPyramid(
        (3, 6, 4), 7, 4, 5, "batch", own=own, gives=gives, cells=(4, 2, 1), channels_last=last
    )
    w = random_weights(pyramid)
    maps = [
        noise(2, wide, 2 * side, 3 * side) for wide, side in zip((3, 6, 4), (4, 2, 1), strict=True)
    ]
    anchor = noise(2, 7, 2, 3)
    x = (*maps, anchor)
    given_maps = tuple(value.movedim(1, -1) for value in x) if last else x
    tokens = (*published(pyramid, maps, anchor, w), anchor.flatten(2).mT)
    flat = UniPT((3, 6, 4), 7, 4, 5, "batch", own=own, gives=gives)
    wanted = plain(flat, tokens, w)
    close(pyramid.branch(given_maps, w), wanted)
    close(pyramid.branch(given_maps, pyramid.settle(w)), wanted)
    close(pyramid.as_written(given_maps, w), wanted)


def test_a_map_of_another_size_is_an_error():
    pyramid = UniPTPyramid((3,), 7, 4, 5, cells=(2,))
    with pytest.raises(IncompatibleArtefact, match="another size than the side network"):
        pyramid.branch((noise(2, 3, 5, 6), noise(2, 7, 2, 3)), random_weights(pyramid))


# Half precision


def settled(tuner: UniPT, w: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tuner.settle(w).items()}


def level(
    tuner: UniPT, anchor: float, target: float
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Taps and weights with `Q` about `anchor` and `T` about `target` everywhere."""
    w = random_weights(tuner)
    for name in w:
        if name.startswith(("anchor", "target")):
            w[name] = 0.02 * w[name]
    w["anchor_bias"] += anchor
    for number in range(len(tuner.widths)):
        w[f"target{number}_bias"] += target
    w["gate"] = 1e-5 * w["gate"]
    return tuple(0.5 * value for value in taps(tuner)), w


VARIANTS = {
    "tokens": UniPT((6, 6), 7, 4, 5, "none"),
    "unlike widths": UniPT((6, 3), 7, 4, 5, "none", gives="mean"),
    "contracted": UniPT((6, 6), 7, 4, 5, "none", vector=True, own="first"),
}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("guard", ["add", "clamp"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_row_of_zeros_gives_zero(name, guard, dtype):
    """No target is like the anchor: what is left is the own row, and `A T` is 0, not NaN."""
    tuner = replace(VARIANTS[name], guard=guard)
    x, w = level(tuner, -2.0, 2.0)
    served = settled(tuner, w, dtype)
    found = tuner.branch(tuple(value.to(dtype) for value in x), served)
    assert found.dtype == dtype
    assert torch.isfinite(found).all()
    wanted = tuner.branch(x, w)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]
    close(found.double(), wanted, tolerance)
    bare = replace(tuner, own="none", up="none", out=4)
    served = {n: t for n, t in served.items() if not n.startswith("up")}
    left = bare.branch(tuple(value.to(dtype) for value in x), served)
    only = {**served, "project_weight": torch.zeros_like(served["project_weight"])}
    assert torch.equal(left, bare.branch(tuple(value.to(dtype) for value in x), only))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", VARIANTS)
def test_sums_run_in_float32(name, dtype):
    """`300 * 300` is beyond half precision, and so is the sum over tokens."""
    tuner = VARIANTS[name]
    x, w = level(tuner, 300.0, 300.0)
    found = tuner.branch(tuple(value.to(dtype) for value in x), settled(tuner, w, dtype))
    assert torch.isfinite(found).all()
    tolerance = 1e-2 if dtype == torch.float16 else 1e-1
    close(found.double(), tuner.branch(x, w), tolerance)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("values", [-1.0, 1.0, 300.0])
def test_cells_in_half_precision(values, dtype):
    """Cells without any score, and with scores whose sum overflows."""
    pyramid = UniPTPyramid((3, 6), 7, 4, 5, "none", cells=(4, 2))
    w = random_weights(pyramid)
    for number in range(2):
        w[f"cell{number}_bias"] += abs(values)
    w |= {n: 0.02 * t for n, t in w.items() if n.startswith("target") or n == "gate"}
    x = (noise(2, 3, 8, 12) + values, noise(2, 6, 4, 6) + values, 0.1 * noise(2, 7, 2, 3))
    served = settled(pyramid, w, dtype)
    found = pyramid.branch(tuple(value.to(dtype) for value in x), served)
    assert torch.isfinite(found).all()
    close(found.double(), pyramid.branch(x, w), 2e-2 if dtype == torch.float16 else 1.5e-1)


@pytest.mark.parametrize("dtype", HALF)
def test_the_length_of_an_embedding_in_half_precision(dtype):
    x = 300 * noise(2, 1, 64)
    found = Embedding(64, unit=True).branch(x.to(dtype), {})
    assert found.dtype == dtype
    close(found.double(), x / x.norm(dim=-1, keepdim=True), 1e-2)


# GPO


def recurrent(tuner: Gpo, w: Mapping[str, Tensor]) -> nn.GRU:
    gru = nn.GRU(tuner.positions, tuner.hidden, batch_first=True, bidirectional=True).double()
    with torch.no_grad():
        for name, parameter in gru.named_parameters():
            parameter.copy_(w[name.replace("_l0", "")])
    return gru


@torch.no_grad()
def test_the_table_is_the_published_run():
    """One packed batch of all lengths, and a softmax in which padding has -10000."""
    tuner = Gpo(9, 6, 4, masked=True)
    w = random_weights(tuner)
    lengths = torch.arange(1, 10)
    places = sinusoids(9, 6).double().expand(9, 9, 6)
    packed = nn.utils.rnn.pack_padded_sequence(
        places, lengths, batch_first=True, enforce_sorted=False
    )
    both, _ = nn.utils.rnn.pad_packed_sequence(recurrent(tuner, w)(packed)[0], batch_first=True)
    scores = (both[..., :4] + both[..., 4:]) / 2 @ w["score"]
    scores = scores.masked_fill(torch.arange(9) >= lengths[:, None], LOWEST)
    table = tuner.settle(w)["table"]
    assert table.shape == (10, 9)
    assert not table[0].any()
    close(table[1:], (scores / 0.1).softmax(1))
    full = replace(tuner, masked=False).settle(w)["table"]
    assert torch.equal(full, table[-1:])


def test_positions_are_sines_and_cosines():
    found = sinusoids(5, 4)
    assert found.dtype == torch.float32
    for place in range(5):
        angles = torch.tensor([place, place / 100.0])
        wanted = torch.stack([angles.sin(), angles.cos()], 1).flatten()
        assert torch.allclose(found[place], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_gpo_sums_sorted_values(masked):
    """In lists of numbers, channel by channel; padding may hold anything."""
    tuner = Gpo(5, 6, 4, masked=masked)
    w = random_weights(tuner)
    table = tuner.settle(w)["table"].tolist()
    lengths = (5, 3, 1) if masked else (5, 5, 5)
    x, mask = noise(3, 5, 2), valid(lengths, 5)
    x = torch.where(mask.mT > 0, x, 1e3 * noise(3, 5, 2).abs())
    found = tuner.branch((x, mask) if masked else x, w)
    assert found.shape == (3, 1, 2)
    for b, length in enumerate(lengths):
        weights = table[length] if masked else table[0]
        assert sum(weights) == pytest.approx(1.0)
        for channel in range(2):
            ordered = sorted(x[b, :length, channel].tolist(), reverse=True)
            wanted = sum(a * v for a, v in zip(weights, ordered, strict=False))
            assert found[b, 0, channel].item() == pytest.approx(wanted, rel=1e-12)


def test_gpo_does_not_mind_the_order_of_tokens():
    tuner = Gpo(5, 6, 4)
    w, x = random_weights(tuner), noise(2, 5, 3)
    assert torch.equal(tuner.branch(x, w), tuner.branch(x[:, torch.randperm(5)], w))


# The ladder and heads of several layers


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gives", ["tokens", "first", "mean"])
@torch.no_grad()
def test_the_ladder_is_blocks_of_torch(masked, gives):
    """`nn.TransformerEncoderLayer`, norm first, between gated sums; for valid tokens alone."""
    tuner = Ladder((6, 6, 3), 8, 2, 12, 5, gives=gives, masked=masked)
    w = random_weights(tuner)
    w["gate1"], w["gate2"] = torch.tensor([0.03, -0.05]).double()

    def block(number: int) -> nn.Module:
        layer = nn.TransformerEncoderLayer(
            8, 2, 12, 0.0, "gelu", tuner.eps, batch_first=True, norm_first=True
        )
        names = {
            "qkv": ("self_attn.in_proj_weight", "self_attn.in_proj_bias"),
            "proj": ("self_attn.out_proj.weight", "self_attn.out_proj.bias"),
            "fc1": ("linear1.weight", "linear1.bias"),
            "fc2": ("linear2.weight", "linear2.bias"),
            "norm1": ("norm1.weight", "norm1.bias"),
            "norm2": ("norm2.weight", "norm2.bias"),
        }
        held = {
            theirs: w[f"block{number}_{own}_{part}"]
            for own, both in names.items()
            for theirs, part in zip(both, ("weight", "bias"), strict=True)
        }
        layer.double().load_state_dict(held)
        return layer.train()  # in eval mode torch takes another path

    x = [noise(2, 5, wide) for wide in tuner.widths]
    found = tuner.branch((*x, valid(LENGTHS, 5)) if masked else tuple(x), w)
    for b, length in enumerate(LENGTHS if masked else (5, 5)):
        down = [
            F.linear(state[b : b + 1, :length], w[f"down{n}_weight"], w[f"down{n}_bias"])
            for n, state in enumerate(x)
        ]
        side = down[0]
        for number in (1, 2):
            share = torch.sigmoid(w[f"gate{number}"] / 0.1)
            side = block(number)(share * down[number] + (1 - share) * side)
        side = F.layer_norm(side, (8,), w["norm_weight"], w["norm_bias"], tuner.eps)
        y = F.linear(side, w["up_weight"], w["up_bias"])[0]
        wanted = {"tokens": y, "first": y[:1], "mean": y.mean(0, keepdim=True)}[gives]
        close(found[b, : len(wanted)], wanted)


@pytest.mark.parametrize("eps", [0.0, 1e-12])
@torch.no_grad()
def test_a_perceptron_is_modules_of_torch(eps):
    tuner = Perceptron((5, 3), "gelu", eps)
    w = random_weights(tuner)
    y = x = noise(2, 1, 6)
    for number, taken in enumerate((5, 3, 4)):
        y = F.linear(y, w[f"layer{number}_weight"], w[f"layer{number}_bias"])
        if number == 2:
            break
        y = F.gelu(y)
        if eps:
            own = (w[f"layer{number}_norm_weight"], w[f"layer{number}_norm_bias"])
            y = F.layer_norm(y, (taken,), *own, eps)
    close(tuner.branch(x, w), y)
    assert tuner.answer_width({"r": 4, "in": 6}) == 4


# Training


@pytest.mark.parametrize("family", ["vit", "resnet", "convnext"])
@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_training_moves_everything_but_statistics(family, norm, host, sites_of):
    backbone = host(family, double=False)
    tuned = attach(backbone, unipt(6, norm=norm), classes=3, sites=sites_of(backbone))
    before = {
        (name, key): tensor.detach().clone()
        for name, _, weights in tuned.parts()
        for key, tensor in weights.items()
    }
    optimizer = torch.optim.SGD(tuned.trainable(), lr=1e-3)
    images = backbone.example(4)
    for _ in range(2):
        optimizer.zero_grad()
        tuned(images).square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in tuned.trainable())
        optimizer.step()
    still = {
        f"{name}/{key}"
        for name, _, weights in tuned.parts()
        for key, tensor in weights.items()
        if torch.equal(tensor, before[name, key])
    }
    statistics = {
        f"{name}/{key}" for name, key in before if key.endswith(("_norm_mean", "_norm_var"))
    }
    assert still == statistics
    assert bool(statistics) == (norm == "batch")
    assert all(p.grad is None for p in backbone.model.parameters())


# Refused


PLAIN: dict[str, Any] = {"widths": (6, 6), "anchor": 7, "width": 4, "out": 5}
MAPS = {**PLAIN, "cells": (2, 1)}
SIDES = {"widths": (6, 6), "width": 4, "heads": 2, "hidden": 8, "out": 5}


@pytest.mark.parametrize(
    ("kind", "fields", "sentence"),
    [
        (UniPT, {**PLAIN, "widths": ()}, "a width among"),
        (UniPT, {**PLAIN, "width": 0}, "a width among"),
        (UniPT, {**PLAIN, "out": 5.0}, "a width among"),
        (UniPT, {**PLAIN, "norm": "group"}, "norm 'group' is not one of"),
        (UniPT, {**PLAIN, "gives": "last"}, "gives 'last' is not one of"),
        (UniPT, {**PLAIN, "eps": 0.0}, "eps 0.0 is not above zero"),
        (UniPT, {**PLAIN, "norm_eps": -1.0}, "norm_eps -1.0 is not above zero"),
        (UniPT, {**PLAIN, "project": "mlp"}, "inner 0 is not a number from 1"),
        (UniPT, {**PLAIN, "inner": 3}, "inner 3 is not"),
        (UniPT, {**PLAIN, "vector": True}, "has no own row among the tokens"),
        (UniPT, {**PLAIN, "up": "none"}, "without up it gives width 4, not out 5"),
        (UniPT, {**PLAIN, "onto": "anchor"}, "has its width, and no projection"),
        (UniPT, {**PLAIN, "onto": "anchor", "project": "none"}, "has its width, and no projection"),
        (UniPT, {**PLAIN, "project": "none"}, "goes without a projection"),
        (UniPT, {**PLAIN, "masked": 1}, "masked 1 is neither true nor false"),
        (UniPTPyramid, PLAIN, "are not one number from 1 per target"),
        (UniPTPyramid, {**MAPS, "cells": (2, 0)}, "are not one number from 1 per target"),
        (UniPTPyramid, {**MAPS, "masked": True}, "has no masks, no memory and no vector"),
        (UniPTPyramid, {**MAPS, "own": "first"}, "has no masks, no memory and no vector"),
        (UniPTPyramid, {**MAPS, "channels_last": 1}, "channels_last 1 is neither true nor false"),
        (Ladder, {**SIDES, "widths": (6,)}, "with two widths at least"),
        (Ladder, {**SIDES, "heads": 3}, "not a multiple of 3 heads"),
        (Ladder, {**SIDES, "gives": "last"}, "is not tokens, first or mean"),
        (Ladder, {**SIDES, "activation": "mish"}, "activation 'mish' is not one of"),
        (Ladder, {**SIDES, "eps": 0}, "eps 0 is not above zero"),
        (Gpo, {"tokens": 0}, "are not numbers from 1"),
        (Gpo, {"tokens": 4, "positions": 3}, "the second even"),
        (Gpo, {"tokens": 4, "masked": "no"}, "masked 'no' is neither true nor false"),
        (Perceptron, {"hidden": ()}, "are not numbers from 1"),
        (Perceptron, {"hidden": (4,), "norm_eps": -1.0}, "norm_eps -1.0 is below zero"),
        (Embedding, {"size": 0}, "size 0 is not a number from 1"),
        (Embedding, {"size": 4, "unit": 1}, "unit 1 is neither true nor false"),
        (Embedding, {"size": 4, "eps": -1.0}, "eps -1.0 is below zero"),
    ],
)
def test_settings_out_of_range(kind, fields, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        kind(**fields)
