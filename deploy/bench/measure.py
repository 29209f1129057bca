"""Time subjects side by side: every round runs each of them once, in an order drawn anew.

Interleaving lets every subject see the same machine: heat, clock and neighbours change over seconds,
a round takes less. A randomised complete block design (R. A. Fisher, The Design of Experiments,
1935). A rotating order (A B C, B C A, C A B) would not do: how long ago a subject ran, and so how
much of it is still in the cache, depends on its place in the round, and the median of the paired
ratios of three equal engines then came out as 1.05 and 0.95.
"""

from __future__ import annotations

import gc
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np

from ...merge.errors import CheckFailed, UsageError
from .cautions import find_cautions
from .machine import Load, Memory, command_line, load_now, read_machine, resident_now, resident_peak
from .report import TIMED, CaseResult, Report, Result, Settings, SubjectFacts
from .state import States, read_state
from .summary import paired_ratio, summarise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from .case import Case
    from .ceilings import Ceilings
    from .report import About
    from .subject import Subject

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000

BALANCED = 4
"""Most subjects whose permutations (24) all fit into a benchmark."""

ON_DEVICE = frozenset({"CUDAExecutionProvider", "TensorRT"})
"""Providers whose device has a clock and a temperature of its own."""

PROGRESS_EVERY_S = 0.25
"""Progress is told between rounds and no more often, so that telling does not disturb."""


@dataclass(frozen=True)
class Progress:
    """Where a benchmark is.

    Attributes:
        case: The case that is being timed.
        number: Its number, from 1.
        cases: How many there are.
        rounds: Counted rounds done; 0 while it warms up.
        fraction: Share of the counted rounds and of the minimum time that is done, 0 to 1.
    """

    case: Case
    number: int
    cases: int
    rounds: int
    fraction: float

    def __str__(self) -> str:
        """One line for a person who waits."""
        now = f"round {self.rounds}" if self.rounds else "warming up"
        return (
            f"{self.number} of {self.cases}, {self.case.label}: {now}, {100 * self.fraction:.0f} %"
        )


def measure(
    subjects: Sequence[Subject],
    cases: Sequence[Case],
    *,
    about: About,
    settings: Settings | None = None,
    threads: int | None = None,
    timed: str = TIMED,
    command: str | None = None,
    ceilings: Ceilings | None = None,
    progress: Callable[[Progress], None] | None = None,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Report:
    """Time every subject in every case.

    Args:
        subjects: What to time; the first is the baseline of the ratios.
        cases: Batch sizes and mixes, in the order of the report.
        about: The bundle whose tasks and inputs are used.
        settings: How long to measure.
        threads: Threads that the engines were opened with, for the report.
        timed: What one call does, for the report.
        command: The command line, for the report; that of this process unless given.
        ceilings: What the machine does at best, for the report.
        progress: Told between rounds, every `PROGRESS_EVERY_S` at most.
        clock: Nanoseconds that only go up.

    Raises:
        UsageError: There is nothing to time, a name is used twice, a case is named twice, or a
            batch is larger than the engines take.
        CheckFailed: A subject returns another number of rows than it was given, or logits that
            are not finite.
    """
    require_measurable(subjects, cases, about)
    settings = settings or Settings()
    began = datetime.now().astimezone()
    load_before, memory_before = load_now(), resident_now()
    on_device = any(subject.provider in ON_DEVICE for subject in subjects)
    state_before = read_state(devices=on_device)
    tell = _Teller(progress, len(cases), clock)
    results = tuple(
        _time_case(subjects, case, number, about, settings, tell, clock)
        for number, case in enumerate(cases, 1)
    )
    states = States(state_before, read_state(devices=on_device))
    load, memory_after = Load(load_before, load_now()), resident_now()
    machine = read_machine()
    facts = tuple(
        SubjectFacts(**{part.name: getattr(subject, part.name) for part in fields(SubjectFacts)})
        for subject in subjects
    )
    return Report(
        about=about,
        timed=timed,
        subjects=facts,
        cases=results,
        settings=settings,
        threads=threads,
        machine=machine,
        load=load,
        memory=Memory(memory_before, memory_after, resident_peak()),
        date=began.isoformat(timespec="seconds"),
        command=command_line() if command is None else command,
        warnings=find_cautions(results, facts, machine, load, ceilings),
        ceilings=ceilings,
        states=states,
    )


def orders(count: int, seed: int) -> Iterator[tuple[int, ...]]:
    """Endless orders of `count` subjects, drawn with a seed.

    Up to `BALANCED` subjects, every permutation comes once before any comes again, so that each
    subject is in each place, and before each other one, equally often.
    """
    generator = np.random.default_rng(seed)
    every = list(permutations(range(count))) if count <= BALANCED else []
    while True:
        if every:
            yield from (every[index] for index in generator.permutation(len(every)))
        else:
            yield tuple(generator.permutation(count).tolist())


def require_measurable(subjects: Sequence[Subject], cases: Sequence[Case], about: About) -> None:
    """Find before anything is run what cannot be timed; see `measure`."""
    if not subjects or not cases or not about.tasks:
        raise UsageError("a benchmark needs a subject, a case and a task")
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names):
        raise UsageError("two subjects have the same name", found=", ".join(names))
    if len(set(cases)) < len(cases):
        raise UsageError("a case is named twice", found="; ".join(case.label for case in cases))
    largest = max(case.batch for case in cases)
    if about.max_batch is not None and largest > about.max_batch:
        raise UsageError(
            "a batch is larger than the engine takes",
            where=about.name,
            wanted=f"at most {about.max_batch}",
            found=largest,
            do="ask for a smaller batch, or export with a larger one",
        )


