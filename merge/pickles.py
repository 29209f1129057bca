"""Files of torch that may hold code, opened without running any."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from datetime import date, datetime, time, timedelta, timezone
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import IncompatibleArtefact
from .files import require_file

if TYPE_CHECKING:
    from pathlib import Path


MARKS = (b"PK", b"\x80")  # a zip file, and the pickles of torch before 1.6


def _plain_classes() -> list[Any]:
    """What training scripts leave beside tensors, and whose making runs no code of the file.

    Arguments, numbers and arrays of NumPy under both names of its module, paths, times, and dictionaries with a
    default, which are made of built-in types alone.
    """
    array, scalar = np.array(0.0).__reduce__()[0], np.float64(0).__reduce__()[0]
    return [
        argparse.Namespace,
        (_plain_dict, "collections.defaultdict"),
        *(dict, float, int, list, set, str, tuple),
        *(datetime, date, time, timedelta, timezone),
        *((PurePosixPath, f"pathlib{inner}.PosixPath") for inner in ("", "._local")),
        *((PureWindowsPath, f"pathlib{inner}.WindowsPath") for inner in ("", "._local")),
        *(PurePosixPath, PureWindowsPath),
        *(np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in np.typecodes["All"])),
        *((array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    ]


def _plain_dict(*_: object) -> dict[Any, Any]:
    """In place of a dictionary with a default, which torch does not fill."""
    return {}


def read_pickle(path: Path) -> Any:
    """A torch checkpoint: tensors, plain containers, and what `_plain_classes` names; no code in it is run.

    Args:
        path: The file.

    Raises:
        UsageError: There is no such file.
        IncompatibleArtefact: The file is damaged, or holds objects other than tensors.
    """
    require_file(path, "a torch checkpoint")
    with path.open("rb") as file:
        if (mark := file.read(2)) and not mark.startswith(MARKS):
            raise IncompatibleArtefact(
                "the file is no torch checkpoint",
                where=path,
                wanted="what torch.save wrote, or a .safetensors file",
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what fails is raised
            with torch.serialization.safe_globals(_plain_classes()):
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as cause:
        raise IncompatibleArtefact(
            "the checkpoint holds objects that would run code when loaded",
            where=path,
            wanted="tensors and plain containers",
            found=_refused_class(str(cause)),
            do="save it again as a plain state dict",
        ) from cause
    except Exception as cause:  # damaged bytes end anywhere in pickle, zipfile and torch
        said = f"{type(cause).__name__}: {cause}".splitlines()[0]
        raise IncompatibleArtefact(
            "the checkpoint is damaged", where=path, found=said.removesuffix(": ")
        ) from cause


def _refused_class(said: str) -> str:
    """The class that torch would not make, or what it said about another refusal."""
    named = re.search(r"GLOBAL (\S+) was not an allowed|allowed global \[?(\S+?)\]? ", said)
    if named:
        return named[1] or named[2]
    reason = said.rpartition("WeightsUnpickler error: ")[2]
    return re.sub(r"\x1b\[[0-9;]*m", "", reason).strip().partition("\n")[0]
