"""A frozen model and its identity: the fingerprint of its tensors.

The fingerprint is SHA-256 over the frozen tensors sorted by name, each as name, dtype, shape and
bytes. The classifier is left out: every task brings its own head, and backbones that differ only in
their classifier answer alike.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ..errors import UsageError
from ..files import canonical_json
from ..inputs import IMAGES, Input
from ..preprocessing import INTERPOLATIONS, LINEAR, Clip, Preprocessing
from .architecture import classifiers_of, make

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@dataclass(frozen=True)
class Identity:
    """Which backbone a file belongs to.

    Attributes:
        architecture: timm's name, or that of `architectures`.
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
    """A frozen model: of pictures, of clips, or of what its `inputs` name.

    Attributes:
        model: In eval mode, without gradients, in the dtype of its file.
        identity: Its name, arguments and fingerprint.
        classifiers: Dotted paths of the modules that turn features into logits: one, or as in DeiT's
            distilled models two, whose logits the model averages.
    """

    model: nn.Module
    identity: Identity
    classifiers: tuple[str, ...]

    def is_classifier(self, tensor: str) -> bool:
        """The tensor of this name belongs to a classifier."""
        return tensor.startswith(tuple(f"{path}." for path in self.classifiers))

    @property
    def frames(self) -> int | None:
        """Frames of a clip; None for a backbone that reads pictures."""
        clip = getattr(self.model, "clip_size", None)
        return None if clip is None else int(clip[0])

    @property
    def dtype(self) -> torch.dtype:
        """Of its parameters; of its buffers where it has none."""
        return dtype_of(self.model)

    @property
    def bytes(self) -> int:
        """What its tensors take."""
        return sum(t.numel() * t.element_size() for t in self.model.state_dict().values())

    @property
    def pictures(self) -> bool:
        """It reads pictures or clips, and nothing else."""
        return [entry.name for entry in self.inputs] == [IMAGES]

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What its `forward` takes, in order; `images` alone for most."""
        own = getattr(self.model, "inputs", None)
        return own if own is not None else (Input(IMAGES, self.input_size),)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels.

        Raises:
            UsageError: It reads no pictures.
        """
        if own := getattr(self.model, "inputs", None):
            if not self.pictures:
                raise UsageError(
                    "the backbone reads no pictures",
                    where=self.identity.architecture,
                    found=", ".join(entry.name for entry in own),
                )
            height, width = own[0].shape[-2:]
            return height, width
        if self.frames is not None:
            _, height, width = cast("tuple[int, int, int]", self.model.clip_size)
            return height, width
        arguments = self.identity.arguments.get("img_size")
        if arguments is not None:
            return (arguments, arguments) if isinstance(arguments, int) else tuple(arguments)
        size = getattr(getattr(self.model, "patch_embed", None), "img_size", None)
        return tuple(size) if size else tuple(self._cfg["input_size"][1:])

    @property
    def _cfg(self) -> Mapping[str, Any]:
        """Timm's configuration of the architecture, or what `architectures` says in its form."""
        return getattr(self.model, "pretrained_cfg", None) or {}

    @property
    def channels(self) -> int:
        """Input channels."""
        return int(self.identity.arguments.get("in_chans", 3))

    @property
    def input_size(self) -> tuple[int, ...]:
        """One row of pictures: `(C, H, W)`, or `(C, T, H, W)` of clips."""
        time = () if self.frames is None else (self.frames,)
        return (self.channels, *time, *self.image_size)

    def example(self, batch: int = 1) -> Tensor:
        """Seeded normal noise `[B, *input_size]` in the model's dtype, for a backbone that reads pictures."""
        (images,) = self.draw(batch)
        return images

    def draw(self, batch: int = 1, seed: int = 0) -> tuple[Tensor, ...]:
        """Random examples of all `inputs`, `[B, ...]` each; real numbers in the model's dtype."""
        noise = torch.Generator().manual_seed(seed)
        drawn = (entry.draw(batch, noise) for entry in self.inputs)
        return tuple(t.to(self.dtype) if t.is_floating_point() else t for t in drawn)

    def preprocessing(self) -> Preprocessing | None:
        """The preprocessing that the architecture was released with, at this image size; None without pictures."""
        if not self.pictures:
            return None
        cfg = self._cfg
        if cfg.get("crop_mode", "center") not in ("center", "squash"):
            raise UsageError(
                "timm prepares pictures for this architecture in a way that a delta cannot name",
                where=self.identity.architecture,
                wanted="crop_mode center or squash",
                found=f"crop_mode {cfg['crop_mode']}",
                do="say how: delta(..., preprocessing=Preprocessing(...))",
            )
        interpolation = cfg.get("interpolation", "bicubic")
        known = INTERPOLATIONS if self.frames is None else (*INTERPOLATIONS, LINEAR)
        return Preprocessing(
            size=self.image_size,
            interpolation=interpolation if interpolation in known else "bicubic",
            crop=float(cfg.get("crop_pct") or 1.0),
            mean=tuple(cfg.get("mean", (0.5, 0.5, 0.5))),
            std=tuple(cfg.get("std", (0.5, 0.5, 0.5))),
            clip=None if self.frames is None else Clip(self.frames, cfg["stride"], cfg["views"]),
            squash=cfg.get("crop_mode") == "squash",
        )


def set_preprocessing(model: nn.Module, prepared: Preprocessing) -> None:
    """Have `Backbone.preprocessing` say this, but for the size, which the architecture's arguments say."""
    released: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    own = {
        "interpolation": prepared.interpolation,
        "crop_pct": prepared.crop,
        "crop_mode": "squash" if prepared.squash else "center",
        "mean": prepared.mean,
        "std": prepared.std,
    }
    setattr(model, "pretrained_cfg", {**released, **own})  # noqa: B010 it is no module


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of a model's parameters, of its buffers where it has none."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def fingerprint(tensors: Mapping[str, Tensor], *classifiers: str) -> str:
    """SHA-256 over the tensors that are not a classifier's; see the module's docstring."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        if name.startswith(tuple(f"{path}." for path in classifiers)):
            continue
        tensor = tensors[name].detach().cpu().contiguous()
        header = canonical_json([name, str(tensor.dtype), list(tensor.shape)])
        sha.update(header.encode() + b"\n")
        if tensor.numel():
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def wrap(model: nn.Module, architecture: str, arguments: Mapping[str, Any]) -> Backbone:
    """Freeze a model that is already in memory.

    Args:
        model: Created by `timm.create_model(architecture, **arguments)`, or of `architectures`; frozen
            in place.
        architecture: Its name.
        arguments: JSON values; `num_classes` is dropped.

    Raises:
        UsageError: The model has no classifier, or timm's has one that is not a linear layer.
    """
    classifiers = classifiers_of(model, architecture)
    model.eval().requires_grad_(requires_grad=False)
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # one call: where prefixes join, and one ONNX node
            module.fused_attn = True  # type: ignore[assignment]
    arguments = {k: v for k, v in arguments.items() if k != "num_classes"}
    identity = Identity(
        architecture, arguments, fingerprint(dict(model.state_dict()), *classifiers)
    )
    return Backbone(model, identity, classifiers)


def create(architecture: str, arguments: Mapping[str, Any] | None = None) -> Backbone:
    """A backbone with random initial weights, for timing, or for training one.

    It comes frozen, with the fingerprint of its initial weights: to train it, call
    `model.requires_grad_(True)`, and then `wrap` or `save` and `load` what came out.

    Raises:
        UsageError: There is no such architecture, or it refuses the arguments.
    """
    arguments = dict(arguments or {})
    return wrap(make(architecture, arguments), architecture, arguments)
