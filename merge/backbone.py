"""The frozen backbone: a timm model, where it came from, and its fingerprint.

The fingerprint is SHA-256 over the frozen tensors sorted by name, each as name, dtype, shape and
bytes. The classifier is left out: every task brings its own head, and backbones that differ only in
their classifier answer alike.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from .errors import IncompatibleArtefact, UsageError
from .files import atomic_folder, canonical_json
from .preprocessing import INTERPOLATIONS, Preprocessing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

DESCRIPTION = "backbone.json"
WEIGHTS = "backbone.safetensors"


@dataclass(frozen=True)
class Identity:
    """Which backbone a file belongs to.

    Attributes:
        architecture: timm's name.
        arguments: What it was created with, classes left out.
        fingerprint: See the module's docstring; hex.
    """

    architecture: str
    arguments: Mapping[str, Any]
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "architecture": self.architecture,
            "arguments": dict(self.arguments),
            "fingerprint": self.fingerprint,
        }


@dataclass(frozen=True)
class Backbone:
    """A frozen timm model.

    Attributes:
        model: In eval mode, without gradients, in the dtype of its file.
        identity: Its name, arguments and fingerprint.
        classifier: Dotted path of the module that turns features into logits.
    """

    model: nn.Module
    identity: Identity
    classifier: str

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        arguments = self.identity.arguments.get("img_size")
        if arguments is not None:
            return (arguments, arguments) if isinstance(arguments, int) else tuple(arguments)
        size = getattr(getattr(self.model, "patch_embed", None), "img_size", None)
        return tuple(size) if size else tuple(self._cfg["input_size"][1:])

    @property
    def _cfg(self) -> Mapping[str, Any]:
        """Timm's configuration of the architecture."""
        return getattr(self.model, "pretrained_cfg", None) or {}

    @property
    def channels(self) -> int:
        """Input channels."""
        return int(self.identity.arguments.get("in_chans", 3))

    def example(self, batch: int = 1) -> Tensor:
        """Seeded normal noise `[B, C, H, W]` in the model's dtype."""
        noise = torch.Generator().manual_seed(0)
        dtype = next(self.model.parameters()).dtype
        return torch.randn(batch, self.channels, *self.image_size, generator=noise).to(dtype)

    def preprocessing(self) -> Preprocessing:
        """Timm's own preprocessing for this architecture at this image size."""
        cfg = self._cfg
        if cfg.get("crop_mode", "center") != "center":
            raise UsageError(
                "timm prepares pictures for this architecture in a way that a delta cannot name",
                where=self.identity.architecture,
                wanted="crop_mode center",
                found=f"crop_mode {cfg['crop_mode']}",
                do="say how: delta(..., preprocessing=Preprocessing(...))",
            )
        interpolation = cfg.get("interpolation", "bicubic")
        return Preprocessing(
            size=self.image_size,
            interpolation=interpolation if interpolation in INTERPOLATIONS else "bicubic",
            crop=float(cfg.get("crop_pct") or 1.0),
            mean=tuple(cfg.get("mean", (0.5, 0.5, 0.5))),
            std=tuple(cfg.get("std", (0.5, 0.5, 0.5))),
        )


