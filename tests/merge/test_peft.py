"""PEFT's adapters against PEFT itself: stored runs, and adapters made here with random values everywhere."""

from __future__ import annotations

import copy
import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from utune_deploy.merge.attach import Tuned
from utune_deploy.merge.backbone import load, wrap
from utune_deploy.merge.bank import stack
from utune_deploy.merge.delta import load_delta, require_backbone, save_delta
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError, UtuneError
from utune_deploy.merge.fold import fold, refusals
from utune_deploy.merge.importers.peft import KINDS, PROMPTS, read_peft
from utune_deploy.merge.mixed import Mixed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

GOLDEN = Path(
    os.environ.get("UTUNE_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden")
)
needs_golden = pytest.mark.skipif(
    not (GOLDEN / "README.md").is_file(),
    reason=f"no golden data at {GOLDEN}; set UTUNE_GOLDEN to their folder",
)
FLOAT64, FLOAT32 = 1e-9, 2e-5

STORED = (
    "peft_vit/lora_qkv",
    "peft_vit/lora_patterns_rslora",
    "peft_vit/lora_qkv_save_head",
    "peft_vit/dora_qkv_fc1",
    "peft_vit/ia3",
    "peft_vit/loha_qkv_fc2",
    "peft_vit/lokr_qkv_proj",
    "peft_vit/oft_qkv",
    "peft_vit/boft_qkv",
    "peft_swin_lora_qkv",
)
MIXED = GOLDEN / "peft_vit" / "mixed_batch_three_lora"

READ_NOT_CALLED = ("eva", "beit", "swinv2")
"""Families whose qkv PEFT passes by until it is merged."""


def stored_backbone(case: str, dtype: torch.dtype) -> Backbone:
    folder = GOLDEN / ("peft_swin_lora_qkv" if "swin" in case else "peft_vit")
    config = json.loads((folder / "config.json").read_text())
    arguments = {k: v for k, v in config["arguments"].items() if k != "num_classes"}
    architecture = "swin_tiny_patch4_window7_224" if "swin" in case else "vit_base_patch16_224"
    found = load(architecture, arguments, folder / "backbone.safetensors")
    return found if dtype == torch.float32 else wrap(found.model.to(dtype), architecture, arguments)


def through_a_file(path: Path, backbone: Backbone, folder: Path, task: str = "task") -> Delta:
    """Read, write as a delta, read again."""
    save_delta(folder / f"{task}.safetensors", read_peft(path, backbone).delta(task, backbone))
    return load_delta(folder / f"{task}.safetensors")


@torch.no_grad()
def tuned(backbone: Backbone, delta: Delta, images: Tensor) -> Tensor:
    return Tuned(backbone, delta.branches, delta.tensors)(images)


# stored runs


@needs_golden
@pytest.mark.parametrize("case", STORED)
def test_a_stored_run(case, error, tmp_path):
    backbone = stored_backbone(case, torch.float32)
    delta = through_a_file(GOLDEN / case, backbone, tmp_path)
    io = load_file(GOLDEN / case / "io.safetensors")
    images = io["input.imgs"]
    assert error(tuned(backbone, delta, images), io["expected.logits"]) <= FLOAT32
    double = stored_backbone(case, torch.float64)
    assert error(tuned(double, delta, images.double()), io["expected64.logits"]) <= FLOAT64


@needs_golden
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_the_stored_batch_of_three_adapters(dtype, error, moved, tmp_path):
    kind = "expected64" if dtype == torch.float64 else "expected"
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    own = stored_backbone("peft_vit", torch.float32)
    names = ("task_a", "task_b", "task_c")
    deltas = [through_a_file(MIXED / name, own, tmp_path, name) for name in names]
    backbone = stored_backbone("peft_vit", dtype)
    deltas = [moved(delta, backbone) for delta in deltas]
    io = load_file(MIXED / "io.safetensors")
    images = io["input.imgs"].to(dtype)
    for delta in deltas:
        wanted = io[f"{kind}.all_rows.{delta.task}"]
        assert error(tuned(backbone, delta, images), wanted) <= tolerance
    rows = json.loads((MIXED / "config.json").read_text())["adapter_names"]
    kept = [row for row, name in enumerate(rows) if name != "__base__"]
    task = torch.tensor([names.index(rows[row]) for row in kept])
    with torch.no_grad():
        mixed = Mixed(backbone, stack(deltas))(images[kept], task)
    assert error(mixed, io[f"{kind}.logits"][kept]) <= tolerance


