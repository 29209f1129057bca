"""ONNX Runtime: the engine file is the ONNX model; the session asserts its provider.

ONNX Runtime falls back to another provider with only a printed line. Here the provider that was
asked for is the one that runs, or opening fails.
"""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from ...merge.errors import IncompatibleArtefact, MissingDependency, UsageError
from ..engine import LOGITS, TASK, by_name, is_row_input

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from ..engine import Rows

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeSession:
    """An ONNX model open on one execution provider."""

    def __init__(
        self,
        model: Path | bytes,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        bank: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> None:
        """Open a model.

        Args:
            model: Path or serialised bytes.
            provider: A key of `PROVIDERS`.
            threads: Threads inside one operator; None lets the runtime choose.
            bank: Task tensors by input name, for an engine whose bank is an input.

        Raises:
            UsageError: Unknown provider name.
            MissingDependency: The provider cannot be loaded.
            IncompatibleArtefact: The model cannot be loaded, or the bank is not the engine's.
        """
        if provider not in PROVIDERS:
            raise UsageError("unknown provider", wanted=sorted(PROVIDERS), found=provider)
        self.provider = PROVIDERS[provider]
        if self.provider not in ort.get_available_providers():
            raise MissingDependency(
                f"ONNX Runtime has no {self.provider}",
                found=ort.get_available_providers(),
                do="run `utune-deploy doctor`, or choose another --provider",
            )
        ort.set_default_logger_severity(4)  # what matters is raised below
        if provider == "cuda":
            _preload_cuda()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.force_spinning_stop", "1")  # idle means idle
        if threads:
            options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(
                str(model) if not isinstance(model, bytes) else model,
                options,
                providers=[self.provider],
            )
        except Exception as cause:
            raise IncompatibleArtefact(
                "ONNX Runtime cannot load the engine",
                where="engine in memory" if isinstance(model, bytes) else model,
                found=str(cause).splitlines()[0],
            ) from cause
        self._session.disable_fallback()
        running = self._session.get_providers()[0]
        if running != self.provider:
            raise MissingDependency(
                "ONNX Runtime fell back to another provider",
                wanted=self.provider,
                found=running,
                do="run `utune-deploy doctor` to see what the provider lacks",
            )
        names = [entry.name for entry in self._session.get_inputs()]
        self.mixes_tasks = TASK in names
        self._row_names = [name for name in names if is_row_input(name)]
        self._bank_names = frozenset(names) - {TASK, *self._row_names}
        self._bank: dict[str, ort.OrtValue] = {}
        self.replace_bank(bank or {})

    @property
    def metadata(self) -> Mapping[str, str]:
        """See `Session.metadata`."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, inputs: Rows, task: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """See `Session.run`."""
        feeds = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in by_name(inputs, self._row_names).items()
        }
        if self.mixes_tasks:
            if task is None:
                raise UsageError("a multi-task engine needs a task row per image")
            feeds[TASK] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(task))
        return self._session.run_with_ort_values([LOGITS], {**feeds, **self._bank})[0].numpy()

    def replace_bank(self, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        """See `Session.replace_bank`."""
        if set(tensors) != self._bank_names:
            raise IncompatibleArtefact(
                "the bank does not hold the tensors that the engine reads",
                wanted=sorted(self._bank_names) or "no bank: the tensors are constants",
                found=sorted(tensors),
            )
        self._bank = {  # copies: on the CPU an OrtValue shares the array's memory
            name: ort.OrtValue.ortvalue_from_numpy(np.array(value, order="C"))
            for name, value in tensors.items()
        }


open_session = OnnxRuntimeSession


def _preload_cuda() -> None:
    """Load CUDA and cuDNN from the Python packages that torch brings, where the system has none."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        ort.preload_dlls()
