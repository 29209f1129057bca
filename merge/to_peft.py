"""A delta as an adapter of Hugging Face PEFT: LoRA, biases and heads, exactly or not at all.

What PEFT's LoRA can say is `scale * B A` beside a layer (arXiv 2106.09685), a bias of B's, tuned biases of
the frozen layers, and whole modules; every other branch is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from .delta import Delta, require_backbone
from .errors import UsageError
from .files import atomic_folder
from .ops import adds_bias_last, is_linear, reads_patches
from .parallel import submodule
from .sites import Sites, measure
from .tuners.bias import Bias
from .tuners.bottleneck import Bottleneck
from .tuners.head import Head

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from .backbone import Backbone
    from .tuner import Branch

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class PeftAdapter:
    """What the two files of an adapter folder hold.

    Attributes:
        config: `adapter_config.json`.
        tensors: `adapter_model.safetensors`; LoRA and heads in the delta's own dtypes, biases in the
            backbone's.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Lora:
    """One layer's LoRA as PEFT has it: `alpha / r * (B A x + bias)`."""

    a: Tensor
    b: Tensor
    alpha: float
    bias: Tensor | None


class _NoForm(Exception):
    """A branch that PEFT's LoRA cannot say; the reason in one clause."""


def to_peft(delta: Delta, backbone: Backbone, sites: Sites | None = None) -> PeftAdapter:
    """The adapter that gives the same logits in PEFT, on timm's model of as many classes as the task's.

    Scales are kept to the last bit: `lora_alpha` is chosen so that PEFT's `lora_alpha / r` is the stored
    scale, and where no number does that, the rank is padded with zeros to a power of two, where one does. A
    bias of `down` is carried through `up`, and a shift added to the frozen bias, in float64 and rounded once.

    Raises:
        IncompatibleArtefact: The delta does not belong to the backbone.
        UsageError: A branch has no form in PEFT's LoRA; every reason is named.
    """
    sites = sites or measure(backbone)
    require_backbone(delta, backbone, sites)
    loras: dict[str, _Lora] = {}
    shifts: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    refused: list[str] = []
    for name, branch in delta.branches.items():
        path, w = branch.add.module, delta.tensors[name]
        op = submodule(backbone.model, path)
        try:
            if isinstance(branch.tuner, Head):
                heads |= {f"{path}.{key}": t for key, t in _head(op, path, w, backbone).items()}
                continue
            if path in backbone.classifiers:
                raise _NoForm("it stands at the classifier, which PEFT saves whole")
            if path in sites.read:
                raise _NoForm("the layer is read and not called, and PEFT would pass it by")
            if isinstance(branch.tuner, Bias):
                if path in shifts:
                    raise _NoForm("the layer has two of them")
                shifts[path] = _bias(op, branch, w)
            else:
                found = _lora(op, branch, w)
                if path in loras:
                    raise _NoForm("the layer has two of them, and PEFT one LoRA per layer")
                loras[path] = found
        except _NoForm as reason:
            refused.append(f"{name}: {reason}")
    if not loras and not refused:
        refused.append("the delta: it has no LoRA, and PEFT no adapter without one")
    if refused:
        more = f"\n          and {len(refused) - 4} more" if refused[4:] else ""
        raise UsageError(
            f"task {delta.task} has no form as a PEFT adapter, so nothing was written",
            wanted="LoRA beside linear layers or convolutions, shifts of their biases, heads",
            found="\n          ".join(refused[:4]) + more,
            do="merge it into a plain checkpoint if it folds, or export an engine",
        )
    tensors = {
        **_lora_tensors(loras),
        **_bias_tensors(backbone, loras, shifts),
        **heads,
    }
    return PeftAdapter(
        _config(loras, shifts, backbone.classifiers),
        {f"{PREFIX}{name}": t.detach().contiguous() for name, t in tensors.items()},
    )


def write_peft(folder: Path, adapter: PeftAdapter) -> None:
    """Write an adapter folder, whole or not at all."""
    with atomic_folder(folder) as temporary:
        text = json.dumps(dict(adapter.config), indent=2, sort_keys=True)
        (temporary / CONFIG).write_text(text + "\n")
        tensors = {name: tensor.clone() for name, tensor in adapter.tensors.items()}
        save_file(tensors, temporary / TENSORS, metadata={"format": "pt"})


