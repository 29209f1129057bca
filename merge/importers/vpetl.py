"""V-PETL (arXiv 2210.00788): parallel attention (PATT) and AdaptFormer beside it; together BAPAT.

A file is `{model, args, ...}`: the whole model, or its tuners and head alone, and the arguments of the
training run, a Namespace or a plain dictionary. Mode and scale of PATT stand in the arguments, those of the
FFN adapter nowhere: the released script fixes them in its code. Keys: `attn.qkv_adapter.{0,2}` and `mlp.adaptmlp.*`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..methods import adapters
from ..sites import blocks
from ..tensor_files import read_saved
from ..tuner import Branch, Point
from ..tuners.bottleneck import Bottleneck
from .containers import arguments_of, contained
from .foreign import (
    Foreign,
    bare_name,
    is_linear_layer,
    other_backbone,
    refuse,
    some,
)
from .trunk import require_known, trunk_changes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..backbone import Backbone
    from ..preprocessing import Preprocessing
    from .settings import Settings

THIRDS = {f"patt_{mode}": thirds for mode, thirds in adapters.THIRDS.items()}
BROKEN = {
    "patt_qk": "its released code drops the softmax, the position bias and the shift mask in this mode",
    "prefix_kv": "its released code fails in this mode, so no such checkpoint can exist",
    "prefix_qk": "its released code fails in this mode, so no such checkpoint can exist",
}
NO_SOFTMAX = (
    "its released code runs attention without softmax in every mode but patt_kv, patt_qv, patt_qkv"
)
HEAD = "fc.0"
SETTINGS = (
    "att_prefix_mode",
    "att_prefix_scale",
    "ffn_option",
    "ffn_adapter_scalar",
    "ffn_adapter_layernorm_option",
)
DROPPED = ("relative_position_index", "attn_mask")  # constants of the geometry
CONTAINERS = ("model", "module", "state_dict", "model_state_dict")
WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.")


def read_vpetl(path: Path, backbone: Backbone, settings: Settings) -> Foreign:
    """Branches of a V-PETL checkpoint.

    Settings, where the file's arguments lack them: `att_prefix_mode` and `att_prefix_scale` of PATT;
    `ffn_option` (parallel, sequential), `ffn_adapter_scalar` and `ffn_adapter_layernorm_option` (none, in,
    out) of the FFN adapter.

    Raises:
        UsageError: A setting is missing.
        IncompatibleArtefact: No V-PETL checkpoint, another backbone, or a mode that is broken in the
            released code.
    """
    settings.allow(*SETTINGS)
    tensors, arguments = _parts(path, read_saved(path), settings)
    found = Foreign("V-PETL", preprocessing=_preprocessing(backbone, settings, arguments))
    _require_softmax(path, settings, arguments)
    if changed := trunk_changes(path, backbone, tensors, found):
        raise other_backbone(path, backbone, list(changed))
    known = {name for name in backbone.model.state_dict() if not backbone.is_classifier(name)}
    for block in blocks(backbone.model):
        known |= _patt(path, tensors, block, found, settings, arguments)
        known |= _ffn(path, tensors, block, found, settings, arguments)
    classifiers = (HEAD, *backbone.classifiers)
    _require_tuners(path, found, arguments)
    head = next((name for name in classifiers if f"{name}.weight" in tensors), None)
    if head is None:
        raise refuse(
            path,
            "the checkpoint has no classifier",
            found=f"no {HEAD}.weight",
            do=f"a task needs its head: save {HEAD} with the tuners",
        )
    known |= {f"{head}.weight", f"{head}.bias"}
    require_known(path, tensors, known, found)
    weight, bias = tensors[f"{head}.weight"], tensors.get(f"{head}.bias")
    weight = weight.flatten(1) if weight.dim() > 1 else weight
    if not is_linear_layer(weight, bias):
        raise refuse(
            path,
            "the checkpoint's classifier is no linear layer",
            found=f"{head}.weight {list(weight.shape)}",
        )
    found.plant_head(backbone, weight, bias)
    found.notes |= {name: str(value) for name, value in settings.found.items()}
    return found


def _require_tuners(path: Path, found: Foreign, arguments: Mapping[str, Any]) -> None:
    """A run that was called with a tuner left it in the file.

    Raises:
        IncompatibleArtefact: It did not.
    """
    for option, label in (("att_prefix", "/patt"), ("ffn_adapt", "/adaptformer")):
        if arguments.get(option) is True and not any(n.endswith(label) for n in found.branches):
            raise refuse(
                path,
                "the run had a tuner that the file does not hold",
                found=f"{option}=True in its arguments, and no such tensors in a block of the backbone",
                do="save the tuners too, and load the backbone that it was trained on",
            )


def _parts(
    path: Path, saved: Any, settings: Settings
) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The model's tensors without the constants, and the run's arguments."""
    model = contained(path, saved, CONTAINERS, settings)
    state = model if isinstance(model, dict) else {}
    named = {bare_name(key, WRAPPERS): v for key, v in state.items() if isinstance(v, Tensor)}
    tensors = {key: tensor for key, tensor in named.items() if not key.endswith(DROPPED)}
    if not any(".blocks." in f".{key}" or key.startswith(f"{HEAD}.") for key in tensors):
        raise refuse(
            path,
            "the file is no checkpoint of V-PETL",
            found=some(map(str, tensors or state)) or type(saved).__name__,
            do="wanted: {model, args, ...} as its training script saves it",
        )
    arguments = arguments_of(saved)
    return tensors, {**arguments, **arguments_of(arguments, ("tuning_config",))}


