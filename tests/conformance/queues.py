"""The batcher as models that pause for every engine call, for the suite that watches queues through metrics.

The suite's other models, of sequences and of an ensemble, are none that this server offers.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utune_deploy.export.bundle import Bundle, Engine, Task
from utune_deploy.export.engine import LOGITS, Tensor
from utune_deploy.serving.bundle_models import BundleModel
from utune_deploy.serving.queueing.batcher import Batcher
from utune_deploy.serving.service import Service

from .behaviour import QUEUES

if TYPE_CHECKING:
    from collections.abc import Mapping

INPUT = "INPUT0"


class Pause:
    """An engine that gives back what it is given, after a pause."""

    provider = "pause"
    metadata: Mapping[str, str] = {}

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def run(self, inputs: Any, task: Any = None) -> Any:
        time.sleep(self._seconds)
        return np.asarray(inputs[INPUT] if isinstance(inputs, dict) else inputs, np.float32)


class Queue(BundleModel):
    """A bundle's model that shows the configuration which the suite looks at."""

    def config(self, version: str) -> dict[str, Any]:
        return {**super().config(version), **QUEUES[self.name]}


def queues() -> list[Queue]:
    """The models that the batcher can be."""
    models = []
    for name in ("default", "dynamic", "max_queue_size"):
        config = QUEUES[name]
        rules = config.get("dynamic_batching", {})
        service = Service(_bundle(name, config["max_batch_size"] if rules else 1), Pause(2.0))
        delay = rules.get("max_queue_delay_microseconds", 0) / 1e3
        room = rules.get("default_queue_policy", {}).get("max_queue_size")
        models.append(
            Queue(Batcher(service, max_delay_ms=delay, max_queued_rows=room), max_delay_ms=delay)
        )
    return models


def _bundle(name: str, rows: int) -> Bundle:
    """One task whose answer has one number, in memory alone."""
    engine = Engine(
        target="onnxruntime",
        file="none",
        precision="fp32",
        opset=18,
        max_batch=rows,
        inputs=(Tensor(INPUT, "float32", ("batch", 1)),),
        outputs=(Tensor(LOGITS, "float32", ("batch", 1)),),
    )
    task = Task(name="only", row=0, labels=(), preprocessing=None, delta="0" * 64, width=1)
    return Bundle(
        path=Path("none"),
        name=name,
        mode="parallel",
        bank="constants",
        engine=engine,
        tasks=(task,),
        backbone={},
        plan={},
        check={},
        versions={},
        identity="",
    )
