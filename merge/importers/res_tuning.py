"""Res-Tuning-Bypass as ms-swift saves it: `restuning_NAME.bypass_blocks.N.{lateral,vertical}_tuner.tuner.*`.

(arXiv 2310.19859, section 3.3.) Where its hooks stand, and what each adapter's output is multiplied by,
are in the configuration only.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..sites import blocks
from ..tuner import Branch, Point
from ..tuners.bypass import RUNGS, Bypass
from .foreign import Foreign, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ..backbone import Backbone

LAYERS = {"down": "ln1.weight", "down_bias": "ln1.bias", "up": "ln2.weight", "up_bias": "ln2.bias"}
WRAPPERS = ("", "model.backbone.", "backbone.", "model.")  # what the patterns may start with
WITHOUT_EFFECT = (None, "", "scale_kv", "scale_kv_channel")  # made, and never multiplied by
TARGET = "norm"


def plant_bypass(
    path: Path,
    backbone: Backbone,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    found: Foreign,
) -> None:
    """One branch from the blocks to the final norm's input.

    Args:
        path: The checkpoint, for messages.
        backbone: The frozen backbone.
        config: Of the tuner.
        tensors: By `N.RUNG_tuner.tuner.*`; all are read.
        found: Takes the branch.

    Raises:
        IncompatibleArtefact: The hooks stand elsewhere, an adapter is of another kind, depends on the whole
            sequence, drops its input, or is not whole.
    """
    places = blocks(backbone.model)
    _require_places(path, backbone, config, places)
    left = dict(tensors)
    width = int(backbone.model.num_features)  # type: ignore[arg-type]
    weights: dict[str, Tensor] = {}
    for rung in RUNGS:
        adapters = [
            _adapter(
                path,
                _chosen(path, config, rung, level),
                f"{level}.{rung}_tuner.tuner.",
                left,
                width,
            )
            for level in range(len(places))
        ]
        for name in LAYERS:
            weights[f"{rung}_{name}"] = _stacked([a.get(name) for a in adapters], name, width)
    if left:
        raise refuse(
            path,
            "the bypass holds tensors that its configuration does not name",
            found=", ".join(sorted(left)[:5]),
        )
    _pad_ranks(weights)
    branch = Branch(
        Bypass(len(places), "gelu"),
        Point(places[0], "input"),
        Point(TARGET, "input"),
        tuple(Point(place, "output") for place in places),
    )
    found.plant(f"{TARGET}/bypass", branch, weights)


def _require_places(
    path: Path, backbone: Backbone, config: Mapping[str, Any], places: Sequence[str]
) -> None:
    """The bypass reads the first block's input and every block's output, and gives the final norm's input.

    Raises:
        IncompatibleArtefact: It does not.
    """
    for name, plain in (
        ("root_modules_hook", "input"),
        ("stem_modules_hook", "output"),
        ("target_modules_hook", "input"),
        ("target_hidden_pos", 0),
        ("use_upsample", False),
    ):
        if (value := config.get(name, plain)) not in (plain, None):
            raise refuse(
                path, "this form of Res-Tuning cannot be carried", found=f"{name}={value!r}",
                do=f"wanted: {name}={plain!r}",
            )  # fmt: skip
    if isinstance(config.get("dims"), list):
        raise refuse(
            path, "a bypass whose width changes cannot be carried", found=f"dims={config['dims']}"
        )
    wanted = ([places[0]], list(places), [TARGET])
    found: list[list[str]] = []
    for wrapper in WRAPPERS:
        names = [f"{wrapper}{name}" for name, _ in backbone.model.named_modules() if name]
        root, stems, target = (
            _matching(path, config, f"{part}_modules", names) for part in ("root", "stem", "target")
        )
        found = [[n.removeprefix(wrapper) for n in part] for part in (root[:1], stems, target)]
        if tuple(found) == wanted:
            break
    else:
        raise refuse(
            path,
            "the bypass stands at other places than the blocks and the final norm",
            found=", ".join(
                f"{part}_modules={config.get(f'{part}_modules')!r}"
                for part in ("root", "stem", "target")
            ),
            do=f"wanted: {places[0]}, {places[0]} to {places[-1]}, and {TARGET} alone",
        )
    if not _given_straight(backbone, places[-1], TARGET):
        raise refuse(
            path,
            "the final norm does not read what the last block gives, so a bypass cannot stand in for it",
            found=backbone.identity.architecture,
        )


def _matching(
    path: Path, config: Mapping[str, Any], setting: str, names: Sequence[str]
) -> list[str]:
    """Names in the order in which ms-swift meets them.

    Raises:
        IncompatibleArtefact: The pattern cannot be read.
    """
    pattern = config.get(setting)
    if isinstance(pattern, list):
        return [name for name in pattern if name in names]
    try:
        return [name for name in names if re.fullmatch(str(pattern), name)]
    except re.error as cause:
        raise refuse(
            path, "a pattern of module names cannot be read", found=f"{setting}={pattern!r}: {cause}"
        ) from cause  # fmt: skip


@torch.no_grad()
def _given_straight(backbone: Backbone, giver: str, taker: str) -> bool:
    """What one module gives is what the other is given."""
    seen: dict[str, Tensor] = {}

    def give(_: nn.Module, args: tuple[Tensor, ...], value: Tensor) -> None:
        seen["given"] = value

    def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["taken"] = args[0]

    handles = [
        backbone.model.get_submodule(giver).register_forward_hook(give),
        backbone.model.get_submodule(taker).register_forward_pre_hook(take),
    ]
    try:
        backbone.model(*backbone.draw())
    finally:
        for handle in handles:
            handle.remove()
    return set(seen) == {"given", "taken"} and torch.equal(seen["given"], seen["taken"])


def _chosen(
    path: Path, config: Mapping[str, Any], rung: str, level: int
) -> Mapping[str, Any] | None:
    """The settings of one adapter; None for the identity.

    Raises:
        IncompatibleArtefact: It is no adapter, or one that is added without its input.
    """
    chosen = config.get("tuner_cfg")
    if isinstance(chosen, list):
        chosen = chosen[level] if level < len(chosen) else None
    if isinstance(chosen, dict):
        chosen = chosen.get(f"{rung}_cfg")
    where = f"{rung} tuner of block {level}: {chosen!r}"
    if chosen == "zero" or (isinstance(chosen, dict) and "zero" in chosen):
        raise refuse(
            path,
            "the bypass drops the input of a tuner, which no branch here can say",
            found=where,
            do="wanted: res_adapter or identity",
        )
    if chosen == "identity":
        return None
    if chosen == "res_adapter":
        return {}
    if isinstance(chosen, dict) and set(chosen) == {"res_adapter"}:
        inner = chosen["res_adapter"]
        return inner if isinstance(inner, dict) else {}
    raise refuse(
        path, "the bypass has a tuner of an unknown kind", found=where, do="wanted: res_adapter or identity"
    )  # fmt: skip


def _adapter(
    path: Path, chosen: Mapping[str, Any] | None, prefix: str, left: dict[str, Tensor], width: int
) -> dict[str, Tensor]:
    """One adapter, its output's factor folded into `up` and `up_bias`, exactly; empty for the identity."""
    if chosen is None:
        return {}
    weight = chosen.get("adapter_weight")
    if weight == "gate":
        raise refuse(
            path,
            "an adapter of the bypass is gated by the mean of its own output over the sequence, which no "
            "branch here can say",
            found=f"{prefix}scaling, adapter_weight={weight!r}",
        )
    missing = [name for name in LAYERS.values() if f"{prefix}{name}" not in left]
    if missing:
        names = ", ".join(f"{prefix}{name}" for name in missing)
        raise refuse(path, "a tuner is not whole", found=f"missing {names}")
    own = {name: left.pop(f"{prefix}{theirs}") for name, theirs in LAYERS.items()}
    rank = own["down"].shape[0] if own["down"].dim() else 0
    for name, shape in (
        ("down", (rank, width)),
        ("down_bias", (rank,)),
        ("up", (width, rank)),
        ("up_bias", (width,)),
    ):
        if own[name].shape != shape:
            raise refuse(
                path,
                "an adapter of the bypass does not have the channels of its place",
                found=f"{prefix}{LAYERS[name]} of shape {list(own[name].shape)}",
                do=f"wanted: {list(shape)}; load the backbone that it was trained on",
            )
    factor = _factor(path, weight, prefix, left)
    if factor is not None:
        if factor.shape not in ((1,), (width,)):
            raise refuse(
                path, "an adapter of the bypass has a factor of another shape",
                found=f"{prefix}scaling of shape {list(factor.shape)}",
            )  # fmt: skip
        own["up"] = own["up"].double() * factor.reshape(-1, 1)
        own["up_bias"] = own["up_bias"].double() * factor
    return own


