"""One execution context at one optimization profile: its stream, its buffers, one caller at a time."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ....merge.errors import IncompatibleArtefact, UsageError, UtuneError
from ...engine import LOGITS
from .cuda import Memory, Stream

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from .cuda import Array, Cuda

DTYPES = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "INT64": np.dtype(np.int64),
    "INT32": np.dtype(np.int32),
    "INT8": np.dtype(np.int8),
    "UINT8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""NumPy's types of TensorRT's."""


@dataclass
class Opened:
    """An engine and what belongs to it.

    Attributes:
        path: The plan's file.
        trt: The `tensorrt` module.
        cuda: The device.
        engine: `trt.ICudaEngine`.
        logger: See `builder.recorder`.
        refits: How often its weights were replaced.
        broken: Why it must not answer any more, or None.
    """

    path: Path
    trt: Any
    cuda: Cuda
    engine: Any
    logger: Any
    refits: int = 0
    broken: str | None = None

    def ok(self, answer: object, what: str) -> None:
        """Hold TensorRT to a yes.

        Raises:
            UtuneError: It answered False or None.
        """
        if not answer:
            raise UtuneError(what, where=self.path, found=self.logger.last())


class Lane:
    """A context that runs one batch at a time.

    Args:
        opened: The engine.
        profile: Number of its optimization profile.
    """

    def __init__(self, opened: Opened, profile: int) -> None:
        self.opened = opened
        self.lock = threading.Lock()
        self.stream = Stream(opened.cuda)
        self.context = opened.engine.create_execution_context()
        opened.ok(self.context is not None, "TensorRT makes no execution context")
        chosen = self.context.set_optimization_profile_async(profile, int(self.stream))
        opened.ok(chosen, f"TensorRT refuses optimization profile {profile}")
        self.stream.wait()
        self.memory: dict[str, Memory] = {}

    def take(self, feeds: Mapping[str, NDArray[Any]], bank: Mapping[str, Array]) -> None:
        """Copy rows to the device and point the context at them, at the bank and at room for the answer.

        The caller keeps the bank until the run is over.

        Raises:
            UsageError: The shapes do not fit the profile, or do not decide the answer's.
            UtuneError: TensorRT or CUDA refuses.
        """
        context, opened = self.context, self.opened
        for name, array in feeds.items():
            self.stream.to_device(self.room(name, array.nbytes), array)
        for name, array in {**feeds, **bank}.items():
            if not context.set_input_shape(name, tuple(array.shape)):
                raise UsageError(
                    "TensorRT refuses the shape of an input",
                    where=name,
                    found=f"{list(array.shape)}: {opened.logger.last()}",
                )
        if missing := context.infer_shapes():
            raise UsageError("the answer's shape is not known before it runs", found=list(missing))
        shape = tuple(context.get_tensor_shape(LOGITS))
        if any(size < 0 for size in shape):
            raise UsageError(
                "the answer's shape is not known before it runs", where=LOGITS, found=list(shape)
            )
        self.answer = np.empty(shape, np.float32)
        self.room(LOGITS, self.answer.nbytes)
        for name, memory in {**self.memory, **bank}.items():
            answer = context.set_tensor_address(name, memory.address)
            opened.ok(answer, f"TensorRT refuses the address of {name}")

    def room(self, name: str, size: int) -> Memory:
        """Memory of an input or the answer, grown if it must be."""
        if name not in self.memory or self.memory[name].size < size:
            self.memory[name] = Memory(self.opened.cuda, size)
        return self.memory[name]

    def enqueue(self) -> None:
        """Put the computation on the stream."""
        self.opened.ok(
            self.context.execute_async_v3(int(self.stream)), "TensorRT does not run the engine"
        )

    def fetch(self) -> NDArray[np.float32]:
        """The answer, once the stream is done."""
        answer = np.empty_like(self.answer)
        self.stream.to_host(answer, self.memory[LOGITS])
        return answer

    def require_sound(self) -> None:
        """Refuse to answer with weights that are neither the old nor the new ones.

        Raises:
            IncompatibleArtefact: A refit failed half-way.
        """
        if self.opened.broken:
            raise IncompatibleArtefact(
                "the engine's weights are not known since a refit failed",
                where=self.opened.path,
                found=self.opened.broken,
                do="open the plan again",
            )
