"""Against code that this project did not write: modelscope's tuners and HF PEFT, from stored runs.

The data stand beside the repository, or where UTUNE_GOLDEN points; their README says how they were
made. Keys are mapped by hand here, so that a mistake in an importer cannot hide.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from utune_deploy.merge.backbone import Backbone, load, wrap
from utune_deploy.merge.bank import stack
from utune_deploy.merge.delta import Delta
from utune_deploy.merge.errors import UsageError
from utune_deploy.merge.fold import fold
from utune_deploy.merge.lower import lower
from utune_deploy.merge.methods import head_branch
from utune_deploy.merge.mixed import Mixed
from utune_deploy.merge.preprocessing import Preprocessing
from utune_deploy.merge.tuner import Branch, Point
from utune_deploy.merge.tuners.bias import Bias
from utune_deploy.merge.tuners.bottleneck import Bottleneck
from utune_deploy.merge.tuners.prefix import Prefix
from utune_deploy.merge.tuners.prompt import Prompt

if TYPE_CHECKING:
    from torch import Tensor

GOLDEN = Path(
    os.environ.get("UTUNE_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden")
)
pytestmark = pytest.mark.skipif(
    not (GOLDEN / "README.md").is_file(),
    reason=f"no golden data at {GOLDEN}; set UTUNE_GOLDEN to their folder",
)

FLOAT64, FLOAT32 = 1e-9, 2e-5  # the README's measure: largest difference over largest value

FOLDS = {"ms_lora_r4", "ms_bitfit", "peft_vit/lora_qkv", "peft_swin_lora_qkv"}
ON_VIT = (
    "ms_lora_r4",
    "ms_adapter_r6",
    "ms_prefix_l5",
    "ms_prompt_deep_p4",
    "ms_bitfit",
    "ms_combo_adapter_lora_prefix",
    "peft_vit/lora_qkv",
)
CASES = (*ON_VIT, "peft_swin_lora_qkv")

Joined = dict[str, tuple[Branch, dict[str, "Tensor"]]]


def serial(tuner: Any, point: str) -> Branch:
    return Branch(tuner, Point.parse(point), Point.parse(point))


def lora(module: str, a: Tensor, b: Tensor, scale: float) -> tuple[Branch, dict[str, Tensor]]:
    branch = Branch(
        Bottleneck("identity", bias=False), Point(module, "input"), Point(module, "output")
    )
    return branch, {"down": a, "up": b, "scale": torch.tensor(scale)}


def modelscope(case: str, frozen: dict[str, Tensor]) -> tuple[Joined, dict[str, Tensor]]:
    """Branches and head of `VisionTransformerPETL`, in its order of execution."""
    config = json.loads((GOLDEN / case / "config.json").read_text())
    saved = torch.load(GOLDEN / case / "checkpoint.pth", weights_only=True)
    if config["layout"] == "a":
        trunk, head = saved["backbone_weight"], saved["head_weight"]
    else:
        trunk = {k[15:]: v for k, v in saved.items() if k.startswith("model.backbone.")}
        head = {k[11:]: v for k, v in saved.items() if k.startswith("model.head.")}
    taken = set(frozen)
    found: Joined = {}
    for name, tensor in frozen.items():
        if not torch.equal(tensor, trunk[name]):
            assert name.endswith(".bias")
            module = name.removesuffix(".bias")
            shift = trunk[name].double() - tensor.double()
            found[name] = serial(Bias(), f"{module}:output"), {"shift": shift}
    for block in range(config["original_config"]["model"]["backbone"]["depth"]):
        at = f"blocks.{block}"

        def take(name: str, at: str = at) -> Tensor:
            taken.add(f"{at}.{name}")
            return trunk[f"{at}.{name}"]

        if f"{at}.prompt.prompt_token" in trunk:
            token = take("prompt.prompt_token")[0]
            found[f"{at}.prompt"] = serial(Prompt(), f"{at}:tokens"), {"token": token}
        if f"{at}.attn.lora.lora_a.weight" in trunk:
            scale = config["not_in_state_dict"]["lora_scale"]
            a, b = take("attn.lora.lora_a.weight"), take("attn.lora.lora_b.weight")
            found[f"{at}.lora"] = lora(f"{at}.attn.qkv", a, b, scale)
        if f"{at}.attn.prefix.prefix_key" in trunk:
            key, value = take("attn.prefix.prefix_key")[0], take("attn.prefix.prefix_value")[0]
            branch = serial(Prefix(joint_softmax=True), f"{at}.attn:keys")
            found[f"{at}.prefix"] = branch, {"key": key, "value": value}
        if f"{at}.adapter.ln1.weight" in trunk:
            assert config["not_in_state_dict"]["activation"] == "gelu (erf)"
            found[f"{at}.adapter"] = (
                serial(Bottleneck("gelu", bias=True), f"{at}.mlp:output"),
                {
                    "down": take("adapter.ln1.weight"),
                    "down_bias": take("adapter.ln1.bias"),
                    "up": take("adapter.ln2.weight"),
                    "up_bias": take("adapter.ln2.bias"),
                    "scale": torch.tensor(1.0),
                },
            )
    assert taken == set(trunk), "a tensor of the checkpoint was not mapped"
    return found, {"weight": head["fc.weight"], "bias": head["fc.bias"]}


def peft(case: str) -> Joined:
    config = json.loads((GOLDEN / case / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert not config["use_rslora"]
    assert not config["use_dora"]
    found: Joined = {}
    adapter = load_file(GOLDEN / case / "adapter_model.safetensors")
    for name in [n for n in adapter if n.endswith("lora_A.weight")]:
        stem = name.removesuffix(".lora_A.weight")
        module = stem.removeprefix("base_model.model.")
        scale = config["lora_alpha"] / config["r"]
        found[f"{module}.lora"] = lora(
            module, adapter[name], adapter[f"{stem}.lora_B.weight"], scale
        )
    assert 2 * len(found) == len(adapter)
    return found


class Case:
    """A stored run: its backbone and its delta, in one dtype."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        folder = GOLDEN / name
        swin = "swin" in name
        if name.startswith("ms_"):
            config = json.loads((folder / "config.json").read_text())
            keys = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
            options = config["original_config"]["model"]["backbone"]
            arguments = {key: options[key] for key in keys}
        else:
            config = json.loads(
                (folder if swin else folder.parent).joinpath("config.json").read_text()
            )
            arguments = {k: v for k, v in config["arguments"].items() if k != "num_classes"}
            folder = folder if swin else folder.parent
        self.architecture = "swin_tiny_patch4_window7_224" if swin else "vit_base_patch16_224"
        self.arguments = arguments
        weights = folder / "backbone.safetensors"
        backbone = load(self.architecture, arguments, weights)
        if dtype == torch.float64:
            backbone = wrap(backbone.model.double(), self.architecture, arguments)
        self.backbone: Backbone = backbone
        frozen = load_file(weights)
        if name.startswith("ms_"):
            found, head = modelscope(name, frozen)
        else:
            found = peft(name)
            head = {key: frozen[f"{backbone.classifier}.{key}"] for key in ("weight", "bias")}
        where, branch = head_branch(backbone.classifier)
        found[where] = branch, head
        self.delta = Delta(
            name.replace("/", "-"),
            tuple(f"class_{i}" for i in range(len(head["bias"]))),
            Preprocessing(backbone.image_size),
            backbone.identity,
            {n: b for n, (b, _) in found.items()},
            {n: {k: t.to(dtype) for k, t in w.items()} for n, (_, w) in found.items()},
        )
        io = load_file(GOLDEN / name / "io.safetensors")
        self.images = io["input.imgs"].to(dtype)
        kind = "expected64" if dtype == torch.float64 else "expected"
        self.logits = io[f"{kind}.logits"]
        self.base = io.get(f"{kind}.base_logits")
        self.tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32


