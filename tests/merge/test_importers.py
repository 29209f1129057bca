"""What readers refuse, what they ask for, and what they read of files made here.

`tests/deploy/test_golden.py` holds them to the original implementations' own files and outputs.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
from collections import defaultdict
from datetime import datetime
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from utune_deploy.merge.attach import restore
from utune_deploy.merge.backbone import create, wrap
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.merge.importers import read
from utune_deploy.merge.pickles import read_pickle
from utune_deploy.merge.tuner import Point


class Exploit:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_code_in_a_checkpoint_is_never_run(vit, tmp_path, capsys):
    with (tmp_path / "evil.pth").open("wb") as file:
        pickle.dump({"backbone_weight": Exploit()}, file)
    with pytest.raises(IncompatibleArtefact, match="would run code"):
        read("modelscope", tmp_path / "evil.pth", vit)
    torch.save({"backbone_weight": Exploit()}, tmp_path / "evil2.pth")
    with pytest.raises(IncompatibleArtefact, match="would run code"):
        read("modelscope", tmp_path / "evil2.pth", vit)
    assert "never" not in capsys.readouterr().out


BESIDE = {
    "arguments": argparse.Namespace(lr=0.1, inner=argparse.Namespace(x=1)),
    "numpy's number": np.float64(0.9),
    "numpy's array": np.arange(3.0),
    "a path": Path("runs/best"),
    "a dictionary with a default": defaultdict(list, loss=[1.0]),
    "a time": datetime(2026, 1, 1),
}


@pytest.mark.parametrize("what", BESIDE)
def test_what_training_scripts_leave_beside_tensors_is_read(what, tmp_path):
    torch.save({"model": {"w": torch.ones(2)}, "beside": BESIDE[what]}, tmp_path / "c.pth")
    saved = read_pickle(tmp_path / "c.pth")
    assert torch.equal(saved["model"]["w"], torch.ones(2))
    if what == "a path":
        assert str(saved["beside"]) == str(BESIDE[what])
    else:
        assert np.array_equal(saved["beside"], BESIDE[what])


def test_the_refusal_names_the_class(tmp_path):
    torch.save({"a": Fraction(1, 2)}, tmp_path / "c.pth")
    with pytest.raises(IncompatibleArtefact) as caught:
        read_pickle(tmp_path / "c.pth")
    assert caught.value.details["found"] == "fractions.Fraction"


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_a_damaged_checkpoint_is_no_traceback(kind, tmp_path):
    """Bytes changed and cut off anywhere: tensors, or an error that a user can act on."""
    saved = {"model": {"a": torch.randn(3), "b": torch.ones(2, 2)}, "epoch": 3}
    path, chance = tmp_path / "c.pth", random.Random(1)
    if kind == "plain":
        path.write_bytes(pickle.dumps({"args": argparse.Namespace(x=[1.0, "y"])}))
    else:
        saved["args"] = argparse.Namespace(x=1)
        torch.save(saved, path, _use_new_zipfile_serialization=kind == "zip")
    whole, refused = path.read_bytes(), []
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        if chance.random() < 0.1:
            damaged = damaged[: chance.randrange(len(damaged))]
        path.write_bytes(damaged)
        try:
            read_pickle(path)
        except IncompatibleArtefact as answer:
            refused.append(str(answer))
    assert refused
    assert all(str(path) in answer for answer in refused)


def modelscope_file(path, vit, features=48, **changes):
    trunk = {k: v for k, v in vit.model.state_dict().items() if not k.startswith("head.")}
    head = {"fc.weight": torch.randn(3, features), "fc.bias": torch.randn(3)}
    torch.save({"backbone_weight": {**trunk, **changes}, "head_weight": head}, path)
    return path


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda f: {"model": f},
        lambda f: {"model_state_dict": f, "CLASSES": None},
        lambda f: {**f, "backbone_weight": {f"module._orig_mod.{k}": v for k, v in f["backbone_weight"].items()}},
        lambda f: {**f, "backbone_weight": {f"backbone.{k}": v for k, v in f["backbone_weight"].items()}},
        lambda f: {**f, "backbone_weight": {k: v.half() for k, v in f["backbone_weight"].items()}},
    ],
    ids=["model", "model_state_dict", "compiled", "backbone", "half"],
)  # fmt: skip
def test_a_checkpoint_is_read_however_it_was_wrapped(wrapped, vit, tmp_path):
    file = modelscope_file(tmp_path / "c.pth", vit)
    saved = torch.load(file)
    torch.save(wrapped(saved), file)
    found = read("modelscope", file, vit)
    head = found.tensors[next(n for n, b in found.branches.items() if b.tuner.answers)]
    assert torch.equal(head["weight"], saved["head_weight"]["fc.weight"])
    assert len(found.branches) == 1


@pytest.mark.parametrize("layer", [{"linear.weight": 0}, {"fc.weight": 0, "fc.scale": 0}])
def test_a_head_that_is_no_linear_layer_is_refused_by_name(layer, vit, tmp_path):
    file = modelscope_file(tmp_path / "c.pth", vit)
    saved = torch.load(file)
    torch.save({**saved, "head_weight": {k: torch.ones(3, 48) for k in layer}}, file)
    with pytest.raises(IncompatibleArtefact, match="no linear layer"):
        read("modelscope", file, vit)


def test_tuners_alone_lack_the_trunk(vit, tmp_path):
    file = modelscope_file(tmp_path / "c.pth", vit)
    torch.save({**torch.load(file), "backbone_weight": {"x": torch.ones(1)}}, file)
    with pytest.raises(IncompatibleArtefact, match="lacks frozen tensors"):
        read("modelscope", file, vit)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("blocks.0.attn.qkv.weight", torch.zeros(144, 48), "frozen tensors are not the backbone's"),
        ("blocks.0.novel.weight", torch.zeros(2), "tensors of no known tuner"),
        ("blocks.0.attn.lora.lora_a.weight", torch.zeros(2, 48), "a tuner is not whole"),
    ],
)
def test_a_checkpoint_that_does_not_fit(key, value, sentence, vit, tmp_path):
    path = modelscope_file(tmp_path / "m.pth", vit, **{key: value})
    with pytest.raises(IncompatibleArtefact, match=sentence) as caught:
        read("modelscope", path, vit)
    assert key.rsplit(".", 2)[0] in str(caught.value)


def test_two_heads_are_their_product(vit, tmp_path, error):
    inner = {"head.weight": torch.randn(5, 48), "head.bias": torch.randn(5)}
    path = modelscope_file(tmp_path / "m.pth", vit, features=5, **inner)
    delta = read("modelscope", path, vit).delta("task", vit)
    features = torch.randn(4, 48)
    outer = torch.load(path, weights_only=True)["head_weight"]
    wanted = (features @ inner["head.weight"].T + inner["head.bias"]) @ outer[
        "fc.weight"
    ].T + outer["fc.bias"]
    head = delta.tensors[delta.head]
    assert (
        error(
            features.double() @ head["weight"].T.double() + head["bias"].double(), wanted.double()
        )
        < 1e-5
    )


def test_missing_files_and_sources(vit, tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        read("modelscope", tmp_path / "none.pth", vit)
    with pytest.raises(UsageError, match="no PEFT adapter"):
        read("peft", tmp_path, vit)
    with pytest.raises(UsageError, match="unknown source"):
        read("novel", tmp_path, vit)
    (tmp_path / "damaged.pth").write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(IncompatibleArtefact):
        read("modelscope", tmp_path / "damaged.pth", vit)


def test_peft_without_any_head_is_refused(tmp_path, vit):
    trunk = wrap(vit.model, vit.identity.architecture, vit.identity.arguments)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    )
    save_file(
        {
            "base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.zeros(2, 48),
            "base_model.model.blocks.0.attn.qkv.lora_B.weight": torch.zeros(144, 2),
            "base_model.model.somewhere.weight": torch.zeros(2),
        },
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(IncompatibleArtefact, match="no known place"):
        read("peft", tmp_path, trunk)


def spans(delta):
    return {
        name: (branch.tap.module, branch.add.module, len(delta.tensors[name]["token"]))
        for name, branch in delta.branches.items()
        if branch.tuner.kind == "prompt"
    }


@pytest.mark.parametrize(
    ("lengths", "wanted"),
    [
        ([2, 2, 2], {"0/prompt": (0, 0, 2), "1/prompt": (1, 1, 2), "2/prompt": (2, 2, 2)}),
        ([3, 0, 0], {"0/prompt": (0, 2, 3)}),
        ([3, 0, 3], {"0/prompt": (0, 1, 3), "2/prompt": (2, 2, 3)}),
        (
            [3, 2, 1],
            {
                "0/prompt.0": (0, 2, 1),
                "0/prompt.1": (0, 0, 2),
                "1/prompt.0": (1, 2, 1),
                "1/prompt.1": (1, 1, 1),
                "2/prompt": (2, 2, 1),
            },
        ),
    ],
    ids=str,
)
def test_prompts_stay_until_a_block_replaces_them(lengths, wanted, vit, tmp_path):
    prompts = {
        f"blocks.{i}.prompt.prompt_token": torch.randn(1, n, 48) for i, n in enumerate(lengths) if n
    }
    path = modelscope_file(tmp_path / "m.pth", vit, **prompts)
    found = spans(read("modelscope", path, vit).delta("task", vit))
    assert found == {
        f"blocks.{name}": (f"blocks.{first}", f"blocks.{last}", count)
        for name, (first, last, count) in wanted.items()
    }


@pytest.mark.parametrize("lengths", [[0, 2, 2], [2, 4, 1]], ids=str)
def test_prompts_that_overwrite_image_tokens_are_refused(lengths, vit, tmp_path):
    prompts = {
        f"blocks.{i}.prompt.prompt_token": torch.randn(1, n, 48) for i, n in enumerate(lengths) if n
    }
    path = modelscope_file(tmp_path / "m.pth", vit, **prompts)
    with pytest.raises(IncompatibleArtefact, match="overwrite image tokens"):
        read("modelscope", path, vit)


def test_prompts_in_a_pooled_mean_are_refused(vit, tmp_path):
    arguments = {**vit.identity.arguments, "global_pool": "avg"}
    pooled = create(vit.identity.architecture, arguments)
    prompts = {"blocks.0.prompt.prompt_token": torch.randn(1, 2, 48)}
    path = modelscope_file(tmp_path / "m.pth", pooled, **prompts)
    with pytest.raises(IncompatibleArtefact, match="enter the pooled mean"):
        read("modelscope", path, pooled)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sidetune.side.novel": torch.zeros(2)}, "not the fcn4"),
        ({"sidetune.alpha": torch.zeros(())}, "not the fcn4"),
        ({"sidetune.side.features.0.weight": torch.zeros(64, 3, 11, 11)}, "not the alexnet"),
    ],
)
def test_a_side_network_that_is_not_whole(change, sentence, vit, tmp_path):
    path = modelscope_file(tmp_path / "m.pth", vit, **change)
    with pytest.raises(IncompatibleArtefact, match=sentence):
        read("modelscope", path, vit)


# V-PETL


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
        (PATT, {"blocks.1.attn.qkv_adapter.2.weight": torch.ones(144, 4)}, "the size of its mode"),
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
