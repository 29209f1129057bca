"""Two loads side by side: what became slower, what faster, what cannot be told apart.

Steps are matched by their level. There is no baseline in a load and nothing to pair: the verdict rests on latencies of
two runs. What fails of a step:

    p50, p99    the whole interval of the ratio lies beyond the threshold
    rows/s      the same, of callers that wait; of A over B, so that more is better
    held        A held the rate and B does not
    failed      the share of failed requests rose by more than FAIL_SHARE, with the whole interval

p90 is judged and fails nothing: it lies between two that do. A step in which either client set the pace is not judged.
Nor are latencies at a rate that either does not hold: its queue grows for as long as one measures. A step that is not
stable in either run fails only beyond the threshold and the tenth by which the parts of a stable run may differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...merge.errors import IncompatibleArtefact
from ..bench.cautions import P99_SAMPLES
from ..comparison.compared import Compared
from ..comparison.verdict import THRESHOLD, beyond, judge
from .alike import remarks, require_alike
from .contrast import PERCENTILES, contrasts, sparse
from .failures import FAIL_SHARE, rise
from .numbers import STABLE
from .step import CLOSED
from .wording import label

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from ..comparison.verdict import Contrast
    from .numbers import StepResult
    from .report import Report
    from .saturation import Saturation

SHOWN = "shown"
"""The verdict of what is not judged."""


@dataclass(frozen=True)
class Measure:
    """One number of a step in both runs.

    Attributes:
        name: `p50`, `p90`, `p99` in ms, `rows/s`, `held` (the part of the rate that was answered) or `failed` (the
            part of the requests).
        a: The first's.
        b: The second's.
        change: B over A; None of parts, and of too few answers.
        verdict: `slower`, `faster`, `equal` or `undecided`; `more` or `fewer` of failed requests; `shown`.
        fails: Whether it fails the comparison.
    """

    name: str
    a: float
    b: float
    change: Contrast | None
    verdict: str
    fails: bool


@dataclass(frozen=True)
class Pair:
    """One step in both runs.

    Attributes:
        level: Callers, or requests per second.
        label: Its name.
        unjudged: Why its latencies are shown and not judged; empty if they are.
        unstable: The runs in which parts of its time disagree: `A`, `B`, `A and B`; empty if none.
        measures: Its numbers.
    """

    level: float
    label: str
    unjudged: str
    unstable: str
    measures: tuple[Measure, ...]


@dataclass(frozen=True)
class Comparison(Compared):
    """Every step that both loads have.

    Attributes:
        loop: A key of `LOOPS`.
        steps: The steps, in order of B.
        saturations: Up to which rate each holds; None of a closed loop.
    """

    format: ClassVar[str] = "utune-load-compare"
    version: ClassVar[int] = 1

    loop: str
    steps: tuple[Pair, ...]
    saturations: tuple[Saturation | None, Saturation | None]

    @property
    def allowed(self) -> str:
        """What the second had to keep to."""
        more = f"at most {100 * FAIL_SHARE:g} in a hundred requests more that fail"
        if self.loop == CLOSED:
            return f"{super().allowed}, and {more}"
        return f"{super().allowed}, every rate that A held, and {more}"

    @property
    def failures(self) -> tuple[str, ...]:
        """Every number that fails, with both values or their ratio."""
        return tuple(
            f"{pair.label}, {measure.name}: "
            f"{measure.change or f'{measure.b:.3g} after {measure.a:.3g}'}"
            for pair in self.steps
            for measure in pair.measures
            if measure.fails
        )


def compare(
    a: Report,
    b: Report,
    *,
    names: tuple[str, str] = ("A", "B"),
    threshold: float = THRESHOLD,
    confidence: float = 0.95,
    despite: Collection[str] = (),
    seed: int = 0,
) -> Comparison:
    """Hold the second load's steps to the first's.

    Args:
        a: The first report.
        b: The second.
        names: What to call the files.
        threshold: A change that matters, a fraction above 0.
        confidence: Coverage of every interval, a fraction.
        despite: Kinds of difference, keys of `alike.KINDS`, that do not stop it.
        seed: Of the bootstrap.

    Raises:
        IncompatibleArtefact: The conditions differ, or there is no step that both have.
    """
    where = " and ".join(names)
    said = (*require_alike(a, b, where, despite), *remarks(a, b))
    earlier, later = ({step.level: step for step in report.steps} for report in (a, b))
    only = [
        tuple(label(report, step) for step in report.steps if step.level not in other)
        for report, other in ((a, later), (b, earlier))
    ]
    both = [(earlier[step.level], step) for step in b.steps if step.level in earlier]
    if not both:
        raise IncompatibleArtefact(
            "the two loads have no step in common",
            where=where,
            wanted="a step with the same level",
            found=f"only in A: {'; '.join(only[0])}. Only in B: {'; '.join(only[1])}",
            do="measure the same levels",
        )
    seconds = a.settings.seconds, b.settings.seconds
    pairs = tuple(
        Pair(
            level=new.level,
            label=label(b, new),
            unjudged=_unjudged(old, new),
            unstable=_sides(not old.stable, not new.stable),
            measures=tuple(_measures(old, new, b.asked.rows, seconds, threshold, confidence, seed)),
        )
        for old, new in both
    )
    return Comparison(
        *names,
        dates=(a.date, b.date),
        threshold=threshold,
        confidence=confidence,
        only_a=only[0],
        only_b=only[1],
        warnings=tuple(dict.fromkeys([*said, *_doubts(pairs)])),
        loop=b.loop,
        steps=pairs,
        saturations=(a.saturation, b.saturation),
    )


def _unjudged(a: StepResult, b: StepResult) -> str:
    """Why latencies and throughput of a step are not judged; empty if they are."""
    for what, first, second in (
        ("client-bound", a.client_bound, b.client_bound),
        ("not held", *(step.offered_per_second is not None and not step.holds for step in (a, b))),
        ("without an answer", a.latency is None, b.latency is None),
    ):
        if sides := _sides(first, second):
            return f"{what} in {sides}"
    return ""


def _sides(a: bool, b: bool) -> str:
    """The runs of which something is true: `A`, `B`, `A and B`; empty of neither."""
    return " and ".join(side for side, found in (("A", a), ("B", b)) if found)


def _measures(
    a: StepResult,
    b: StepResult,
    rows: int,
    seconds: tuple[float, float],
    threshold: float,
    confidence: float,
    seed: int,
) -> Iterator[Measure]:
    closed = b.offered_per_second is None
    enough = not any(sparse(*side) for side in zip((a, b), seconds, strict=True))
    changes = contrasts(a, b, seconds, seed, confidence) if enough else {}
    judged = enough and not _unjudged(a, b)
    limit = threshold if a.stable and b.stable else (1 + threshold) * (1 + STABLE) - 1
    if a.latency and b.latency:
        fewest = min(a.latency.samples, b.latency.samples)
        for percentile in PERCENTILES:
            name = f"p{percentile}"
            change = changes.get(name)
            told = judged and change is not None and (percentile < 99 or fewest >= P99_SAMPLES)
            yield Measure(
                name,
                getattr(a.latency, f"{name}_ms"),
                getattr(b.latency, f"{name}_ms"),
                change,
                judge(change, threshold) if told and change else SHOWN,
                bool(told and change and percentile != 90 and beyond(change, limit)),
            )
    bound = a.client_bound or b.client_bound
    if closed:
        yield _rate(a, b, rows, changes.get("rate"), threshold, limit, judged=not bound)
    else:
        yield _held(a, b, judged=not bound)
    if a.failed or b.failed:
        yield _failed(a, b, confidence, judged=not bound and (closed or a.holds))


def _rate(
    a: StepResult,
    b: StepResult,
    rows: int,
    change: Contrast | None,
    threshold: float,
    limit: float,
    *,
    judged: bool,
) -> Measure:
    """Rows per second of callers that wait; a server that ceased to answer has nothing to resample."""
    ceased = change is None and 2 * b.answered_per_second < a.answered_per_second
    verdict, fails = ("slower", True) if ceased and judged else (SHOWN, False)
    if change is not None and judged:
        slower = change.inverse
        verdict, fails = judge(slower, threshold), beyond(slower, limit)
    per_second = a.answered_per_second * rows, b.answered_per_second * rows
    return Measure("rows/s", *per_second, change, verdict, fails)


def _held(a: StepResult, b: StepResult, *, judged: bool) -> Measure:
    """The part of the offered rate that was answered."""
    first, second = (
        step.answered_per_second / step.offered_per_second if step.offered_per_second else 0.0
        for step in (a, b)
    )
    verdict = {
        (True, True): "equal",
        (True, False): "slower",
        (False, True): "faster",
        (False, False): SHOWN,
    }[a.holds, b.holds]
    fails = judged and verdict == "slower"
    return Measure("held", first, second, None, verdict if judged else SHOWN, fails)


def _failed(a: StepResult, b: StepResult, confidence: float, *, judged: bool) -> Measure:
    """The part of the requests that had no good answer."""
    before, after = ((step.failed, step.failed + len(step.samples_ms)) for step in (a, b))
    first, second = (failed / total if total else 0.0 for failed, total in (before, after))
    if not (judged and before[1] and after[1]):
        return Measure("failed", first, second, None, SHOWN, fails=False)
    low, high = rise(before, after, confidence)
    verdict = "more" if low > 0 else "fewer" if high < 0 else "equal"
    return Measure("failed", first, second, None, verdict, low > FAIL_SHARE)


def _doubts(pairs: tuple[Pair, ...]) -> Iterator[str]:
    unstable = [pair.label for pair in pairs if pair.unstable and not pair.unjudged]
    if unstable:
        yield (
            f"Not stable in one of the runs: {', '.join(unstable)}. Intervals are too short where latency or "
            "throughput wanders through a run; measure both for longer."
        )
    thin = [
        pair.label
        for pair in pairs
        if not pair.unjudged and any(m.name == "p50" and m.change is None for m in pair.measures)
    ]
    if thin:
        yield f"Too few answers to judge latencies: {', '.join(thin)}; measure for longer."
    more = [
        pair.label for pair in pairs if any(measure.verdict == "more" for measure in pair.measures)
    ]
    if more:
        yield f"More requests failed in B, and are in no latency: {', '.join(more)}."
