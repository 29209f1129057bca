"""A bundle, its bare backbone and other bundles as subjects of one benchmark.

The backbone is created anew with random weights and goes through the same graph passes: the time of
an engine does not depend on the values in it, and the comparison needs no file but the bundle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...export.bundle import FAN_OUT
from ...export.engine import row_inputs
from ...export.targets.onnxruntime import OnnxRuntimeSession
from ...merge.errors import IncompatibleArtefact, UsageError
from .case import Case
from .ceilings import measure_ceilings
from .furnish import furnish
from .measure import measure, require_measurable
from .naming import subject_names
from .report import TIMED, TIMED_ON_DEVICE, about_bundle, engine_words
from .source import Source
from .subject import BARE, EVERY_TASK, open_subject
from .wording import plural

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...export.bundle import Bundle
    from ...export.engine import Device
    from .beside import Beside
    from .measure import Progress
    from .report import Report, Settings
    from .subject import Subject

RANKED = frozenset({"bottleneck", "bypass", "kronecker"})
"""Kinds of slots whose free size `r` is a rank; that of a prefix is a length, that of a head its classes."""


def bench(
    bundle: Bundle,
    others: Sequence[Bundle],
    *,
    batches: Sequence[int],
    mixes: Sequence[str],
    device: Device,
    resident: bool = False,
    beside: Beside | None = None,
    settings: Settings,
    ceiling: bool = True,
    footprint: bool = True,
    nodes: bool = False,
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
        beside: What else answers the tasks of `bundle`, timed in the same run.
        settings: Rounds and seconds.
        ceiling: Measure what the machine does at best.
        footprint: Measure the memory of each subject in a process of its own.
        nodes: Profile each subject in a session of its own.
        progress: Called between rounds.

    Raises:
        UsageError: A batch or a mix that the bundle does not have, or nodes that cannot be profiled.
        CheckFailed: The memory of a subject could not be measured.
        IncompatibleArtefact: Another bundle reads something else.
        CheckFailed: What stands beside the bundle answers otherwise.
    """
    subjects = open_subjects(
        bundle,
        others,
        subject_names([bundle, *others]),
        device,
        resident=resident,
        beside=beside,
    )
    about = about_bundle(bundle)
    cases = [Case(batch, mix) for batch in batches for mix in mixes]
    require_measurable(subjects, cases, about)
    return measure(
        furnish(subjects, cases, about, settings.seed, footprint=footprint, nodes=nodes),
        cases,
        about=about,
        settings=settings,
        threads=device.threads,
        timed=TIMED_ON_DEVICE if resident else TIMED,
        ceilings=measure_ceilings(device, bundle.engine.precision) if ceiling else None,
        progress=progress,
    )


def open_subjects(
    bundle: Bundle,
    others: Sequence[Bundle],
    names: Sequence[str],
    device: Device,
    *,
    resident: bool = False,
    beside: Beside | None = None,
) -> list[Subject]:
    """Open the bare backbone, then the bundles, then what else answers the first one's tasks, in this process.

    Args:
        bundle: Whose backbone is the baseline.
        others: Other bundles that read the same.
        names: What the report calls each bundle, `bundle` first.
        device: Where every engine runs.
        resident: See `bench`.
        beside: See `bench`.

    Raises:
        UsageError: Something else than an engine would be timed on the device.
        IncompatibleArtefact: Another bundle reads something else.
        CheckFailed: What stands beside the bundle answers otherwise.
    """
    if resident and beside is not None:
        raise UsageError(
            "only engines are timed with inputs that stay on the device",
            found=", ".join(beside.kinds),
            do="leave out --resident, or --beside",
        )
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
            BARE,
            "the frozen model without any tuner, through the same graph passes",
            lambda: OnnxRuntimeSession(
                bare, device, tf32=bundle.engine.precision == "tf32", cuda_graph=graph
            ),
            takes_task=False,
            resident=resident,
            engine=engine_words(bundle.engine),
            task_count=0,
            source=Source(bare, device, takes_task=False, tf32=bundle.engine.precision == "tf32"),
        )
    ]
    for opened, name in zip((bundle, *others), names, strict=True):
        tasks = plural(len(opened.tasks), "task")
        if opened.mode != FAN_OUT:
            subjects.append(
                open_subject(
                    name,
                    ", ".join([opened.mode, tasks, *_bank(opened)]),
                    lambda opened=opened: opened.open_session(device, cuda_graph=graph),
                    takes_task=opened.mode == "multi",
                    resident=resident,
                    engine=engine_words(opened.engine),
                    identity=opened.identity,
                    task_count=len(opened.tasks),
                    rank=_rank(opened),
                    source=Source(opened, device, takes_task=opened.mode == "multi"),
                )
            )
        if opened.engine_of_all is not None:
            subjects.append(
                open_subject(
                    f"{name}{EVERY_TASK}",
                    f"each row answered for {'all ' if len(opened.tasks) > 1 else ''}{tasks} at once",
                    lambda opened=opened: opened.open_fan_out(device, cuda_graph=graph),
                    takes_task=False,
                    resident=resident,
                    engine=engine_words(opened.engine_of_all),
                    identity=opened.identity,
                    task_count=len(opened.tasks),
                    rank=_rank(opened),
                    source=Source(opened, device, takes_task=False, fan_out=True),
                )
            )
    if beside is not None:
        from .alternatives import open_alternatives

        subjects += open_alternatives(beside, bundle, subjects[1].run, device)
    return subjects


def _rank(bundle: Bundle) -> int | None:
    """The largest rank of its bank."""
    ranks = [
        slot["sizes"].get("r", 0) for slot in bundle.plan.get("slots", ()) if slot["kind"] in RANKED
    ]
    return max(ranks, default=0) or None


def _bank(bundle: Bundle) -> list[str]:
    return [] if bundle.bank == "none" else [f"bank as {bundle.bank}"]


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
    from ..graphs import backbone_engine

    classes = max(len(task.labels) for task in bundle.tasks)
    arguments = {**bundle.backbone["arguments"], "num_classes": classes}
    backbone = create(bundle.backbone["architecture"], arguments)
    return backbone_engine(backbone, bundle.engine.precision)
