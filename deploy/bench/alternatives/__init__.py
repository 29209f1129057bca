"""What else could answer the same tasks: subjects that are timed beside a bundle, made from its deltas.

Each is the most that its kind can do with the same weights in the same precision, and before anything is timed
it must answer as the bundle does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ....export.bundle import FAN_OUT
from ....merge.errors import UsageError
from ..subject import Subject
from .agreement import require_same_answers
from .in_turn import in_turn
from .originals import read_originals
from .peft import peft_mixed, peft_mixed_compiled
from .torch_mixed import torch_compiled, torch_eager
from .unfused import unfused

if TYPE_CHECKING:
    from collections.abc import Callable

    from ....export.bundle import Bundle
    from ....export.engine import Device
    from ..beside import Beside
    from ..subject import Run
    from .opened import Opened
    from .originals import Originals


class Alternative(NamedTuple):
    """One way to answer the tasks of a bundle without the bundle; `beside.KINDS` is the list.

    Attributes:
        name: Of its subject.
        says: A sentence for the report.
        opens: `(originals, precision, device)` to what is timed.
    """

    name: str
    says: str
    opens: Callable[[Originals, str, Device], Opened]


ALTERNATIVES = {
    "unfused": Alternative(
        "unfused",
        "the same graph as torch exports it, rewritten by ONNX Runtime alone",
        unfused,
    ),
    "in-turn": Alternative(
        "an engine per task, in turn",
        "each task's own engine, folded where that is exact, called with the rows of its task",
        in_turn,
    ),
    "torch": Alternative(
        "torch, eager", "the same mixed batch in torch, weights gathered by row", torch_eager
    ),
    "torch-compiled": Alternative(
        "torch, compiled",
        "the same mixed batch through torch.compile, once per batch size",
        torch_compiled,
    ),
    "peft": Alternative(
        "PEFT, mixed batch", "PEFT's adapter_names, eager", peft_mixed
    ),
    "peft-compiled": Alternative(
        "PEFT, mixed batch, compiled",
        "PEFT's adapter_names through torch.compile, once per batch size",
        peft_mixed_compiled,
    ),
}  # fmt: skip


def open_alternatives(
    beside: Beside, bundle: Bundle, bundle_runs: Run, device: Device
) -> list[Subject]:
    """Open each as a subject, and hold its answers to the bundle's.

    Args:
        beside: What is wanted, and the files that it is made from.
        bundle: Whose tasks are answered.
        bundle_runs: The bundle's own engine, which says what the right answers are.
        device: Where everything runs.

    Raises:
        UsageError: A kind cannot answer these tasks.
        MissingDependency: A package that a kind needs is not installed.
        IncompatibleArtefact: The files are not those that the bundle was exported from.
        CheckFailed: A subject answers otherwise than the bundle.
    """
    if bundle.mode == FAN_OUT:
        raise UsageError(
            "nothing else answers every task for every row",
            where=bundle.path,
            do="time a bundle whose rows each ask for a task",
        )
    originals = read_originals(bundle, beside.weights, beside.deltas)
    subjects = []
    for kind in beside.kinds:
        name, says, opens = ALTERNATIVES[kind]
        run, provider, source = opens(originals, bundle.engine.precision, device)
        require_same_answers(name, run, bundle, bundle_runs)
        count = len(bundle.tasks)
        subjects.append(Subject(name, says, run, provider, task_count=count, source=source))
    return subjects
