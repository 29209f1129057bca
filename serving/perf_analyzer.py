"""Requests for NVIDIA's perf_analyzer, which by itself would name tasks that do not exist.

Its `--input-data FILE` takes JSON: a list of entries, each one row of every input, sent in turn. A number
of an FP32 input must be written with a decimal point, or it is read as another type. Source:
https://github.com/triton-inference-server/perf_analyzer/blob/main/docs/input_data.md.
"""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import numpy as np

from ..export.engine import TASK, row_inputs
from ..merge.files import atomic_file

if TYPE_CHECKING:
    from pathlib import Path

    from ..export.bundle import Bundle
    from ..export.engine import Tensor

ENTRIES = 8  # at least; each task has one
DECIMALS = 3  # of the random numbers: a picture of 224 is then 1 MB of text


def requests(bundle: Bundle, *, entries: int = ENTRIES, seed: int = 0) -> dict[str, Any]:
    """Random rows, each for the next task.

    Args:
        bundle: What is served.
        entries: How many; never fewer than there are tasks.
        seed: Of the random numbers.

    Returns:
        JSON values: `data`, a list of entries; an entry has `content`, flat, and `shape` by input.
    """
    random = np.random.default_rng(seed)
    names = [task.name for task in bundle.tasks]
    inputs = row_inputs(bundle.engine.inputs)
    return {
        "data": [
            {
                **{tensor.name: _row(tensor, random) for tensor in inputs},
                TASK: {"content": [names[number % len(names)]], "shape": [1]},
            }
            for number in range(max(entries, len(names)))
        ]
    }


def write(path: Path, bundle: Bundle) -> None:
    """Write `requests` to a file; see `refuse_existing`, which asks first."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(requests(bundle), separators=(",", ":")))


def command(bundle: Bundle, grpc: str, path: Path | None) -> str:
    """The command line that measures a served bundle.

    Args:
        bundle: What is served.
        grpc: `host:port` of gRPC.
        path: The file that `write` wrote; None for a name to be filled in.
    """
    file = "FILE" if path is None else shlex.quote(str(path.resolve()))
    return (
        f"perf_analyzer -m {shlex.quote(bundle.name)} -i grpc -u {grpc} "
        f"--concurrency-range 1:16:5 --input-data {file}"
    )


def _row(tensor: Tensor, random: np.random.Generator) -> dict[str, Any]:
    """One random row: numbers around zero, ids below their bound, and masks of ones."""
    sizes = tuple(int(size) for size in tensor.shape[1:])
    if tensor.dtype == "float32":
        content = random.standard_normal(sizes).round(DECIMALS).ravel().tolist()
    elif tensor.high is not None:
        content = random.integers(0, tensor.high, sizes).ravel().tolist()
    else:
        content = [1] * int(np.prod(sizes))
    return {"content": content, "shape": list(sizes)}
