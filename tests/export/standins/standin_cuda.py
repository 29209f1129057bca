"""A stand-in for `cuda.bindings.runtime`, for the control flow of our code only.

Device memory is host memory, a stream runs at once, and a copy outside what was allocated is an error.
Faults are the names of functions that are to fail, in `STANDIN_FAULTS`, separated by commas.
"""

from __future__ import annotations

import ctypes
import enum
import os
from typing import Any

faults: set[str] = set(filter(None, os.environ.get("STANDIN_FAULTS", "").split(",")))
capability = [9, 0]
allocated: dict[int, Any] = {}
captures: dict[int, list[Any] | None] = {}  # by stream, what is being recorded
calls: list[str] = []
cudaStreamNonBlocking = 1


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorNoDevice = 100


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class cudaDeviceAttr(enum.IntEnum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


def done(name: str, *values: Any) -> tuple[Any, ...]:
    calls.append(name)
    if name in faults:
        return (cudaError_t.cudaErrorInvalidValue, *[None for _ in values])
    return (cudaError_t.cudaSuccess, *values)


def cudaGetErrorString(error: int) -> tuple[Any, ...]:
    return (cudaError_t.cudaSuccess, cudaError_t(error).name.encode())


def cudaGetDevice() -> tuple[Any, ...]:
    return done("cudaGetDevice", 0)


def cudaDeviceGetAttribute(attribute: int, device: int) -> tuple[Any, ...]:
    return done("cudaDeviceGetAttribute", capability[attribute - 75])


def cudaMalloc(size: int) -> tuple[Any, ...]:
    block = ctypes.create_string_buffer(size)
    allocated[ctypes.addressof(block)] = block
    return done("cudaMalloc", ctypes.addressof(block))


def cudaFree(address: int) -> tuple[Any, ...]:
    del allocated[address]
    return done("cudaFree")


def cudaMemcpyAsync(to: int, source: int, size: int, kind: int, stream: int) -> tuple[Any, ...]:
    device = to if kind == cudaMemcpyKind.cudaMemcpyHostToDevice else source
    if len(allocated[device]) < size or captures[stream] is not None:
        return (cudaError_t.cudaErrorInvalidValue,)
    ctypes.memmove(to, source, size)
    return done("cudaMemcpyAsync")


def cudaStreamCreateWithFlags(flags: int) -> tuple[Any, ...]:
    assert flags == cudaStreamNonBlocking
    handle = max(captures, default=0) + 1
    captures[handle] = None
    return done("cudaStreamCreateWithFlags", handle)


def cudaStreamDestroy(stream: int) -> tuple[Any, ...]:
    return done("cudaStreamDestroy")


def cudaStreamSynchronize(stream: int) -> tuple[Any, ...]:
    return done("cudaStreamSynchronize")


def cudaStreamBeginCapture(stream: int, mode: int) -> tuple[Any, ...]:
    captures[stream] = []
    return done("cudaStreamBeginCapture")


def cudaStreamEndCapture(stream: int) -> tuple[Any, ...]:
    recorded, captures[stream] = captures[stream], None
    return done("cudaStreamEndCapture", recorded)


def cudaGraphInstantiate(graph: Any, flags: int) -> tuple[Any, ...]:
    return done("cudaGraphInstantiate", graph)


def cudaGraphDestroy(graph: Any) -> tuple[Any, ...]:
    return done("cudaGraphDestroy")


def cudaGraphExecDestroy(graph: Any) -> tuple[Any, ...]:
    return done("cudaGraphExecDestroy")


def cudaGraphLaunch(graph: Any, stream: int) -> tuple[Any, ...]:
    for step in graph:
        step()
    return done("cudaGraphLaunch")
