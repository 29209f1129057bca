"""PEFT's adapters of transformers' vision models on timm's backbones, against PEFT and transformers themselves."""

from __future__ import annotations

import copy
import json
import re
import shutil
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from utune_deploy.export.graph import Inputs, clean, serialise, trace
from utune_deploy.merge import importers
from utune_deploy.merge.attach import Tuned
from utune_deploy.merge.backbone import load, wrap
from utune_deploy.merge.backbone.transformers.config import set_eps
from utune_deploy.merge.bank import stack
from utune_deploy.merge.delta import load_delta, require_backbone, save_delta
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.merge.fold import fold, refusals
from utune_deploy.merge.importers.peft import KINDS, read_peft
from utune_deploy.merge.mixed import Mixed
from utune_deploy.merge.preprocessing import Preprocessing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

FLOAT64, FLOAT32 = 1e-9, 2e-5
COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
SIZES = {**COMMON, "intermediate_size": 128}
OURS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
STAGES = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
WINDOWS = {"image_size": 64, "patch_size": 4, **STAGES}
CLIP = {"global_pool": "avg", "final_norm": False, "fc_norm": False}
GIANT = {"mlp_ratio": 176 / 32}

# configuration, class, settings, timm's name, its arguments
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str, dict[str, Any]]] = {
    "vit": ("ViT", "ViTForImageClassification", SIZES, "vit_base_patch16_224", OURS),
    "deit": (
        "DeiT", "DeiTForImageClassification", SIZES, "deit_tiny_distilled_patch16_224", OURS,
    ),
    "deit of two heads": (
        "DeiT", "DeiTForImageClassificationWithTeacher", SIZES, "deit_tiny_distilled_patch16_224", OURS,
    ),
    "dinov2": ("Dinov2", "Dinov2Model", COMMON, "vit_base_patch14_dinov2", OURS),
    "dinov2 with registers": (
        "Dinov2WithRegisters", "Dinov2WithRegistersModel", COMMON, "vit_base_patch14_reg4_dinov2", OURS,
    ),
    "dinov2 giant": (
        "Dinov2", "Dinov2Model", {**COMMON, "use_swiglu_ffn": True}, "vit_giant_patch14_dinov2", OURS | GIANT,
    ),
    "beit": (
        "Beit", "BeitForImageClassification",
        {**SIZES, "use_relative_position_bias": True}, "beit_base_patch16_224", OURS,
    ),
    "data2vec": (
        "Data2VecVision", "Data2VecVisionForImageClassification",
        {**SIZES, "use_relative_position_bias": True}, "beit_base_patch16_224", OURS,
    ),
    "swin": (
        "Swin", "SwinForImageClassification", WINDOWS,
        "swin_tiny_patch4_window7_224", {"img_size": 64, **STAGES},
    ),
    "swinv2": (
        "Swinv2", "Swinv2ForImageClassification", WINDOWS,
        "swinv2_tiny_window8_256", {"img_size": 64, **STAGES},
    ),
    "clip": (
        "CLIP", "CLIPForImageClassification", {"vision_config": SIZES},
        "vit_base_patch16_clip_quickgelu_224", OURS | CLIP,
    ),
    "siglip": (
        "Siglip", "SiglipForImageClassification", {"vision_config": SIZES},
        "vit_base_patch16_siglip_gap_224", {**OURS, "act_layer": "gelu_tanh"},
    ),
}  # fmt: skip
BARE = ("dinov2", "dinov2 with registers", "dinov2 giant")
"""Whose classifier reads more than the class token: here they are trunks, with a classifier beside them."""

