"""V-PETL's checkpoints: what is read of files made here, what is asked for, and what is refused."""

from __future__ import annotations

import argparse

import pytest
import torch

from utune_deploy.merge.attach import restore
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.merge.importers import read
from utune_deploy.merge.tuner import Point

from .test_importers import Exploit, alone, same

PATT = {
    "blocks.1.attn.qkv_adapter.0.weight": torch.ones(4, 48) / 48,
    "blocks.1.attn.qkv_adapter.0.bias": torch.zeros(4),
    "blocks.1.attn.qkv_adapter.2.weight": torch.ones(96, 4),
    "blocks.1.attn.qkv_adapter.2.bias": torch.arange(96.0),
}
ADAPTER = {
    f"blocks.1.mlp.adaptmlp.{side}_proj.{kind}": torch.ones(*shape)
    for side, rows, columns in (("down", 3, 48), ("up", 48, 3))
    for kind, shape in (("weight", (rows, columns)), ("bias", (rows,)))
}
FFN = {"ffn_option": "parallel", "ffn_adapter_scalar": "0.1"}


def vpetl_file(path, vit, tuners, args=None, **changes):
    trunk = {k: v for k, v in vit.model.state_dict().items() if not vit.is_classifier(k)}
    fc = {"fc.0.weight": torch.randn(3, 48, 1, 1, 1), "fc.0.bias": torch.randn(3)}
    saved = {"model": {**trunk, **tuners, **fc, **changes}, "epoch": 3}
    if args is not None:
        saved["args"] = args
    torch.save(saved, path)
    return path


@pytest.mark.parametrize("kind", ["namespace", "dictionary", "settings"])
def test_mode_and_scale_come_from_the_arguments_or_a_person(kind, vit, tmp_path):
    values = {"att_prefix_mode": "patt_qv", "att_prefix_scale": 0.3}
    args = {"namespace": argparse.Namespace(**values), "dictionary": values, "settings": None}[kind]
    path = vpetl_file(tmp_path / "v.pth", vit, PATT, args)
    given = {k: str(v) for k, v in values.items()} if kind == "settings" else {}
    foreign = read("vpetl", path, vit, given)
    weights = foreign.tensors["blocks.1.attn.qkv/patt"]
    assert weights["scale"] == 0.3
    assert weights["up"].shape == (144, 4)
    assert not weights["up"][48:96].any()
    assert weights["up_bias"].tolist() == [*range(48), *[0] * 48, *range(48, 96)]
    assert foreign.delta("task", vit).provenance["att_prefix_mode"] == "patt_qv"
    restore(vit, foreign.delta("task", vit))


def test_what_a_file_does_not_say_is_asked_for_by_name(vit, tmp_path):
    path = vpetl_file(tmp_path / "v.pth", vit, {**PATT, **ADAPTER})
    given = {}
    for name, value in {
        "att_prefix_mode": "patt_kv", "att_prefix_scale": "0.2", **FFN,
    }.items():  # fmt: skip
        with pytest.raises(UsageError, match=f"does not say its {name}") as caught:
            read("vpetl", path, vit, given)
        assert f"--set {name}=VALUE" in str(caught.value)
        given[name] = value
    foreign = read("vpetl", path, vit, given)
    assert foreign.branches["blocks.1.mlp/adaptformer"].tap == Point("blocks.1.mlp", "input")
    with pytest.raises(UsageError, match="means nothing for this file"):
        read("vpetl", path, vit, {**given, "novel": "1"})
    with pytest.raises(UsageError, match="cannot be read"):
        read("vpetl", path, vit, {**given, "att_prefix_scale": "much"})
    with pytest.raises(UsageError, match="not one that can be carried"):
        read("vpetl", path, vit, {**given, "ffn_option": "diagonal"})


@pytest.mark.parametrize("mode", ["patt_qk", "prefix_kv", "prefix_qk", "prompt_qk"])
@pytest.mark.parametrize("tuners", [{}, PATT], ids=["without", "with"])
def test_broken_modes_are_refused_with_the_reason(mode, tuners, vit, tmp_path):
    path = vpetl_file(tmp_path / "v.pth", vit, tuners, {"att_prefix_mode": mode})
    with pytest.raises(IncompatibleArtefact, match="cannot be carried") as caught:
        read("vpetl", path, vit)
    assert mode in str(caught.value)
    assert "released code" in str(caught.value)


@pytest.mark.parametrize(
    ("tuners", "changes", "sentence"),
    [
        (
            {**PATT, "blocks.1.attn.qkv_adapter.2.weight": torch.ones(144, 4)},
            {"blocks.1.attn.qkv_adapter.2.bias": torch.ones(144)},
            "the size of its mode",
        ),
        ({**PATT}, {"blocks.0.attn.qkv.weight": torch.zeros(144, 48)}, "not the backbone's"),
        ({**PATT}, {"blocks.1.attn.novel": torch.zeros(2)}, "of no known tuner"),
        ({k: v for k, v in PATT.items() if "2.bias" not in k}, {}, "not whole"),
        ({**ADAPTER, "blocks.1.mlp.adaptmlp.novel": torch.zeros(1)}, {}, "not whole"),
    ],
)
def test_a_vpetl_checkpoint_that_does_not_fit(tuners, changes, sentence, vit, tmp_path):
    args = {"att_prefix_mode": "patt_kv", "att_prefix_scale": 0.2, **FFN}
    path = vpetl_file(tmp_path / "v.pth", vit, tuners, args, **changes)
    with pytest.raises(IncompatibleArtefact, match=sentence):
        read("vpetl", path, vit)


