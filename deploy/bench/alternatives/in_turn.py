"""An engine per task: what serving a model per task comes to when a batch holds several tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ....export.graph import serialise
from ....export.targets.onnxruntime import OnnxRuntimeSession
from ...graphs import finish, graph_of
from ...plan import make_plan
from .opened import Opened

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ....export.engine import Device, Rows
    from .originals import Originals


def in_turn(originals: Originals, precision: str, device: Device) -> Opened:
    """See `Alternative.opens`."""
    engines = _Engines(originals, precision, device)
    return Opened(engines.run, engines.open(0).provider)


class _Engines:
    """Sessions by task, opened when their task is first asked for: a warm-up opens those of a case.

    Sixty-four of them do not fit where one engine of sixty-four tasks does.
    """

    def __init__(self, originals: Originals, precision: str, device: Device) -> None:
        self.originals, self.precision, self.device = originals, precision, device
        self.sessions: dict[int, OnnxRuntimeSession] = {}

    def open(self, number: int) -> OnnxRuntimeSession:
        """The engine of one task, as `export` builds it for that task alone."""
        if number not in self.sessions:
            backbone, sites = self.originals.backbone, self.originals.sites
            deltas = [self.originals.deltas[number]]
            plan = make_plan(deltas, backbone, sites)
            model = graph_of(plan, backbone, deltas, sites, (), self.precision).model
            finish(model, self.precision)
            self.sessions[number] = OnnxRuntimeSession(
                serialise(model, {}), self.device, tf32=self.precision == "tf32"
            )
        return self.sessions[number]

    def run(self, rows: Rows, task: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Subject.run`. The answer is as wide as the widest task's; what a narrower one lacks is 0."""
        answers = {}
        for number in np.unique(task).tolist():
            asked = task == number
            answers[number] = self.open(number).run(_some(rows, asked))
        width = max(answer.shape[-1] for answer in answers.values())
        inner = next(iter(answers.values())).shape[1:-1]
        logits = np.zeros((len(task), *inner, width), np.float32)
        for number, answer in answers.items():
            logits[task == number, ..., : answer.shape[-1]] = answer
        return logits


def _some(rows: Rows, asked: NDArray[np.bool_]) -> Rows:
    if isinstance(rows, np.ndarray):
        return rows[asked]
    return {name: array[asked] for name, array in rows.items()}