def _factor(path: Path, weight: object, prefix: str, left: dict[str, Tensor]) -> Tensor | None:
    """What the adapter's output is multiplied by, `[1]` or `[C]`, float64; None for nothing."""
    if weight in WITHOUT_EFFECT:
        return None
    scaling = f"{prefix}scaling"
    if weight in ("scale", "scale_channel") and scaling in left:
        return left.pop(scaling).double()
    try:
        if isinstance(weight, str) and weight.startswith("scalar"):
            return torch.tensor([float(weight.split("_")[-1])], dtype=torch.float64)
    except ValueError:
        pass
    raise refuse(
        path,
        "an adapter of the bypass has a factor that cannot be read",
        found=f"adapter_weight={weight!r}",
        do=f"wanted: none, scalar_NUMBER, or scale or scale_channel with {scaling}",
    )


def _stacked(tensors: Sequence[Tensor | None], name: str, width: int) -> Tensor:
    """`[depth, ...]`, ranks padded with zeros; the identity is an adapter of zeros."""
    there = [tensor for tensor in tensors if tensor is not None]
    empty = {"down": (0, width), "down_bias": (0,), "up": (width, 0), "up_bias": (width,)}[name]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in there) else torch.float32
    filled = [torch.zeros(empty) if tensor is None else tensor for tensor in tensors]
    axis = {"down": 0, "down_bias": 0, "up": 1}.get(name)
    if axis is not None:
        rank = max(1, *(tensor.shape[axis] for tensor in filled))
        filled = [_padded(tensor, axis, rank) for tensor in filled]
    return torch.stack([tensor.to(dtype) for tensor in filled])


def _pad_ranks(weights: dict[str, Tensor]) -> None:
    """The rank of both rungs alike."""
    axes = {"down": 1, "down_bias": 1, "up": 2}
    rank = max(weights[f"{rung}_down"].shape[1] for rung in RUNGS)
    for rung in RUNGS:
        for name, axis in axes.items():
            weights[f"{rung}_{name}"] = _padded(weights[f"{rung}_{name}"], axis, rank)


def _padded(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Zeros behind an axis up to a size."""
    more = list(tensor.shape)
    more[axis] = size - tensor.shape[axis]
    return torch.cat([tensor, tensor.new_zeros(more)], dim=axis)