# adapters made here


@pytest.fixture(scope="module")
def peft() -> Iterator[Any]:
    """PEFT, with block diagonals in torch in the place of its CUDA extension, so that BOFT has all factors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("peft")
        from peft.tuners.boft import layer

    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*level) for level in blocks])]

    kept, layer.get_fbd_cuda = layer.get_fbd_cuda, lambda: SimpleNamespace(forward=forward)
    yield module
    layer.get_fbd_cuda = kept


@pytest.fixture
def made(peft: Any, tmp_path: Path) -> Callable[..., tuple[Path, Tensor, Tensor]]:
    """An adapter with random values in every trained tensor: folder, images and PEFT's own logits.

    `(backbone, config, change=None, merged=False, name="adapter")`; `change` may alter the model.
    """

    def made(
        backbone: Backbone,
        config: Any,
        *,
        change: Callable[[Any], None] | None = None,
        merged: bool = False,
        name: str = "adapter",
        seed: int = 0,
    ) -> tuple[Path, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(copy.deepcopy(backbone.model), copy.deepcopy(config)).eval()
            named = model.named_parameters()
            trained = [p for n, p in named if p.requires_grad and ".ranknum." not in n]
            assert trained
            for parameter in trained:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise.to(parameter))
            if change is not None:
                change(model)
            model.save_pretrained(tmp_path / name)
            images = torch.randn(2, *backbone.input_size, generator=generator, dtype=torch.float64)
            frozen = backbone.model(images)
            logits = (model.merge_and_unload() if merged else model)(images)
        if logits.shape == frozen.shape:
            assert (logits - frozen).abs().max() > 1e-3 * frozen.abs().max()
        return tmp_path / name, images, logits

    return made


def config_of(peft: Any, kind: str, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(peft, f"{kind}Config")(**settings)


LINEAR = ["qkv", "attn.proj", "fc1", "fc2"]
EVERY = ["qkv", "proj", "fc1", "fc2"]  # and the convolution patch_embed.proj
CONVNEXT = ["stem.0", "downsample.1", "fc1", "fc2"]
RESNET = ["conv1", "conv2"]  # 1 x 1, and 3 x 3 with padding
PATTERNS = {
    "rank_pattern": {"fc2": 3, r"blocks\.1\.attn\.qkv": 2, "stem.0": 4},
    "alpha_pattern": {r"^blocks\.0\.attn\.qkv": 100, "fc1": 5.5},
}

# kind, settings, families, settings of the targets by family
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "lora": (
        "Lora",
        {"r": 5, "lora_alpha": 7, **PATTERNS},
        ("vit", "swin", "convnext", "resnet", "eva", "beit", "swinv2", "deit"),
    ),
    "rslora with biases of its own": (
        "Lora",
        {"r": 5, "lora_alpha": 7, "use_rslora": True, "lora_bias": True, **PATTERNS},
        ("vit", "swin", "convnext"),
    ),
    "lora and its layers' biases": ("Lora", {"r": 3, "bias": "lora_only"}, ("vit", "convnext")),
    "lora and every bias": ("Lora", {"r": 3, "bias": "all"}, ("vit", "swin", "convnext", "resnet")),
    "lora beside saved modules": (
        "Lora",
        {"r": 3, "modules_to_save": ["norm1", "head", "bn1"]},
        ("vit", "swin", "convnext"),
    ),
    "lora at the head": ("Lora", {"r": 3, "target_modules": ["qkv", "head"]}, ("vit",)),
    "dora": (
        "Lora",
        {"r": 3, "lora_alpha": 5, "use_dora": True},
        ("vit", "swin", "convnext", "resnet", "eva", "beit", "swinv2"),
    ),
    "dora and every bias": ("Lora", {"r": 3, "use_dora": True, "bias": "all"}, ("vit",)),
    "dora at the head": (
        "Lora",
        {"r": 3, "use_dora": True, "target_modules": ["fc1", "head"]},
        ("vit",),
    ),
    "adalora": (
        "AdaLora",
        {"init_r": 5, "lora_alpha": 7, "total_step": 10},
        ("vit", "swin", "convnext", "resnet", "eva"),
    ),
    "vera": ("Vera", {"r": 7}, ("vit", "swin", "eva")),
    "vera drawn again": (
        "Vera",
        {"r": 7, "save_projection": False, "projection_prng_key": 11},
        ("vit", "swin"),
    ),
    "loha": (
        "LoHa",
        {"r": 3, "alpha": 5, **PATTERNS},
        ("vit", "swin", "convnext", "resnet", "eva"),
    ),
    "loha of full rank": ("LoHa", {"r": 9, "alpha": 5}, ("vit",)),
    "loha of kernels": (
        "LoHa",
        {"r": 3, "alpha": 5, "use_effective_conv2d": True},
        ("resnet", "convnext"),
    ),
    "lokr": (
        "LoKr",
        {"r": 2, "alpha": 5, **PATTERNS},
        ("vit", "swin", "convnext", "resnet", "eva"),
    ),
    "lokr of two products": (
        "LoKr",
        {"r": 2, "alpha": 5, "decompose_both": True, "decompose_factor": 8},
        ("vit", "resnet"),
    ),
    "linear lokr": (
        "LoKr",
        {"r": 2, "alpha": 5, "decompose_factor": 8, "target_modules": LINEAR},
        ("vit", "eva"),
    ),
    "lokr of whole factors": (
        "LoKr",
        {"r": 64, "alpha": 5, "decompose_factor": 4},
        ("vit", "resnet"),
    ),
    "lokr of kernels": (
        "LoKr",
        {"r": 2, "alpha": 5, "use_effective_conv2d": True, "decompose_factor": 2},
        ("resnet", "convnext"),
    ),
    "ia3": (
        "IA3",
        {"feedforward_modules": ["fc2", "conv2"]},
        ("vit", "swin", "convnext", "resnet", "eva", "beit"),
    ),
    "oft": ("OFT", {"oft_block_size": 8}, ("vit", "swin", "eva")),
    "oft of shared blocks": (
        "OFT",
        {"oft_block_size": 4, "block_share": True, "use_cayley_neumann": False},
        ("vit",),
    ),
    "oft, constrained": (
        "OFT",
        {"oft_block_size": 8, "coft": True, "eps": 0.2, "num_cayley_neumann_terms": 7},
        ("vit",),
    ),
    "oft of few terms": (
        "OFT",
        {"r": 4, "oft_block_size": 0, "num_cayley_neumann_terms": 3, "bias": "all"},
        ("vit",),
    ),
    "oft of 1 x 1": ("OFT", {"oft_block_size": 4, "target_modules": ["downsample.0"]}, ("resnet",)),
    "boft": (
        "BOFT",
        {"boft_block_size": 4, "boft_n_butterfly_factor": 1},
        ("vit", "swin", "resnet", "eva"),
    ),
    "boft of three factors": (
        "BOFT",
        {"boft_block_size": 4, "boft_n_butterfly_factor": 3, "bias": "boft_only"},
        ("vit",),
    ),
    "norms": (
        "LNTuning",
        {"modules_to_save": ["head"]},
        ("vit", "swin", "convnext", "resnet", "eva"),
    ),
}
TARGETS = {
    **dict.fromkeys(("swin", "vit", "eva", "beit", "swinv2", "deit"), EVERY),
    "convnext": CONVNEXT,
    "resnet": RESNET,
}
NORMS = {
    "vit": ["norm1", "norm2"],
    "swin": ["norm1", "downsample.norm"],
    "convnext": ["blocks.0.norm", "stem.1"],
    "resnet": ["bn1"],
    "eva": ["norm2"],
}


def settings_of(case: str, family: str) -> tuple[str, dict[str, Any]]:
    kind, settings, _ = CASES[case]
    settings = dict(settings)
    if kind == "LNTuning":
        settings["target_modules"] = NORMS[family]
        settings["modules_to_save"] = ["fc" if family == "resnet" else "head"]
    targets = TARGETS[family]
    if kind in ("Vera", "OFT", "BOFT"):
        targets = ["conv2"] if family == "resnet" else LINEAR
    settings.setdefault("target_modules", targets)
    if kind == "IA3":
        settings["feedforward_modules"] = [
            t for t in settings["target_modules"] if t in settings["feedforward_modules"]
        ]
    return kind, settings


LIVE = [(case, family) for case, (_, _, families) in CASES.items() for family in families]


def may_stay_parallel(case: str, family: str) -> bool:
    """Exact beside the backbone, and without a place in its weights."""
    gains = (
        case in ("dora", "ia3", "boft") and family in READ_NOT_CALLED
    )  # a bias outside the layer
    return (
        gains
        or case.startswith("lokr")
        or case == "oft of 1 x 1"
        or (case, family) == ("ia3", "resnet")
    )


@pytest.mark.parametrize(("case", "family"), LIVE, ids=[f"{c}, {f}" for c, f in LIVE])
def test_an_adapter_answers_as_in_peft(case, family, peft, made, host, sites_of, error, tmp_path):
    """Alone, folded into a plain model where it folds, and in a batch with another task."""
    backbone = host(family)
    kind, settings = settings_of(case, family)
    config = config_of(peft, kind, **settings)
    path, images, logits = made(backbone, config, merged=family in READ_NOT_CALLED)
    delta = through_a_file(path, backbone, tmp_path)
    require_backbone(delta, backbone, sites_of(backbone))
    assert error(tuned(backbone, delta, images), logits) <= FLOAT64

    if not (refused := refusals(delta, backbone)):
        merged = fold(delta, backbone, sites=sites_of(backbone))
        plain = timm.create_model(
            backbone.identity.architecture,
            **backbone.identity.arguments,
            num_classes=logits.shape[1],
        ).double()
        plain.load_state_dict(merged.tensors, strict=True)
        with torch.no_grad():
            assert error(plain.eval()(images), logits) <= FLOAT64
    assert not refused or may_stay_parallel(case, family)

    second_lora = config_of(peft, "Lora", r=2, target_modules=TARGETS[family])
    other, _, _ = made(backbone, second_lora, name="other", merged=True, seed=1)
    second = through_a_file(other, backbone, tmp_path, "other")
    alone = tuned(backbone, second, images)
    with torch.no_grad():
        mixed = Mixed(backbone, stack([delta, second], torch.float64))(
            images[[0, 1, 0, 1]], torch.tensor([1, 0, 0, 1])
        )
    assert error(mixed, torch.stack([alone[0], logits[1], logits[0], alone[1]])) <= FLOAT64


def reloaded(peft: Any, backbone: Backbone, path: Path, images: Tensor) -> Tensor:
    """What PEFT answers when it reads the files itself."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(backbone.model), path)
        return model.eval()(images)