def fingerprint(tensors: Mapping[str, Tensor], classifier: str) -> str:
    """SHA-256 over the tensors that are not the classifier's; see the module's docstring."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        if name.startswith(f"{classifier}."):
            continue
        tensor = tensors[name].detach().cpu().contiguous()
        header = canonical_json([name, str(tensor.dtype), list(tensor.shape)])
        sha.update(header.encode() + b"\n")
        if tensor.numel():
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def wrap(model: nn.Module, architecture: str, arguments: Mapping[str, Any]) -> Backbone:
    """Freeze a timm model that is already in memory.

    Args:
        model: Created by `timm.create_model(architecture, **arguments)`; frozen in place.
        architecture: timm's name.
        arguments: JSON values; `num_classes` is dropped.

    Raises:
        UsageError: The model has no classifier, or more than one.
    """
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if not isinstance(classifier, str):
        raise UsageError(
            "the backbone has no single classifier for the tasks' heads to replace",
            where=architecture,
            wanted="one classifier in timm's configuration of the architecture",
            found=classifier,
        )
    if not isinstance(model.get_submodule(classifier), nn.Linear | nn.Identity):
        raise UsageError(
            "the backbone's classifier is not one linear layer, which is what a task's head replaces",
            where=f"{architecture}: {classifier}",
            found=type(model.get_submodule(classifier)).__name__,
        )
    model.eval().requires_grad_(requires_grad=False)
    for module in model.modules():
        if hasattr(
            module, "fused_attn"
        ):  # one attention call: where prefixes join, and one ONNX node
            module.fused_attn = True  # type: ignore[assignment]
    arguments = {k: v for k, v in arguments.items() if k != "num_classes"}
    identity = Identity(architecture, arguments, fingerprint(dict(model.state_dict()), classifier))
    return Backbone(model, identity, classifier)


def create(architecture: str, arguments: Mapping[str, Any] | None = None) -> Backbone:
    """A backbone with timm's random initial weights, for timing, or for training one.

    It comes frozen, with the fingerprint of its initial weights: to train it, call
    `model.requires_grad_(True)`, and then `wrap` or `save` and `load` what came out.

    Raises:
        UsageError: timm has no such architecture, or it refuses the arguments.
    """
    arguments = dict(arguments or {})
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=5)
        raise UsageError(
            "timm has no such architecture",
            found=architecture,
            do=f"for example {', '.join(close)}" if close else "see timm.list_models()",
        )
    try:
        model = timm.create_model(architecture, pretrained=False, **arguments)
    except (TypeError, ValueError, AssertionError) as cause:
        raise UsageError(
            "timm cannot create the backbone with these arguments",
            where=architecture,
            found=f"{arguments}: {cause}",
            do="check the --backbone-arg values",
        ) from cause
    return wrap(model, architecture, arguments)


def load(architecture: str | None, arguments: Mapping[str, Any] | None, weights: Path) -> Backbone:
    """A backbone from a file of weights, or from a folder that `save` wrote.

    Args:
        architecture: timm's name; None when `weights` is a folder.
        arguments: For `timm.create_model`. The number of classes is read off the file.
        weights: A safetensors file with timm's keys, or a folder.

    Raises:
        UsageError: The file is not there, or the architecture is not named.
        IncompatibleArtefact: The file is damaged, or its tensors are not the architecture's.
    """
    weights = Path(weights)
    if weights.is_dir():
        architecture, arguments = _described(weights, architecture, arguments)
        weights = weights / WEIGHTS
    if architecture is None:
        raise UsageError(
            "the backbone is not named",
            where=weights,
            do="add --backbone TIMM_NAME, or give --weights a folder that `save` wrote",
        )
    tensors = read_tensors(weights)
    arguments = {**(arguments or {}), "num_classes": 0}
    trunk = create(architecture, arguments)
    head = tensors.get(f"{trunk.classifier}.weight")
    if head is not None:
        trunk = create(architecture, {**arguments, "num_classes": head.shape[0]})
    _require_same(weights, trunk.model.state_dict(), tensors)
    trunk.model.load_state_dict(tensors, assign=True)
    return wrap(trunk.model, architecture, arguments)


def save(folder: Path, backbone: Backbone) -> None:
    """Write a folder that `load` reads: description and weights, whole or not at all."""
    with atomic_folder(Path(folder)) as temporary:
        description = {
            "architecture": backbone.identity.architecture,
            "arguments": dict(backbone.identity.arguments),
        }
        (temporary / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        tensors = {k: v.contiguous() for k, v in backbone.model.state_dict().items()}
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        UsageError: There is no such file.
        IncompatibleArtefact: It is truncated or not safetensors.
    """
    if not path.is_file():
        raise UsageError("there is no such file", where=path, wanted="a safetensors file")
    try:
        with safe_open(path, framework="pt"):
            pass
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as cause:
        raise IncompatibleArtefact(
            "the file is truncated or not safetensors", where=path, found=str(cause)
        ) from cause


def _described(
    folder: Path, architecture: str | None, arguments: Mapping[str, Any] | None
) -> tuple[str, Mapping[str, Any]]:
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        found = str(description["architecture"]), dict(description["arguments"])
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise IncompatibleArtefact(
            "the folder holds no backbone",
            where=folder,
            wanted=f"{DESCRIPTION} and {WEIGHTS}, as `save` writes them",
            found=str(cause),
        ) from cause
    if architecture not in (None, found[0]) or any(
        found[1].get(key) != value
        for key, value in json.loads(json.dumps(dict(arguments or {}))).items()  # tuples are lists
    ):
        raise UsageError(
            "the folder holds another backbone than the one named",
            where=folder,
            wanted=f"{architecture} {dict(arguments or {})}",
            found=f"{found[0]} {found[1]}",
            do="leave out --backbone and --backbone-arg when --weights is a folder",
        )
    return found


def _require_same(path: Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for what, names in (
        ("lacks tensors", sorted(set(wanted) - set(found))),
        ("has tensors that the architecture lacks", sorted(set(found) - set(wanted))),
    ):
        if names:
            raise IncompatibleArtefact(
                f"the file of weights {what}",
                where=path,
                found=", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else ""),
                do="check --backbone and --backbone-arg",
            )
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise IncompatibleArtefact(
                "a tensor of the backbone has another shape than the architecture's",
                where=f"{path}: {name}",
                wanted=list(tensor.shape),
                found=list(found[name].shape),
                do="check --backbone and --backbone-arg",
            )
