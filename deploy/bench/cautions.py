"""What to doubt about a measurement, said by the measurement itself."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from .wording import percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .ceilings import Ceilings
    from .machine import Load, Machine
    from .report import CaseResult, SubjectFacts

CV_LIMIT = 0.10
"""A quiet machine stays below 5 %; above 10 % something else was running or the clock changed."""

P99_SAMPLES = 200
"""Below it fewer than two samples lie beyond p99: the number is the slowest call or near it."""

DRIFT_LIMIT = 0.05
DRIFT_SAMPLES = 8
"""Samples that a third has at least; the median of fewer moves by chance."""

STEADY_GOVERNOR = "performance"


def find_cautions(
    cases: Sequence[CaseResult],
    subjects: Sequence[SubjectFacts],
    machine: Machine,
    load: Load,
    ceilings: Ceilings | None = None,
) -> tuple[str, ...]:
    """One sentence for each thing that weakens the numbers; none for a clean run."""
    return tuple(
        sentence
        for sentence in (
            _unsteady(cases),
            _drifting(cases),
            busy(machine, load),
            _few_samples(cases),
            _providers(subjects),
            governed(machine),
            _uncounted(cases, subjects),
            _above(cases, ceilings),
        )
        if sentence is not None
    )


def _unsteady(cases: Sequence[CaseResult]) -> str | None:
    rows = [
        (result.summary.cv, case.case.label, result.subject)
        for case in cases
        for result in case.results
    ]
    loose = sorted((row for row in rows if row[0] > CV_LIMIT), reverse=True)
    if not loose:
        return None
    cv, label, subject = loose[0]
    return (
        f"Samples vary by more than {percent(CV_LIMIT)} of their mean in {len(loose)} of {len(rows)} "
        f"rows; the widest is {subject} at {label} with {percent(cv)}."
    )


def _drifting(cases: Sequence[CaseResult]) -> str | None:
    """Medians of the first and of the last third: a run that has settled has the same."""
    rows = [
        (abs(drift - 1), drift, case.case.label, result.subject)
        for case in cases
        for result in case.results
        if (drift := _drift(result.samples_ms)) is not None and abs(drift - 1) > DRIFT_LIMIT
    ]
    if not rows:
        return None
    of = sum(len(case.results) for case in cases)
    _, drift, label, subject = max(rows)
    return (
        f"Unstable: the median moved by more than {percent(DRIFT_LIMIT)} from the first third of the rounds to the last "
        f"in {len(rows)} of {of} rows; the most is {subject} at {label}, {drift:.2f} times. The ratios of one round hold, "
        "milliseconds hold for this run only."
    )


def _drift(samples: Sequence[float]) -> float | None:
    third = len(samples) // 3
    if third < DRIFT_SAMPLES:
        return None
    return statistics.median(samples[-third:]) / statistics.median(samples[:third])


def busy(machine: Machine, load: Load, whose: str = "The") -> str | None:
    """That more wanted to run than there were cores; `whose` begins the sentence."""
    highest = max(load.before, load.after)
    if highest <= machine.usable_cores:
        return None
    return (
        f"{whose} load average was {load.before:.1f} before and {load.after:.1f} after on "
        f"{machine.usable_cores} usable cores: more wanted to run than could."
    )


def _few_samples(cases: Sequence[CaseResult]) -> str | None:
    short = [case for case in cases if case.results[0].summary.samples < P99_SAMPLES]
    if not short:
        return None
    fewest = min(case.results[0].summary.samples for case in short)
    return (
        f"p99 needs {P99_SAMPLES} samples to have two beyond it; {len(short)} of {len(cases)} "
        f"cases have fewer (the fewest: {fewest}). Read their p99 as about the slowest call."
    )


def _providers(subjects: Sequence[SubjectFacts]) -> str | None:
    providers = {subject.provider for subject in subjects}
    if len(providers) == 1:
        return None
    return (
        f"The subjects ran on different providers ({', '.join(sorted(providers))}): "
        "the ratios compare those too."
    )


def governed(machine: Machine, whose: str = "The", during: str = "a run") -> str | None:
    """That the clock is not held; `whose` begins the sentence."""
    if machine.governor in (None, STEADY_GOVERNOR):
        return None
    return (
        f"{whose} frequency governor is {machine.governor}, not {STEADY_GOVERNOR}: "
        f"the clock may change during {during}."
    )


def _uncounted(cases: Sequence[CaseResult], subjects: Sequence[SubjectFacts]) -> str | None:
    graphs = {subject.name for subject in subjects if subject.graph is not None}
    names = sorted(
        {result.subject for case in cases for result in case.results if result.work is None}
        & graphs
    )
    if not names:
        return None
    return f"The work of {', '.join(names)} is not counted: the graph holds operators that no rule of the counter knows."


def _above(cases: Sequence[CaseResult], ceilings: Ceilings | None) -> str | None:
    """A ceiling that was measured while the machine was busier is none."""
    if ceilings is None:
        return None
    reached = [
        (ceilings.reached(result.work, result.summary.p50_ms), result.subject, case.case.label)
        for case in cases
        for result in case.results
        if result.work is not None
    ]
    share, subject, label = max(reached, default=(0.0, "", ""))
    if share <= 1:
        return None
    return (
        f"{subject} at {label} did {percent(share)} of the product's ceiling: the ceiling was measured while the machine "
        "was slower. Read no fraction of it."
    )