def test_pruned_ranks(peft, made, vit64, error, tmp_path):
    """AdaLoRA keeps the rank that it began with in its scale, and a layer may lose all of its ranks."""
    kept = {"blocks.0.attn.qkv": [True, False, True, False, True], "blocks.1.attn.qkv": [False] * 5}

    def prune(model: Any) -> None:
        pattern = {f"{path}.lora_E.default": rows for path, rows in kept.items()}
        model.peft_config["default"].rank_pattern = pattern
        for path, rows in kept.items():
            layer = model.base_model.model.get_submodule(path)
            layer.lora_E["default"][~torch.tensor(rows)] = 0.0

    config = config_of(
        peft, "AdaLora", init_r=5, lora_alpha=7, total_step=10, target_modules=["qkv"]
    )
    path, images, logits = made(vit64, config, change=prune)
    delta = through_a_file(path, vit64, tmp_path)
    assert delta.tensors["blocks.0.attn.qkv/lora"]["down"].shape == (3, 48)
    assert "blocks.1.attn.qkv/lora" not in delta.branches
    assert error(tuned(vit64, delta, images), logits) <= FLOAT64
    assert error(reloaded(peft, vit64, path, images), logits) <= FLOAT64


def test_patterns_that_overlap_are_used_as_peft_reads_them_and_named(
    peft, made, vit64, error, tmp_path
):
    """PEFT takes the first that matches, and sorts them when it saves."""
    config = config_of(
        peft,
        "Lora",
        r=2,
        target_modules=["qkv"],
        alpha_pattern={"qkv": 3, r"^blocks\.0\.attn\.qkv": 9},
    )
    path, images, logits = made(vit64, config)
    delta = through_a_file(path, vit64, tmp_path)
    again = reloaded(peft, vit64, path, images)
    assert error(tuned(vit64, delta, images), again) <= FLOAT64
    assert error(again, logits) > 1e-3
    assert "several match, 9" in delta.provenance["alpha_pattern of blocks.0.attn.qkv"]
    assert "alpha_pattern of blocks.1.attn.qkv" not in delta.provenance


