"""A bundle, its bare backbone and other bundles as subjects of one benchmark.

The backbone is created anew with random weights and goes through the same graph passes: the time of
an engine does not depend on the values in it, and the comparison needs no file but the bundle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...export.bundle import FAN_OUT
from ...export.engine import row_inputs
from ...export.targets.onnxruntime import OnnxRuntimeSession
from ...merge.errors import IncompatibleArtefact
from .case import Case
from .measure import measure
from .report import TIMED, TIMED_ON_DEVICE, about_bundle
from .subject import EVERY_TASK, open_subject

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...export.bundle import Bundle
    from ...export.engine import Device
    from .measure import Progress
    from .report import Report, Settings


def bench(
    bundle: Bundle,
    others: Sequence[Bundle],
    *,
    batches: Sequence[int],
    mixes: Sequence[str],
    device: Device,
    resident: bool = False,
    settings: Settings,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Time a bundle.

    Args:
        bundle: What the verdict is about.
        others: Other bundles that read the same, timed in the same run.
        batches: Batch sizes.
        mixes: Task mixes, keys of `case.MIXES`.
        device: Where every engine runs.
        resident: Time engines whose inputs and answer stay on the device, their kernels replayed as one
            CUDA graph where it is one; otherwise from host memory to host memory.
        settings: Rounds and seconds.
        progress: Called between rounds.

    Raises:
        UsageError: A batch or a mix that the bundle does not have.
        IncompatibleArtefact: Another bundle reads something else.
    """
    for other in others:
        if _reads(other) != _reads(bundle):
            raise IncompatibleArtefact(
                "the bundles do not read the same inputs",
                where=other.path,
                wanted="; ".join(_reads(bundle)),
                found="; ".join(_reads(other)),
            )
    bare = bare_backbone(bundle)
    graph = resident and device.provider == "cuda"
    subjects = [
        open_subject(
            "backbone only",
            "the frozen model without any tuner, through the same graph passes",
            lambda: OnnxRuntimeSession(
                bare, device, tf32=bundle.engine.precision == "tf32", cuda_graph=graph
            ),
            takes_task=False,
            resident=resident,
        )
    ]
    for number, opened in enumerate((bundle, *others)):
        name = opened.name if number == 0 else f"{opened.name} ({number})"
        note = f"{opened.mode}, {len(opened.tasks)} tasks, bank {opened.bank}"
        if opened.mode != FAN_OUT:
            subjects.append(
                open_subject(
                    name,
                    note,
                    lambda opened=opened: opened.open_session(device, cuda_graph=graph),
                    takes_task=opened.mode == "multi",
                    resident=resident,
                )
            )
        if opened.engine_of_all is not None:
            subjects.append(
                open_subject(
                    f"{name}{EVERY_TASK}",
                    f"each row answered for all {len(opened.tasks)} tasks at once",
                    lambda opened=opened: opened.open_fan_out(device, cuda_graph=graph),
                    takes_task=False,
                    resident=resident,
                )
            )
    cases = [Case(batch, mix) for batch in batches for mix in mixes]
    return measure(
        subjects,
        cases,
        about=about_bundle(bundle),
        settings=settings,
        threads=device.threads,
        timed=TIMED_ON_DEVICE if resident else TIMED,
        progress=progress,
    )


def _reads(bundle: Bundle) -> list[str]:
    """The row inputs of a bundle, in words."""
    return [
        f"{tensor.name} {list(tensor.shape[1:])} {tensor.dtype}"
        + ("" if tensor.high is None else f" below {tensor.high}")
        for tensor in row_inputs(bundle.engine.inputs)
    ]


def bare_backbone(bundle: Bundle) -> bytes:
    """An engine of the bundle's backbone without tuners; without labels, its classifier left out."""
    from ...merge.backbone import create
    from ..build import backbone_engine

    classes = max(len(task.labels) for task in bundle.tasks)
    arguments = {**bundle.backbone["arguments"], "num_classes": classes}
    backbone = create(bundle.backbone["architecture"], arguments)
    return backbone_engine(backbone, bundle.engine.precision)