def test_what_vpetl_trained_alone(vit, tmp_path):
    args = {"att_prefix_mode": "patt_kv", "att_prefix_scale": 0.2, **FFN}
    for tuners in ({**PATT, **ADAPTER}, {}):
        file = vpetl_file(tmp_path / "v.pth", vit, tuners, args)
        wanted = read("vpetl", file, vit)
        found = read("vpetl", alone(file, vit), vit)
        assert same(found, wanted)
        assert "no frozen tensors" in found.notes["trunk"]


def test_a_norm_in_an_adapter_asks_for_its_place(vit, tmp_path):
    norm = {
        f"blocks.1.mlp.adaptmlp.adapter_layer_norm_before.{kind}": torch.ones(48)
        for kind in ("weight", "bias")
    }
    args = {"att_prefix_mode": "patt_kv", **FFN}
    path = vpetl_file(tmp_path / "v.pth", vit, {**ADAPTER, **norm}, args)
    with pytest.raises(UsageError, match="ffn_adapter_layernorm_option"):
        read("vpetl", path, vit)
    for place in ("in", "out"):
        foreign = read("vpetl", path, vit, {"ffn_adapter_layernorm_option": place})
        assert foreign.branches["blocks.1.mlp/adaptformer"].tuner.norm == place


def test_an_object_inside_a_namespace_is_not_made(vit, tmp_path, capsys):
    path = vpetl_file(tmp_path / "v.pth", vit, {}, {"att_prefix_mode": Exploit()})
    with pytest.raises(IncompatibleArtefact, match="would run code"):
        read("vpetl", path, vit)
    assert "never" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tuners", "changes"),
    [
        (PATT, {"blocks.1.attn.qkv_adapter.0.weight": torch.zeros(48)}),
        (PATT, {"blocks.1.attn.qkv_adapter.2.bias": torch.zeros(97)}),
        (ADAPTER, {"blocks.1.mlp.adaptmlp.scale": torch.zeros(2)}),
        (PATT, {"fc.0.weight": torch.zeros(48)}),
    ],
    ids=["patt", "bias", "scale", "head"],
)
def test_vpetl_tensors_of_another_shape(tuners, changes, vit, tmp_path):
    args = {"att_prefix_mode": "patt_kv", "att_prefix_scale": 0.2, **FFN}
    path = vpetl_file(tmp_path / "v.pth", vit, tuners, args, **changes)
    with pytest.raises(IncompatibleArtefact) as caught:
        read("vpetl", path, vit)
    assert str(path) in caught.value.details["where"]


@pytest.mark.parametrize("args", [["--x"], "--x", 3])
def test_arguments_that_are_no_arguments(args, vit, tmp_path):
    path = vpetl_file(tmp_path / "v.pth", vit, PATT, args)
    read("vpetl", path, vit, {"att_prefix_mode": "patt_kv", "att_prefix_scale": "0.2"})


def test_settings_of_the_tuners_inside_the_arguments(vit, tmp_path):
    inner = argparse.Namespace(att_prefix_mode="patt_kv", att_prefix_scale=0.3, **FFN)
    args = argparse.Namespace(tuning_config=inner)
    path = vpetl_file(tmp_path / "v.pth", vit, {**PATT, **ADAPTER}, args)
    assert read("vpetl", path, vit).tensors["blocks.1.attn.qkv/patt"]["scale"] == 0.3


@pytest.mark.parametrize("option", ["att_prefix", "ffn_adapt"])
def test_a_tuner_of_the_run_that_was_not_saved(option, vit, tmp_path):
    args = {"att_prefix_mode": "patt_kv", "att_prefix_scale": 0.2, **FFN}
    path = vpetl_file(tmp_path / "v.pth", vit, {**PATT, **ADAPTER}, {**args, option: True})
    read("vpetl", path, vit)
    path = vpetl_file(tmp_path / "v.pth", vit, {}, {**args, option: True})
    with pytest.raises(IncompatibleArtefact, match="does not hold") as caught:
        read("vpetl", path, vit)
    assert option in caught.value.details["found"]


def test_constants_of_the_geometry_are_left(vit, tmp_path):
    args = {"att_prefix_mode": "patt_kv", "att_prefix_scale": 0.2}
    constants = {"blocks.1.attn_mask": torch.zeros(2, 2)}
    constants["blocks.1.attn.relative_position_index"] = torch.zeros(2, dtype=torch.long)
    read("vpetl", vpetl_file(tmp_path / "v.pth", vit, PATT, args, **constants), vit)
