"""The machine just before and just after: clocks, heat, and what held the clocks down.

CUDA devices are asked through NVML where nvidia-ml-py is installed (its module is `pynvml`); it is no dependency.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NVML = "pynvml"
LIMIT = "nvmlClocksThrottleReason"
NO_LIMITS = frozenset({"None", "All", "GpuIdle"})
"""NVML's names for no reason, for the sum of all, and for a device that has nothing to do."""

MILLIWATTS_PER_WATT = 1000


@dataclass(frozen=True)
class DeviceState:
    """A CUDA device at one moment; None is what the driver does not tell.

    Attributes:
        name: Its name.
        clock_mhz: Of its multiprocessors.
        memory_clock_mhz: Of its memory.
        temperature_c: In degrees Celsius.
        power_w: In watts.
        limits: Why the clock is not higher, in NVML's words; empty when nothing holds it down.
    """

    name: str
    clock_mhz: int | None
    memory_clock_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    limits: tuple[str, ...]


@dataclass(frozen=True)
class State:
    """One moment.

    Attributes:
        cpu_mhz: Clock of the processor, a mean over its cores; None where the system does not tell.
        devices: CUDA devices, where they are used and nvidia-ml-py is installed.
    """

    cpu_mhz: float | None
    devices: tuple[DeviceState, ...] = ()


@dataclass(frozen=True)
class States:
    """Before the first case and after the last."""

    before: State
    after: State


def read_state(*, devices: bool) -> State:
    """The state now.

    Args:
        devices: Whether CUDA devices are used; they are asked only then.
    """
    clock = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    return State(
        cpu_mhz=clock.current if clock and clock.current else None,
        devices=tuple(_devices()) if devices and importlib.util.find_spec(NVML) else (),
    )


def _devices() -> Iterator[DeviceState]:
    nvml = importlib.import_module(NVML)
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return  # no driver answers
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            yield _device(nvml, nvml.nvmlDeviceGetHandleByIndex(index))
    finally:
        nvml.nvmlShutdown()


def _device(nvml: Any, handle: Any) -> DeviceState:
    def ask(call: Callable[[], Any]) -> Any:
        """None where the driver does not tell."""
        try:
            return call()
        except nvml.NVMLError:
            return None

    name = nvml.nvmlDeviceGetName(handle)
    power = ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
    bits = ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) or 0
    return DeviceState(
        name=name.decode() if isinstance(name, bytes) else name,
        clock_mhz=ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        memory_clock_mhz=ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
        temperature_c=ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        power_w=None if power is None else power / MILLIWATTS_PER_WATT,
        limits=_limits(nvml, bits),
    )


def _limits(nvml: Any, bits: int) -> tuple[str, ...]:
    """The names of the bits that are set."""
    names = sorted(name for name in dir(nvml) if name.startswith(LIMIT))
    return tuple(
        name.removeprefix(LIMIT)
        for name in names
        if name.removeprefix(LIMIT) not in NO_LIMITS and bits & getattr(nvml, name)
    )
