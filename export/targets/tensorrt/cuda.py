"""Memory, streams and recorded graphs of a CUDA device; every error code is raised.

Over `cuda.bindings.runtime`, whose functions answer `(error, *values)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ....merge.errors import MissingDependency, UtuneError
from .library import cudart

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray


class Cuda:
    """The current device.

    Raises:
        MissingDependency: cuda-python, a driver or a device is missing.
    """

    def __init__(self) -> None:
        self.runtime = cudart()
        error, device = self.runtime.cudaGetDevice()
        if error != self.runtime.cudaError_t.cudaSuccess:
            raise MissingDependency(
                "there is no CUDA device for TensorRT",
                found=self.words(error),
                do="run `nvidia-smi` to see what the driver finds",
            )
        self.device: int = device

    def ok(self, answer: Sequence[Any]) -> Any:
        """What a function of the runtime answered, without its error code.

        Raises:
            UtuneError: The code is not that of success.
        """
        error, *values = answer
        if error != self.runtime.cudaError_t.cudaSuccess:
            raise UtuneError("CUDA reports an error", found=self.words(error))
        return values[0] if values else None

    def words(self, error: Any) -> str:
        """An error code in CUDA's words."""
        text = self.runtime.cudaGetErrorString(error)[1]
        return text.decode() if isinstance(text, bytes) else str(text or error)

    def capability(self) -> tuple[int, int]:
        """Compute capability of the device."""
        kinds = self.runtime.cudaDeviceAttr
        major, minor = (
            self.ok(self.runtime.cudaDeviceGetAttribute(kind, self.device))
            for kind in (
                kinds.cudaDevAttrComputeCapabilityMajor,
                kinds.cudaDevAttrComputeCapabilityMinor,
            )
        )
        return major, minor


class Memory:
    """Bytes on the device, freed with the object.

    Attributes:
        address: Where they are.
        size: How many.
    """

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.cuda, self.size, self.address = cuda, size, 0
        self.address = int(cuda.ok(cuda.runtime.cudaMalloc(max(1, size))))

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            self.cuda.runtime.cudaFree(self.address)  # nobody could act on its error here


class Array(Memory):
    """A host array's copy on the device."""

    def __init__(self, stream: Stream, array: NDArray[Any]) -> None:
        super().__init__(stream.cuda, array.nbytes)
        self.shape = array.shape
        stream.to_device(self, array)


class Stream:
    """A queue of work on the device, apart from the default one."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.handle: Any = None
        runtime = cuda.runtime
        self.handle = cuda.ok(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))

    def __del__(self) -> None:
        if getattr(self, "handle", None) is not None:
            self.cuda.runtime.cudaStreamDestroy(self.handle)

    def __int__(self) -> int:
        return int(self.handle)

    def wait(self) -> None:
        """Until all work of the stream is done."""
        self.cuda.ok(self.cuda.runtime.cudaStreamSynchronize(self.handle))

    def to_device(self, memory: Memory, array: NDArray[Any]) -> None:
        """Copy an array into memory; returns when the array may change again."""
        contiguous = np.ascontiguousarray(array)
        kind = self.cuda.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(memory.address, contiguous.ctypes.data, contiguous.nbytes, kind)
        self.wait()

    def to_host(self, array: NDArray[Any], memory: Memory) -> None:
        """Copy memory into a contiguous array; returns when it is there."""
        kind = self.cuda.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(array.ctypes.data, memory.address, array.nbytes, kind)
        self.wait()

    def _copy(self, to: int, source: int, size: int, kind: Any) -> None:
        self.cuda.ok(self.cuda.runtime.cudaMemcpyAsync(to, source, size, kind, self.handle))


class Graph:
    """What a function puts on a stream, recorded once and launched as a whole."""

    def __init__(self, stream: Stream, enqueue: Callable[[], None]) -> None:
        self.stream, self.cuda, self.executable = stream, stream.cuda, None
        runtime = self.cuda.runtime
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.cuda.ok(runtime.cudaStreamBeginCapture(stream.handle, mode))
        try:
            enqueue()
        except BaseException:
            runtime.cudaStreamEndCapture(stream.handle)  # the first error is the one to tell
            raise
        graph = self.cuda.ok(runtime.cudaStreamEndCapture(stream.handle))
        try:
            self.executable = self.cuda.ok(runtime.cudaGraphInstantiate(graph, 0))
        finally:
            runtime.cudaGraphDestroy(graph)

    def __del__(self) -> None:
        if getattr(self, "executable", None) is not None:
            self.cuda.runtime.cudaGraphExecDestroy(self.executable)

    def launch(self) -> None:
        """Put it on its stream."""
        self.cuda.ok(self.cuda.runtime.cudaGraphLaunch(self.executable, self.stream.handle))