QUERY_VALUE = {
    **{family: ["q_proj", "v_proj"] for family in FAMILIES},
    "data2vec": ["query", "value"],
    "swinv2": ["query", "value"],
}
DENSE = {
    **{family: ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"] for family in FAMILIES},
    "dinov2 giant": ["q_proj", "up_proj", "gate_proj", "down_proj"],
    "clip": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "siglip": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "data2vec": ["query", "key", "value", "output.dense", "intermediate.dense"],
    "swinv2": ["query", "key", "value", "output.dense", "intermediate.dense"],
    "swin": ["q_proj", "v_proj", "o_proj", "fc2", "reduction"],
}
OLD = {  # of transformers 4, behind a block's number
    r"\.layers\.(\d+)\.(?=attention|layernorm|mlp|lambda)": r".encoder.layer.\1.",
    r"attention\.q_proj": "attention.attention.query",
    r"attention\.k_proj": "attention.attention.key",
    r"attention\.v_proj": "attention.attention.value",
    r"attention\.o_proj": "attention.output.dense",
    r"mlp\.fc1": "intermediate.dense",
    r"mlp\.fc2": "output.dense",
}


@dataclass
class Pair:
    """A transformers model and the folder that it was saved into, and timm's of the same weights."""

    theirs: Any
    folder: Path
    ours: Backbone

    def images(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(2, *self.ours.input_size, generator=generator, dtype=torch.float64)


class Trunk(torch.nn.Module):
    """A trunk and a classifier of its class token."""

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.trunk = trunk
        self.classifier = torch.nn.Linear(trunk.config.hidden_size, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.trunk(images).last_hidden_state[:, 0])


@pytest.fixture(scope="module")
def hub() -> Iterator[Any]:
    """transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


@pytest.fixture(scope="module")
def pair(hub: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`(family)`, made once; random values everywhere, float64."""
    made: dict[str, Pair] = {}

    def pair(family: str) -> Pair:
        if family not in made:
            config, name, settings, architecture, arguments = FAMILIES[family]
            folder = tmp_path_factory.mktemp("hub")
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                described = getattr(hub, f"{config}Config")(**settings)
                described.num_labels = 3
                model = getattr(hub, name)(described).eval().double()
                generator = torch.Generator().manual_seed(3)
                for parameter in model.parameters():
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_(0.2 * noise)
                model.save_pretrained(folder)
                frozen = load(architecture, arguments, folder)
                ours = wrap(frozen.model.double(), architecture, frozen.identity.arguments)
            whole = Trunk(model).double().eval() if family in BARE else model
            made[family] = Pair(whole, folder, ours)
        return made[family]

    return pair


@torch.no_grad()
def answer(model: Any, images: Tensor) -> Tensor:
    found = model(images)
    return found if isinstance(found, torch.Tensor) else found.logits


@torch.no_grad()
def tuned(backbone: Backbone, delta: Delta, images: Tensor) -> Tensor:
    return Tuned(backbone, delta.branches, delta.tensors)(images)


def adapter(
    peft: Any, pair: Pair, folder: Path, kind: str, *, seed: int = 0, **settings: Any
) -> tuple[Path, Any]:
    """A folder of random values, and PEFT's model."""
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        config = getattr(peft, f"{kind}Config")(**settings)
        model = peft.get_peft_model(copy.deepcopy(pair.theirs), config).eval()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".ranknum." not in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise.to(parameter))
        model.save_pretrained(folder)
    return folder, model


def read(path: Path, backbone: Backbone, folder: Path, task: str = "task") -> Delta:
    """As a delta, written and read again."""
    save_delta(folder / f"{task}.safetensors", read_peft(path, backbone).delta(task, backbone))
    return load_delta(folder / f"{task}.safetensors")


def rename(path: Path, changes: dict[str, str]) -> None:
    """Other names in an adapter's file."""
    tensors = load_file(path / "adapter_model.safetensors")
    for old, new in changes.items():
        tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
    save_file(tensors, path / "adapter_model.safetensors")


# the frozen weights


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in BARE])
def test_the_weights_give_the_same_logits(family, pair, error):
    both = pair(family)
    images = both.images()
    with torch.no_grad():
        assert error(both.ours.model(images), answer(both.theirs, images)) <= FLOAT64


