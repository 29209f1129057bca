"""The record of one benchmark, and its JSON. `schema.json` specifies the file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ...export.engine import IMAGES, Tensor, row_inputs
from ...merge.errors import UsageError
from ..records import plain, write_record

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ...export.bundle import Bundle, Engine
    from .case import Case
    from .ceilings import Ceilings
    from .footprint import Footprint
    from .machine import Load, Machine, Memory
    from .nodes import NodeTimes
    from .state import States
    from .summary import Ratio, Summary
    from .work import GraphFacts, Work

FORMAT = "utune-bench"
SWEEP_FORMAT = "utune-bench-sweep"
"""Several reports of one recipe in one file, by the name of their comparison."""
VERSION = 3

TIMED = (
    "One engine call end to end in process: host arrays in, host logits out. "
    "No pre-processing, no post-processing, no queue, no network."
)

TIMED_ON_DEVICE = (
    "One engine call whose inputs lie on the device and whose answer stays there, waited for; on a CUDA "
    "device the kernels are replayed as one CUDA graph. No copies, no pre-processing, no post-processing, no "
    "queue, no network."
)


@dataclass(frozen=True)
class TaskFacts:
    """A task that the benchmark asks for.

    Attributes:
        name: Its name.
        row: Its row in the bank, the value of the `task` input.
        classes: How many labels it has; without labels, how many values its answer has on its last axis.
    """

    name: str
    row: int
    classes: int


@dataclass(frozen=True)
class About:
    """What the benchmark is about.

    Attributes:
        name: Name of the bundle.
        tasks: Its tasks in row order, at least one.
        image_shape: `(3, H, W)` of a picture, `(3, T, H, W)` of a clip; None where something else is read.
        max_batch: Largest batch that the engines take; None if there is no limit.
        facts: Label and text of what else a reader wants to know, in order.
        inputs: What a call is given, where that is not pictures of `image_shape`.
    """

    name: str
    tasks: tuple[TaskFacts, ...]
    image_shape: tuple[int, ...] | None
    max_batch: int | None = None
    facts: tuple[tuple[str, str], ...] = ()
    inputs: tuple[Tensor, ...] = ()

    @property
    def reads(self) -> tuple[Tensor, ...]:
        """What a call is given."""
        return self.inputs or (Tensor(IMAGES, "float32", ("batch", *(self.image_shape or ()))),)


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        warmup_rounds: Rounds of a case that run first and are not counted, at least 1.
        min_rounds: Counted rounds at least, and never fewer than 2.
        min_seconds: Counted rounds go on until this much time has passed.
        settle_calls: Calls of a subject that are not timed before each one that is, so that caches
            and threads are those of an engine that is called back to back, as a server does. With
            0 every call follows another subject's.
        seed: Of pictures, task rows, orders and bootstrap.

    Raises:
        UsageError: A setting is out of range.
    """

    warmup_rounds: int = 5
    min_rounds: int = 50
    min_seconds: float = 3.0
    settle_calls: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("warmup_rounds", 1),
            ("min_rounds", 2),
            ("min_seconds", 0),
            ("settle_calls", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise UsageError(
                    "a benchmark setting is out of range",
                    where=name,
                    wanted=f"at least {least}",
                    found=getattr(self, name),
                )


@dataclass(frozen=True)
class SubjectFacts:
    """A subject without its engine; see `Subject` for the fields."""

    name: str
    note: str
    provider: str
    opened_bytes: int | None = None
    engine: str | None = None
    identity: str | None = None
    task_count: int | None = None
    rank: int | None = None
    graph: GraphFacts | None = None
    footprint: Footprint | None = None
    nodes: NodeTimes | None = None


@dataclass(frozen=True)
class Result:
    """One subject in one case.

    Attributes:
        subject: Its name.
        samples_ms: Raw latency of every counted round in order, in ms.
        summary: Their statistics.
        ratio: Cost beside the baseline of the same rounds; None for the baseline itself.
        work: What a call has to do; None where that cannot be counted.
    """

    subject: str
    samples_ms: tuple[float, ...]
    summary: Summary
    ratio: Ratio | None
    work: Work | None = None


@dataclass(frozen=True)
class CaseResult:
    """All subjects in one case.

    Attributes:
        case: Batch size and mix.
        task_rows: The `task` input that was used, `B` rows of the bank.
        results: One per subject, in the order of the subjects.
    """

    case: Case
    task_rows: tuple[int, ...]
    results: tuple[Result, ...]

    def bound(self, result: Result) -> float | None:
        """Arithmetic bound of a ratio: the result's multiply-accumulates over the baseline's; None if not counted."""
        base = self.results[0].work
        if base is None or result.work is None or not base.macs:
            return None
        return result.work.macs / base.macs


@dataclass(frozen=True)
class Report:
    """Everything that was measured, and what it was measured on.

    Attributes:
        about: The bundle.
        timed: What one sample is, in words.
        subjects: What was timed; the first is the baseline.
        cases: The numbers.
        settings: How long was measured.
        threads: Threads that the engines were given; None is the runtime's own choice.
        machine: Where it ran.
        load: Load average before and after.
        memory: Resident memory of the process.
        date: When it began, ISO 8601 with its offset.
        command: The command line.
        warnings: What a reader should doubt, one sentence each.
        ceilings: What the machine does at best; None if that was not measured.
        states: Clocks and heat before and after; None in older reports.
    """

    about: About
    timed: str
    subjects: tuple[SubjectFacts, ...]
    cases: tuple[CaseResult, ...]
    settings: Settings
    threads: int | None
    machine: Machine
    load: Load
    memory: Memory
    date: str
    command: str
    warnings: tuple[str, ...] = field(default=())
    ceilings: Ceilings | None = None
    states: States | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON value that `schema.json` specifies."""
        return {"format": FORMAT, "version": VERSION, **plain(asdict(self))}


def about_bundle(bundle: Bundle) -> About:
    """What a report says of a bundle."""
    engine = bundle.engine
    inputs = row_inputs(engine.inputs)
    pictures = [tensor.name for tensor in inputs] == [IMAGES]
    shape = tuple(int(size) for size in inputs[0].shape[1:]) if pictures else None
    facts = (
        ("backbone", str(bundle.backbone.get("architecture", "unknown"))),
        ("mode", bundle.mode),
        ("bank", bundle.bank),
        ("engine", engine_words(engine)),
        *(_read(inputs) if shape is None else [_picture(shape)]),
        ("identity", bundle.identity),
    )
    return About(
        name=bundle.name,
        tasks=tuple(
            TaskFacts(task.name, task.row, len(task.labels) or task.width or 0)
            for task in bundle.tasks
        ),
        image_shape=shape,
        max_batch=engine.max_batch,
        facts=facts,
        inputs=() if pictures else inputs,
    )


def engine_words(engine: Engine) -> str:
    """Target, precision and opset of an engine, as reports have them."""
    return f"{engine.target}, {engine.precision}, opset {engine.opset}"


def _picture(shape: tuple[int, ...]) -> tuple[str, str]:
    return "picture" if len(shape) == 3 else "clip", _sizes(shape)


def _read(inputs: Sequence[Tensor]) -> list[tuple[str, str]]:
    return [(tensor.name, f"{_sizes(tensor.shape[1:])} {tensor.dtype}") for tensor in inputs]


def _sizes(shape: Sequence[object]) -> str:
    return " x ".join(map(str, shape))


def write_json(report: Report, path: Path) -> None:
    """Write the report as JSON, whole or not at all."""
    write_record(report.to_json(), path)
