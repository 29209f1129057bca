"""The machine just before and just after: clocks, heat, and what held the clocks down."""

from __future__ import annotations

from dataclasses import dataclass


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
