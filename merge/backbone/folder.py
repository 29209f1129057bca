"""Backbones in files: those that `save` wrote, bare files of weights, and Hugging Face's folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from safetensors.torch import save_file

from ..architectures import find
from ..errors import IncompatibleArtefact, UsageError
from ..files import atomic_folder
from ..tensor_files import read_state_dict
from .architecture import classifiers_of, known, make
from .frozen import create, set_preprocessing, wrap
from .transformers.config import CONFIG
from .transformers.reading import may_be_transformers, read_transformers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ..preprocessing import Preprocessing
    from .frozen import Backbone

DESCRIPTION = "backbone.json"
WEIGHTS = "backbone.safetensors"


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
            transformers model of the same architecture, see `transformers`. Hugging Face's has `config.json`
            and safetensors, and is one of `bert`, `clip_image`, `clip_text` and `t5`. None for an architecture
            that has no weights, such as `states`.

    Raises:
        UsageError: The file is not there, or the architecture is not named.
        IncompatibleArtefact: The file is damaged, or its tensors are not the architecture's.
    """
    if weights is None:
        return _without_weights(architecture, arguments or {})
    weights = Path(weights)
    prepared: Preprocessing | None = None
    if architecture is not None and _of_transformers(architecture, weights):
        arguments, tensors, prepared = read_transformers(architecture, arguments or {}, weights)
    elif weights.is_dir() and _published(weights):
        architecture, arguments, tensors = _read_published(weights, architecture, arguments or {})
    else:
        if weights.is_dir():
            architecture, arguments = _described(weights, architecture, arguments)
            weights = weights / WEIGHTS
        if architecture is None:
            raise _unnamed(weights)
        tensors = read_state_dict(weights)
    arguments = {**(arguments or {}), "num_classes": 0}
    classes = _classes(architecture, arguments, tensors)
    model = make(architecture, {**arguments, "num_classes": classes})
    _require_same(weights, model.state_dict(), tensors)
    model.load_state_dict(tensors, assign=True)
    if prepared is not None:
        set_preprocessing(model, prepared)
    return wrap(model, architecture, arguments)


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


def _without_weights(architecture: str | None, arguments: Mapping[str, Any]) -> Backbone:
    """A backbone that has none.

    Raises:
        UsageError: The architecture has weights, or is not named.
    """
    if architecture is None:
        raise _unnamed(None)
    own = known(architecture)
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


def _classes(architecture: str, arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """The number of classes that a file's tensors are for; 0 where it has no classifier."""
    beside = 0
    if known(architecture) is None:
        named = timm.get_pretrained_cfg_value(architecture, "classifier")
        first = named if isinstance(named, str) else next(iter(named or ()), "")
    else:
        model = make(architecture, arguments)
        first = classifiers_of(model, architecture)[0]
        beside = getattr(model, "logits_beside_classes", 0)
    head = tensors.get(f"{first}.weight")
    return 0 if head is None else head.shape[0] - beside


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
    from ..architectures.huggingface import TYPES, architecture_of, read_folder

    kind = architecture_of(folder)
    if architecture is None and kind == "clip":
        raise UsageError(
            "the folder holds two backbones, and none of them is named",
            where=folder,
            wanted="clip_image or clip_text",
            do="add --backbone clip_image, or --backbone clip_text",
        )
    if architecture is not None and architecture not in TYPES:
        known(architecture)
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


def _of_transformers(architecture: str, weights: Path) -> bool:
    """The architecture is timm's, and the file or folder may be a transformers model of it."""
    if not timm.is_model(architecture) or (weights / DESCRIPTION).is_file():
        return False
    return may_be_transformers(weights)


def _published(folder: Path) -> bool:
    """A folder is one of Hugging Face's, and not one that `save` wrote."""
    return (folder / CONFIG).is_file() and not (folder / DESCRIPTION).is_file()


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


def _unnamed(weights: Path | None) -> UsageError:
    return UsageError(
        "the backbone is not named",
        where=weights,
        do="add --backbone NAME, or give --weights a folder that `save` wrote",
    )
