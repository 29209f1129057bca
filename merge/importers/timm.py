"""A timm model that was fine-tuned in all or in some of its own parameters, as its difference.

Files: safetensors, Hugging Face's folder with one, or a torch checkpoint of timm's `train.py` and the like, a
plain state dict or one under `state_dict`, `model`, `state_dict_ema` or `model_ema`. Full fine-tuning, linear probing, BitFit and norm
tuning differ in what changed and nothing else; see `differences.carry`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..backbone.architecture import features_of
from ..backbone.transformers.config import weights_of
from ..differences import Ranks, carry, say_truncation, subtract
from ..errors import UsageError
from ..tensor_files import read_saved
from .foreign import Foreign, other_backbone, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ..backbone import Backbone
    from .settings import Settings

CONTAINERS = ("state_dict", "model", "model_state_dict", "net", "state_dict_ema", "model_ema")
WRAPPERS = (
    "module.",
    "model.",
    "backbone.",
    "_orig_mod.",
)  # of distributed training, trainers, torch.compile


def read_timm(path: Path, backbone: Backbone, settings: Settings) -> Foreign:
    """The difference between a tuned timm checkpoint and its base, and the classifier as head.

    Settings, none of them needed: `rank` or `energy` cut the differences of weights to a low rank, with the
    error in the notes; `weights` chooses between the state dicts of a file that holds several, such as
    those of training and their moving average.

    Raises:
        UsageError: There is no such file, it holds several state dicts and none is chosen, or a setting is
            out of range.
        IncompatibleArtefact: The file is unsafe or damaged; tensors are missing, surplus, not finite, or of
            another shape; it has no classifier.
    """
    rank, energy = settings.get("rank", int), settings.get("energy", float)
    ranks = None if rank is None and energy is None else Ranks(rank, energy)
    tuned = _unwrapped(path, backbone, _state_dict(path, settings.get("weights", str)))
    heads = {name: tuned.pop(name) for name in list(tuned) if backbone.is_classifier(name)}
    frozen = backbone.model.state_dict()
    frozen = {name: frozen[name] for name in frozen if not backbone.is_classifier(name)}
    _require_same(path, backbone, frozen, tuned)
    changed = subtract(frozen, tuned)
    carried = carry(backbone, changed, ranks=ranks)
    found = Foreign("a tuned timm checkpoint")
    found.plant_changes(carried)
    _heads(path, backbone, heads, found)
    found.notes |= {"changed": f"{len(changed)} of {len(frozen)} tensors"}
    dtypes = {str(tuned[n].dtype)[6:] for n in changed if tuned[n].dtype != frozen[n].dtype}
    if dtypes:
        found.notes["dtype"] = (
            f"the checkpoint is {', '.join(sorted(dtypes))}: what rounding to it changed is part of the "
            "difference"
        )
    found.notes |= {name: str(value) for name, value in settings.found.items()}
    if ranks is not None:
        found.notes["truncation"] = say_truncation(carried.truncations)
    return found


def _state_dict(path: Path, chosen: str | None) -> Mapping[str, Tensor]:
    """The tensors of the file by name.

    Raises:
        UsageError: Several state dicts and none chosen, or the chosen one is not there.
        IncompatibleArtefact: The file holds none.
    """
    saved = read_saved((weights_of(path) if path.is_dir() else None) or path)
    if not isinstance(saved, dict):
        raise refuse(path, "the file holds no state dict", found=type(saved).__name__)
    parts = {key: saved[key] for key in CONTAINERS if isinstance(saved.get(key), dict)}
    if chosen is not None and chosen not in parts:
        raise UsageError(
            "the file holds no such weights",
            where=path,
            wanted=", ".join(parts) or "no setting `weights`: it holds one state dict",
            found=chosen,
        )
    if chosen is None and len(parts) > 1:
        raise UsageError(
            "the file holds several state dicts, such as a moving average beside the last step",
            where=path,
            found=", ".join(parts),
            do=f"choose one: --set weights={' or --set weights='.join(parts)}",
        )
    part = parts[chosen] if chosen else next(iter(parts.values()), saved)
    tensors = {str(key): value for key, value in part.items() if isinstance(value, Tensor)}
    if not tensors:
        raise refuse(path, "the file holds no state dict", found=", ".join(map(str, part))[:80])
    return tensors


def _unwrapped(path: Path, backbone: Backbone, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the backbone's names; constants that it makes itself are left out."""
    known = set(backbone.model.state_dict()) | {f"{c}.bias" for c in backbone.classifiers}
    constants = {n: b for n, b in backbone.model.named_buffers() if n not in known}
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key
        while name not in known and name.startswith(WRAPPERS):
            name = name.partition(".")[2]
        if name in found:
            raise refuse(path, "the checkpoint holds a tensor twice", found=f"{key} is {name}")
        constant = constants.get(name)
        if constant is None or not torch.equal(constant, tensor.to(constant.dtype)):
            found[name] = tensor
    return found


