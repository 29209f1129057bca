"""Two reports side by side: what became slower, what faster, what cannot be told apart.

A case is a subject at a batch size and a mix. Its verdict rests on the ratio of ratios where both reports timed the
baseline beside it: (B / baseline of B) over (A / baseline of A). Where one did not, on the ratio of medians. What
the verdicts mean, `comparison.verdict` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...merge.errors import IncompatibleArtefact
from ..comparison.compared import Compared
from ..comparison.verdict import THRESHOLD, beyond, judge
from .alike import remarks, require_alike
from .contrast import contrast
from .subject import BARE

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from ..comparison.verdict import Contrast
    from .case import Case
    from .report import CaseResult, Report, Result


@dataclass(frozen=True)
class Row:
    """One case in both reports.

    Attributes:
        comparison: Its comparison in a sweep, else "".
        subject: Its name, as the second report has it.
        case: Batch size and mix.
        p50_ms: Medians of the first and of the second, in ms.
        rounds: Counted rounds of the first and of the second.
        medians: Ratio of the medians.
        ratios: Ratio of the ratios to the baseline; None for the baseline and where there is none.
        verdict: `slower`, `faster`, `equal` or `undecided`; `baseline` for what the others stand beside.
        too_slow: The whole interval lies beyond the threshold.
    """

    comparison: str
    subject: str
    case: Case
    p50_ms: tuple[float, float]
    rounds: tuple[int, int]
    medians: Contrast
    ratios: Contrast | None
    verdict: str
    too_slow: bool

    @property
    def judged(self) -> Contrast:
        """What the verdict rests on."""
        return self.ratios or self.medians

    @property
    def label(self) -> str:
        """Its name in a message."""
        comparison = f"{self.comparison}: " if self.comparison else ""
        return f"{comparison}{self.subject}, {self.case.label}"


@dataclass(frozen=True)
class Comparison(Compared):
    """Every case that both reports have.

    Attributes:
        baseline: The subject that ratios of ratios stand beside.
        rows: The cases.
    """

    format: ClassVar[str] = "utune-compare"
    version: ClassVar[int] = 1

    baseline: str
    rows: tuple[Row, ...]

    @property
    def too_slow(self) -> tuple[Row, ...]:
        """What fails."""
        return tuple(row for row in self.rows if row.too_slow)

    @property
    def failures(self) -> tuple[str, ...]:
        """Every case that fails, with its ratio."""
        return tuple(f"{row.label}: {row.judged}" for row in self.too_slow)

    def to_json(self) -> dict[str, Any]:
        """The JSON value; the rows with what their verdict rests on."""
        value = super().to_json()
        for row, given in zip(value["rows"], self.rows, strict=True):
            row["judged"] = "ratios" if given.ratios else "medians"
        return value


def compare(
    a: Mapping[str, Report],
    b: Mapping[str, Report],
    *,
    names: tuple[str, str] = ("A", "B"),
    threshold: float = THRESHOLD,
    confidence: float = 0.95,
    baseline: str = BARE,
    renamed: Mapping[str, str] | None = None,
    despite: Collection[str] = (),
    seed: int = 0,
) -> Comparison:
    """Hold the second file's cases to the first's.

    Args:
        a: Reports of the first file by comparison.
        b: Reports of the second.
        names: What to call the files.
        threshold: A change that matters, a fraction above 0.
        confidence: Coverage of every interval, a fraction.
        baseline: The subject that the others are put beside, where both reports have it.
        renamed: Names of subjects in the first by their names in the second, where they differ.
        despite: Kinds of difference, keys of `alike.KINDS`, that do not stop it.
        seed: Of the bootstrap.

    Raises:
        IncompatibleArtefact: The conditions differ, or there is no case that both have.
    """
    rows: list[Row] = []
    warnings: list[str] = []
    where = " and ".join(names)
    for comparison in [name for name in a if name in b]:
        first, second = a[comparison], b[comparison]
        said = (*require_alike(first, second, where, despite), *remarks(first, second))
        found = _rows(
            comparison, first, second, renamed or {}, baseline, threshold, confidence, seed
        )
        warnings += [f"{comparison}: {text}" if comparison else text for text in said]
        rows += found
    judged = [row for row in rows if row.verdict != "baseline"]
    only = [_missing(side, rows, of) for side, of in ((a, renamed or {}), (b, {}))]
    if not judged:
        raise IncompatibleArtefact(
            "the two reports have no case in common",
            where=where,
            wanted="a subject with the same name, batch and mix",
            found=f"only in A: {'; '.join(only[0]) or 'none'}. Only in B: {'; '.join(only[1]) or 'none'}",
            do="rename subjects with --pair B_NAME=A_NAME, or measure the same cases",
        )
    if any(row.ratios is None for row in judged):
        warnings.append(
            f"Not both reports timed {baseline} beside every subject: where they did not, the verdict rests on "
            "latencies of two runs, and a machine that was busier in one of them looks like a change."
        )
    dates = tuple("; ".join(report.date for report in side.values()) for side in (a, b))
    return Comparison(
        *names,
        dates=(dates[0], dates[1]),
        threshold=threshold,
        confidence=confidence,
        baseline=baseline,
        rows=tuple(rows),
        only_a=only[0],
        only_b=only[1],
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _rows(
    comparison: str,
    a: Report,
    b: Report,
    renamed: Mapping[str, str],
    baseline: str,
    threshold: float,
    confidence: float,
    seed: int,
) -> list[Row]:
    earlier = {case.case: case for case in a.cases}
    rows: list[Row] = []
    for case in b.cases:
        if case.case not in earlier:
            continue
        before, after = _results(earlier[case.case]), _results(case)
        both = baseline in before and baseline in after
        for name, result in after.items():
            old = before.get(renamed.get(name, name))
            if old is None:
                continue
            medians = contrast(old.samples_ms, result.samples_ms, seed, confidence)
            ratios = None
            if both and name != baseline:
                ratios = contrast(
                    _beside(old, before[baseline]),
                    _beside(result, after[baseline]),
                    seed,
                    confidence,
                )
            judged = ratios or medians
            is_baseline = both and name == baseline
            rows.append(
                Row(
                    comparison=comparison,
                    subject=name,
                    case=case.case,
                    p50_ms=(old.summary.p50_ms, result.summary.p50_ms),
                    rounds=(len(old.samples_ms), len(result.samples_ms)),
                    medians=medians,
                    ratios=ratios,
                    verdict="baseline" if is_baseline else judge(judged, threshold),
                    too_slow=not is_baseline and beyond(judged, threshold),
                )
            )
    return rows


def _results(case: CaseResult) -> dict[str, Result]:
    return {result.subject: result for result in case.results}


def _beside(result: Result, baseline: Result) -> Sequence[float]:
    """The ratio to the baseline in every round: paired inside a run."""
    return [x / y for x, y in zip(result.samples_ms, baseline.samples_ms, strict=True)]


def _missing(
    side: Mapping[str, Report], rows: Sequence[Row], renamed: Mapping[str, str]
) -> tuple[str, ...]:
    """Cases of one file that no row has, by name."""
    had = {(row.comparison, renamed.get(row.subject, row.subject), row.case) for row in rows}
    return tuple(
        f"{comparison + ': ' if comparison else ''}{result.subject}, {case.case.label}"
        for comparison, report in side.items()
        for case in report.cases
        for result in case.results
        if (comparison, result.subject, case.case) not in had
    )
