"""The frozen backbone: a timm model, or one of `architectures`, where it came from, its fingerprint.

The fingerprint is SHA-256 over the frozen tensors sorted by name, each as name, dtype, shape and
bytes. The classifier is left out: every task brings its own head, and backbones that differ only in
their classifier answer alike.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from .architectures import ARCHITECTURES, find
from .counterparts import Counterparts
from .errors import IncompatibleArtefact, UsageError
from .files import atomic_folder, canonical_json
from .inputs import IMAGES, Input
from .pickles import read_pickle
from .preprocessing import INTERPOLATIONS, LINEAR, Clip, Preprocessing
from .processor import read_processor
from .published import EPS, PICKLED, match_config, of_pictures, set_eps, weights_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

DESCRIPTION = "backbone.json"
WEIGHTS = "backbone.safetensors"
CONFIG = "config.json"  # Hugging Face's description
OF_TRUNKS = ("bert", "roberta", "t5", "clip_text_model")  # its models that are none of timm's


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
    classifiers = _classifiers(model, architecture)
    model.eval().requires_grad_(requires_grad=False)
    for module in model.modules():
        if hasattr(
            module, "fused_attn"
        ):  # one attention call: where prefixes join, and one ONNX node
            module.fused_attn = True  # type: ignore[assignment]
    arguments = {k: v for k, v in arguments.items() if k != "num_classes"}
    identity = Identity(
        architecture, arguments, fingerprint(dict(model.state_dict()), *classifiers)
    )
    return Backbone(model, identity, classifiers)


def _classifiers(model: nn.Module, architecture: str) -> tuple[str, ...]:
    """Paths of the modules that turn features into logits.

    One of ours may be more than a linear layer: a head stands in for what the module gives, whatever it is.

    Raises:
        UsageError: There is none, or timm's is not a linear layer.
    """
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    classifiers = (named,) if isinstance(named, str) else tuple(named or ())
    if not classifiers:
        raise UsageError(
            "the backbone has no classifier for the tasks' heads to replace",
            where=architecture,
            wanted="a classifier in timm's configuration of the architecture",
            found=named,
        )
    for classifier in () if architecture in ARCHITECTURES else classifiers:
        if not isinstance(model.get_submodule(classifier), nn.Linear | nn.Identity):
            raise UsageError(
                "the backbone's classifier is not one linear layer, which is what a task's head replaces",
                where=f"{architecture}: {classifier}",
                found=type(model.get_submodule(classifier)).__name__,
            )
    return classifiers


def create(architecture: str, arguments: Mapping[str, Any] | None = None) -> Backbone:
    """A backbone with random initial weights, for timing, or for training one.

    It comes frozen, with the fingerprint of its initial weights: to train it, call
    `model.requires_grad_(True)`, and then `wrap` or `save` and `load` what came out.

    Raises:
        UsageError: There is no such architecture, or it refuses the arguments.
    """
    arguments = dict(arguments or {})
    return wrap(_make(architecture, arguments), architecture, arguments)


def _make(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The model itself; see `create`."""
    own = _known(architecture)
    try:
        if own is not None:
            return own(**arguments)
        arguments = dict(arguments)
        eps = arguments.pop(EPS, None)
        model = timm.create_model(architecture, pretrained=False, **arguments)
        if eps is not None:
            set_eps(model, float(eps))
        return model
    except (TypeError, ValueError, AssertionError) as cause:
        raise UsageError(
            f"{'timm' if own is None else own.__name__} cannot create the backbone with these arguments",
            where=architecture,
            found=f"{arguments}: {cause}",
            do="check the --backbone-arg values"
            if own is None
            else f"it takes {', '.join(inspect.signature(own).parameters)}",
        ) from cause


def _of_transformers(architecture: str, weights: Path) -> bool:
    """The architecture is timm's, and the file or folder may be a transformers model."""
    if not timm.is_model(architecture) or (weights / DESCRIPTION).is_file():
        return False
    path = weights_of(weights) if weights.is_dir() else weights
    if path is None or not path.is_file():
        return False
    if _published(weights) and _model_type(weights / CONFIG) in OF_TRUNKS:
        return False
    return path.suffix != ".safetensors" or any(map(Counterparts.may_be, _names(path)))


