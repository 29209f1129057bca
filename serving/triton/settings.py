"""What the configuration of a Triton model says to our service: its `parameters`, which are texts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...export.engine import CPU, Device

if TYPE_CHECKING:
    from collections.abc import Mapping

PRIORITY = "utune_priority"
"""The parameter of a request that says its priority: that of the protocol does not reach Triton's Python backend."""

SOCKETS = "sockets"
ALIAS_SLOTS = "alias_slots"
OF_DEVICE = ("threads", "kernels", "prepared", "memory_mb")
"""Fields of `Device` that are left out where they are None."""


@dataclass(frozen=True)
class Settings:
    """How a model in Triton is served.

    Attributes:
        device: Where the engine runs.
        rows: See `Service.open`.
        keep: See `Service.open`.
        task_control: Whether clients may change the tasks.
        sockets: Folder of the sockets between models; None for one in the system's temporary folder.
        bundle: Where the bundle is; None for beside the model's code.
        queueing: Settings of `Batcher`; None there is its own default.
        slots: Of the aliases, see `aliases`; None where there are none.
    """

    device: Device = CPU
    rows: int | None = None
    keep: Path | None = None
    task_control: bool = False
    sockets: Path | None = None
    bundle: Path | None = None
    queueing: Mapping[str, Any] = field(default_factory=dict)
    slots: int | None = None

    def write(self) -> dict[str, str]:
        """The parameters."""
        texts = {"provider": self.device.provider, "arena": json.dumps(self.device.arena)}
        for holder, names in (
            (self.device, OF_DEVICE),
            (self, ("rows", "keep", SOCKETS, "bundle")),
        ):
            for name in names:
                if (value := getattr(holder, name)) is not None:
                    texts[name] = str(value)
        if self.slots is not None:
            texts[ALIAS_SLOTS] = str(self.slots)
        texts["task_control"] = json.dumps(self.task_control)
        texts["queueing"] = json.dumps(self.queueing, sort_keys=True)
        return texts

    @classmethod
    def read(cls, texts: Mapping[str, str]) -> Settings:
        """What parameters say; those that are not known here are others' affair."""

        def path(name: str) -> Path | None:
            return Path(texts[name]) if name in texts else None

        def number(name: str) -> int | None:
            return int(texts[name]) if name in texts else None

        return cls(
            device=Device(
                provider=texts["provider"],
                threads=number("threads"),
                kernels=path("kernels"),
                prepared=path("prepared"),
                arena=texts.get("arena") != "false",
                memory_mb=number("memory_mb"),
            ),
            rows=number("rows"),
            keep=path("keep"),
            task_control=texts.get("task_control") == "true",
            sockets=path(SOCKETS),
            bundle=path("bundle"),
            queueing=json.loads(texts.get("queueing", "{}")),
            slots=number(ALIAS_SLOTS),
        )
