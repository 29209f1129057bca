"""A transformers model beside a name of timm's: its tensors under timm's names, its pictures as it prepared them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...tensor_files import read_state_dict, tensor_names
from ..architecture import classifiers_of, features_of, make
from .config import CONFIG, EPS, match_config, model_type, of_pictures, weights_of
from .counterparts import Counterparts
from .processor import read_processor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from ...preprocessing import Preprocessing

OF_TRUNKS = ("bert", "roberta", "t5", "clip_text_model")  # its models that are none of timm's


def may_be_transformers(weights: Path) -> bool:
    """A file or a folder may be a transformers model of pictures, by the names in it."""
    path = weights_of(weights) if weights.is_dir() else weights
    if path is None or not path.is_file():
        return False
    if weights.is_dir() and model_type(weights / CONFIG) in OF_TRUNKS:
        return False
    return path.suffix != ".safetensors" or any(map(Counterparts.may_be, tensor_names(path)))


def read_transformers(
    architecture: str, arguments: Mapping[str, Any], weights: Path
) -> tuple[dict[str, Any], dict[str, Tensor], Preprocessing | None]:
    """Arguments, tensors and preprocessing of a transformers model, or of a file that has timm's names after all.

    Args:
        architecture: timm's name.
        arguments: Its arguments; the eps of the norms is added where the folder has another than timm.
        weights: What `may_be_transformers` is true of.

    Returns:
        The preprocessing is None where the folder does not say.

    Raises:
        IncompatibleArtefact: It is another model than timm's, or a file of it is malformed.
    """
    path = weights_of(weights) if weights.is_dir() else weights
    assert path is not None  # `may_be_transformers` saw it
    prepared = read_processor(path.parent)
    tensors = of_pictures(read_state_dict(path))
    model = make(architecture, {**arguments, "num_classes": 0})
    classifiers = classifiers_of(model, architecture)
    names = Counterparts.find(model, classifiers, tensors, where=path)
    if names is None:
        return dict(arguments), tensors, prepared
    eps = match_config(path.parent / CONFIG, model)
    own = {} if eps is None or EPS in arguments else {EPS: eps}
    found = names.assemble(tensors, model.state_dict(), where=path)
    heads = [name for name in found if name.startswith(tuple(f"{c}." for c in classifiers))]
    width = features_of(model)
    if any(found[name].dim() != 1 and found[name].shape[-1] != width for name in heads):
        for name in heads:  # it reads other features; a task brings its own
            del found[name]
    return {**arguments, **own}, found, prepared