@pytest.mark.parametrize("module", ["patch_embed.proj", "blocks.1.norm2", "blocks.0.mlp", "head"])
def test_a_saved_module(module, peft, made, vit64, sites_of, error, tmp_path):
    config = config_of(
        peft, "Lora", r=2, target_modules=["qkv"], modules_to_save=[module], bias="all"
    )
    path, images, logits = made(vit64, config)
    delta = through_a_file(path, vit64, tmp_path)
    require_backbone(delta, vit64, sites_of(vit64))
    assert error(tuned(vit64, delta, images), logits) <= FLOAT64
    folded = fold(delta, vit64, sites=sites_of(vit64)).tensors
    plain = copy.deepcopy(vit64.model)
    plain.load_state_dict(folded)
    with torch.no_grad():
        assert error(plain(images), logits) <= FLOAT64


def test_a_saved_norm_that_runs_twice_is_a_difference(vit64, error, tmp_path):
    """No branch stands where an image passes twice; a parameter's difference does."""
    model = copy.deepcopy(vit64.model)
    model.blocks[1].norm1 = model.blocks[0].norm1  # type: ignore[index]
    backbone = wrap(model, vit64.identity.architecture, vit64.identity.arguments)
    weight = torch.linspace(0.5, 1.5, 48, dtype=torch.float64)
    saved = {f"blocks.{block}.norm1.ln_tuning_layers.weight": weight for block in (0, 1)}
    saved = {name: tensor.clone() for name, tensor in saved.items()}
    delta = through_a_file(written(tmp_path / "adapter", saved, **LN), backbone, tmp_path)
    assert {branch.tuner.kind for branch in delta.branches.values()} == {"difference", "head"}
    images = backbone.example(2)
    whole = copy.deepcopy(model)
    whole.blocks[0].norm1.weight.data.copy_(weight)  # type: ignore[index,union-attr]
    with torch.no_grad():
        assert error(tuned(backbone, delta, images), whole(images)) <= FLOAT64


