"""How a subject's engine is opened again: in a process of its own, with a profiler, or as a graph to count."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from ...export.bundle import BANK, Bundle
from ...export.engine import CPU
from ...export.targets.onnxruntime import OnnxRuntimeSession

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...export.bundle import Engine
    from ...export.engine import Device, Session

ONNXRUNTIME = "onnxruntime"  # a key of `TARGETS`
LARGE = 1024
"""Elements; a constant above it is a weight, whose values nothing that counts reads."""


@dataclass(frozen=True)
class Source:
    """An engine, by what it was made of.

    Attributes:
        model: The ONNX model, in memory or a file, or the bundle that holds it.
        device: Where it runs.
        takes_task: Whether it has a `task` input.
        fan_out: Of a bundle, the engine that answers every task.
        tf32: Of a model without a bundle, which says it itself.
    """

    model: bytes | Path | Bundle
    device: Device = CPU
    takes_task: bool = True
    fan_out: bool = False
    tf32: bool = False

    @property
    def file(self) -> Path | None:
        """The engine's file; None for a model in memory."""
        if isinstance(self.model, Bundle):
            return self.model.path / self._engine(self.model).file
        return self.model if isinstance(self.model, Path) else None

    @property
    def is_graph(self) -> bool:
        """Whether it is an ONNX model of ONNX Runtime, which can be counted and profiled."""
        return not isinstance(self.model, Bundle) or self._engine(self.model).target == ONNXRUNTIME

    @property
    def bank(self) -> Mapping[str, Any]:
        """The tensors of a bank that is an input, mapped from its file; empty without one."""
        if not isinstance(self.model, Bundle) or not self._engine(self.model).reads_bank:
            return {}
        return self.model.read_bank()

    @property
    def bank_bytes(self) -> int:
        """Of these tensors."""
        return sum(tensor.nbytes for tensor in self.bank.values())

    @property
    def tasks(self) -> int:
        """Rows of the bank, 1 without one."""
        return len(self.model.tasks) if isinstance(self.model, Bundle) else 1

    @property
    def disk_bytes(self) -> int:
        """Engine file, or the model as it would be written, and bank file."""
        engine = len(self.model) if isinstance(self.model, bytes) else self.file.stat().st_size  # type: ignore[union-attr]
        bank = self.model.path / BANK if isinstance(self.model, Bundle) and self.bank else None
        return engine + (bank.stat().st_size if bank else 0)

    @cached_property
    def graph(self) -> ir.Model:
        """The graph with the types and shapes of its weights, but not their values."""
        raw = self.model if isinstance(self.model, bytes) else self.file.read_bytes()  # type: ignore[union-attr]
        model = ir.from_proto(onnx.load_model_from_string(raw))
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.size > LARGE:
                value.const_value = ir.LazyTensor(
                    _no_values,
                    dtype=tensor.dtype,
                    shape=ir.Shape(list(tensor.shape.numpy())),
                    name=tensor.name,
                )
        return model

    def open(self) -> Session:
        """The engine, open as the benchmark opens it, without a CUDA graph."""
        if not isinstance(self.model, Bundle):
            return OnnxRuntimeSession(self.model, self.device, tf32=self.tf32)
        if self.fan_out:
            return self.model.open_fan_out(self.device)
        return self.model.open_session(self.device)

    def _engine(self, bundle: Bundle) -> Engine:
        return bundle.require_fan_out() if self.fan_out else bundle.engine


def _no_values() -> ir.Tensor:
    raise AssertionError("the values of a weight were asked for where only its shape is kept")