def _preprocessing(
    backbone: Backbone, settings: Settings, arguments: Mapping[str, Any]
) -> Preprocessing:
    """The backbone's own with what the run's arguments say of frames, views and normalisation."""
    plain = backbone.preprocessing()
    assert plain is not None  # it reads clips
    if arguments.get("inception"):
        plain = replace(plain, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    if plain.clip is None:
        return plain
    stride = settings.get("sampling_rate", int, arguments) or plain.clip.stride
    views = settings.get("test_num_segment", int, arguments) or plain.clip.views
    return replace(plain, clip=replace(plain.clip, stride=stride, views=views))


def _require_softmax(path: Path, settings: Settings, arguments: Mapping[str, Any]) -> None:
    """The mode decides how the released attention computes, with or without a tuner in it."""
    mode = settings.need(
        "att_prefix_mode", str, arguments, hint=f"one of {', '.join(THIRDS)}, also without PATT"
    )
    if mode not in THIRDS:
        raise refuse(
            path,
            "the attention of this checkpoint cannot be carried",
            found=f"att_prefix_mode={mode}: {BROKEN.get(mode, NO_SOFTMAX)}",
            do=f"train with one of {', '.join(THIRDS)}",
        )


def _patt(
    path: Path,
    tensors: Mapping[str, Tensor],
    block: str,
    found: Foreign,
    settings: Settings,
    arguments: Mapping[str, Any],
) -> set[str]:
    """`q, k, v += scale * W2 tanh(W1 h + b1) + b2` on the thirds of its mode."""
    stem = f"{block}.attn.qkv_adapter"
    own = _below(tensors, stem)
    if not own:
        return set()
    _require_whole(path, stem, own, ("0.weight", "2.weight"), ("0.bias", "2.bias"))
    mode = settings.need("att_prefix_mode", str, arguments, hint=", ".join(THIRDS))
    scale = settings.need(
        "att_prefix_scale", float, arguments, hint="the factor of PATT, such as 0.2"
    )
    if not all(is_linear_layer(own[f"{n}.weight"], own.get(f"{n}.bias")) for n in "02"):
        raise refuse(
            path,
            "a PATT tuner is no pair of linear layers",
            found=some(f"{stem}.{name} {list(tensor.shape)}" for name, tensor in own.items()),
        )
    width = own["0.weight"].shape[1]
    if own["2.weight"].shape[0] != width * len(THIRDS[mode]):
        raise refuse(
            path,
            "a PATT tuner does not have the size of its mode",
            found=f"{stem}.2.weight with {own['2.weight'].shape[0]} rows, {mode}",
            do=f"wanted: {width * len(THIRDS[mode])} rows; check att_prefix_mode",
        )
    weights = {"down": own["0.weight"], "up": _thirds(own["2.weight"], mode, width)}
    weights["scale"] = torch.tensor(scale, dtype=torch.float64)
    if bias := "0.bias" in own:
        weights |= {"down_bias": own["0.bias"], "up_bias": _thirds(own["2.bias"], mode, width)}
    qkv = f"{block}.attn.qkv"
    branch = Branch(Bottleneck("tanh", bias=bias), Point(qkv, "input"), Point(qkv, "output"))
    found.plant(f"{qkv}/patt", branch, weights)
    return {f"{stem}.{name}" for name in own}


def _below(tensors: Mapping[str, Tensor], stem: str) -> dict[str, Tensor]:
    """The tensors of one module, by their names in it."""
    return {k.removeprefix(f"{stem}."): v for k, v in tensors.items() if k.startswith(f"{stem}.")}


def _thirds(t: Tensor, mode: str, width: int) -> Tensor:
    """Rows for all of q, k and v, zero where the mode does not tune."""
    whole = t.new_zeros(3 * width, *t.shape[1:])
    for place, third in enumerate(THIRDS[mode]):
        whole[third * width : (third + 1) * width] = t[place * width : (place + 1) * width]
    return whole


def _ffn(
    path: Path,
    tensors: Mapping[str, Tensor],
    block: str,
    found: Foreign,
    settings: Settings,
    arguments: Mapping[str, Any],
) -> set[str]:
    """AdaptFormer beside or behind the FFN (arXiv 2205.13535)."""
    stem = f"{block}.mlp.adaptmlp"
    own = _below(tensors, stem)
    if not own:
        return set()
    norm = ("adapter_layer_norm_before.weight", "adapter_layer_norm_before.bias")
    needed = tuple(f"{side}_proj.{kind}" for side in ("down", "up") for kind in ("weight", "bias"))
    _require_whole(path, stem, own, needed, norm, ("scale",))
    option = settings.choose("ffn_option", ("parallel", "sequential"), arguments)
    place = "none"
    if norm[0] in own:
        place = settings.choose("ffn_adapter_layernorm_option", ("in", "out"), arguments)
    if "scale" in own:
        scale = own["scale"].reshape(()) if own["scale"].numel() == 1 else own["scale"]
    else:
        hint = "the factor of the FFN adapter; the released script has 0.1"
        value = settings.need("ffn_adapter_scalar", float, arguments, hint=hint)
        scale = torch.tensor(value, dtype=torch.float64)
    weights = {
        "down": own["down_proj.weight"],
        "down_bias": own["down_proj.bias"],
        "up": own["up_proj.weight"],
        "up_bias": own["up_proj.bias"],
        "scale": scale,
    }
    if place != "none":
        weights |= {"norm_weight": own[norm[0]], "norm_bias": own[norm[1]]}
    add = Point(f"{block}.mlp", "output")
    tap = add if option == "sequential" else Point(f"{block}.mlp", "input")
    branch = Branch(Bottleneck("relu", bias=True, norm=place), tap, add)
    found.plant(f"{block}.mlp/adaptformer", branch, weights)
    return {f"{stem}.{name}" for name in own}


def _require_whole(
    path: Path,
    stem: str,
    own: Mapping[str, Tensor],
    needed: tuple[str, ...],
    *groups: tuple[str, ...],
) -> None:
    """All needed tensors, each further group whole or not at all, and nothing else."""
    missing = [name for name in needed if name not in own]
    for group in groups:
        there = [name in own for name in group]
        missing += [n for n, have in zip(group, there, strict=True) if any(there) and not have]
    surplus = sorted(set(own) - set(needed) - {name for group in groups for name in group})
    if missing or surplus:
        what = "missing" if missing else "surplus"
        names = ", ".join(f"{stem}.{name}" for name in missing or surplus)
        raise refuse(path, "a tuner is not whole", found=f"{what} {names}")
