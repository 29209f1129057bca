"""modelscope's `vision_efficient_tuning`, the code of U-Tuning's authors (arXiv 2303.00690).

Two layouts: a hub file with `backbone_weight` and `head_weight`, and a trainer's flat state dict with
`model.backbone.*` and `model.head.*`. Tuners are found by their keys, whatever combination there is:
adapter (serial behind the FFN, GELU), LoRA on qkv (scale 1), prefix, prompts (deep, shallow, of unequal
lengths), side networks, and biases that differ from the frozen ones (BitFit).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ..pickles import read_pickle
from ..preprocessing import Preprocessing
from ..sites import blocks
from ..tuner import Branch, Point
from ..tuners.bias import Bias
from ..tuners.bottleneck import Bottleneck
from ..tuners.prefix import Prefix
from .foreign import (
    Foreign,
    bare_name,
    contained,
    differing,
    other_backbone,
    refuse,
)
from .prompts import plant_prompts
from .side_tuning import plant_side_network

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ..backbone import Backbone
    from .settings import Settings

CROP = 224 / 256  # its pipeline resizes to 256 and cuts 224, with ImageNet's mean and deviation
CONTAINERS = ("state_dict", "model", "model_state_dict")
WRAPPERS = (
    "module.",
    "model.",
    "net.",
    "_orig_mod.",
)  # of distributed training, trainers, torch.compile
ADAPTER = ("adapter.ln1.weight", "adapter.ln1.bias", "adapter.ln2.weight", "adapter.ln2.bias")
LORA = ("attn.lora.lora_a.weight", "attn.lora.lora_b.weight")
PREFIX = ("attn.prefix.prefix_key", "attn.prefix.prefix_value")
PROMPT = "prompt.prompt_token"
SIDE = "sidetune."


def read_modelscope(path: Path, backbone: Backbone, settings: Settings) -> Foreign:
    """Branches of a modelscope checkpoint.

    Raises:
        IncompatibleArtefact: No modelscope checkpoint, another backbone, or prompts that overwrite
            image tokens or enter a pooled mean.
    """
    trunk, head, labels = _parts(path, read_pickle(path))
    found = Foreign(
        "modelscope vision_efficient_tuning",
        labels=labels,
        preprocessing=Preprocessing(
            backbone.image_size, "bilinear", CROP, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        ),
    )
    known = set(backbone.model.state_dict())
    _biases(path, backbone, trunk, found)
    places = blocks(backbone.model)
    known |= _prompts(path, backbone, trunk, places, found)
    for block in places:
        known |= _block(path, backbone, trunk, block, found)
    side = {k.removeprefix(SIDE): v for k, v in trunk.items() if k.startswith(SIDE)}
    if side:
        plant_side_network(path, backbone, side, found)
        known |= {f"{SIDE}{name}" for name in side}
    left = sorted(k for k in trunk if k not in known and not backbone.is_classifier(k))
    if left:
        raise refuse(
            path, "the checkpoint holds tensors of no known tuner", found=", ".join(left[:5])
        )
    _head(path, backbone, trunk, head, found)
    return found


def _parts(
    path: Path, saved: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[str, ...] | None]:
    """Trunk and head tensors by their names inside, and class names."""
    saved = contained(saved, CONTAINERS)
    if isinstance(saved, dict) and isinstance(saved.get("backbone_weight"), dict):
        trunk, head = (
            {
                bare_name(key, WRAPPERS).removeprefix("backbone."): v
                for key, v in (saved.get(part) or {}).items()
            }
            for part in ("backbone_weight", "head_weight")
        )
        classes = saved.get("CLASSES")
        return trunk, head, tuple(map(str, classes)) if classes else None
    flat = saved if isinstance(saved, dict) else {}
    flat = {
        bare_name(key, WRAPPERS): value for key, value in flat.items() if isinstance(value, Tensor)
    }
    trunk = {k.removeprefix("backbone."): v for k, v in flat.items() if k.startswith("backbone.")}
    head = {k.removeprefix("head."): v for k, v in flat.items() if k.startswith("head.")}
    if not trunk:
        raise refuse(
            path,
            "the file is no checkpoint of modelscope's vision_efficient_tuning",
            found=", ".join(list(flat)[:3]) or type(saved).__name__,
            do="wanted: backbone_weight and head_weight, or model.backbone.* and model.head.*",
        )
    return trunk, head, None


def _biases(path: Path, backbone: Backbone, trunk: Mapping[str, Tensor], found: Foreign) -> None:
    """Shifts beside the biases that differ; every other frozen tensor must be the backbone's."""
    changed = differing(path, backbone, trunk)
    if strange := [name for name in changed if not name.endswith(".bias")]:
        raise other_backbone(path, backbone, strange)
    for name, (own, frozen) in changed.items():
        module = name.removesuffix(".bias")
        point = Point(module, "output")
        shift = own.double() - frozen.double()  # float64 holds it well enough to give it back
        found.plant(f"{module}/bias", Branch(Bias(), point, point), {"shift": shift})