@pytest.fixture(scope="module")
def cases() -> dict[tuple[str, torch.dtype], Case]:
    return {(name, d): Case(name, d) for name in CASES for d in (torch.float64, torch.float32)}


dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])


@dtypes
@pytest.mark.parametrize("name", CASES)
def test_tuned(name, dtype, cases, run, error):
    case = cases[name, dtype]
    assert error(run(case.backbone, case.delta, case.images), case.logits) <= case.tolerance


@dtypes
@pytest.mark.parametrize("name", ["peft_vit/lora_qkv", "peft_swin_lora_qkv"])
def test_the_frozen_backbone(name, dtype, cases, error):
    case = cases[name, dtype]
    assert case.base is not None
    with torch.no_grad():
        assert error(case.backbone.model(case.images), case.base) <= case.tolerance


@dtypes
def test_all_cases_of_one_backbone_in_one_batch(dtype, cases, sites_of, error):
    """Seven tasks of five kinds with 5 to 13 classes, their rows shuffled."""
    listed = [cases[name, dtype] for name in ON_VIT]
    backbone = listed[0].backbone
    assert {case.backbone.identity.fingerprint for case in listed} == {
        backbone.identity.fingerprint
    }
    bank = stack([lower(backbone, case.delta, sites_of(backbone)) for case in listed])
    images = torch.cat([case.images for case in listed])
    task = torch.arange(len(listed)).repeat_interleave(2)
    order = torch.randperm(len(task), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        shuffled = Mixed(backbone, bank)(images[order], task[order])
    mixed = torch.empty_like(shuffled)
    mixed[order] = shuffled
    for number, case in enumerate(listed):
        logits = mixed[2 * number : 2 * number + 2, : case.logits.shape[1]]
        assert error(logits, case.logits) <= case.tolerance, case.delta.task


@dtypes
def test_swin_in_a_bank(dtype, cases, error):
    case = cases["peft_swin_lora_qkv", dtype]
    with torch.no_grad():
        mixed = Mixed(case.backbone, stack([case.delta]))(case.images, torch.zeros(2).long())
    assert error(mixed, case.logits) <= case.tolerance


@dtypes
@pytest.mark.parametrize("name", CASES)
def test_fold(name, dtype, cases, sites_of, error):
    case = cases[name, dtype]
    if name not in FOLDS:
        with pytest.raises(UsageError, match="cannot be merged exactly"):
            fold(case.delta, case.backbone, sites=sites_of(case.backbone))
        return
    merged = fold(case.delta, case.backbone, sites=sites_of(case.backbone))
    plain = timm.create_model(
        case.architecture, **case.arguments, num_classes=case.logits.shape[1]
    ).to(dtype)
    plain.load_state_dict(merged.tensors, strict=True)
    with torch.no_grad():
        assert error(plain.eval()(case.images), case.logits) <= case.tolerance
