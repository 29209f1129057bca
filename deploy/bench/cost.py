"""What a load costs, one mixed engine for all tasks against one model per task, from a report's latencies.

The formulas are `FORMULAS`, printed with every answer; there is nothing else in it. What they leave out: requests that
come in bursts (choose the utilisation for that), the latency that filling a batch adds, how well models really pack
on machines, other work than the engine's call. The report's machine is the one that is priced.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...merge.errors import UsageError
from .case import MIXES, Case
from .subject import BARE
from .taken import is_measured, per_task, taken

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .report import Report, SubjectFacts

FORMAT = "utune-cost"
VERSION = 1
HOUR = 3600
MILLION = 1_000_000
CPU = "CPUExecutionProvider"

FORMULAS = (
    ("share s_k", "part of the requests that task k of N has, as the mix says; the shares sum to 1"),
    ("throughput R(b)", "b / mean latency of a batch of b, images/s of one machine"),
    ("batch b_k of task k alone", "the largest batch in the report that is at most max(1, B s_k): the rows of its own "
     "that a task gets while a mixed batch of B fills; the smallest in the report if none is"),
    ("busy machines, mixed", "rate / R(B)"),
    ("busy machines, model per task", "sum over k of rate s_k / R(b_k)"),
    ("machines, mixed", "ceil(busy / utilisation); each holds the engine of all tasks"),
    ("machines, models that share", "max(ceil(busy / utilisation), ceil(N M_one / memory of a machine)); as if models "
     "packed without loss, so never more than it takes"),
    ("machines, a machine per task", "sum over k of max(1, ceil(rate s_k / R(b_k) / utilisation))"),
    ("memory M_mixed", "as measured where the engine holds N tasks or more; otherwise M + (N - n) m, with m the "
     "difference of two measured engines per task"),
    ("memory in all", "mixed: machines M_mixed; model per task: N M_one, or one M_one on each machine if those are more"),
    ("idle", "1 - busy / machines"),
    ("cost per million", "price 10^6 machines / (3600 rate): what is paid for at this rate"),
    ("limit of a large rate", "price 10^6 busy / (3600 rate utilisation): no machine is partly used"),
)  # fmt: skip
"""Symbol and formula of everything that is computed."""


@dataclass(frozen=True)
class Load:
    """What is asked for.

    Attributes:
        tasks: How many tasks are served, N.
        rate: Images per second over all tasks.
        price: Of a machine like the report's, per hour, in any currency.
        utilisation: Most of a machine's time that may be planned with, a fraction; the rest is for bursts.
        mix: How the requests spread over the tasks, a key of `MIXES`.
        batch: The mixed batch, B.
        machine_bytes: Memory of a machine that engines may fill.
    """

    tasks: int
    rate: float
    price: float
    utilisation: float
    mix: str
    batch: int
    machine_bytes: float


@dataclass(frozen=True)
class Way:
    """One way to serve the load.

    Attributes:
        name: What it is.
        batch: Smallest and largest batch that its engines are given.
        busy: Machines that would be busy all the time.
        machines: Machines that are needed.
        bound: What decides their number: `rate`, `memory` or `tasks`.
        memory_bytes: Of all engines together.
        idle: Part of what is paid for that does nothing.
        per_million: Cost of a million images at this rate.
        limit_per_million: The same at a rate so large that no machine is partly used.
    """

    name: str
    batch: tuple[int, int]
    busy: float
    machines: int
    bound: str
    memory_bytes: float
    idle: float
    per_million: float
    limit_per_million: float


@dataclass(frozen=True)
class Cost:
    """The answer.

    Attributes:
        load: What was asked for.
        mixed: The subject that is the mixed engine.
        single: The subject that stands for one task's model.
        mixed_bytes: Memory of the mixed engine of N tasks.
        single_bytes: Memory of one task's model.
        ways: The mixed engine, models that share machines, a machine per task.
        notes: What was assumed, one sentence each.
    """

    load: Load
    mixed: str
    single: str
    mixed_bytes: float
    single_bytes: float
    ways: tuple[Way, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON value, with the formulas."""
        return {"format": FORMAT, "version": VERSION, **asdict(self), "formulas": dict(FORMULAS)}