def _time_case(
    subjects: Sequence[Subject],
    case: Case,
    number: int,
    about: About,
    settings: Settings,
    tell: _Teller,
    clock: Callable[[], int],
) -> CaseResult:
    given = case.rows(about.reads, settings.seed)
    rows = case.task_rows([task.row for task in about.tasks], settings.seed)
    tell(case, number, 0, 0.0)
    order = orders(len(subjects), settings.seed)
    for _ in range(settings.warmup_rounds):
        for index in range(len(subjects)):
            _check(subjects[index], case, subjects[index].run(given, rows))
    samples: list[list[float]] = [[] for _ in subjects]
    with without_collector():
        began, rounds, fraction = clock(), 0, 0.0
        while fraction < 1:
            for index in next(order):
                run = subjects[index].run
                for _ in range(settings.settle_calls):
                    run(given, rows)
                start = clock()
                run(given, rows)
                # A call that a coarse clock cannot see took one tick, not none: ratios divide.
                samples[index].append(max(clock() - start, 1) / NS_PER_MS)
            rounds += 1
            fraction = _fraction(settings, rounds, (clock() - began) / NS_PER_S)
            tell(case, number, rounds, fraction)
    return CaseResult(
        case=case,
        task_rows=tuple(rows.tolist()),
        results=tuple(
            Result(
                subject=subject.name,
                samples_ms=tuple(samples[index]),
                summary=summarise(samples[index], case.batch),
                ratio=paired_ratio(samples[index], samples[0], settings.seed) if index else None,
                work=subject.work(case.batch, rows.tolist()) if subject.work else None,
            )
            for index, subject in enumerate(subjects)
        ),
    )


def _fraction(settings: Settings, rounds: int, seconds: float) -> float:
    timed = seconds / settings.min_seconds if settings.min_seconds else 1.0
    return min(rounds / settings.min_rounds, timed, 1.0)


def _check(subject: Subject, case: Case, logits: NDArray[np.float32]) -> None:
    if logits.shape[:1] != (case.batch,):
        raise CheckFailed(
            "a subject does not answer every row",
            where=f"{subject.name}, {case.label}",
            wanted=f"[{case.batch}, ...]",
            found=list(logits.shape),
        )
    if not np.isfinite(logits).all():
        raise CheckFailed(
            "a subject's logits are not finite",
            where=f"{subject.name}, {case.label}",
            do="check that the tasks' rows are those of its bank",
        )


@contextmanager
def without_collector() -> Iterator[None]:
    """Python's cycle collector runs before, not during."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Teller:
    """Passes progress on, but not too often."""

    def __init__(
        self,
        progress: Callable[[Progress], None] | None,
        cases: int,
        clock: Callable[[], int],
    ) -> None:
        self.progress, self.cases, self.clock = progress, cases, clock
        self.last: int | None = None

    def __call__(self, case: Case, number: int, rounds: int, fraction: float) -> None:
        if self.progress is None:
            return
        now = self.clock()
        due = self.last is None or now - self.last >= PROGRESS_EVERY_S * NS_PER_S
        if due or rounds == 0 or fraction >= 1:
            self.last = now
            self.progress(Progress(case, number, self.cases, rounds, fraction))