@pytest.mark.parametrize("family", BARE)
def test_the_weights_give_the_same_class_token(family, pair, error):
    both = pair(family)
    images = both.images()
    with torch.no_grad():
        wanted = both.theirs.trunk(images).last_hidden_state[:, 0]
        assert error(both.ours.model(images), wanted) <= FLOAT64


def test_the_eps_is_an_argument_of_the_backbone(pair):
    both = pair("vit")
    assert both.ours.identity.arguments["layer_norm_eps"] == 1e-12
    assert both.ours.model.norm.eps == 1e-12  # type: ignore[union-attr]
    again = load("vit_base_patch16_224", OURS, both.folder / "model.safetensors")
    assert again.identity == both.ours.identity
    given = load("vit_base_patch16_224", {**OURS, "layer_norm_eps": 1e-6}, both.folder)
    assert given.model.norm.eps == 1e-6  # type: ignore[union-attr]


def test_a_pickled_file_with_the_names_of_transformers_5(pair, tmp_path):
    both = pair("vit")
    torch.save(both.theirs.state_dict(), tmp_path / "pytorch_model.bin")
    found = load(
        "vit_base_patch16_224", {**OURS, "layer_norm_eps": 1e-12}, tmp_path / "pytorch_model.bin"
    )
    assert found.identity == both.ours.identity
    assert (
        load("vit_base_patch16_224", OURS, tmp_path).identity.fingerprint
        == found.identity.fingerprint
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_attention_heads": 4}, "another number of heads"),
        ({"hidden_act": "relu"}, "another activation"),
        ({"hidden_act": "something"}, "another activation"),
    ],
)
def test_a_configuration_of_another_model_is_refused(change, sentence, pair, tmp_path):
    both = pair("vit")
    config = json.loads((both.folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "model.safetensors").write_bytes((both.folder / "model.safetensors").read_bytes())
    with pytest.raises(IncompatibleArtefact, match=sentence):
        load("vit_base_patch16_224", OURS, tmp_path)


@pytest.mark.parametrize("architecture", ["vit_base_patch16_224", "swin_tiny_patch4_window7_224"])
def test_weights_of_another_architecture_are_refused(architecture, pair):
    arguments = (
        {**OURS, "depth": 3} if architecture.startswith("vit") else {"img_size": 64, **STAGES}
    )
    with pytest.raises(IncompatibleArtefact, match=r"lacks tensors|number of heads"):
        load(architecture, arguments, pair("vit").folder)


# adapters

CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "query and value": ("Lora", {"r": 3, "lora_alpha": 5}, tuple(FAMILIES)),
    "lora": ("Lora", {"r": 3, "lora_alpha": 5, "bias": "all"}, tuple(FAMILIES)),
    "lora of patterns": (
        "Lora",
        {
            "r": 3, "lora_alpha": 5, "use_rslora": True, "lora_bias": True, "bias": "lora_only",
            "rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"vit\.layers\.1\.attention\.q_proj": 9},
        },
        ("vit", "beit"),
    ),
    "lora of patches": ("Lora", {"r": 3, "target_modules": ["projection", "q_proj"]}, ("vit", "swin")),
    "lora at the head": ("Lora", {"r": 3, "target_modules": ["q_proj", "classifier"]}, ("vit", "swin")),
    "dora": ("Lora", {"r": 3, "use_dora": True}, tuple(FAMILIES)),
    "adalora": ("AdaLora", {"init_r": 4, "total_step": 10}, ("vit", "beit", "swinv2")),
    "vera": ("Vera", {"r": 5}, ("vit", "beit", "dinov2 giant")),
    "loha": ("LoHa", {"r": 2, "alpha": 3}, ("vit", "beit", "swin")),
    "loha of full rank": ("LoHa", {"r": 6, "alpha": 3}, ("vit",)),
    "lokr": ("LoKr", {"r": 2, "alpha": 3}, ("vit", "beit", "swin")),
    "ia3": ("IA3", {"feedforward_modules": ["fc2", "o_proj"]}, tuple(FAMILIES)),
    "ia3 before a part": ("IA3", {"feedforward_modules": ["q_proj", "fc2"]}, ("vit", "beit")),
    "oft": ("OFT", {"oft_block_size": 8}, ("vit", "beit", "swin", "swinv2")),
    "boft": ("BOFT", {"boft_block_size": 8, "boft_n_butterfly_factor": 1}, ("vit", "beit", "swin")),
    "norms": ("LNTuning", {}, ("vit", "beit", "swin", "clip")),
    "saved modules": (
        "Lora", {"r": 2, "modules_to_save": ["classifier", "layernorm_before", "patch_embeddings"]}, ("vit", "swin"),
    ),
}  # fmt: skip
NORMS = {
    "vit": ["layernorm_before", "layernorm"],
    "beit": ["layernorm_after", "pooler.layernorm"],
    "swin": ["layernorm_before", "downsample.norm"],
    "clip": ["layer_norm1", "pre_layrnorm"],
}
LIVE = [(case, family) for case, (_, _, families) in CASES.items() for family in families]


