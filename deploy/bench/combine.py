"""Reports of single cases, measured in one or several sittings, as one report."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .cautions import find_cautions
from .machine import Load, Memory
from .state import States

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .report import Report


def combine(reports: Sequence[Report], sittings: Sequence[str]) -> Report:
    """One report of all cases, in their order.

    Args:
        reports: Of the same subjects with the same settings, one at least.
        sittings: When the sitting began in which each was measured.
    """
    first, last = reports[0], reports[-1]
    cases = tuple(case for report in reports for case in report.cases)
    load = Load(max(r.load.before for r in reports), max(r.load.after for r in reports))
    begun = sorted(set(sittings))
    measured = [report.ceilings for report in reports if report.ceilings is not None]
    ceilings = max(measured, key=lambda found: found.flops_per_second, default=None)
    warnings = find_cautions(cases, first.subjects, first.machine, load, ceilings)
    if len(begun) > 1:
        warnings += (
            f"The cases come from {len(begun)} sittings, begun {', '.join(begun)}: compare subjects inside a case; "
            "between cases lies another state of the machine too.",
        )
    return replace(
        first,
        cases=cases,
        load=load,
        memory=Memory(
            first.memory.before, last.memory.after, max(report.memory.peak for report in reports)
        ),
        date=min(report.date for report in reports),
        command=last.command,
        warnings=warnings,
        ceilings=ceilings,
        states=States(first.states.before, last.states.after)
        if first.states and last.states
        else None,
    )
