"""A graph and its bank, put into their files; a bank that nobody holds goes there row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors.numpy import save_file

from ..export.engine import BANK_PREFIX
from ..export.precision import HALF
from ..export.streamed import fill, write_engine, write_tensors
from .bank_inputs import bank_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ..export.precision import Losses
    from .graphs import Made

KINDS = {"fp16": "F16", "bf16": "BF16"}  # safetensors' names of the halves


def write_graph(made: Made, path: Path, metadata: Mapping[str, str], losses: Losses) -> None:
    """Write a finished graph, with the bank that is in it.

    Args:
        made: The graph.
        path: The file.
        metadata: Of the model.
        losses: Counts what the types of the graph do to a bank that is written row by row.

    Raises:
        BuildFailed: The file would be over protobuf's limit of 2 GiB.
    """
    rows = made.streamed
    without = BANK_PREFIX if rows is not None else None
    holes = write_engine(made.model, path, metadata, without=without)
    if holes and rows is not None:
        values = made.model.graph.initializers
        half = {name for name in holes if values[name].dtype in HALF.values()}
        fill(path, holes, (_laid_out(row, holes, half, losses.cast) for row in rows))


def write_bank(
    made: Made, path: Path, metadata: Mapping[str, str], precision: str, losses: Losses
) -> None:
    """Write a bank that is an input of its engine, in the type in which that reads it.

    Args:
        made: The graph.
        path: The file.
        metadata: Of the file.
        precision: Of the engine.
        losses: As of `write_graph`.
    """
    rows = made.streamed
    if rows is None:
        assert made.bank is not None
        save_file(bank_inputs(made.bank.tensors, precision), path, metadata=dict(metadata))
        return
    shapes = {f"{BANK_PREFIX}{k}": tuple(t.shape) for k, t in rows.shaped().tensors.items()}
    holes = write_tensors(path, shapes, metadata, KINDS.get(precision, "F32"))
    half = set(holes) if precision in HALF else set()
    fill(path, holes, (_laid_out(row, holes, half, losses.cast_weights) for row in rows))


def _laid_out(
    row: Mapping[str, Tensor],
    names: Iterable[str],
    half: set[str],
    cast: Callable[[str, NDArray[np.float32]], NDArray[Any]],
) -> dict[str, NDArray[Any]]:
    """A row by the names that are written; a tensor that the engine reads in two types has two."""
    found: dict[str, NDArray[Any]] = {}
    for name in names:
        key = name.removeprefix(BANK_PREFIX)
        own = key if key in row else key.rpartition(".")[0]  # the typing pass adds the precision
        values = row[own].float().numpy()
        found[name] = cast(f"{BANK_PREFIX}{own}", values) if name in half else values
    return found