def _prompts(
    path: Path,
    backbone: Backbone,
    trunk: Mapping[str, Tensor],
    places: Sequence[str],
    found: Foreign,
) -> set[str]:
    keys = {
        number: f"{block}.{PROMPT}"
        for number, block in enumerate(places)
        if f"{block}.{PROMPT}" in trunk
    }
    plant_prompts(path, backbone, {n: trunk[key][0] for n, key in keys.items()}, places, found)
    return set(keys.values())


def _block(
    path: Path, backbone: Backbone, trunk: dict[str, Tensor], block: str, found: Foreign
) -> set[str]:
    """The other tuners of one block, in the order in which modelscope applies them."""
    known: set[str] = set()

    def take(names: tuple[str, ...]) -> list[Tensor] | None:
        keys = [f"{block}.{name}" for name in names]
        there = [key in trunk for key in keys]
        if not any(there):
            return None
        if not all(there):
            missing = [key for key, have in zip(keys, there, strict=True) if not have]
            raise refuse(path, "a tuner is not whole", found=f"missing {', '.join(missing)}")
        known.update(keys)
        return [trunk[key] for key in keys]

    if tensors := take(LORA):
        qkv = f"{block}.attn.qkv"
        branch = Branch(
            Bottleneck("identity", bias=False), Point(qkv, "input"), Point(qkv, "output")
        )
        down, up = tensors
        found.plant(f"{qkv}/lora", branch, {"down": down, "up": up, "scale": torch.ones(())})
    if tensors := take(PREFIX):
        point = Point(f"{block}.attn", "keys")
        key, value = tensors
        branch = Branch(Prefix(joint_softmax=True), point, point)
        found.plant(f"{block}.attn/prefix", branch, {"key": key[0], "value": value[0]})
    if tensors := take(ADAPTER):
        point = _behind_ffn(backbone.model, block)
        names = ("down", "down_bias", "up", "up_bias")
        weights = {**dict(zip(names, tensors, strict=True)), "scale": torch.ones(())}
        branch = Branch(Bottleneck("gelu", bias=True), point, point)
        found.plant(f"{point.module}/adapter", branch, weights)
    return known


def _behind_ffn(model: nn.Module, block: str) -> Point:
    """Behind the FFN and its LayerScale, in front of the residual sum."""
    scale = getattr(model.get_submodule(block), "ls2", None)
    scaled = scale is not None and not isinstance(scale, nn.Identity)
    return Point(f"{block}.ls2" if scaled else f"{block}.mlp", "output")


def _head(
    path: Path,
    backbone: Backbone,
    trunk: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    found: Foreign,
) -> None:
    """The classifier; where backbone and model each have one, their product."""
    classifier = f"{backbone.classifiers[0]}."
    inner = {k.removeprefix(classifier): v for k, v in trunk.items() if k.startswith(classifier)}
    outer = {key.removeprefix("fc."): value for key, value in head.items()}
    if not inner and not outer:
        raise refuse(
            path, "the checkpoint has no classifier", found="neither head_weight nor head.fc"
        )
    for layer in (inner, outer):
        if layer and not {"weight"} <= set(layer) <= {"weight", "bias"}:
            raise refuse(
                path,
                "the checkpoint's classifier is no linear layer",
                found=", ".join(sorted(layer)[:5]),
                do=f"wanted: head.fc.weight, or {classifier}weight, with or without a bias",
            )
    if not inner or not outer:
        one = inner or outer
        found.plant_head(backbone, one["weight"], one.get("bias"))
        return
    weight = outer["weight"].double() @ inner["weight"].double()
    bias = weight.new_zeros(len(weight))
    if "bias" in inner:
        bias = bias + outer["weight"].double() @ inner["bias"].double()
    if "bias" in outer:
        bias = bias + outer["bias"].double()
    found.plant_head(backbone, weight, bias)
