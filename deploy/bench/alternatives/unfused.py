"""The traced graph without any of our passes: what ONNX Runtime makes of it alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....export.graph import serialise
from ....export.precision import retype
from ....export.targets.onnxruntime import OnnxRuntimeSession
from ...graphs import graph_of
from ...plan import make_plan

if TYPE_CHECKING:
    from ....export.engine import Device
    from ..subject import Run
    from .originals import Originals


def unfused(originals: Originals, precision: str, device: Device) -> tuple[Run, str]:
    """See `Alternative.opens`."""
    backbone, deltas, sites = originals.backbone, originals.deltas, originals.sites
    mode = "multi" if len(deltas) > 1 else "parallel"
    plan = make_plan(deltas, backbone, sites, mode=mode)
    model = graph_of(plan, backbone, deltas, sites, (), "fp32").model
    retype(model, precision)
    session = OnnxRuntimeSession(serialise(model, {}), device, tf32=precision == "tf32")
    if session.mixes_tasks:
        return session.run, session.provider
    return lambda rows, task: session.run(rows), session.provider
