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

from utune_deploy.merge.backbone import create, wrap
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.merge.importers import read
from utune_deploy.merge.pickles import read_pickle


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


def test_a_file_of_text_is_no_checkpoint(vit, tmp_path):
    (tmp_path / "train.py").write_text("import torch\n")
    with pytest.raises(IncompatibleArtefact, match="no torch checkpoint"):
        read("timm", tmp_path / "train.py", vit)


def test_a_folder_stands_for_the_weights_in_it(vit, tmp_path):
    tensors = {name: t.contiguous() for name, t in vit.model.state_dict().items()}
    tensors |= {"head.weight": torch.ones(3, 48), "head.bias": torch.zeros(3)}
    with pytest.raises(UsageError, match="this is a folder"):
        read("timm", tmp_path, vit)
    save_file(tensors, tmp_path / "model.safetensors")
    assert list(read("timm", tmp_path, vit).branches) == ["head/head"]


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


def alone(path, vit, trained=()):
    """A file without the frozen tensors, as a filter on `requires_grad` leaves it."""
    saved = torch.load(path, weights_only=False)
    frozen = {n for n in vit.model.state_dict() if not vit.is_classifier(n)} - set(trained)
    for part in ("backbone_weight", "model"):
        if part in saved:
            saved[part] = {k: t for k, t in saved[part].items() if k not in frozen}
    torch.save(saved, path)
    return path


TUNERS = {
    "adapter.ln1.weight": (4, 48), "adapter.ln1.bias": (4,), "adapter.ln2.weight": (48, 4),
    "adapter.ln2.bias": (48,), "attn.lora.lora_a.weight": (2, 48), "attn.lora.lora_b.weight": (144, 2),
    "attn.prefix.prefix_key": (1, 3, 48), "attn.prefix.prefix_value": (1, 3, 48),
    "attn.qkv.bias": (144,), "mlp.fc2.bias": (48,),
}  # fmt: skip


def same(found, wanted):
    """Two readings are one."""
    return found.branches == wanted.branches and all(
        torch.equal(tensor, found.tensors[branch][name])
        for branch, tensors in wanted.tensors.items()
        for name, tensor in tensors.items()
    )


@pytest.mark.parametrize("part", ["", "adapter", "attn.", "bias"])
def test_what_was_trained_alone(part, vit, tmp_path):
    """Without the trunk, and of tuned biases without the other ones; a head alone is a probe."""
    kept = (k for k in TUNERS if part and part in k)
    if part == "bias":
        kept = ("attn.qkv.bias", "mlp.fc2.bias")
    trained = {f"blocks.1.{k}": torch.randn(TUNERS[k]) for k in kept}
    file = modelscope_file(tmp_path / "c.pth", vit, **trained)
    wanted = read("modelscope", file, vit)
    found = read("modelscope", alone(file, vit, trained), vit)
    assert same(found, wanted)
    assert set(found.notes) - set(wanted.notes) == {"trunk"}
    held = sum(name in vit.model.state_dict() for name in trained)
    assert found.notes["trunk"].startswith(f"the file holds {held or 'no'}")
    saved = torch.load(file)
    flat = {f"model.head.{k}": v for k, v in saved["head_weight"].items()}
    torch.save({f"model.backbone.{k}": v for k, v in saved["backbone_weight"].items()} | flat, file)
    assert same(read("modelscope", file, vit), wanted)


def test_what_was_trained_alone_fits_no_other_backbone(vit, tmp_path):
    file = alone(modelscope_file(tmp_path / "c.pth", vit, x=torch.ones(1)), vit)
    with pytest.raises(IncompatibleArtefact, match="no known tuner") as caught:
        read("modelscope", file, vit)
    assert "load the backbone" in caught.value.details["do"]


def test_a_part_of_the_trunk(vit, tmp_path):
    """It was not left out by a filter: nothing trains a weight of the trunk."""
    file = alone(modelscope_file(tmp_path / "c.pth", vit), vit, ["blocks.0.attn.qkv.weight"])
    with pytest.raises(IncompatibleArtefact, match="lacks frozen tensors"):
        read("modelscope", file, vit)


SHAPES = {
    "blocks.0.prompt.prompt_token": [(), (3, 48), (2, 3, 48)],
    "blocks.0.attn.prefix.prefix_key": [(), (3, 48)],
    "sidetune.alpha": [(2,)],
    "sidetune.side.fc.weight": [(), (1, 48, 64)],
    "head.weight": [(4, 48), (48,)],  # the head behind it reads 48
}


