"""Where the numbers come from: processor, memory, load, libraries. A fact not readable is None."""

from __future__ import annotations

import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

PACKAGES = (
    "utune-deploy", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "peft", "tensorrt", "torch",
)  # fmt: skip
"""Distributions whose versions decide a latency; those not installed are left out."""

GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
CPU_FACTS = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Machine:
    """The machine as this process sees it.

    Attributes:
        cpu: Model name of the processor.
        physical_cores: Cores without hardware threads.
        logical_cores: Cores that the system schedules on.
        usable_cores: Cores that this process may run on.
        memory_bytes: Main memory.
        governor: Frequency governor of the first core.
        gpus: Name, driver and memory of each NVIDIA device that the driver lists.
        system: Operating system and kernel.
        python: Version of the interpreter.
        versions: Version of each distribution of `PACKAGES` that is installed.
        cache_bytes: The processor's last cache; None where the system does not tell, and in older reports.
    """

    cpu: str
    physical_cores: int | None
    logical_cores: int
    usable_cores: int
    memory_bytes: int
    governor: str | None
    gpus: tuple[str, ...]
    system: str
    python: str
    versions: dict[str, str]
    cache_bytes: int | None = None


@dataclass(frozen=True)
class Load:
    """Runnable processes averaged over a minute.

    Attributes:
        before: When the benchmark began, before it added its own.
        after: When it ended, its own included.
    """

    before: float
    after: float


@dataclass(frozen=True)
class Memory:
    """Resident memory of the process on the host, in bytes.

    Attributes:
        before: When the first case began; the subjects are open.
        after: When the last case ended.
        peak: The most there ever was since the process started.
    """

    before: int
    after: int
    peak: int


def read_machine() -> Machine:
    """The facts, read now."""
    logical = psutil.cpu_count() or 1
    return Machine(
        cpu=_cpu_model(),
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=logical,
        usable_cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else logical,
        memory_bytes=psutil.virtual_memory().total,
        governor=GOVERNOR.read_text().strip() if GOVERNOR.is_file() else None,
        gpus=_gpus(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        versions=_versions(),
        cache_bytes=last_level_cache(),
    )


def load_now() -> float:
    """Load average of the last minute."""
    return os.getloadavg()[0]


def resident_now() -> int:
    """Resident memory of this process, in bytes."""
    return psutil.Process().memory_info().rss


def resident_peak() -> int:
    """The most resident memory that this process ever had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB
    return max(peak, resident_now())  # the kernel updates its peak late


def _cpu_model() -> str:
    if CPU_FACTS.is_file():
        for line in CPU_FACTS.read_text().splitlines():
            label, _, value = line.partition(":")
            if label.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _gpus() -> tuple[str, ...]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()  # a driver that does not answer runs nothing either
    rows = (line.split(", ") for line in answer.stdout.splitlines() if line.count(", ") == 2)
    return tuple(f"{name}, driver {driver}, {memory}" for name, driver, memory in rows)


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def last_level_cache() -> int | None:
    """Size of the largest cache that the first core reads through, in bytes."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [file.read_text().strip() for file in CACHES.glob("index*/size")]
    return max(
        (int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=None
    )


def command_line() -> str:
    """How this process was called, by the name of its program alone."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
