"""What a subject takes in memory and on disk, measured in a fresh process that opens nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Footprint:
    """An engine alone in a process. Memory is resident, on the host, beyond what the loaded runtime takes.

    Attributes:
        disk_bytes: Engine file and bank file.
        opened_bytes: Growth when the engine is open.
        called_bytes: Growth after its first call: what serving it takes.
        peak_bytes: The most that it was, opening and first call included; None where the system does not tell.
        open_ms: Time to open it, its files in the system's cache or not, as they were.
        first_call_ms: Time of the first call.
        batch: Rows of that call.
    """

    disk_bytes: int
    opened_bytes: int
    called_bytes: int
    peak_bytes: int | None
    open_ms: float
    first_call_ms: float
    batch: int