def _require_same(
    path: Path, backbone: Backbone, frozen: Mapping[str, Tensor], tuned: Mapping[str, Tensor]
) -> None:
    """Hold the checkpoint to the architecture, tensor by tensor.

    Raises:
        IncompatibleArtefact: A tensor is missing, surplus, of another shape, not finite, or a constant that
            changed.
    """
    architecture = backbone.identity.architecture
    for what, names in (
        (f"the checkpoint lacks tensors of {architecture}", [n for n in frozen if n not in tuned]),
        (
            f"the checkpoint has tensors that {architecture} lacks",
            [n for n in tuned if n not in frozen],
        ),
    ):
        if names:
            raise refuse(path, what, found=_few(names), do="check --backbone and --backbone-arg")
    shapes = [
        f"{name} {list(tuned[name].shape)} for {list(tensor.shape)}"
        for name, tensor in frozen.items()
        if tuned[name].shape != tensor.shape
    ]
    if shapes:
        raise refuse(
            path,
            "tensors of the checkpoint have another shape than the backbone's",
            found=_few(shapes),
            do="check --backbone-arg: img_size of the fine-tuning, for example",
        )
    if wrong := [name for name in frozen if not torch.isfinite(tuned[name]).all()]:
        raise refuse(path, "tensors of the checkpoint hold NaN or Inf", found=_few(wrong))
    moved = [
        name
        for name, tensor in frozen.items()
        if not tensor.is_floating_point()
        and not name.endswith(
            ".num_batches_tracked"
        )  # counts the steps of training; nothing reads it
        and not torch.equal(tuned[name].to(tensor.dtype), tensor)
    ]
    if moved:
        raise refuse(path, "tensors of whole numbers differ from the backbone's", found=_few(moved))


def _heads(path: Path, backbone: Backbone, heads: Mapping[str, Tensor], found: Foreign) -> None:
    """The classifiers of the checkpoint, of any number of classes.

    Raises:
        IncompatibleArtefact: One is missing, reads other features, or is more than a linear layer.
    """
    left = dict(heads)
    for number, classifier in enumerate(backbone.classifiers):
        weight = left.pop(f"{classifier}.weight", None)
        if weight is None:
            raise refuse(
                path, "the checkpoint has no classifier", found=f"no {classifier}.weight",
                do="a task needs its head: save the whole model",
            )  # fmt: skip
        if _features(backbone, classifier) not in (None, weight.shape[-1]):
            raise other_backbone(path, backbone, [f"{classifier}.weight"])
        found.plant_head(backbone, weight, left.pop(f"{classifier}.bias", None), number)
    if left:
        raise refuse(path, "the classifier is not one linear layer", found=", ".join(left))


def _features(backbone: Backbone, classifier: str) -> int | None:
    """What the classifier reads, where the backbone says it."""
    layer = backbone.model.get_submodule(classifier)
    if isinstance(layer, nn.Linear):
        return layer.in_features
    return features_of(backbone.model)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