def test_a_saved_batch_norm_of_negative_variance_is_refused(host, tmp_path):
    backbone = host("resnet")
    variance = backbone.model.bn1.running_var  # type: ignore[union-attr]
    path = written(tmp_path / "adapter", {"bn1.running_var": -variance}, **LN)  # type: ignore[operator]
    with pytest.raises(IncompatibleArtefact, match="negative variance") as caught:
        read_peft(path, backbone)
    assert "bn1.running_var" in str(caught.value)


def test_a_bias_of_lora_at_a_classifier_without_one(vit64, error, tmp_path):
    """The task's head may have a bias though the backbone's classifier has none."""
    model = copy.deepcopy(vit64.model)
    model.head = torch.nn.Linear(48, 3, bias=False, dtype=torch.float64)
    backbone = wrap(model, vit64.identity.architecture, vit64.identity.arguments)
    low = {"head.lora_A.weight": torch.randn(2, 48), "head.lora_B.weight": torch.randn(3, 2)}
    low |= {"head.lora_B.bias": torch.randn(3)}
    path = written(tmp_path / "adapter", low, lora_bias=True)
    delta = through_a_file(path, backbone, tmp_path)
    images = backbone.example(2)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
        a, b, bias = (tensor.double() for tensor in low.values())
        wanted = model.head(features) + features @ a.mT @ b.mT + bias
    assert error(tuned(backbone, delta, images), wanted) <= FLOAT64


