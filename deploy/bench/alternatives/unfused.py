"""The traced graph without any of our passes: what ONNX Runtime makes of it alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....export.graph import serialise
from ....export.precision import retype
from ....export.targets.onnxruntime import OnnxRuntimeSession
from ...graphs import graph_of
from ...plan import make_plan
from ..source import Source
from .opened import Opened

if TYPE_CHECKING:
    from ....export.engine import Device
    from .originals import Originals


def unfused(originals: Originals, precision: str, device: Device) -> Opened:
    """See `Alternative.opens`."""
    backbone, deltas, sites = originals.backbone, originals.deltas, originals.sites
    mode = "multi" if len(deltas) > 1 else "parallel"
    plan = make_plan(deltas, backbone, sites, mode=mode)
    model = graph_of(plan, backbone, deltas, sites, (), "fp32").model
    retype(model, precision)
    file, tf32 = serialise(model, {}), precision == "tf32"
    session = OnnxRuntimeSession(file, device, tf32=tf32)
    source = Source(file, device, takes_task=session.mixes_tasks, tf32=tf32)
    run = session.run if session.mixes_tasks else lambda rows, task: session.run(rows)
    return Opened(run, session.provider, source)
