"""The range of numbers that a value of a graph takes on examples, by ONNX Runtime's calibrators.

`minmax` is the smallest and the largest number seen; `percentile` leaves out one number in a hundred thousand;
`entropy` cuts where a histogram loses least information.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from ..merge.errors import BuildFailed, UsageError
from .targets.private import calibrators

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

METHODS = ("minmax", "percentile", "entropy")


class _One:
    """A batch, once."""

    def __init__(self, batch: Mapping[str, NDArray[Any]]) -> None:
        self.left = [dict(batch)]

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return self.left.pop() if self.left else None


def ranges(
    model: ir.Model,
    names: Sequence[str],
    batches: Iterable[Mapping[str, NDArray[Any]]],
    method: str = "minmax",
) -> dict[str, tuple[float, float]]:
    """The smallest and the largest number of each value.

    Args:
        model: A float32 graph; left as it is.
        names: Of its values.
        batches: All its inputs by name, a batch at a time. The calibrator is fed one at a time: it keeps what it
            is given until it has seen all.
        method: A key of `METHODS`.

    Raises:
        UsageError: Unknown method.
        BuildFailed: A value took on no finite number.
    """
    if method not in METHODS:
        raise UsageError("unknown method of calibration", wanted=", ".join(METHODS), found=method)
    wanted = {
        name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in names
    }
    with tempfile.TemporaryDirectory() as folder:
        path, augmented = Path(folder) / "model.onnx", Path(folder) / "augmented.onnx"
        path.write_bytes(ir.to_proto(model).SerializeToString())
        calibrator = _calibrator(method, wanted)(path, augmented_model_path=str(augmented))
        calibrator.augment_graph()
        calibrator.create_inference_session()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it was told
            for batch in batches:
                calibrator.collect_data(_One(batch))
            found = calibrator.compute_data()
        calibrator.infer_session = None  # lets go of the file
    limits = {}
    for name in names:
        low, high = (float(np.asarray(end).item()) for end in found[name].range_value)
        if not (-float("inf") < low <= high < float("inf")):
            raise BuildFailed(
                "a value is not finite on the calibration examples", where=name, found=(low, high)
            )
        limits[name] = (low, high)
    return limits


def _calibrator(method: str, wanted: Mapping[str, onnx.ValueInfoProto]) -> Any:
    """One of the library's classes of calibrators, of these values alone and without its remarks."""
    library = calibrators()
    base = {
        "minmax": library.MinMaxCalibrater,
        "percentile": library.PercentileCalibrater,
        "entropy": library.EntropyCalibrater,
    }[method]

    def select(self: Any, model: onnx.ModelProto) -> tuple[set[str], dict[str, Any]]:
        have = {value.name for value in (*model.graph.value_info, *model.graph.input)}
        model.graph.value_info.extend(v for name, v in wanted.items() if name not in have)
        return set(wanted), dict(wanted)

    return type(base.__name__, (base,), {"select_tensors_to_calibrate": select})