def _model_type(path: Path) -> str | None:
    """What a configuration says; None where it cannot be read, which who reads it says."""
    try:
        return json.loads(path.read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _translated(
    architecture: str, arguments: Mapping[str, Any], weights: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments and tensors of a transformers model, or of a file that has timm's names after all.

    Raises:
        IncompatibleArtefact: It is another model than timm's.
    """
    path = weights_of(weights) if weights.is_dir() else weights
    assert path is not None  # `_of_transformers` saw it
    tensors = of_pictures(_read_any(path))
    model = _make(architecture, {**arguments, "num_classes": 0})
    classifiers = _classifiers(model, architecture)
    names = Counterparts.find(model, classifiers, tensors, where=path)
    if names is None:
        return dict(arguments), tensors
    eps = match_config(path.parent / CONFIG, model)
    own = {} if eps is None or EPS in arguments else {EPS: eps}
    found = names.assemble(tensors, model.state_dict(), where=path)
    heads = [name for name in found if name.startswith(tuple(f"{c}." for c in classifiers))]
    width = getattr(model, "head_hidden_size", getattr(model, "num_features", None))
    if any(found[name].dim() != 1 and found[name].shape[-1] != width for name in heads):
        for name in heads:  # it reads other features; a task brings its own
            del found[name]
    return {**arguments, **own}, found


def _names(path: Path) -> list[str]:
    """Of a safetensors file; none where it is damaged, which reading it says."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError, ValueError):
        return []


def _read_any(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of a state dict that torch saved.

    Raises:
        UsageError: There is no such file.
        IncompatibleArtefact: It is damaged, unsafe, or no state dict.
    """
    if path.suffix not in PICKLED:
        return read_tensors(path)
    saved = read_pickle(path)
    if not isinstance(saved, dict) or not all(hasattr(t, "shape") for t in saved.values()):
        raise IncompatibleArtefact(
            "the file is no state dict", where=path, found=type(saved).__name__
        )
    return {str(name): tensor for name, tensor in saved.items()}


def _known(architecture: str) -> type[nn.Module] | None:
    """The class of one of our architectures; None for timm's.

    Raises:
        UsageError: There is no such architecture.
    """
    own = find(architecture)
    if own is None and not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, [*ARCHITECTURES, *timm.list_models()], n=5)
        raise UsageError(
            "there is no such architecture, neither in timm nor in merge/architectures",
            found=architecture,
            do=f"for example {', '.join(close)}"
            if close
            else f"see timm.list_models(), or {', '.join(ARCHITECTURES)}",
        )
    return own


def load(
    architecture: str | None, arguments: Mapping[str, Any] | None, weights: Path | None
) -> Backbone:
    """A backbone from a file of weights, from a folder that `save` wrote, or from one of Hugging Face's.

    Args:
        architecture: timm's name, or that of `architectures`; None when `weights` is a folder that says it.
        arguments: Of the architecture. Those of a folder that `save` wrote are known, and given ones must be
            the same; of Hugging Face's folder given ones go before its own. The number of classes is read off
            the file.
        weights: A safetensors file with the architecture's keys, or a folder; or the file or the folder of a
            transformers model of the same architecture, see `published`. Hugging Face's has `config.json`
            and safetensors, and is one of `bert`, `clip_image`, `clip_text` and `t5`. None for an architecture
            that has no weights, such as `states`.

    Raises:
        UsageError: The file is not there, or the architecture is not named.
        IncompatibleArtefact: The file is damaged, or its tensors are not the architecture's.
    """
    if weights is None:
        return _without_weights(architecture, arguments or {})
    weights = Path(weights)
    published: Preprocessing | None = None
    if architecture is not None and _of_transformers(architecture, weights):
        published = read_processor(weights if weights.is_dir() else weights.parent)
        arguments, tensors = _translated(architecture, arguments or {}, weights)
    elif weights.is_dir() and _published(weights):
        architecture, arguments, tensors = _read_published(weights, architecture, arguments or {})
    else:
        if weights.is_dir():
            architecture, arguments = _described(weights, architecture, arguments)
            weights = weights / WEIGHTS
        if architecture is None:
            raise _unnamed(weights)
        tensors = _read_any(weights)
    arguments = {**(arguments or {}), "num_classes": 0}
    classes = _classes(architecture, arguments, tensors)
    model = _make(architecture, {**arguments, "num_classes": classes})
    _require_same(weights, model.state_dict(), tensors)
    model.load_state_dict(tensors, assign=True)
    if published is not None:
        released: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        setattr(model, "pretrained_cfg", {**released, **_as_timm_says(published)})  # noqa: B010 it is no module
    return wrap(model, architecture, arguments)


def _as_timm_says(prepared: Preprocessing) -> dict[str, Any]:
    """Entries of timm's configuration of a model, but for the size, which is an argument."""
    return {
        "interpolation": prepared.interpolation,
        "crop_pct": prepared.crop,
        "crop_mode": "squash" if prepared.squash else "center",
        "mean": prepared.mean,
        "std": prepared.std,
    }


def _classes(
    architecture: str, arguments: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> int:
    """The number of classes that a file's tensors are for; 0 where it has no classifier."""
    beside = 0
    if _known(architecture) is None:
        named = timm.get_pretrained_cfg_value(architecture, "classifier")
        first = named if isinstance(named, str) else next(iter(named or ()), "")
    else:
        model = _make(architecture, arguments)
        first = _classifiers(model, architecture)[0]
        beside = getattr(model, "logits_beside_classes", 0)
    head = tensors.get(f"{first}.weight")
    return 0 if head is None else head.shape[0] - beside


def _without_weights(architecture: str | None, arguments: Mapping[str, Any]) -> Backbone:
    """A backbone that has none.

    Raises:
        UsageError: The architecture has weights, or is not named.
    """
    if architecture is None:
        raise _unnamed(None)
    own = _known(architecture)
    if own is not None:
        backbone = create(architecture, {**arguments, "num_classes": 0})
        if next(backbone.model.parameters(), None) is None:
            return backbone
    raise UsageError(
        "the architecture has weights, and none are given",
        where=architecture,
        wanted="a safetensors file, or a folder",
        do="add --weights",
    )


def _unnamed(weights: Path | None) -> UsageError:
    return UsageError(
        "the backbone is not named",
        where=weights,
        do="add --backbone NAME, or give --weights a folder that `save` wrote",
    )


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


def _published(folder: Path) -> bool:
    """A folder is one of Hugging Face's, and not one that `save` wrote."""
    return (folder / CONFIG).is_file() and not (folder / DESCRIPTION).is_file()


def _read_published(
    folder: Path, architecture: str | None, arguments: Mapping[str, Any]
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Architecture, all arguments and tensors of Hugging Face's folder.

    Raises:
        UsageError: It holds another architecture than the one named, or several and none is named.
        IncompatibleArtefact: It holds none that is written here, or a file of it is damaged.
        MissingDependency: There is no transformers.
    """
    find("bert")  # it says what to install
    from .architectures.huggingface import TYPES, architecture_of, read_folder

    kind = architecture_of(folder)
    if architecture is None and kind == "clip":
        raise UsageError(
            "the folder holds two backbones, and none of them is named",
            where=folder,
            wanted="clip_image or clip_text",
            do="add --backbone clip_image, or --backbone clip_text",
        )
    if architecture is not None and architecture not in TYPES:
        _known(architecture)
        raise UsageError(
            "the folder holds another backbone than the one named",
            where=folder,
            wanted=architecture,
            found=kind,
            do=f"name one of {', '.join(TYPES)}",
        )
    if (named := architecture or kind) is None:
        raise IncompatibleArtefact(
            "the folder holds no backbone that is written here",
            where=folder / CONFIG,
            wanted=f"a model_type among {', '.join(sorted({t for own in TYPES.values() for t in own}))}",
        )
    own, tensors = read_folder(folder, named)
    return named, {**own, **arguments}, tensors


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
            wanted=f"{DESCRIPTION} and {WEIGHTS}, as `save` writes them, or {CONFIG} of Hugging Face's",
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
