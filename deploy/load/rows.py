"""The rows of a load: drawn as the model declares its inputs, or read from a file."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np

from ...export.engine import TASK
from ...merge.errors import IncompatibleArtefact, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from .target import Target

DISTINCT = 32
"""Rows that are drawn."""

DTYPES: dict[str, str] = {
    "BOOL": "bool",
    **{f"{kind}{bits}": f"{kind.lower()}{bits}" for kind in ("INT", "UINT") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": f"float{bits}" for bits in (16, 32, 64)},
}  # fmt: skip
"""Datatypes of the protocol that numpy has."""

DRAWN = "drawn: real numbers standard normal, bytes evenly, other integers 1"


def draw_rows(target: Target, seed: int) -> dict[str, NDArray[Any]]:
    """`[DISTINCT, ...]` of each input but the task; the same for the same seed.

    Real numbers are standard normal, unsigned bytes are even over their range, other integers are ones: ids that
    every vocabulary has, masks that leave nothing out. Latency of a dense network does not depend on what they are.

    Raises:
        UsageError: An input cannot be drawn.
    """
    generator = np.random.default_rng(seed)
    drawn = {}
    for name, (datatype, sizes) in target.facts.inputs.items():
        if name == TASK:
            continue
        if datatype not in DTYPES or any(size < 0 for size in sizes):
            raise UsageError(
                "rows of this input cannot be drawn",
                where=f"{target.model}, {name}",
                found=f"{datatype} {list(sizes)}",
                do="give them with --input FILE.npz",
            )
        drawn[name] = _draw(DTYPES[datatype], (DISTINCT, *sizes), generator)
    return drawn


def _draw(dtype: str, shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[Any]:
    if dtype.startswith("float"):
        return generator.standard_normal(shape, np.float32).astype(dtype)
    if dtype == "uint8":
        return generator.integers(256, size=shape, dtype=np.uint8)
    return np.ones(shape, dtype)


def read_rows(target: Target, path: Path) -> dict[str, NDArray[Any]]:
    """`[n, ...]` of each input but the task, from an npz file that has them by name.

    Raises:
        UsageError: There is no such file.
        IncompatibleArtefact: It is no npz file, or its arrays are not rows of the model.
    """
    if not path.is_file():
        raise UsageError("there is no such file of rows", where=path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as cause:  # an npy holds one array
        raise IncompatibleArtefact(
            "the file of rows cannot be read",
            where=path,
            wanted="arrays by name, as numpy.savez writes them",
            found=cause,
        ) from cause
    wanted = {name: entry for name, entry in target.facts.inputs.items() if name != TASK}
    if set(arrays) != set(wanted) or len({len(np.atleast_1d(a)) for a in arrays.values()}) != 1:
        raise IncompatibleArtefact(
            "the arrays are not the model's inputs",
            where=path,
            wanted=f"{', '.join(wanted)}, with as many rows each",
            found=", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items()),
        )
    for name, (datatype, sizes) in wanted.items():
        arrays[name] = _fitted(arrays[name], datatype, sizes, where=f"{path}, {name}")
    return arrays


def _fitted(
    array: NDArray[Any], datatype: str, sizes: tuple[int, ...], *, where: str
) -> NDArray[Any]:
    """An input's rows in its own datatype; of BYTES as objects."""
    right = array.ndim == len(sizes) + 1 and len(array) > 0
    right = right and all(s in (-1, n) for s, n in zip(sizes, array.shape[1:], strict=False))
    if datatype == "BYTES":
        right = right and array.dtype.kind in "SU"
    else:
        right = right and array.dtype.name == DTYPES.get(datatype)
    if not right:
        raise IncompatibleArtefact(
            "an array is not as the model declares its input",
            where=where,
            wanted=f"{datatype} [n, {', '.join(map(str, sizes))}]",
            found=f"{array.dtype.name} {list(array.shape)}",
        )
    if datatype != "BYTES":
        return np.ascontiguousarray(array)
    flat = [item.encode() if isinstance(item, str) else bytes(item) for item in array.flat]
    return np.array(flat, object).reshape(array.shape)
