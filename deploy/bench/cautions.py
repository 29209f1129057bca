"""What to doubt about a measurement, said by the measurement itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .wording import percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .machine import Load, Machine
    from .report import CaseResult, SubjectFacts

CV_LIMIT = 0.10
"""A quiet machine stays below 5 %; above 10 % something else was running or the clock changed."""

P99_SAMPLES = 200
"""Below it fewer than two samples lie beyond p99: the number is the slowest call or near it."""

STEADY_GOVERNOR = "performance"


def find_cautions(
    cases: Sequence[CaseResult], subjects: Sequence[SubjectFacts], machine: Machine, load: Load
) -> tuple[str, ...]:
    """One sentence for each thing that weakens the numbers; none for a clean run."""
    return tuple(
        sentence
        for sentence in (
            _unsteady(cases),
            _busy(machine, load),
            _few_samples(cases),
            _providers(subjects),
            _governor(machine),
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


def _busy(machine: Machine, load: Load) -> str | None:
    highest = max(load.before, load.after)
    if highest <= machine.usable_cores:
        return None
    return (
        f"The load average was {load.before:.1f} before and {load.after:.1f} after on "
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


def _governor(machine: Machine) -> str | None:
    if machine.governor in (None, STEADY_GOVERNOR):
        return None
    return (
        f"The frequency governor is {machine.governor}, not {STEADY_GOVERNOR}: "
        "the clock may change during a run."
    )