def test_a_saved_classifier_and_lora_of_other_classes_are_refused(vit, tmp_path):
    tensors = {**low_rank("head", out=7), "head.weight": torch.ones(3, 48)}
    with pytest.raises(IncompatibleArtefact, match="than what stands at it") as caught:
        read_peft(written(tmp_path / "adapter", tensors), vit)
    assert "head [3, 48] with head/lora [7, 48]" in str(caught.value)


def test_the_biases_of_layers_that_are_read_are_noted_in_one_pass(host, tmp_path):
    backbone = host("eva")
    gains = {f"blocks.{block}.attn.qkv.ia3_l": torch.full((144, 1), 1.5) for block in range(3)}
    path = written(tmp_path / "adapter", gains, peft_type="IA3", feedforward_modules=[])
    passes = []
    handle = backbone.model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        found = read_peft(path, backbone)
    finally:
        handle.remove()
    assert len(found.branches) == 3 + 1
    assert len(passes) == 2  # and one that tells which layers are read


def test_what_peft_does_not_run_is_read_as_it_merges_it(peft, made, host, error, tmp_path):
    """EVA reads qkv's weight: PEFT's own answer is the backbone's until it is merged."""
    backbone = host("eva")
    config = config_of(peft, "Lora", r=2, target_modules=["fc1", "qkv"])
    path, images, merged = made(backbone, config, merged=True)
    delta = through_a_file(path, backbone, tmp_path)
    assert error(tuned(backbone, delta, images), merged) <= FLOAT64
    assert error(reloaded(peft, backbone, path, images), merged) > 1e-3


def test_a_pickled_adapter(peft, made, vit64, error, tmp_path):
    path, images, logits = made(vit64, config_of(peft, "Lora", r=2, target_modules=["qkv"]))
    tensors = load_file(path / "adapter_model.safetensors")
    (path / "adapter_model.safetensors").unlink()
    torch.save(tensors, path / "adapter_model.bin")
    assert error(tuned(vit64, through_a_file(path, vit64, tmp_path), images), logits) <= FLOAT64
    torch.save({"a": print}, path / "adapter_model.bin")
    with pytest.raises(IncompatibleArtefact, match="would run code"):
        read_peft(path, vit64)
    torch.save([1.0], path / "adapter_model.bin")
    with pytest.raises(IncompatibleArtefact, match="no state dict"):
        read_peft(path, vit64)
    (path / "adapter_model.bin").unlink()
    with pytest.raises(UsageError, match="no such file"):
        read_peft(path, vit64)


