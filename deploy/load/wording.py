"""Sentences and facts as people read them, the same on the terminal and on the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..bench.case import MIXES
from ..bench.wording import memory, milliseconds, plural, rate
from .step import CLOSED, LOOPS, Step

if TYPE_CHECKING:
    from .numbers import StepResult
    from .report import Report
    from .saturation import Saturation

COUNTS = {
    CLOSED: "A latency is from sending a request to all of its answer; the requests that ended in the measured time count.",
}
COUNTS_OPEN = (
    "A latency is from when a request was due to all of its answer; every request that was due in the measured time "
    "counts, however late its answer."
)


def timed(report: Report) -> str:
    """What one sample is."""
    return f"Load: {LOOPS[report.loop]}. {COUNTS.get(report.loop, COUNTS_OPEN)}"


def label(report: Report, step: StepResult) -> str:
    """A step's name."""
    return Step(report.loop, step.level).label


def verdict(report: Report) -> str:
    """The finding in a sentence; of steps that say something of the server."""
    if all(step.latency is None for step in report.steps):
        return "No request had a good answer"
    if all(step.client_bound for step in report.steps if step.latency):
        return "The client set the pace in every step: nothing is known of the server"
    found = _most(report) if report.saturation is None else _held(report, report.saturation)
    failed = sum(step.failed for step in report.steps)
    return f"{found}; {failed:,} requests had no good answer" if failed else found


def _most(report: Report) -> str:
    """The largest throughput of callers that wait."""
    answered = [step for step in report.steps if step.latency]
    best = max(
        (step for step in answered if not step.client_bound),
        key=lambda step: step.answered_per_second,
    )
    assert best.latency is not None
    more = any(step.answered_per_second > best.answered_per_second for step in answered)
    return (
        f"{rate(best.answered_per_second)} requests/s {'at least' if more else 'at most'}, with "
        f"{label(report, best)}: p50 {milliseconds(best.latency.p50_ms)} ms, "
        f"p99 {milliseconds(best.latency.p99_ms)} ms"
    )


def _held(report: Report, found: Saturation) -> str:
    """The rate up to which the server holds."""
    holds, fails = found.holds, found.fails
    if holds is None:
        return f"Already {fails:g} requests/s are too much"
    step = next(step for step in report.steps if step.level == holds)
    p99 = "" if step.latency is None else f" with p99 {milliseconds(step.latency.p99_ms)} ms"
    beyond = "beyond is not known" if fails is None else f"{fails:g} is too much"
    return f"Holds {holds:g} requests/s{p99}; {beyond}"


def state(step: StepResult) -> str:
    """What to know before reading a step's numbers; empty if nothing."""
    found = []
    if step.client_bound:
        found.append("client-bound")
    if step.failed:
        found.append(plural(step.failed, "error"))
    if not step.stable:
        found.append("unstable")
    return ", ".join(found)


def facts(report: Report) -> tuple[tuple[str, str], ...]:
    """Label and text of the few things that a number is worth nothing without."""
    asked, settings = report.asked, report.settings
    server = " ".join(report.server.get(key, "") for key in ("name", "version")).strip()
    tasks = len(asked.task_rows)
    spread = f", {plural(tasks, 'task')}, {asked.mix}" if tasks else ""
    return (
        ("server", f"{report.url}{f' ({server})' if server else ''}"),
        ("model", report.model),
        ("requests", f"{plural(asked.rows, 'row')} each{spread}; {asked.encoding}"),
        ("time", f"{settings.seconds:g} s per step after {settings.warmup_s:g} s of warm-up"),
        ("client", f"{report.machine.cpu}, {report.machine.usable_cores} usable cores"),
        ("date", report.date),
    )


def inputs(report: Report) -> str:
    """What the model takes: name, datatype and shape of a row."""
    return "; ".join(
        f"{given.name} {given.datatype} [{', '.join(map(str, given.shape))}]"
        for given in report.asked.inputs
    )


def environment(report: Report) -> tuple[tuple[str, str], ...]:
    """Label and text of everything else that the numbers depend on."""
    asked, machine, settings = report.asked, report.machine, report.settings
    return (
        ("inputs", inputs(report)),
        ("rows", asked.source),
        ("distinct requests", f"{asked.requests:,}, {asked.request_bytes:,} bytes each"),
        *([("task mix", MIXES[asked.mix].says)] if asked.task_rows else []),
        ("a request is given up", f"after {settings.timeout_s:g} s"),
        ("seed", str(settings.seed)),
        ("client's processor", machine.cpu),
        (
            "client's cores",
            f"{machine.physical_cores or 'unknown'} physical, {machine.logical_cores} logical, "
            f"{machine.usable_cores} usable by this process",
        ),
        ("frequency governor", machine.governor or "not readable"),
        ("main memory", memory(machine.memory_bytes)),
        ("load average", f"{report.load.before:.2f} before, {report.load.after:.2f} after"),
        ("system", machine.system),
        ("Python", machine.python),
        *machine.versions.items(),
        ("date", report.date),
    )
