"""A graph and its bank, put into their files; a bank that nobody holds goes there row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors.numpy import save_file

from ..export.engine import BANK_PREFIX
from ..export.streamed import fill, write_engine, write_tensors
from .graphs import bank_inputs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from ..merge.rows import Rows
    from .graphs import Made


def write_graph(made: Made, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a finished graph, with the bank that is in it.

    Raises:
        BuildFailed: The file would be over protobuf's limit of 2 GiB.
    """
    streamed = made.bank is None and made.rows is not None
    holes = write_engine(made.model, path, metadata, without=BANK_PREFIX if streamed else None)
    if holes and made.rows is not None:
        fill(path, holes, _laid_out(made.rows))


def write_bank(made: Made, path: Path, metadata: Mapping[str, str], precision: str) -> None:
    """Write a bank that is an input of its engine, in the type in which that reads it."""
    if made.bank is not None:
        save_file(bank_inputs(made.bank.tensors, precision), path, metadata=dict(metadata))
        return
    assert made.rows is not None
    shapes = {
        f"{BANK_PREFIX}{key}": tuple(tensor.shape)
        for key, tensor in made.rows.shaped().tensors.items()
    }
    fill(path, write_tensors(path, shapes, metadata), _laid_out(made.rows))


def _laid_out(rows: Rows) -> Iterator[dict[str, NDArray[np.generic]]]:
    """Each row by the names that the engine reads."""
    return (bank_inputs(row, "fp32") for row in rows)