class Wrapper(nn.Module):
    """A model around another, as transformers has one around timm's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.timm_model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.timm_model(images)


@pytest.mark.parametrize("distributed", [False, True])
def test_an_adapter_of_a_wrapped_backbone(distributed, peft, made, vit64, error, tmp_path):
    config = config_of(
        peft, "Lora", r=2, target_modules=["qkv", "fc1"],
        alpha_pattern={r"^timm_model\.blocks\.0\.attn\.qkv": 9}, modules_to_save=["head"],
    )  # fmt: skip
    wrapped = replace(vit64, model=Wrapper(vit64.model))
    path, images, logits = made(wrapped, config)
    if distributed:
        tensors = load_file(path / "adapter_model.safetensors")
        named = {f"module.{name}": tensor for name, tensor in tensors.items()}
        save_file(named, path / "adapter_model.safetensors")
    delta = through_a_file(path, vit64, tmp_path)
    assert error(tuned(vit64, delta, images), logits) <= FLOAT64
    assert "timm_model." in delta.provenance["wrapper"]


# what is refused


PLAIN_LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}


def written(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """An adapter folder by hand."""
    folder.mkdir(exist_ok=True)
    settings = config if "peft_type" in config else {**PLAIN_LORA, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def low_rank(module: str, width: int = 48, out: int = 144) -> dict[str, Tensor]:
    return {
        f"{module}.lora_A.weight": torch.ones(2, width),
        f"{module}.lora_B.weight": torch.ones(out, 2),
    }


QKV = "blocks.0.attn.qkv"


def test_every_other_kind_is_refused_by_name(peft, vit, tmp_path):
    """All kinds that the installed PEFT knows, and what to do instead."""
    others = {kind.value for kind in peft.PeftType} - set(KINDS)
    assert len(others) > 10
    for kind in others:
        path = written(tmp_path / "adapter", {}, peft_type=kind)
        with pytest.raises(IncompatibleArtefact, match="this kind of PEFT adapter") as caught:
            read_peft(path, vit)
        assert kind in str(caught.value)
        assert ("prefixes or deep prompts" if kind in PROMPTS else "merge") in caught.value.details[
            "do"
        ]


@pytest.mark.parametrize(
    "settings",
    [
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"alora_invocation_tokens": [1]},
        {"layer_replication": [[0, 2]]},
        {"target_parameters": ["qkv.weight"]},
        {"trainable_token_indices": [0]},
        {"enable_lora": [True, False, True]},
        {"kasa_config": {"beta": 1}},
        {"something_of_tomorrow": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_variant_is_refused_by_name(settings, vit, tmp_path):
    path = written(tmp_path / "adapter", low_rank(QKV), **settings)
    with pytest.raises(IncompatibleArtefact, match="this variant of LORA cannot") as caught:
        read_peft(path, vit)
    assert next(iter(settings)) in str(caught.value)


LN = {"peft_type": "LN_TUNING"}
REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str, str]] = {
    "start out of the weights": (
        low_rank(QKV),
        {"init_lora_weights": "pissa_niter_4"},
        "changed the frozen weights",
        "pissa",
    ),
    "no such module": (low_rank("blocks.9.attn.qkv"), {}, "no such module", "blocks.9.attn.qkv"),
    "wrong width": (low_rank(QKV, width=47), {}, "wrong shape", "[r, 48]"),
    "wrong output": (low_rank(QKV, out=48), {}, "wrong shape", "[144, 2]"),
    "half a layer": (
        {f"{QKV}.lora_A.weight": torch.ones(2, 48)},
        {},
        "is missing",
        f"{QKV}.lora_B.weight",
    ),
    "beside a norm": (low_rank("blocks.0.norm1"), {}, "at this layer cannot", "LayerNorm"),
    "leftover": (
        {**low_rank(QKV), "somewhere.weight": torch.ones(2)},
        {},
        "no known place",
        "somewhere.weight",
    ),
    "leftover at the head": (
        {**low_rank(QKV), "head.more": torch.ones(2)},
        {},
        "no known place",
        "head.more",
    ),
    "saved with another shape": (
        {**low_rank(QKV), "norm.weight": torch.ones(2)},
        {},
        "another shape",
        "norm.weight",
    ),
    "a head of several layers": (
        {**low_rank(QKV), "head.weight": torch.ones(2, 3, 4)},
        {},
        "not one linear layer",
        "[2, 3, 4]",
    ),
    "saved twice, unlike": (
        {
            **low_rank(QKV),
            "norm.bias": torch.ones(48),
            "norm.modules_to_save.bias": torch.zeros(48),
        },
        {},
        "twice",
        "norm.modules_to_save.bias",
    ),
    "magnitudes without DoRA": (
        {**low_rank(QKV), f"{QKV}.lora_magnitude_vector": torch.ones(144)},
        {},
        "without saying use_dora",
        QKV,
    ),
    "no alpha": (low_rank(QKV), {"lora_alpha": None}, "malformed", "lora_alpha"),
    "a pattern that is none": (
        low_rank(QKV),
        {"alpha_pattern": {"(": 1}},
        "malformed",
        "alpha_pattern",
    ),
    "patterns that are none": (low_rank(QKV), {"alpha_pattern": [1]}, "malformed", "alpha_pattern"),
    "rank zero": (
        {f"{QKV}.lora_A.weight": torch.ones(0, 48), f"{QKV}.lora_B.weight": torch.ones(144, 0)},
        {},
        "wrong shape",
        "[r, 48]",
    ),
    "LoHa of rank zero": (
        {f"{QKV}.hada_w1_a": torch.ones(144, 2)},
        {"peft_type": "LOHA", "r": 0, "alpha": 1},
        "malformed",
        "r from 1",
    ),
    "IA3 of no pattern": (
        {f"{QKV}.ia3_l": torch.ones(144, 1)},
        {"peft_type": "IA3", "feedforward_modules": "("},
        "malformed",
        "feedforward_modules",
    ),
    "a butterfly of odd blocks": (
        {f"{QKV}.boft_R": torch.ones(2, 16, 3, 3), f"{QKV}.boft_s": torch.ones(144, 1)},
        {"peft_type": "BOFT"},
        "channels of its layer",
        "factor 2",
    ),
    "projection missing": (
        {f"{QKV}.vera_lambda_b": torch.ones(144), f"{QKV}.vera_lambda_d": torch.ones(2)},
        {"peft_type": "VERA", "r": 2},
        "projections do not fit",
        "vera_A",
    ),
    "vera beside a convolution": (
        {"patch_embed.proj.vera_lambda_b": torch.ones(48)},
        {"peft_type": "VERA"},
        "at this layer cannot",
        "Conv2d",
    ),
    "a rotation of windows": (
        {"patch_embed.proj.oft_R.weight": torch.ones(24, 28)},
        {"peft_type": "OFT"},
        "OFT at this layer cannot",
        "overlap",
    ),
    "a rotation of other channels": (
        {f"{QKV}.oft_R.weight": torch.ones(5, 28)},
        {"peft_type": "OFT", "num_cayley_neumann_terms": 5},
        "channels of its layer",
        "48 channels",
    ),
    "a rotation of no block": (
        {f"{QKV}.oft_R.weight": torch.ones(6, 27)},
        {"peft_type": "OFT"},
        "no block has",
        "27",
    ),
    "no terms": (
        {f"{QKV}.oft_R.weight": torch.ones(6, 28)},
        {"peft_type": "OFT", "num_cayley_neumann_terms": 0},
        "malformed",
        "num_cayley_neumann_terms",
    ),
    "tuned norm of no known place": (
        {"blocks.0.norm9.ln_tuning_layers.weight": torch.ones(48)},
        LN,
        "no known place",
        "blocks.0.norm9.weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_carried_is_refused_with_its_place(case, vit, tmp_path):
    tensors, config, sentence, named = REFUSED[case]
    path = written(tmp_path / "adapter", tensors, **config)
    with pytest.raises(UtuneError) as caught:
        read_peft(path, vit)
    assert sentence in str(caught.value)
    assert named in str(caught.value)
    assert str(path) in str(caught.value)


def test_groups_and_dilations_are_refused(host, tmp_path):
    backbone = host("convnext")
    tensors = {
        "stages.0.blocks.0.conv_dw.lora_A.weight": torch.ones(2, 8, 7, 7),
        "stages.0.blocks.0.conv_dw.lora_B.weight": torch.ones(8, 2, 1, 1),
    }
    with pytest.raises(IncompatibleArtefact, match="Conv2d of 8 groups"):
        read_peft(written(tmp_path / "adapter", tensors), backbone)
    resnet = copy.deepcopy(host("resnet"))
    resnet.model.conv1.dilation = (2, 2)  # type: ignore[union-attr]
    with pytest.raises(IncompatibleArtefact, match="dilated convolution"):
        read_peft(written(tmp_path / "adapter", low_rank("conv1")), resnet)


def test_malformed_folders(vit, tmp_path):
    with pytest.raises(UsageError, match="no PEFT adapter"):
        read_peft(tmp_path, vit)
    for text in ("{", "[]", "{}", "3"):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(IncompatibleArtefact, match="malformed"):
            read_peft(tmp_path, vit)


def test_an_adapter_without_any_head(vit, tmp_path):
    model = timm.create_model(
        vit.identity.architecture, **{**vit.identity.arguments, "num_classes": 0}
    )
    trunk = wrap(model, vit.identity.architecture, vit.identity.arguments)
    path = written(tmp_path / "adapter", low_rank(QKV))
    with pytest.raises(IncompatibleArtefact, match="the task has no head"):
        read_peft(path, trunk)
    saved = {"head.weight": torch.ones(3, 48), "head.bias": torch.ones(3)}
    found = read_peft(written(tmp_path / "adapter", {**low_rank(QKV), **saved}), trunk)
    assert found.delta("task", trunk).labels == ("class_0", "class_1", "class_2")