def price(
    report: Report,
    *,
    tasks: int,
    rate: float,
    per_hour: float,
    utilisation: float,
    mix: str | None = None,
    batch: int | None = None,
    mixed: str | None = None,
    single: str | None = None,
    mixed_bytes: float | None = None,
    single_bytes: float | None = None,
    machine_bytes: float | None = None,
) -> Cost:
    """Price a load.

    Args:
        report: Latencies and memory.
        tasks: See `Load`.
        rate: See `Load`.
        per_hour: See `Load`.
        utilisation: See `Load`.
        mix: A mix of the report; its only one unless given.
        batch: A batch size of the report; its largest of that mix unless given.
        mixed: Subject that is the mixed engine; the smallest that holds enough tasks unless given.
        single: Subject that stands for one task's model; one of a single task unless given, else the backbone.
        mixed_bytes: Memory of the mixed engine, if the report's is not to be used.
        single_bytes: Memory of one task's model, likewise.
        machine_bytes: Memory of a machine; the report's main memory unless given.

    Raises:
        UsageError: The report lacks what was asked for, or the mixed engine does not fit a machine.
    """
    case = _case(report, mix, batch)
    on_host = all(subject.provider == CPU for subject in report.subjects)
    if not on_host and None in (mixed_bytes, single_bytes, machine_bytes):
        raise UsageError(
            "the report knows the host's memory only, and its engines ran elsewhere",
            where=report.about.name,
            wanted="--mixed-memory, --single-memory and --machine-memory of the device",
            found=", ".join(sorted({subject.provider for subject in report.subjects})),
        )
    engine = _subject(report, mixed) if mixed else _mixed(report, tasks)
    model = _subject(report, single) if single else _single(report)
    notes = []
    held = _task_count(report, engine)
    if mixed_bytes is None:
        mixed_bytes = _memory(report, engine, held, tasks)
    if held is not None and held < tasks:
        notes.append(
            f"{engine.name} holds {held} tasks; that one of {tasks} is as fast is assumed."
        )
    if single_bytes is None:
        if not is_measured(model):
            raise _unmeasured(model, "--single-memory")
        single_bytes = taken(model)
        assert single_bytes is not None  # so `_measured` has it
        if model is report.subjects[0] and model.footprint is None:
            notes.append(f"{model.name} was opened first: its memory includes loading the runtime.")
    if model.name == BARE:
        notes.append(
            f"A task's own model is taken to be as fast as {BARE}: true of tasks that fold."
        )
    if mixed_bytes < single_bytes and (model.footprint or model is not report.subjects[0]):
        raise UsageError(
            "the mixed engine cannot be smaller than one task's model: both hold the backbone",
            where=report.about.name,
            wanted=f"{engine.name} above {single_bytes:.0f} bytes, the memory of {model.name}",
            found=f"{mixed_bytes:.0f}",
            do="say both with --mixed-memory and --single-memory; in reports before version 3 an engine that was opened where "
            "memory had just been freed grew the process by less than it takes (its model.onnx is the least)",
        )
    machine_bytes = machine_bytes or report.machine.memory_bytes
    for name, size in ((engine.name, mixed_bytes), (model.name, single_bytes)):
        if size > machine_bytes:
            raise UsageError(
                "an engine does not fit a machine",
                where=name,
                wanted=f"at most {machine_bytes:.0f} bytes",
                found=f"{size:.0f}",
                do="say how much a machine holds with --machine-memory, or split the tasks over more engines",
            )
    load = Load(tasks, rate, per_hour, utilisation, case.mix, case.batch, machine_bytes)
    busy = rate / _throughput(report, engine.name, case)
    shares = MIXES[case.mix].shares(tasks)
    speeds = _throughputs(report, model.name, case.mix)
    smallest = min(speeds)
    if smallest > 1:
        notes.append(
            f"The report has no batch below {smallest}: a task alone is taken to fill that."
        )
    batches = [
        max([b for b in speeds if b <= max(1, case.batch * s)], default=smallest) for s in shares
    ]
    loads = np.array([rate * s / speeds[b] for s, b in zip(shares, batches, strict=True)])
    spread = (min(batches), max(batches))
    by_rate, alone = _ceil(busy / utilisation), float(loads.sum())
    by_load, by_memory = _ceil(alone / utilisation), _ceil(tasks * single_bytes / machine_bytes)
    shared = max(by_load, by_memory)
    apart = sum(_ceil(x / utilisation) for x in loads)
    every = tasks * single_bytes
    return Cost(
        load=load,
        mixed=engine.name,
        single=model.name,
        mixed_bytes=mixed_bytes,
        single_bytes=single_bytes,
        ways=(
            _way("one mixed engine", (case.batch, case.batch), busy, by_rate, "rate", by_rate * mixed_bytes, load),
            _way(
                "a model per task, sharing machines", spread, alone, shared,
                "memory" if by_memory > by_load else "rate", max(every, shared * single_bytes), load,
            ),
            _way(
                "a machine per task", spread, alone, apart, "tasks" if apart == tasks else "rate",
                max(every, apart * single_bytes), load,
            ),
        ),
        notes=tuple(notes),
    )  # fmt: skip