def settings_of(case: str, family: str) -> tuple[str, dict[str, Any]]:
    kind, settings, _ = CASES[case]
    heads = ["cls_classifier", "distillation_classifier"] if "two" in family else ["classifier"]
    named = {"modules_to_save": heads} if case != "lora at the head" else {}
    targets = QUERY_VALUE[family] if case == "query and value" else DENSE[family]
    targets = NORMS[family] if kind == "LNTuning" else targets
    found = {"target_modules": targets, **named, **settings}
    if kind == "IA3":
        found["feedforward_modules"] = [
            t
            for t in targets
            if t in (*settings["feedforward_modules"], "out_proj", "output.dense")
        ]
    return kind, found


def test_every_kind_is_here():
    assert {kind.upper().replace("LNTUNING", "LN_TUNING") for kind, _, _ in CASES.values()} == set(
        KINDS
    )


@pytest.mark.parametrize(("case", "family"), LIVE, ids=[f"{c}, {f}" for c, f in LIVE])
def test_an_adapter_answers_as_in_peft(case, family, peft, pair, sites_of, error, tmp_path):
    """Alone in float64 and float32, folded where it folds, and in a batch with another task."""
    both = pair(family)
    kind, settings = settings_of(case, family)
    path, model = adapter(peft, both, tmp_path / "adapter", kind, **settings)
    images = both.images(1)
    logits = answer(model, images)
    assert error(answer(both.theirs, images), logits) > 1e-3
    delta = read(path, both.ours, tmp_path)
    require_backbone(delta, both.ours, sites_of(both.ours))
    assert error(tuned(both.ours, delta, images), logits) <= FLOAT64

    single = wrap(
        copy.deepcopy(both.ours.model).float(),
        both.ours.identity.architecture,
        both.ours.identity.arguments,
    )
    assert error(tuned(single, delta, images.float()), logits) <= FLOAT32

    if not refusals(delta, both.ours):
        merged = fold(delta, both.ours, sites=sites_of(both.ours))
        arguments = {k: v for k, v in both.ours.identity.arguments.items() if k != "layer_norm_eps"}
        plain = timm.create_model(
            both.ours.identity.architecture, **{**arguments, "num_classes": 3}
        ).double()
        set_eps(plain, both.ours.identity.arguments.get("layer_norm_eps", plain_eps(both.ours)))
        plain.load_state_dict(merged.tensors, strict=True)
        with torch.no_grad():
            assert error(plain.eval()(images), logits) <= FLOAT64

    if any(branch.tuner.no_bank for branch in delta.branches.values()):
        return  # it shares no batch
    second, _ = adapter(
        peft, both, tmp_path / "second", "Lora", seed=1, r=2, target_modules=QUERY_VALUE[family],
        modules_to_save=settings_of("query and value", family)[1]["modules_to_save"],
    )  # fmt: skip
    other = read(second, both.ours, tmp_path, "other")
    alone = tuned(both.ours, other, images)
    with torch.no_grad():
        mixed = Mixed(both.ours, stack([delta, other], torch.float64))(
            images[[0, 1, 0, 1]], torch.tensor([1, 0, 0, 1])
        )
    assert error(mixed, torch.stack([alone[0], logits[1], logits[0], alone[1]])) <= FLOAT64


