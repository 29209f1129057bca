"""Tuned timm checkpoints as deltas: every tensor comes back, and what is cut says by how much."""

from __future__ import annotations

import argparse
import copy

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from utune_deploy.merge.attach import Tuned, restore
from utune_deploy.merge.backbone import wrap
from utune_deploy.merge.delta import load_delta, save_delta
from utune_deploy.merge.differences import (
    Ranks,
    carry,
    low_rank,
    say_truncation,
    subtract,
    total_error,
)
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.merge.fold import fold, refusals
from utune_deploy.merge.importers.settings import Settings
from utune_deploy.merge.importers.timm import read_timm

FAMILIES = ("vit", "dinov3", "eva", "beit", "deit", "swin", "swinv2", "convnext", "resnet")
CLASSES = 5


def plain(backbone, tensors, classes=CLASSES):
    """The tensors in a model that timm alone makes."""
    model = timm.create_model(
        backbone.identity.architecture, **backbone.identity.arguments, num_classes=classes
    )
    model.to(next(backbone.model.parameters()).dtype).load_state_dict(dict(tensors), strict=True)
    return model.eval()


def tuned(backbone, moves=lambda name: True, seed=0, size=0.1):
    """The backbone's tensors with noise where `moves` says so, and a head of its own."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in backbone.model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if backbone.is_classifier(name):
            shape = (CLASSES, *tensor.shape[1:])
            found[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
        elif not tensor.is_floating_point():
            found[name] = tensor + 9
        elif not moves(name):
            found[name] = tensor
        else:
            scale = noise.abs() if name.endswith("running_var") else noise
            found[name] = tensor + size * scale
        if tensor.is_floating_point():
            found[name] = found[name].to(tensor.dtype)
    return found


def read(backbone, tensors, tmp_path, **settings):
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "tuned.safetensors")
    given = Settings({key: str(value) for key, value in settings.items()})
    foreign = read_timm(tmp_path / "tuned.safetensors", backbone, given)
    given.require_used()
    return foreign


@torch.no_grad()
def logits(model, images):
    return model(images)


# Exactly


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_fine_tune_comes_back(family, host, error, tmp_path):
    backbone = host(family)
    tensors = tuned(backbone)
    delta = read(backbone, tensors, tmp_path).delta("full", backbone)
    save_delta(tmp_path / "full.safetensors", delta)
    delta = load_delta(tmp_path / "full.safetensors")
    images = backbone.example(2)
    wanted = logits(plain(backbone, tensors), images)
    assert error(logits(backbone.model, images)[:, :CLASSES], wanted) > 1e-2
    assert error(logits(restore(backbone, delta), images), wanted) < 1e-9
    assert refusals(delta, backbone) == []
    merged = fold(delta, backbone).tensors
    assert error(logits(plain(backbone, merged), images), wanted) < 1e-9
    batch_norms = {n.rpartition(".")[0] for n in tensors if n.endswith("running_var")}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and name.rpartition(".")[0] not in batch_norms:
            assert error(merged[name], tensor) < 1e-12, name


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_float32_comes_back_bit_by_bit(family, host, tmp_path):
    """Float64 holds the difference of two float32 numbers well enough."""
    backbone = host(family, double=False)
    tensors = tuned(backbone, moves=lambda name: "bn" not in name and "downsample" not in name)
    delta = read(backbone, tensors, tmp_path).delta("full", backbone)
    merged = fold(delta, backbone).tensors
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            assert torch.equal(merged[name], tensor), name


def test_the_backbone_is_not_changed(host, tmp_path):
    backbone = host("resnet")
    before = copy.deepcopy(backbone.model.state_dict())
    read(backbone, tuned(backbone), tmp_path, rank=2)
    assert all(torch.equal(t, before[n]) for n, t in backbone.model.state_dict().items())


# Which branch


@pytest.mark.parametrize(
    ("family", "moves", "kinds"),
    [
        ("vit", lambda n: False, set()),
        ("vit", lambda n: n.endswith(".bias"), {"bias"}),
        ("resnet", lambda n: n.endswith(".bias"), {"bias"}),
        ("convnext", lambda n: n.endswith(".bias"), {"bias"}),
        ("vit", lambda n: "norm" in n, {"norm"}),
        ("convnext", lambda n: "norm" in n, {"norm"}),
        ("swin", lambda n: "norm" in n and n.endswith("weight"), {"norm"}),
        ("resnet", lambda n: "bn" in n, {"gain"}),
        ("resnet", lambda n: "running" in n, {"gain"}),
        ("vit", lambda n: n in ("cls_token", "pos_embed"), {"difference"}),
        ("swin", lambda n: n.endswith("bias_table"), {"difference"}),
        ("beit", lambda n: n.endswith(("q_bias", "v_bias")), {"difference"}),
        ("vit", lambda n: n.endswith("qkv.weight"), {"difference"}),
        ("resnet", lambda n: n.endswith("conv1.weight"), {"difference"}),
    ],
)
def test_kinds(family, moves, kinds, host, run, error, tmp_path):
    backbone = host(family)
    tensors = tuned(backbone, moves)
    delta = read(backbone, tensors, tmp_path).delta("a", backbone)
    found = {branch.tuner.kind for branch in delta.branches.values()} - {"head"}
    assert found == kinds
    assert len(delta.heads) == len(backbone.classifiers)
    wanted = logits(plain(backbone, tensors), backbone.example(2))
    assert error(run(backbone, delta, backbone.example(2)), wanted) < 1e-9


def test_only_what_changed_has_a_branch(vit64, tmp_path):
    moved = "blocks.1.mlp.fc1.weight"
    foreign = read(vit64, tuned(vit64, lambda n: n == moved), tmp_path)
    assert list(foreign.branches) == [f"{moved}/difference", "head/head"]
    assert foreign.notes["changed"].startswith("1 of ")
    assert "cannot share a batch" in foreign.notes["alone"]


class ActNorm(nn.LayerNorm):
    """A norm that does more than its parent."""

    act = nn.GELU()

    def forward(self, x):
        return self.act(super().forward(x))


def test_a_norm_with_an_activation_is_whole(vit64, run, error):
    arguments = vit64.identity.arguments
    model = copy.deepcopy(vit64.model)
    norm = ActNorm(48, eps=1e-6).double()
    norm.load_state_dict(model.norm.state_dict())
    model.norm = norm
    backbone = wrap(model, vit64.identity.architecture, arguments)
    shifts = {f"norm.{k}": torch.full((48,), 0.1, dtype=torch.float64) for k in ("weight", "bias")}
    carried = carry(backbone, shifts)
    assert list(carried.branches) == ["norm.weight/difference", "norm.bias/difference"]
    assert carried.whole == tuple(carried.branches)


def test_what_no_branch_can_carry(vit64):
    with pytest.raises(IncompatibleArtefact, match="not the backbone's"):
        carry(vit64, {"blocks.9.norm1.weight": torch.ones(48)})
    shared = copy.deepcopy(vit64.model)
    shared.blocks[1].mlp.fc1.weight = shared.blocks[0].mlp.fc1.weight
    backbone = wrap(shared, vit64.identity.architecture, vit64.identity.arguments)
    names = [f"blocks.{i}.mlp.fc1.weight" for i in (0, 1)]
    with pytest.raises(IncompatibleArtefact, match="shared by two modules"):
        carry(backbone, {name: torch.ones(192, 48) for name in names})


def test_a_module_held_twice_has_one_difference(error):
    """CoaT calls one convolution in all blocks of a stage; its state dict names it in each."""
    torch.manual_seed(0)
    model = timm.create_model("coat_tiny", num_classes=CLASSES).double()
    backbone = wrap(model, "coat_tiny", {})
    shifts = {
        name: torch.full_like(tensor, 0.01)
        for name, tensor in model.state_dict().items()
        if name.startswith(("cpe1.", "serial_blocks1.0.cpe.", "serial_blocks1.1.cpe."))
    }
    assert len(shifts) == 6
    carried = carry(backbone, shifts)
    assert len(carried.branches) == 2
    wanted = copy.deepcopy(model)
    wanted.load_state_dict({n: t + shifts.get(n, 0) for n, t in model.state_dict().items()})
    images = backbone.example(1)
    tuned_model = Tuned(backbone, carried.branches, carried.tensors)
    assert not torch.equal(logits(model, images), logits(wanted, images))
    assert error(logits(tuned_model, images), logits(wanted, images)) < 1e-12
    last = list(shifts)[-1]
    with pytest.raises(IncompatibleArtefact, match="second name"):
        carry(backbone, {**shifts, last: 2 * shifts[last]})


def test_a_negative_variance_is_refused(host):
    with pytest.raises(IncompatibleArtefact, match="negative variance") as caught:
        carry(host("resnet"), {"bn1.running_var": torch.full((64,), -9.0)})
    assert "bn1.running_var" in str(caught.value)


def test_subtract_leaves_out_what_is_equal():
    frozen = {"a": torch.tensor([1.0]), "b": torch.tensor([1.0]), "n": torch.tensor(3)}
    tensors = {"a": torch.tensor([1.0]), "b": torch.tensor([0.9]), "n": torch.tensor(4)}
    found = subtract(frozen, tensors)
    assert list(found) == ["b"]
    assert found["b"].dtype == torch.float64
    assert float(found["b"]) == float(torch.tensor(0.9)) - 1.0


# A low rank


def test_the_error_is_the_tail_of_the_singular_values():
    matrix = torch.randn(7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    singular = torch.linalg.svdvals(matrix)
    for rank in (1, 3, 7, 99):
        down, up, error = low_rank(matrix, Ranks(rank))
        assert down.shape == (min(rank, 7), 12)
        assert up.shape == (7, min(rank, 7))
        tail = float(singular[rank:].square().sum().sqrt())
        assert float((matrix - up @ down).norm()) == pytest.approx(tail, abs=1e-12)
        assert error == pytest.approx(tail / float(matrix.norm()), abs=1e-12)
        assert (up.gather(0, up.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_low_rank_has_no_more_ranks_than_it_needs():
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(20, 2, generator=generator, dtype=torch.float64) @ torch.ones(2, 9).double()
    down, up, error = low_rank(thin, Ranks(8))
    assert down.shape == (1, 9)
    assert error < 1e-12
    assert torch.allclose(up @ down, thin, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("energy", "rank"), [(0.5, 1), (16 / 21, 1), (0.77, 2), (20 / 21, 2), (0.96, 3), (1.0, 3)]
)
def test_energy(energy, rank):
    matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    down, _, error = low_rank(matrix, Ranks(energy=energy))
    assert len(down) == rank
    assert 1 - error**2 >= energy - 1e-12


@pytest.mark.parametrize(
    "settings", [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}]
)
def test_ranks_out_of_range(settings):
    with pytest.raises(UsageError):
        Ranks(**settings)


@pytest.mark.parametrize("family", ["vit", "swin", "convnext", "resnet"])
def test_a_low_rank_is_what_it_says(family, host, run, error, tmp_path):
    """The folded delta is base plus the nearest matrices, and the notes have their errors."""
    backbone = host(family)
    tensors = tuned(backbone, lambda n: n.endswith("weight") and "norm" not in n and "bn" not in n)
    foreign = read(backbone, tensors, tmp_path, rank=2)
    delta = foreign.delta("low", backbone)
    merged = fold(delta, backbone).tensors
    frozen = backbone.model.state_dict()
    changed = subtract(frozen, {k: v for k, v in tensors.items() if not backbone.is_classifier(k)})
    carried = carry(backbone, changed, ranks=Ranks(2))
    cuts = {cut.tensor: cut for cut in carried.truncations}
    linear = {  # linear layers, and convolutions of one group
        f"{path}.weight"
        for path, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }
    lost, whole = 0.0, 0.0
    for name, shift in changed.items():
        gap = tensors[name] - merged[name]
        if name not in cuts:
            assert float(gap.abs().max()) < 1e-12
            continue
        singular = torch.linalg.svdvals(shift.flatten(1))
        tail = float(singular[2:].norm())
        assert float(gap.norm()) == pytest.approx(tail, rel=1e-9)
        assert cuts[name].error == pytest.approx(tail / float(shift.norm()), rel=1e-9)
        lost, whole = lost + tail**2, whole + float(shift.norm()) ** 2
    assert {n for n in cuts if n not in linear} == set()
    assert len(cuts) == len([n for n in changed if n in linear]) > 2
    assert total_error(carried.truncations) == pytest.approx((lost / whole) ** 0.5)
    assert foreign.notes["truncation"] == say_truncation(carried.truncations)
    assert f"{len(cuts)} tensors at rank 2" in foreign.notes["truncation"]
    wanted = logits(plain(backbone, merged), backbone.example(2))
    assert error(run(backbone, delta, backbone.example(2)), wanted) < 1e-9


def test_all_ranks_are_exact(vit64, run, error, tmp_path):
    tensors = tuned(vit64, lambda n: n.endswith("weight") and "norm" not in n)
    delta = read(vit64, tensors, tmp_path, energy=1.0).delta("all", vit64)
    assert {b.tuner.kind for b in delta.branches.values()} == {"bottleneck", "head"}
    wanted = logits(plain(vit64, tensors), vit64.example(2))
    assert error(run(vit64, delta, vit64.example(2)), wanted) < 1e-9


# Files


@pytest.mark.parametrize(
    ("prefix", "container"),
    [
        ("", None),
        ("module.", "state_dict"),
        ("model.", "model"),
        ("_orig_mod.", "state_dict_ema"),
        ("module._orig_mod.", "model_ema"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".bin"])
def test_containers_and_prefixes(prefix, container, suffix, vit, tmp_path):
    tensors = {f"{prefix}{k}": v for k, v in tuned(vit, lambda n: n.endswith(".bias")).items()}
    saved = tensors if container is None else {container: tensors, "epoch": 3}
    saved |= {"args": argparse.Namespace(lr=0.1)} if container else {}
    path = tmp_path / f"checkpoint{suffix}"
    torch.save(saved, path)
    found = read_timm(path, vit, Settings())
    assert {branch.tuner.kind for branch in found.branches.values()} == {"bias", "head"}


def test_a_moving_average_is_asked_for_by_name(vit, tmp_path):
    tensors = {seed: tuned(vit, seed=seed) for seed in (1, 2)}
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"state_dict": tensors[1], "state_dict_ema": tensors[2]}, path)
    with pytest.raises(UsageError, match="several state dicts") as caught:
        read_timm(path, vit, Settings())
    assert "--set weights=state_dict_ema" in caught.value.details["do"]
    for name, seed in (("state_dict", 1), ("state_dict_ema", 2)):
        found = read_timm(path, vit, Settings({"weights": name}))
        assert torch.equal(found.tensors["head/head"]["weight"], tensors[seed]["head.weight"])
        assert found.notes["weights"] == name
    with pytest.raises(UsageError, match="no such weights"):
        read_timm(path, vit, Settings({"weights": "model_ema"}))


@pytest.mark.parametrize(
    ("change", "sentence", "name"),
    [
        (lambda t: t.pop("blocks.0.norm1.bias"), "lacks tensors", "blocks.0.norm1.bias"),
        (lambda t: t.update({"novel": torch.ones(1)}), r"has tensors that", "novel"),
        (lambda t: t.update({"cls_token": torch.ones(1, 1, 3)}), "another shape", "cls_token"),
        (lambda t: t["norm.bias"].fill_(torch.nan), "NaN", "norm.bias"),
        (lambda t: t.pop("head.weight"), "no classifier", "head.weight"),
        (
            lambda t: t.update({"head.weight": torch.ones(5, 9)}),
            "not the backbone's",
            "head.weight",
        ),
        (lambda t: t.update({"module.norm.bias": torch.ones(48)}), "twice", "norm.bias"),
    ],
)
def test_what_does_not_fit_is_named(change, sentence, name, vit, tmp_path):
    tensors = {k: v.clone() for k, v in tuned(vit).items()}
    change(tensors)
    with pytest.raises(IncompatibleArtefact, match=sentence) as caught:
        read(vit, tensors, tmp_path)
    assert name in str(caught.value)


def test_another_architecture_is_refused(vit, swin, tmp_path):
    with pytest.raises(IncompatibleArtefact, match="lacks tensors"):
        read(vit, tuned(swin), tmp_path)


def test_whole_numbers_that_differ_are_refused(vit, tmp_path):
    model = copy.deepcopy(vit.model)
    model.register_buffer("order", torch.arange(4))
    backbone = wrap(model, vit.identity.architecture, vit.identity.arguments)
    tensors = tuned(vit)
    read(backbone, {**tensors, "order": torch.arange(4)}, tmp_path)
    with pytest.raises(IncompatibleArtefact, match="whole numbers differ") as caught:
        read(backbone, {**tensors, "order": torch.arange(4).flip(0)}, tmp_path)
    assert "order" in str(caught.value)


def test_constants_of_the_geometry_may_be_in_the_file(swin, tmp_path):
    """Older timm saved them; they are the backbone's own, or the file is refused."""
    name = "layers.0.blocks.1.attn.relative_position_index"
    index = dict(swin.model.named_buffers())[name]
    tensors = tuned(swin)
    assert name not in tensors
    assert len(read(swin, {**tensors, name: index.clone()}, tmp_path).branches) > 1
    with pytest.raises(IncompatibleArtefact, match=r"has tensors that .* lacks"):
        read(swin, {**tensors, name: index.flip(0)}, tmp_path)


