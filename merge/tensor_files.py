"""Files of named tensors: safetensors, and state dicts that torch saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from .errors import IncompatibleArtefact
from .files import require_file
from .pickles import read_pickle

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

PICKLED = (".bin", ".pth", ".pt")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        UsageError: There is no such file.
        IncompatibleArtefact: It is truncated or not safetensors.
    """
    require_file(path, "a safetensors file")
    try:
        with safe_open(path, framework="pt"):
            pass
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as cause:
        raise IncompatibleArtefact(
            "the file is truncated or not safetensors", where=path, found=str(cause)
        ) from cause


def tensor_names(path: Path) -> list[str]:
    """Of a safetensors file; none where it is damaged, which reading it says."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError, ValueError):
        return []


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of a state dict that torch saved (`PICKLED`).

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


def read_saved(path: Path) -> Any:
    """A torch checkpoint, no code of which is run, or the tensors of a safetensors file.

    Raises:
        UsageError: There is no such file.
        IncompatibleArtefact: It is damaged, or holds objects other than tensors and plain containers.
    """
    return read_tensors(path) if path.suffix == ".safetensors" else read_pickle(path)