def _lora(op: nn.Module, branch: Branch, w: Mapping[str, Tensor]) -> _Lora:
    """A bottleneck as PEFT's LoRA.

    Raises:
        _NoForm: It is none.
    """
    tuner = branch.tuner
    if not isinstance(tuner, Bottleneck):
        raise _NoForm(f"PEFT's LoRA has no form for a {tuner.kind}")
    if tuner.activation != "identity":
        raise _NoForm(f"it has a {tuner.activation} between down and up")
    if tuner.norm != "none":
        raise _NoForm("it has a layer norm of its own")
    if branch.place not in ("beside", "over"):
        raise _NoForm(f"it reads {branch.tap} and not what {branch.add.module} reads")
    if not is_linear(op, branch.place):
        patches = " and does not read its patches" if reads_patches(op) else ""
        raise _NoForm(f"it stands beside a {type(op).__name__}{patches}")
    if any(step != 1 for step in getattr(op, "dilation", ())):
        raise _NoForm("the convolution is dilated, and PEFT's LoRA is not")
    alpha, rank = _alpha(float(w["scale"]), w["down"].shape[0])
    padding = rank - w["down"].shape[0]
    a = torch.nn.functional.pad(w["down"], (0, 0, 0, padding))
    b = torch.nn.functional.pad(w["up"], (0, padding))
    bias = None
    if tuner.bias:
        exact = w["up"].double() @ w["down_bias"].double() + w["up_bias"].double()
        bias = exact.to(w["up_bias"].dtype)
    if not isinstance(op, nn.Linear):
        frozen: Tensor = op.weight  # type: ignore[assignment]
        kernel = frozen.shape[1:]
        a, b = a.reshape(rank, *kernel), b.reshape(*b.shape, *[1] * (len(kernel) - 1))
    return _Lora(a, b, alpha, bias)


def _alpha(scale: float, rank: int) -> tuple[float, int]:
    """`alpha` and a rank, no smaller, whose quotient in float64 is `scale` to the last bit."""
    rank = max(rank, 1)
    near = scale * rank
    for alpha in (near, math.nextafter(near, -math.inf), math.nextafter(near, math.inf)):
        if alpha / rank == scale:
            break
    else:
        rank = 1 << (rank - 1).bit_length()  # a product with a power of two is exact
        alpha = scale * rank
    return (int(alpha) if alpha == int(alpha) else alpha), rank


def _bias(op: nn.Module, branch: Branch, w: Mapping[str, Tensor]) -> Tensor:
    """A shift of the op's own bias, `[out]`, float64.

    Raises:
        _NoForm: The op has no bias that it adds last.
    """
    if branch.place != "behind" or not adds_bias_last(op) or getattr(op, "bias", None) is None:
        raise _NoForm(f"a {type(op).__name__} has no bias here that a checkpoint could hold")
    return w["shift"].double()


def _head(
    op: nn.Module, path: str, w: Mapping[str, Tensor], backbone: Backbone
) -> Mapping[str, Tensor]:
    """A head's tensors by the names of timm's classifier.

    Raises:
        _NoForm: PEFT would save other modules along with it, or the classifier has no bias.
    """
    for other, _ in backbone.model.named_modules():
        if other.endswith(path) and other not in backbone.classifiers:
            raise _NoForm(f"PEFT would take {other} for the classifier {path}")
    if isinstance(op, nn.Linear) and op.bias is None:
        if w["bias"].any():
            raise _NoForm("it has a bias, and the backbone's classifier has none")
        return {"weight": w["weight"]}
    return w


def _lora_tensors(loras: Mapping[str, _Lora]) -> dict[str, Tensor]:
    """A and B of every layer; if one has a bias, all have, perhaps of zeros."""
    biased = any(lora.bias is not None for lora in loras.values())
    tensors: dict[str, Tensor] = {}
    for path, lora in loras.items():
        tensors[f"{path}.lora_A.weight"] = lora.a
        tensors[f"{path}.lora_B.weight"] = lora.b
        if biased:
            zeros = lora.b.new_zeros(lora.b.shape[0])
            tensors[f"{path}.lora_B.bias"] = zeros if lora.bias is None else lora.bias
    return tensors


def _bias_tensors(
    backbone: Backbone, loras: Mapping[str, _Lora], shifts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tuned biases, in the backbone's dtype; PEFT keeps those of LoRA's layers inside its wrapper."""
    tensors: dict[str, Tensor] = {}
    for path, shift in shifts.items():
        frozen: Tensor = submodule(backbone.model, path).bias  # type: ignore[assignment]
        name = f"{path}.base_layer.bias" if path in loras else f"{path}.bias"
        tensors[name] = (frozen.double() + shift).to(frozen.dtype)
    return tensors


def _config(
    loras: Mapping[str, _Lora], shifts: Mapping[str, Tensor], classifiers: tuple[str, ...]
) -> dict[str, Any]:
    """The configuration: the commonest rank and alpha, and the others by patterns of whole names."""
    ranks = {path: lora.a.shape[0] for path, lora in loras.items()}
    alphas = {path: lora.alpha for path, lora in loras.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    bias = "none" if not shifts else "lora_only" if set(shifts) <= set(loras) else "all"
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_whole(p): r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {_whole(p): a for p, a in alphas.items() if a != alpha},
        "target_modules": "|".join(re.escape(path) for path in loras),
        "modules_to_save": list(classifiers),
        "bias": bias,
        "lora_bias": any(lora.bias is not None for lora in loras.values()),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _whole(path: str) -> str:
    """A pattern of this layer and no other: PEFT lets a pattern begin behind any dot."""
    return f"^{re.escape(path)}"
