"""The folder of a transformers vision model: which file has its weights, and what only its configuration says.

The numbers of heads, the activation and the eps of the norms are in no tensor. transformers' ViT has an eps of 1e-12 where
timm has 1e-6: the argument `layer_norm_eps` of a timm backbone keeps it, in the identity too.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import IncompatibleArtefact
from ...tuners.bottleneck import ACTIVATIONS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

EPS = "layer_norm_eps"
"""An argument of timm's models here: the eps of all layer norms."""
FILES = ("model.safetensors", "pytorch_model.bin")
CALLED = {  # transformers' name of an activation, and ours
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
VISION = "vision_model."
CONFIG = "config.json"


def weights_of(folder: Path) -> Path | None:
    """The file of a folder's weights."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def model_type(path: Path) -> str | None:
    """What a configuration says; None where it cannot be read, which who reads it says."""
    try:
        return json.loads(path.read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def of_pictures(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those of CLIP's and SigLIP's texts."""
    if not any(name.startswith(VISION) for name in tensors):
        return dict(tensors)
    return {n: t for n, t in tensors.items() if n.startswith((VISION, "classifier."))}


def set_eps(model: nn.Module, eps: float) -> None:
    """The eps of all layer norms."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


def match_config(path: Path, model: nn.Module) -> float | None:
    """Hold a configuration to timm's model.

    Args:
        path: Of `config.json`; nothing is held where there is none.
        model: timm's.

    Returns:
        The eps of the layer norms, where it is not timm's.

    Raises:
        IncompatibleArtefact: The configuration cannot be read, or says other numbers of heads, another activation,
            or an eps that only some of the norms have.
    """
    if not path.is_file():
        return None
    try:
        config: dict[str, Any] = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as cause:
        raise IncompatibleArtefact(
            "the configuration cannot be read", where=path, found=repr(cause)
        ) from cause
    config = config.get("vision_config") or config
    modules = list(model.modules())
    _require_heads(path, config, [int(m.num_heads) for m in modules if hasattr(m, "qkv")])  # type: ignore[arg-type]
    acts = [getattr(module, "act", None) for module in modules]
    act = next((own for own in acts if isinstance(own, nn.Module)), None)
    _require_activation(path, config.get("hidden_act"), act)
    own = {module.eps for module in modules if isinstance(module, nn.LayerNorm)}
    eps = config.get(EPS)
    if eps is None or own == {eps}:
        return None
    if "depths" in config:  # Swin's patches are normed with torch's own eps
        raise IncompatibleArtefact(
            "the norms of the model have several eps",
            where=path,
            wanted=f"{EPS} {', '.join(map(str, own))}",
            found=eps,
        )
    return float(eps)


def _require_heads(path: Path, config: Mapping[str, Any], own: list[int]) -> None:
    """As many heads in every block."""
    heads, depths = config.get("num_attention_heads"), config.get("depths")
    if depths is not None:
        each = [
            h for d, h in zip(depths, config.get("num_heads", ()), strict=False) for _ in range(d)
        ]
    else:
        each = own if heads is None else [heads] * len(own)
    if each != own:
        raise IncompatibleArtefact(
            "the model has another number of heads than the backbone",
            where=path,
            wanted=own,
            found=each,
            do="check --backbone and --backbone-arg num_heads=...",
        )


def _require_activation(path: Path, name: object, act: nn.Module | None) -> None:
    """The same function, by its values."""
    known = CALLED.get(str(name))
    if (
        name is None or act is None or isinstance(act, nn.SiLU)
    ):  # a gated layer does not ask hidden_act
        return
    x = torch.linspace(-4, 4, 65, dtype=torch.float64)
    if known is None or not torch.allclose(act(x), ACTIVATIONS[known](x), rtol=0, atol=1e-9):
        raise IncompatibleArtefact(
            "the model has another activation than the backbone",
            where=path,
            wanted=type(act).__name__,
            found=name,
            do="name the timm architecture with this activation (those of CLIP have quickgelu in their names)",
        )
