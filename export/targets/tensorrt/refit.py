"""Other values for the weights of an open engine, all of them or an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ....merge.errors import IncompatibleArtefact, UtuneError
from .lane import DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from .lane import Opened


def refit(opened: Opened, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Replace named weights. No work may be pending on the engine.

    Raises:
        IncompatibleArtefact: A tensor is not one that the engine can take; nothing was replaced.
        UtuneError: TensorRT refuses; `opened.broken` says so if some weights may have been replaced.
    """
    trt = opened.trt
    refitter = _refitter(opened)
    kept = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    prototypes = {name: refitter.get_weights_prototype(name) for name in kept}
    for name, array in kept.items():
        wanted = prototypes[name]
        if wanted.size == -1:
            raise IncompatibleArtefact(
                "the engine has no such weights to refit", where=opened.path, found=name
            )
        if (DTYPES.get(wanted.dtype.name), wanted.size) != (array.dtype, array.size):
            raise IncompatibleArtefact(
                "a tensor is not of the type and size that the engine holds",
                where=name,
                wanted=f"{wanted.size} numbers of {wanted.dtype.name}",
                found=f"{array.size} numbers of {array.dtype}",
            )
    for name, array in kept.items():
        weights = trt.Weights(prototypes[name].dtype, array.ctypes.data, array.size)
        opened.ok(refitter.set_named_weights(name, weights), f"TensorRT refuses the weights {name}")
    _finish(opened, refitter)


def restore_weights(opened: Opened, onnx: Path) -> None:
    """Give a stripped engine the weights of the graph that it was built from.

    Raises:
        UtuneError: TensorRT refuses.
    """
    refitter = _refitter(opened)
    reader = opened.trt.OnnxParserRefitter(refitter, opened.logger)
    if not reader.refit_from_file(str(onnx)):
        errors = [reader.get_error(number).desc() for number in range(reader.num_errors)]
        raise UtuneError(
            "TensorRT cannot take the weights of the ONNX file",
            where=onnx,
            found="; ".join(errors) or opened.logger.last(),
        )
    _finish(opened, refitter)


def _refitter(opened: Opened) -> Any:
    try:
        return opened.trt.Refitter(opened.engine, opened.logger)
    except TypeError as cause:  # how the bindings say that none could be made
        raise UtuneError(
            "the engine cannot be refitted", where=opened.path, found=opened.logger.last()
        ) from cause


def _finish(opened: Opened, refitter: Any) -> None:
    """Replace what was set; a failure may leave some weights old and some new."""
    missing = list(refitter.get_missing_weights())
    opened.ok(not missing, f"a refit needs more weights: {', '.join(missing[:5])}")
    opened.broken = "the refit did not end"
    if not refitter.refit_cuda_engine():
        opened.broken = opened.logger.last()
        raise UtuneError(
            "TensorRT could not refit the engine", where=opened.path, found=opened.broken
        )
    opened.broken = None
    opened.refits += 1
