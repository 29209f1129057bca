"""Readers against the original implementations' own files and outputs, and what they refuse."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from utune_deploy.merge.attach import Tuned, restore
from utune_deploy.merge.backbone import load, wrap
from utune_deploy.merge.delta import load_delta, save_delta
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.merge.importers import read

GOLDEN = Path(
    os.environ.get("UTUNE_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden")
)
needs_golden = pytest.mark.skipif(
    not (GOLDEN / "README.md").is_file(),
    reason=f"no golden data at {GOLDEN}; set UTUNE_GOLDEN to their folder",
)
MODELSCOPE = (
    "ms_lora_r4",
    "ms_adapter_r6",
    "ms_prefix_l5",
    "ms_prompt_deep_p4",
    "ms_bitfit",
    "ms_combo_adapter_lora_prefix",
)
PEFT = ("peft_vit/lora_qkv", "peft_vit/lora_patterns_rslora", "peft_vit/lora_qkv_save_head")
GEOMETRY = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
ARCHITECTURE = "vit_base_patch16_224"


def backbone_of(case: str, dtype=torch.float32):
    folder = GOLDEN / case if case.startswith(("ms_", "peft_swin")) else GOLDEN / "peft_vit"
    config = json.loads((folder / "config.json").read_text())
    if case.startswith("ms_"):
        arguments = {k: config["original_config"]["model"]["backbone"][k] for k in GEOMETRY}
    else:
        arguments = {k: v for k, v in config["arguments"].items() if k != "num_classes"}
    architecture = "swin_tiny_patch4_window7_224" if "swin" in case else ARCHITECTURE
    found = load(architecture, arguments, folder / "backbone.safetensors")
    return found if dtype == torch.float32 else wrap(found.model.to(dtype), architecture, arguments)


def source_of(case: str):
    return (
        ("modelscope", GOLDEN / case / "checkpoint.pth")
        if case.startswith("ms_")
        else ("peft", GOLDEN / case)
    )


@needs_golden
@pytest.mark.parametrize("case", [*MODELSCOPE, *PEFT, "peft_swin_lora_qkv"])
def test_the_original_answers(case, error, run, tmp_path):
    backbone = backbone_of(case)
    source, path = source_of(case)
    save_delta(tmp_path / "d.safetensors", read(source, path, backbone).delta("task", backbone))
    delta = load_delta(tmp_path / "d.safetensors")
    io = load_file(GOLDEN / case / "io.safetensors")
    restore(backbone, delta)  # the fingerprint and every place fit
    assert error(run(backbone, delta, io["input.imgs"]), io["expected.logits"]) <= 2e-5
    double = backbone_of(case, torch.float64)
    with torch.no_grad():
        found = Tuned(double, delta.branches, delta.tensors)(io["input.imgs"].double())
    assert error(found, io["expected64.logits"]) <= 1e-9


@needs_golden
def test_class_names_come_along():
    case = "ms_combo_adapter_lora_prefix"
    foreign = read(*source_of(case), backbone_of(case))
    assert foreign.labels == tuple(f"class_{i}" for i in range(13))


@needs_golden
@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("ms_sidetune_fcn4", "side networks cannot be read yet"),
        ("ms_prompt_shallow_p4", "shallow or unequal prompts"),
        ("peft_vit/dora_qkv_fc1", "this variant of LoRA"),
        ("peft_vit/ia3", "this kind of PEFT adapter"),
        ("peft_vit/loha_qkv_fc2", "this kind of PEFT adapter"),
        ("peft_vit/oft_qkv", "this kind of PEFT adapter"),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(case, sentence):
    with pytest.raises(IncompatibleArtefact, match=sentence):
        read(*source_of(case), backbone_of(case))


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


def modelscope_file(path, vit, features=48, **changes):
    trunk = {k: v for k, v in vit.model.state_dict().items() if not k.startswith("head.")}
    head = {"fc.weight": torch.randn(3, features), "fc.bias": torch.randn(3)}
    torch.save({"backbone_weight": {**trunk, **changes}, "head_weight": head}, path)
    return path


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