def plain_eps(backbone: Backbone) -> float:
    return next(float(m.eps) for m in backbone.model.modules() if isinstance(m, torch.nn.LayerNorm))


def test_query_and_value_are_one_branch(peft, pair, tmp_path):
    """So that it shares a slot with LoRA on timm's own qkv."""
    both = pair("vit")
    _, settings = settings_of("query and value", "vit")
    path, _ = adapter(peft, both, tmp_path / "adapter", "Lora", **settings)
    delta = read(path, both.ours, tmp_path)
    assert set(delta.branches) == {"blocks.0.attn.qkv/lora", "blocks.1.attn.qkv/lora", "head/head"}
    up = delta.tensors["blocks.0.attn.qkv/lora"]["up"]
    assert up.shape == (96, 6 if settings["r"] == 3 else 0)
    assert not up[32:64].any()


@pytest.mark.parametrize("family", ["vit", "beit", "deit"])
def test_the_names_of_transformers_4(family, peft, pair, error, tmp_path):
    both = pair(family)
    _, settings = settings_of("lora", family)
    path, model = adapter(peft, both, tmp_path / "adapter", "Lora", **settings)
    rename(path, OLD)
    assert any(
        "attention.attention.query" in name
        for name in load_file(path / "adapter_model.safetensors")
    )
    images = both.images(1)
    assert (
        error(tuned(both.ours, read(path, both.ours, tmp_path), images), answer(model, images))
        <= FLOAT64
    )


@pytest.mark.parametrize("case", ["lora", "dora", "ia3", "vera", "boft", "loha", "saved modules"])
def test_a_whole_state_dict(case, peft, pair, error, tmp_path):
    both = pair("vit")
    kind, settings = settings_of(case, "vit")
    path, model = adapter(peft, both, tmp_path / "adapter", kind, **settings)
    (path / "adapter_model.safetensors").unlink()
    torch.save(model.state_dict(), path / "adapter_model.bin")
    images = both.images(1)
    found = read(path / "adapter_model.bin", both.ours, tmp_path)
    assert error(tuned(both.ours, found, images), answer(model, images)) <= FLOAT64

    state = dict(model.state_dict())
    moved = next(name for name in state if name.endswith("layernorm_after.weight"))
    torch.save({**state, moved: state[moved] + 1e-6}, path / "adapter_model.bin")
    with pytest.raises(IncompatibleArtefact, match="not the backbone's") as caught:
        read_peft(path, both.ours)
    assert "blocks.0.norm2.weight" in str(caught.value)


def test_a_state_dict_of_several_adapters_is_refused(peft, pair, tmp_path):
    both = pair("vit")
    _, settings = settings_of("query and value", "vit")
    path, model = adapter(peft, both, tmp_path / "adapter", "Lora", **settings)
    model.add_adapter("another", model.peft_config["default"])
    (path / "adapter_model.safetensors").unlink()
    torch.save(model.state_dict(), path / "adapter_model.bin")
    with pytest.raises(IncompatibleArtefact, match="several adapters") as caught:
        read_peft(path, both.ours)
    assert "another, default" in str(caught.value)


def test_a_file_without_its_configuration(pair, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UsageError, match=r"adapter_config\.json beside"):
        read_peft(tmp_path / "adapter_model.safetensors", pair("vit").ours)