def _way(
    name: str,
    batch: tuple[int, int],
    busy: float,
    machines: int,
    bound: str,
    memory: float,
    load: Load,
) -> Way:
    unit = load.price * MILLION / (HOUR * load.rate)
    return Way(
        name=name,
        batch=batch,
        busy=busy,
        machines=machines,
        bound=bound,
        memory_bytes=memory,
        idle=1 - busy / machines,
        per_million=unit * machines,
        limit_per_million=unit * busy / load.utilisation,
    )


def _ceil(machines: float) -> int:
    """Whole machines, one at least; what rounding added to a whole number is no machine."""
    return max(1, math.ceil(machines - 1e-9))


def _case(report: Report, mix: str | None, batch: int | None) -> Case:
    mixes = sorted({case.case.mix for case in report.cases})
    if mix is None and len(mixes) > 1:
        raise UsageError("the report has several mixes", wanted=f"--mix, one of {', '.join(mixes)}")
    cases = [case.case for case in report.cases if case.case.mix == (mix or mixes[0])]
    cases = [case for case in cases if batch in (None, case.batch)]
    if not cases:
        raise UsageError(
            "the report has no such case",
            where=report.about.name,
            wanted=f"one of {'; '.join(case.case.label for case in report.cases)}",
            found=f"batch {batch or 'any'}, {mix or 'any'}",
            do="name one that is there, or bench it with --batch and --mix",
        )
    return max(cases, key=lambda case: case.batch)


def _subject(report: Report, name: str) -> SubjectFacts:
    for subject in report.subjects:
        if subject.name == name:
            return subject
    raise UsageError(
        "the report has no such subject",
        where=report.about.name,
        wanted=f"one of {', '.join(subject.name for subject in report.subjects)}",
        found=name,
    )


def _task_count(report: Report, subject: SubjectFacts) -> int | None:
    """Tasks of a subject; a report of version 1 says it of its own bundle only."""
    own = len(report.about.tasks) if subject.name == report.about.name else None
    return own if subject.task_count is None else subject.task_count


def _multi(report: Report) -> list[tuple[int, SubjectFacts]]:
    counted = [(_task_count(report, subject) or 0, subject) for subject in report.subjects]
    return sorted((pair for pair in counted if pair[0] > 1), key=lambda pair: pair[0])


def _mixed(report: Report, tasks: int) -> SubjectFacts:
    engines = _multi(report)
    if not engines:
        raise UsageError(
            "the report has no engine of several tasks",
            where=report.about.name,
            do="name the subject with --mixed",
        )
    return next((subject for count, subject in engines if count >= tasks), engines[-1][1])


def _single(report: Report) -> SubjectFacts:
    for subject in report.subjects:
        if _task_count(report, subject) == 1:
            return subject
    if not any(subject.name == BARE for subject in report.subjects):
        raise UsageError(
            "the report has no model of a single task",
            where=report.about.name,
            do="name the subject with --single",
        )
    return _subject(report, BARE)


def _memory(report: Report, engine: SubjectFacts, held: int | None, tasks: int) -> float:
    """Memory of a mixed engine of `tasks` tasks, measured or by the line through two that were."""
    size = taken(engine)
    if not is_measured(engine) or size is None or held is None:
        raise _unmeasured(engine, "--mixed-memory")
    if held >= tasks:
        return size
    each = per_task([(n, taken(subject)) for n, subject in _multi(report)])
    if each is None:
        raise UsageError(
            "the report has no engine of that many tasks, and no second one to tell what a task adds",
            where=engine.name,
            wanted=f"{tasks} tasks",
            found=held,
            do="say its memory with --mixed-memory, or bench engines of two sizes",
        )
    return size + (tasks - held) * max(0.0, each)


def _unmeasured(subject: SubjectFacts, option: str) -> UsageError:
    return UsageError(
        "the report does not know the memory of a subject, or how many tasks it holds",
        where=subject.name,
        wanted=option,
    )


def _mean_ms(report: Report, subject: str, case: Case) -> float:
    of = next(found for found in report.cases if found.case == case)
    return next(result.summary.mean_ms for result in of.results if result.subject == subject)


def _throughput(report: Report, subject: str, case: Case) -> float:
    return case.batch * 1000 / _mean_ms(report, subject, case)


def _throughputs(report: Report, subject: str, mix: str) -> dict[int, float]:
    """Images per second by batch size; a model of one task is as fast in any mix."""
    cases: Sequence[Case] = [case.case for case in report.cases]
    found = {}
    for batch in sorted({case.batch for case in cases}):
        at = [case for case in cases if case.batch == batch]
        case = next((case for case in at if case.mix == mix), at[0])
        found[batch] = _throughput(report, subject, case)
    return found
