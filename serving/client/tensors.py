"""Arrays as tritonclient's inputs, and its results as arrays; its HTTP and gRPC halves are alike here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..triton.settings import PRIORITY

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from .calls import Infer

DATATYPES = {"float32": "FP32", "int64": "INT64", "object": "BYTES"}


def infer_inputs(triton: Any, inputs: Mapping[str, NDArray[Any]]) -> list[Any]:
    """The inputs of a request.

    Args:
        triton: `tritonclient.http` or `tritonclient.grpc`.
        inputs: As of `Infer`.
    """
    return [
        triton.InferInput(name, list(array.shape), DATATYPES[str(array.dtype)]).set_data_from_numpy(
            np.ascontiguousarray(array)
        )
        for name, array in inputs.items()
    ]


def infer_parameters(call: Infer) -> dict[str, int] | None:
    """A request's own parameters: the priority once more, under the name that reaches a model in Triton."""
    return {PRIORITY: call.priority} if call.priority else None


def outputs(result: Any, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """The outputs of a result, by name."""
    return {name: result.as_numpy(name) for name in names}


def texts(array: NDArray[Any]) -> list[str]:
    """The elements of BYTES in row order, as text."""
    return [item.decode() if isinstance(item, bytes) else str(item) for item in array.flat]


def elements(values: Iterable[str | bytes]) -> NDArray[np.object_]:
    """`[n]` BYTES."""
    return np.array([v.encode() if isinstance(v, str) else v for v in values], dtype=np.object_)


def microseconds(limit_s: float | None) -> int | None:
    """A limit as the protocol's `timeout`; at least 1, as 0 would be none."""
    return None if limit_s is None else max(int(limit_s * 1e6), 1)