def test_old_settings_and_magnitudes(peft, pair, error, tmp_path):
    both = pair("vit")
    kind, settings = settings_of("dora", "vit")
    path, model = adapter(peft, both, tmp_path / "adapter", kind, **settings)
    rename(path, {r"lora_magnitude_vector$": "lora_magnitude_vector.weight"})
    config = json.loads((path / "adapter_config.json").read_text())
    old = {"merge_weights": True, "enable_lora": None, "fan_in_fan_out": True}
    (path / "adapter_config.json").write_text(json.dumps({**config, **old}))
    images = both.images(1)
    assert (
        error(tuned(both.ours, read(path, both.ours, tmp_path), images), answer(model, images))
        <= FLOAT64
    )


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_out_of_the_frozen_weights_is_computed_again(start, peft, pair, error, tmp_path):
    """As PEFT does when it loads the folder onto the frozen model."""
    both = pair("vit")
    single = replace(both, theirs=copy.deepcopy(both.theirs).float())
    _, settings = settings_of("query and value", "vit")
    path, model = adapter(
        peft, single, tmp_path / "adapter", "Lora", init_lora_weights=start, **settings
    )
    images = both.images(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(single.theirs), path).eval()
    logits = answer(again, images.float())
    assert error(answer(model, images.float()), logits) <= FLOAT32
    delta = read(path, both.ours, tmp_path)
    assert error(tuned(both.ours, delta, images), logits) <= FLOAT32
    assert start in delta.provenance["start"]
    down = delta.tensors["blocks.0.attn.qkv/lora"]["down"]
    assert down.shape == (12, 32)


def test_an_engine_of_two_tasks(peft, pair, error, tmp_path):
    """In ONNX Runtime, each row its own adapter."""
    both = pair("vit")
    images, deltas, logits = both.images(1).float(), [], []
    arguments = both.ours.identity.arguments
    model = copy.deepcopy(both.ours.model).float()
    single = wrap(model, both.ours.identity.architecture, arguments)
    for seed in (0, 1):
        _, settings = settings_of("query and value", "vit")
        path, tuned_there = adapter(
            peft, both, tmp_path / f"adapter{seed}", "Lora", seed=seed, **settings
        )
        deltas.append(read(path, single, tmp_path, f"task{seed}"))
        logits.append(answer(tuned_there, images.double()))
    mixed = Mixed(single, stack(deltas, torch.float32))
    task = torch.tensor([1, 0])
    graph = clean(trace(mixed, Inputs(images, task)))
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        serialise(graph, {}), options, providers=["CPUExecutionProvider"]
    )
    feeds = {"images": images.numpy(), "task": task.numpy()}
    found = torch.from_numpy(np.asarray(session.run(["logits"], feeds)[0]))
    wanted = torch.stack([logits[1][0], logits[0][1]])
    assert error(found, wanted) <= FLOAT32


# what is refused


def test_a_layer_that_the_backbone_lacks(peft, pair, tmp_path):
    both = pair("vit")
    _, settings = settings_of("query and value", "vit")
    path, _ = adapter(peft, both, tmp_path / "adapter", "Lora", **settings)
    rename(path, {r"layers\.1\.": "layers.12."})
    with pytest.raises(IncompatibleArtefact, match="no such module") as caught:
        read_peft(path, both.ours)
    assert "blocks.12.attn.qkv" in str(caught.value)


def test_another_width(peft, pair, tmp_path):
    both = pair("vit")
    _, settings = settings_of("query and value", "vit")
    path, _ = adapter(peft, both, tmp_path / "adapter", "Lora", **settings)
    wide: dict[str, Any] = {**OURS, "embed_dim": 48}
    wider = wrap(timm.create_model("vit_base_patch16_224", **wide), "vit_base_patch16_224", wide)
    with pytest.raises(IncompatibleArtefact, match="wrong shape") as caught:
        read_peft(path, wider)
    assert "vit.layers.0.attention" in str(caught.value)