def test_a_checkpoint_in_half_precision_says_so(vit, tmp_path):
    """Rounding is part of what the file holds, and is carried as it is."""
    tensors = {k: v.half() for k, v in tuned(vit, lambda n: False).items()}
    foreign = read(vit, tensors, tmp_path)
    assert "float16" in foreign.notes["dtype"]
    merged = fold(foreign.delta("a", vit), vit, dtype=torch.float16).tensors
    assert all(torch.equal(merged[name], tensor) for name, tensor in tensors.items())
    assert "dtype" not in read(vit, tuned(vit), tmp_path).notes


def test_a_classifier_without_a_bias(vit64, run, error, tmp_path):
    tensors = tuned(vit64)
    bias = tensors.pop("head.bias")
    delta = read(vit64, tensors, tmp_path).delta("a", vit64)
    assert not delta.tensors["head/head"]["bias"].any()
    wanted = logits(
        plain(vit64, {**tensors, "head.bias": torch.zeros_like(bias)}), vit64.example(1)
    )
    assert error(run(vit64, delta, vit64.example(1)), wanted) < 1e-9


def test_files_that_are_no_checkpoint(vit, tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        read_timm(tmp_path / "none.pth", vit, Settings())
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 1}, tmp_path / "empty.pth")
    for name in ("list.pth", "empty.pth"):
        with pytest.raises(IncompatibleArtefact, match="no state dict"):
            read_timm(tmp_path / name, vit, Settings())
