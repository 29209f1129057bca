"""A comparison of two loads on the terminal and as Markdown for a pull request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from ..bench.wording import milliseconds, plural, rate
from ..comparison.views import (
    COLOURS,
    cells,
    empty_table,
    escape,
    markdown_around,
    percent,
    print_around,
    tally,
)
from ..console import paper
from .compare import SHOWN

if TYPE_CHECKING:
    from rich.console import Console

    from .compare import Comparison, Measure, Pair
    from .saturation import Saturation

DESCRIPTION = (
    "B/A is the ratio of the two runs' percentiles or throughputs. The runs are not paired and have no baseline: each "
    "is resampled on its own, in blocks of time, and whatever made one run's machine slower is in it. The verdict rests "
    "on latencies of two runs."
)
NAMES = {"p50": "p50 ms", "p90": "p90 ms", "p99": "p99 ms", "held": "of the rate"}
FAILS = {"held": "not held", "failed": "too many", "rows/s": "too few"}


def finding(comparison: Comparison) -> str:
    """The outcome in a sentence."""
    measures = [measure for pair in comparison.steps for measure in pair.measures]
    judged = [measure for measure in measures if measure.verdict != SHOWN]
    failed = sum(measure.fails for measure in judged)
    steps = plural(len(comparison.steps), "step")
    head = f"{failed} of {plural(len(judged), 'number')}" if failed else "No number"
    verb = "fail" if failed > 1 else "fails"
    told = tally(measure.verdict for measure in judged) or "none is judged"
    limit = percent(comparison.threshold)
    a, b = map(_saturation, comparison.saturations)
    saturation = f"; saturation A {a}, B {b}" if a and b else ""
    return f"{head} of {steps} {verb} at {limit} ({told}){saturation}"


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the outcome, a table and the warnings.

    Args:
        comparison: What was found.
        console: Where to; standard output unless given.
    """
    table = empty_table("", ("A", "B", "B/A", f"{percent(comparison.confidence)} CI"))
    for pair in comparison.steps:
        table.add_section()
        table.add_row(Text(pair.label, "bold"))
        if about := _about(pair):
            table.add_row(Text(about, "yellow"))
        for measure in pair.measures:
            table.add_row(
                Text(NAMES.get(measure.name, measure.name)),
                *_values(measure),
                *cells(measure.change),
                Text(
                    _verdict(measure),
                    "red" if measure.fails else COLOURS.get(measure.verdict, "dim"),
                ),
            )
    print_around(comparison, finding(comparison), table, DESCRIPTION, console or paper())


def to_markdown(comparison: Comparison) -> str:
    """The same as Markdown: the outcome, the table, and the small print folded away."""
    rows = [("step", "", "A", "B", "B/A", "verdict")]
    for pair in comparison.steps:
        about = _about(pair)
        for number, measure in enumerate(pair.measures):
            verdict = f"**{_verdict(measure)}**" if measure.fails else _verdict(measure)
            change = "" if measure.change is None else str(measure.change)
            step = f"{pair.label} ({about})" if about and not number else pair.label
            name = NAMES.get(measure.name, measure.name)
            rows.append((escape(step), name, *_values(measure), change, verdict))
    return markdown_around(comparison, f"Load: {finding(comparison)}", rows, "llrrrl", DESCRIPTION)


def _about(pair: Pair) -> str:
    """What to know of a step before reading its numbers."""
    unjudged = [f"not judged: {pair.unjudged}"] if pair.unjudged else []
    unstable = [f"unstable in {pair.unstable}"] if pair.unstable else []
    return "; ".join([*unjudged, *unstable])


def _values(measure: Measure) -> tuple[str, str]:
    a, b = measure.a, measure.b
    if measure.name in ("held", "failed"):
        return f"{100 * a:.1f} %", f"{100 * b:.1f} %"
    says = rate if measure.name == "rows/s" else milliseconds
    return says(a), says(b)


def _verdict(measure: Measure) -> str:
    return FAILS.get(measure.name, "too slow") if measure.fails else measure.verdict


def _saturation(found: Saturation | None) -> str:
    """The interval in a clause; empty of callers that wait."""
    if found is None:
        return ""
    if found.holds is None:
        return "not known" if found.fails is None else f"below {found.fails:g}/s"
    return f"above {found.holds:g}/s" + (
        "" if found.fails is None else f", at most {found.fails:g}/s"
    )