def test_another_pooling(peft, pair, tmp_path):
    both = pair("vit")
    _, settings = settings_of("query and value", "vit")
    path, _ = adapter(peft, both, tmp_path / "adapter", "Lora", **settings)
    mean: dict[str, Any] = {**OURS, "global_pool": "avg"}
    backbone = wrap(timm.create_model("vit_base_patch16_224", **mean), "vit_base_patch16_224", mean)
    with pytest.raises(IncompatibleArtefact, match="reads other features") as caught:
        read_peft(path, backbone)
    assert "global_pool=token" in str(caught.value)


def test_two_trunks(pair, tmp_path):
    names = [f"{tower}_model.encoder.layers.0.self_attn.q_proj" for tower in ("text", "vision")]
    tensors = {f"base_model.model.{n}.lora_A.weight": torch.ones(2, 32) for n in names}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(IncompatibleArtefact, match="more than one trunk"):
        read_peft(tmp_path, pair("clip").ours)


@pytest.fixture
def classified(hub: Any, pair: Any) -> Any:
    """`(family)`: DINOv2 with the classifier that transformers gives it, of the pair's trunk."""

    def classified(family: str) -> Pair:
        both = pair(family)
        trunk = both.theirs.trunk
        name = type(trunk).__name__.removesuffix("Model")
        described = copy.deepcopy(trunk.config)
        described.num_labels = 3
        model = getattr(hub, f"{name}ForImageClassification")(described).double().eval()
        getattr(model, model.base_model_prefix).load_state_dict(trunk.state_dict())
        return replace(both, theirs=model)

    return classified


@pytest.mark.parametrize("family", BARE)
@pytest.mark.parametrize("kind", ["Lora", "IA3"])
def test_dinov2s_own_classifier(family, kind, peft, classified, error, tmp_path, sites_of):
    """It reads the class token beside the mean of the patches, behind registers."""
    both = classified(family)
    settings = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
    if kind == "IA3":
        settings["feedforward_modules"] = []
    path, model = adapter(peft, both, tmp_path / "adapter", kind, **settings)
    images = both.images(1)
    delta = read(path, both.ours, tmp_path)
    require_backbone(delta, both.ours, sites_of(both.ours))
    assert error(tuned(both.ours, delta, images), answer(model, images)) <= FLOAT64
    assert [refusal.branch for refusal in refusals(delta, both.ours)][-1] == "head/head"


def test_an_engine_of_dinov2s_classifier_and_of_the_class_tokens(
    peft, pair, classified, error, tmp_path
):
    wide, both = classified("dinov2 with registers"), pair("dinov2 with registers")
    settings = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
    ours = both.ours
    single = wrap(
        copy.deepcopy(ours.model).float(), ours.identity.architecture, ours.identity.arguments
    )
    tasks = []
    for number, each in enumerate((wide, both)):
        path, _ = adapter(
            peft, each, tmp_path / str(number), "Lora", seed=number, r=2 + number, **settings
        )
        tasks.append(read(path, single, tmp_path, f"t{number}"))
    images, task = both.images(1)[[0, 1, 0, 1]], torch.tensor([0, 1, 1, 0])
    alone = [tuned(ours, delta, images) for delta in tasks]
    mixed = Mixed(single, stack(tasks, torch.float32))
    graph = clean(trace(mixed, Inputs(images.float(), task)))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        serialise(graph, {}), options, providers=["CPUExecutionProvider"]
    )
    (logits,) = session.run(None, {"images": images.float().numpy(), "task": task.numpy()})
    wanted = torch.stack([alone[number][row] for row, number in enumerate(task.tolist())])
    assert error(torch.from_numpy(np.asarray(logits)), wanted) <= FLOAT32


