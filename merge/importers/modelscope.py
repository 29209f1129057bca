"""modelscope's `vision_efficient_tuning`, the code of U-Tuning's authors (arXiv 2303.00690).

Two layouts: a hub file with `backbone_weight` and `head_weight`, and a trainer's flat state dict with
`model.backbone.*` and `model.head.*`; either with the frozen tensors or without. Tuners are found by their keys, whatever combination there is:
adapter (serial behind the FFN, GELU), LoRA on qkv (scale 1), prefix, prompts (deep, shallow, of unequal
lengths), side networks, and biases that differ from the frozen ones (BitFit).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ..preprocessing import Preprocessing
from ..sites import blocks
from ..tensor_files import read_saved
from ..tuner import Branch, Point
from ..tuners.bias import Bias
from ..tuners.bottleneck import Bottleneck
from ..tuners.prefix import Prefix
from .containers import contained
from .foreign import (
    Foreign,
    bare_name,
    is_linear_layer,
    other_backbone,
    refuse,
    some,
)
from .prompts import plant_prompts
from .side_tuning import plant_side_network
from .trunk import require_known, trunk_changes

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
    trunk, head, labels = _parts(path, read_saved(path), settings)
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
    known |= {name for name in trunk if backbone.is_classifier(name)}
    require_known(path, trunk, known, found)
    _head(path, backbone, trunk, head, found)
    return found


def _parts(
    path: Path, saved: Any, settings: Settings
) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[str, ...] | None]:
    """Trunk and head tensors by their names inside, and class names."""
    saved = contained(path, saved, CONTAINERS, settings)
    if isinstance(saved, dict) and isinstance(saved.get("backbone_weight"), dict):
        trunk, head = (
            {
                bare_name(key, WRAPPERS).removeprefix("backbone."): v
                for key, v in (saved.get(part) or {}).items()
                if isinstance(v, Tensor)
            }
            for part in ("backbone_weight", "head_weight")
        )
        return trunk, head, _labels(path, saved.get("CLASSES"))
    flat = saved if isinstance(saved, dict) else {}
    flat = {
        bare_name(key, WRAPPERS): value for key, value in flat.items() if isinstance(value, Tensor)
    }
    trunk = {k.removeprefix("backbone."): v for k, v in flat.items() if k.startswith("backbone.")}
    head = {k.removeprefix("head."): v for k, v in flat.items() if k.startswith("head.")}
    if not trunk and ("fc.weight" not in head or len(head) < len(flat)):  # a head alone is a probe
        raise refuse(
            path,
            "the file is no checkpoint of modelscope's vision_efficient_tuning",
            found=", ".join(list(flat)[:3]) or type(saved).__name__,
            wanted="backbone_weight and head_weight, or model.backbone.* and model.head.*",
        )
    return trunk, head, None


def _labels(path: Path, classes: Any) -> tuple[str, ...] | None:
    """The names of the classes, in the order of the logits.

    Raises:
        IncompatibleArtefact: They are in no order.
    """
    if classes is None:
        return None
    if not isinstance(classes, (list, tuple, np.ndarray)):
        raise refuse(
            path,
            "the names of the classes are no list",
            found=f"CLASSES, a {type(classes).__name__}",
            do="save it as a list in the order of the logits, or leave it out and give --labels",
        )
    return tuple(map(str, classes)) or None


def _biases(path: Path, backbone: Backbone, trunk: Mapping[str, Tensor], found: Foreign) -> None:
    """Shifts beside the biases that differ; every other frozen tensor must be the backbone's."""
    changed = trunk_changes(path, backbone, trunk, found, tuned=".bias")
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
    prompts = {number: _rows(path, key, trunk[key]) for number, key in keys.items()}
    plant_prompts(path, backbone, prompts, places, found)
    return set(keys.values())


def _rows(path: Path, key: str, tensor: Tensor) -> Tensor:
    """`[L, C]` of `[1, L, C]`.

    Raises:
        IncompatibleArtefact: It has another shape.
    """
    if tensor.dim() != 3 or len(tensor) != 1:
        raise refuse(
            path,
            "a tuner's tokens have another shape",
            found=f"{key} of shape {list(tensor.shape)}",
            wanted="[1, length, channels]",
        )
    return tensor[0]


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
        branch = Branch(Prefix(joint_softmax=True), point, point)
        rows = (_rows(path, f"{block}.{name}", t) for name, t in zip(PREFIX, tensors, strict=True))
        found.plant(f"{block}.attn/prefix", branch, dict(zip(("key", "value"), rows, strict=True)))
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
            path,
            "the checkpoint has no classifier",
            found="neither head_weight nor head.fc",
            do="a task needs its head: save it with the tuners",
        )
    for layer in (inner, outer):
        surplus = set(layer) - {"weight", "bias"}
        if layer and (surplus or not is_linear_layer(layer.get("weight"), layer.get("bias"))):
            raise refuse(
                path,
                "the checkpoint's classifier is no linear layer",
                found=some(f"{name} {list(layer[name].shape)}" for name in sorted(layer)),
                wanted=f"head.fc.weight, or {classifier}weight, with or without a bias",
            )
    if not inner or not outer:
        one = inner or outer
        found.plant_head(backbone, one["weight"], one.get("bias"))
        return
    shapes = [list(layer["weight"].shape) for layer in (inner, outer)]
    if shapes[1][1] != shapes[0][0]:
        raise refuse(
            path,
            "the head does not read what the backbone's classifier gives",
            found=f"head.fc.weight {shapes[1]} behind {classifier}weight {shapes[0]}",
        )
    weight = outer["weight"].double() @ inner["weight"].double()
    bias = weight.new_zeros(len(weight))
    if "bias" in inner:
        bias = bias + outer["weight"].double() @ inner["bias"].double()
    if "bias" in outer:
        bias = bias + outer["bias"].double()
    found.plant_head(backbone, weight, bias)
