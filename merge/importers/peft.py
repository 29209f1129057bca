"""LoRA as Hugging Face PEFT saves it: a folder with `adapter_config.json` and its tensors.

Ranks and scales are resolved per layer (`rank_pattern`, `alpha_pattern`, rsLoRA), so that nobody has to
recompute them. Kinds other than plain LoRA are refused by name.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backbone import read_tensors
from ..errors import UsageError
from ..tuner import Branch, Point
from ..tuners.bottleneck import Bottleneck
from .foreign import Foreign, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..backbone import Backbone

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PLAIN = {  # settings under which LoRA is more than scale * up(down(x))
    "use_dora": False,
    "use_qalora": False,
    "use_bdlora": None,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
}


def read_peft(path: Path, backbone: Backbone) -> Foreign:
    """Branches of a PEFT LoRA adapter.

    Raises:
        UsageError: The folder lacks a file.
        IncompatibleArtefact: Another kind than plain LoRA, a tensor of no known place, or no head.
    """
    if not (path / CONFIG).is_file():
        raise UsageError("there is no PEFT adapter", where=path, wanted=f"a folder with {CONFIG}")
    try:
        config: dict[str, Any] = json.loads((path / CONFIG).read_text())
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError) as cause:
        raise refuse(
            path / CONFIG, "the adapter's configuration is malformed", found=repr(cause)
        ) from cause
    if kind != "LORA":
        raise refuse(
            path, "this kind of PEFT adapter cannot be read yet", found=kind, do="wanted: LORA"
        )
    for setting, plain in PLAIN.items():
        if config.get(setting, plain) not in (plain, None):
            raise refuse(
                path,
                "this variant of LoRA cannot be read yet",
                found=f"{setting}={config[setting]!r}",
            )
    tensors = {k.removeprefix(PREFIX): v for k, v in read_tensors(path / TENSORS).items()}
    found = Foreign(f"PEFT {config.get('peft_version', '')} LoRA".replace("  ", " "))
    saved: dict[str, Tensor] = {}
    ups = {
        k.removesuffix(".lora_B.weight"): v
        for k, v in tensors.items()
        if k.endswith(".lora_B.weight")
    }
    for name, tensor in tensors.items():
        module = name.removesuffix(".lora_A.weight")
        if module != name and module in ups:
            _check_linear(path, backbone, module)
            branch = Branch(
                Bottleneck("identity", bias=False), Point(module, "input"), Point(module, "output")
            )
            weights = {"down": tensor, "up": ups[module], "scale": _scale(config, module, tensor)}
            found.plant(f"{module}/lora", branch, weights)
        elif not name.endswith(".lora_B.weight"):
            saved[name] = tensor
    _head(path, backbone, saved, found)
    return found


def _scale(config: Mapping[str, Any], module: str, down: Tensor) -> Tensor:
    """`alpha / r`, or `alpha / sqrt(r)` with rsLoRA (arXiv 2312.03732), for one layer."""
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    rank = down.shape[0]
    return torch.tensor(
        alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), dtype=torch.float64
    )


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that is the module's name or its end behind a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _check_linear(path: Path, backbone: Backbone, module: str) -> None:
    try:
        op = backbone.model.get_submodule(module)
    except AttributeError as cause:
        raise refuse(path, "the backbone has no such module", found=module) from cause
    if not isinstance(op, nn.Linear):
        raise refuse(
            path,
            "LoRA beside this layer cannot be read yet",
            found=f"{module}: {type(op).__name__}",
        )


def _head(path: Path, backbone: Backbone, saved: dict[str, Tensor], found: Foreign) -> None:
    """The head of `modules_to_save`, or else the backbone's own classifier."""
    classifier = backbone.classifier
    own = {
        k: saved.pop(f"{classifier}.{k}")
        for k in ("weight", "bias")
        if f"{classifier}.{k}" in saved
    }
    if saved:
        raise refuse(
            path, "the adapter holds tensors of no known place", found=", ".join(list(saved)[:5])
        )
    if not own:
        layer = backbone.model.get_submodule(classifier)
        if not isinstance(layer, nn.Linear):
            raise refuse(
                path, "the task has no head", found=f"{classifier} is neither saved nor in the backbone",
                do="load a backbone with its classifier, or train with modules_to_save",
            )  # fmt: skip
        own = {
            "weight": layer.weight.detach(),
            **({"bias": layer.bias.detach()} if layer.bias is not None else {}),
        }
    found.plant_head(backbone, own["weight"], own.get("bias"))