def test_as_wide_a_classifier_of_somebody_else_is_refused(peft, pair, tmp_path):
    """What it reads beside the class token is nowhere said."""
    both = pair("dinov2")
    whole = copy.deepcopy(both.theirs)
    whole.classifier = torch.nn.Linear(64, 3).double()
    path, _ = adapter(
        peft, replace(both, theirs=whole), tmp_path / "adapter", "Lora",
        target_modules=["q_proj"], modules_to_save=["classifier"],
    )  # fmt: skip
    with pytest.raises(IncompatibleArtefact, match="reads other features") as caught:
        read_peft(path, both.ours)
    assert "64" in str(caught.value)


def test_a_tuned_classifier_where_two_are_averaged(peft, pair, tmp_path):
    both = pair("deit")
    path, _ = adapter(
        peft, both, tmp_path / "adapter", "Lora", r=2, target_modules=["q_proj", "classifier"]
    )
    with pytest.raises(IncompatibleArtefact, match="averages two"):
        read_peft(path, both.ours)


def test_layers_that_no_classifier_reads_are_named(peft, pair, tmp_path):
    """SigLIP's attention over all tokens, which a short name such as fc1 matches too."""
    both = pair("siglip")
    _, settings = settings_of("lora", "siglip")
    path, _ = adapter(peft, both, tmp_path / "adapter", "Lora", **settings)
    assert "vision_model.head.mlp.fc1" in read_peft(path, both.ours).notes["left out"]


def test_what_the_adapter_cannot_prove_is_said(peft, pair, tmp_path):
    both = pair("vit")
    _, settings = settings_of("lora", "vit")
    path, _ = adapter(peft, both, tmp_path / "adapter", "Lora", **settings)
    config = json.loads((path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "google/vit"
    (path / "adapter_config.json").write_text(json.dumps(config))
    notes = importers.read("peft", path, both.ours).notes
    assert notes["trained on"].startswith("google/vit, ")
    assert notes["layer_norm_eps"].startswith("1e-12, ")
    config["base_model_name_or_path"] = None
    (path / "adapter_config.json").write_text(json.dumps(config))
    assert "trained on" not in importers.read("peft", path, both.ours).notes


def test_old_oft_is_refused(pair, tmp_path):
    name = "base_model.model.vit.encoder.layer.0.attention.attention.query.oft_r"
    save_file({name: torch.ones(4, 8, 8)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "OFT", "r": 4}))
    with pytest.raises(IncompatibleArtefact, match="PEFT up to"):
        read_peft(tmp_path, pair("vit").ours)


def test_pictures_are_prepared_as_the_folder_of_the_adapter_or_of_the_weights_says(
    hub, peft, pair, tmp_path
):
    found = pair("vit")
    path, _ = adapter(peft, found, tmp_path / "a", "Lora", target_modules=".*(query|q_proj)")
    timms = read(path, found.ours, tmp_path, "timms").preprocessing
    size = {"height": 32, "width": 32}
    shutil.copytree(found.folder, tmp_path / "weights")
    hub.ViTImageProcessor(size=size, resample=3).save_pretrained(tmp_path / "weights")
    architecture, arguments = FAMILIES["vit"][3:]
    frozen = load(architecture, arguments, tmp_path / "weights")
    assert frozen.identity == load(architecture, arguments, found.folder).identity
    said = Preprocessing((32, 32), "bicubic", 1.0, (0.5,) * 3, (0.5,) * 3, squash=True)
    assert timms != said
    assert frozen.preprocessing() == said
    assert read(path, frozen, tmp_path, "said").preprocessing == said
    hub.ViTImageProcessor(size=size, image_mean=[0.1, 0.2, 0.3]).save_pretrained(path)
    own = replace(said, interpolation="bilinear", mean=(0.1, 0.2, 0.3))
    assert read(path, frozen, tmp_path, "own").preprocessing == own
    hub.ViTImageProcessor().save_pretrained(path)
    with pytest.raises(IncompatibleArtefact, match="another size than the backbone reads"):
        read_peft(path, frozen)