@pytest.mark.parametrize(("key", "shape"), [(k, s) for k, shapes in SHAPES.items() for s in shapes])
def test_tensors_of_another_shape(key, shape, vit, tmp_path):
    changes = {key: torch.zeros(shape)}
    if "prefix" in key:
        changes["blocks.0.attn.prefix.prefix_value"] = torch.zeros(1, 3, 48)
    if "sidetune" in key:
        for n, (out, given) in enumerate(((16, 3), (16, 16), (32, 16), (64, 32)), start=1):
            changes[f"sidetune.side.conv{n}.0.weight"] = torch.zeros(out, given, 3, 3)
            changes |= {
                f"sidetune.side.conv{n}.1.{p}": torch.zeros(out) for p in ("weight", "bias")
            }
        changes = {
            "sidetune.alpha": torch.zeros(()),
            "sidetune.side.fc.weight": torch.zeros(48, 64),
            **changes,
        }
    file = modelscope_file(tmp_path / "c.pth", vit, **changes)
    with pytest.raises(IncompatibleArtefact) as caught:
        read("modelscope", file, vit)
    assert str(file) in caught.value.details["where"]


@pytest.mark.parametrize("bias", [(), (2,)])
@pytest.mark.parametrize("weight", [(48,), (3, 48)])
def test_a_head_of_another_shape(weight, bias, vit, tmp_path):
    file = modelscope_file(tmp_path / "c.pth", vit, **{"head.weight": torch.zeros(48, 48)})
    head = {"fc.weight": torch.zeros(weight), "fc.bias": torch.zeros(bias)}
    torch.save({**torch.load(file), "head_weight": head}, file)
    with pytest.raises(IncompatibleArtefact) as caught:
        read("modelscope", file, vit)
    assert str(file) in caught.value.details["where"]


@pytest.mark.parametrize("average", ["model_ema", "state_dict_ema", "ema"])
def test_moving_averages(average, vit, tmp_path):
    """Alone they are read; beside the last step they are chosen by a person."""
    file = modelscope_file(tmp_path / "c.pth", vit)
    state = torch.load(file)
    torch.save({average: state, "epoch": 3}, file)
    wanted = read("modelscope", file, vit)
    last = {**state, "head_weight": {"fc.weight": torch.zeros(3, 48)}}
    torch.save({"model": last, average: state}, file)
    with pytest.raises(UsageError, match="several states") as caught:
        read("modelscope", file, vit)
    assert f"--set weights=model or --set weights={average}" in caught.value.details["do"]
    assert same(read("modelscope", file, vit, {"weights": average}), wanted)
    assert (
        not read("modelscope", file, vit, {"weights": "model"}).tensors["head/head"]["weight"].any()
    )
    with pytest.raises(UsageError, match="no such weights"):
        read("modelscope", file, vit, {"weights": "best"})


def test_safetensors(vit, tmp_path):
    file = modelscope_file(tmp_path / "c.pth", vit)
    state = torch.load(file)
    flat = {f"model.backbone.{k}": t for k, t in state["backbone_weight"].items()}
    flat |= {f"model.head.{k}": t for k, t in state["head_weight"].items()}
    save_file(flat, tmp_path / "c.safetensors")
    assert same(read("modelscope", tmp_path / "c.safetensors", vit), read("modelscope", file, vit))


@pytest.mark.parametrize("classes", [["a", "b", "c"], ("a", "b", "c"), np.array(["a", "b", "c"])])
def test_names_of_classes(classes, vit, tmp_path):
    file = modelscope_file(tmp_path / "c.pth", vit)
    torch.save({**torch.load(file), "CLASSES": classes}, file)
    assert read("modelscope", file, vit).labels == ("a", "b", "c")
    torch.save({**torch.load(file, weights_only=False), "CLASSES": {"a": 0}}, file)
    with pytest.raises(IncompatibleArtefact, match="are no list"):
        read("modelscope", file, vit)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_named_with_its_file(value, vit, tmp_path):
    down = torch.full((2, 48), value)
    tuner = {
        "blocks.0.attn.lora.lora_a.weight": down,
        "blocks.0.attn.lora.lora_b.weight": torch.ones(144, 2),
    }
    file = modelscope_file(tmp_path / "c.pth", vit, **tuner)
    with pytest.raises(IncompatibleArtefact, match="NaN or Inf") as caught:
        read("modelscope", file, vit)
    assert caught.value.details["where"] == f"{file}: blocks.0.attn.qkv/lora/down"


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
