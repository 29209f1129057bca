"""What the configuration of a Triton model says to our service: its `parameters`, which are texts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

PRIORITY = "utune_priority"
"""The parameter of a request that says its priority: that of the protocol does not reach Triton's Python backend."""

SOCKETS = "sockets"


@dataclass(frozen=True)
class Settings:
    """How a model in Triton is served.

    Attributes:
        provider: Of the engine.
        threads: Of the engine; 0 lets the runtime choose.
        kernels: See `Device`.
        rows: See `Service.open`.
        keep: See `Service.open`.
        task_control: Whether clients may change the tasks.
        sockets: Folder of the sockets between models; None for one in the system's temporary folder.
        bundle: Where the bundle is; None for beside the model's code.
        queueing: Settings of `Batcher`; None there is its own default.
    """

    provider: str = "cpu"
    threads: int = 0
    kernels: Path | None = None
    rows: int | None = None
    keep: Path | None = None
    task_control: bool = False
    sockets: Path | None = None
    bundle: Path | None = None
    queueing: Mapping[str, Any] = field(default_factory=dict)

    def write(self) -> dict[str, str]:
        """The parameters."""
        texts = {"provider": self.provider, "threads": str(self.threads)}
        for name in ("kernels", "rows", "keep", SOCKETS, "bundle"):
            if (value := getattr(self, name)) is not None:
                texts[name] = str(value)
        texts["task_control"] = json.dumps(self.task_control)
        texts["queueing"] = json.dumps(self.queueing, sort_keys=True)
        return texts

    @classmethod
    def read(cls, texts: Mapping[str, str]) -> Settings:
        """What parameters say; those that are not known here are others' affair."""

        def path(name: str) -> Path | None:
            return Path(texts[name]) if name in texts else None

        return cls(
            provider=texts["provider"],
            threads=int(texts["threads"]),
            kernels=path("kernels"),
            rows=int(texts["rows"]) if "rows" in texts else None,
            keep=path("keep"),
            task_control=texts.get("task_control") == "true",
            sockets=path(SOCKETS),
            bundle=path("bundle"),
            queueing=json.loads(texts.get("queueing", "{}")),
        )
