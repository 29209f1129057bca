"""Numbers and sentences as people read them, the same on the terminal and on the page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .subject import EVERY_TASK

if TYPE_CHECKING:
    from .ceilings import Ceilings
    from .report import CaseResult, Report
    from .state import DeviceState, States

GIB = 1 << 30
MIB = 1 << 20
GIGA = 1e9

TIMES = "\N{MULTIPLICATION SIGN}"
NO_BREAK = "\N{NO-BREAK SPACE}"


def milliseconds(value: float) -> str:
    """Four digits or so: `0.214`, `8.31`, `123.4`."""
    digits = 3 if value < 1 else 2 if value < 100 else 1
    return f"{value:.{digits}f}"


def rate(value: float) -> str:
    """Images per second: `9.4`, `1,204`."""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def three_digits(value: float) -> str:
    """`0.0100`, `2.43`, `19.4`, `271`, `1,204`."""
    if not 0 < value < 100:
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(value))}f}"


def percent(share: float) -> str:
    """A fraction as a whole number of percent."""
    return f"{100 * share:.0f} %"


def memory(value: int) -> str:
    """Bytes as MiB or GiB."""
    if abs(value) < GIB:
        return f"{value / MIB:,.0f} MiB"
    return f"{value / GIB:.1f} GiB"


def plural(count: int, noun: str) -> str:
    """`1 core`, `2 cores`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def verdict(report: Report) -> str:
    """The finding in a sentence: what the subject after the baseline costs beside it.

    It speaks of the largest batch that mixes tasks; of the largest batch if none does.
    """
    mixed = [case for case in report.cases if len(set(case.task_rows)) > 1]
    case = max(mixed or report.cases, key=lambda case: case.case.batch)
    if len(case.results) == 1:
        alone = case.results[0]
        return (
            f"{alone.subject}: {milliseconds(alone.summary.p50_ms)} ms for {_batch(case).lower()}"
        )
    result, baseline = case.results[1], report.subjects[0].name
    assert result.ratio is not None  # only the baseline, subject 0, has none
    batch = _batch(case)
    if result.subject.endswith(EVERY_TASK):
        batch = f"Every task of {_plain_batch(case).lower()}"
    finding = f"{batch} costs {result.ratio.median:.2f}{NO_BREAK}{TIMES} {baseline}"
    confidence = (
        f"({percent(result.ratio.confidence)} CI {result.ratio.low:.2f} to {result.ratio.high:.2f})"
    )
    if len(report.subjects) > 2:  # say which of them it is
        finding = f"{result.subject}: {finding[0].lower()}{finding[1:]}"
    return f"{finding} {confidence}"


def facts(report: Report) -> tuple[tuple[str, str], ...]:
    """Label and text of the few things that a number is worth nothing without."""
    machine, settings = report.machine, report.settings
    providers = sorted({subject.provider for subject in report.subjects})
    fewest = min(case.results[0].summary.samples for case in report.cases)
    most = max(case.results[0].summary.samples for case in report.cases)
    rounds = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    threads = "threads chosen by the runtime"
    return (
        ("processor", machine.cpu),
        *(("device", gpu) for gpu in machine.gpus),
        (
            "cores",
            f"{machine.usable_cores} usable of {machine.logical_cores}; "
            f"{threads if report.threads is None else plural(report.threads, 'engine thread')}",
        ),
        ("provider", ", ".join(providers)),
        ("rounds", f"{rounds} per case after {settings.warmup_rounds} of warm-up"),
        ("date", report.date),
    )


def environment(report: Report) -> tuple[tuple[str, str], ...]:
    """Label and text of everything else that the numbers depend on."""
    machine, settings = report.machine, report.settings
    return (
        ("processor", machine.cpu),
        *(("device", gpu) for gpu in machine.gpus),
        (
            "cores",
            f"{machine.physical_cores or 'unknown'} physical, {machine.logical_cores} logical, "
            f"{machine.usable_cores} usable by this process",
        ),
        ("frequency governor", machine.governor or "not readable"),
        *([("last cache", memory(machine.cache_bytes))] if machine.cache_bytes else []),
        ("main memory", memory(machine.memory_bytes)),
        *(_states(report.states) if report.states else []),
        ("load average", f"{report.load.before:.2f} before, {report.load.after:.2f} after"),
        (
            "resident memory",
            f"{memory(report.memory.before)} before, {memory(report.memory.after)} after, "
            f"{memory(report.memory.peak)} peak of the process",
        ),
        ("system", machine.system),
        ("Python", machine.python),
        *machine.versions.items(),
        ("warm-up", plural(settings.warmup_rounds, "round")),
        (
            "counted",
            f"until {plural(settings.min_rounds, 'round')} and {settings.min_seconds:g} s",
        ),
        ("order", "every subject once a round, in an order drawn anew (seeded)"),
        ("settling", f"{plural(settings.settle_calls, 'untimed call')} before each timed one"),
        ("seed", str(settings.seed)),
        ("date", report.date),
    )


def _states(states: States) -> list[tuple[str, str]]:
    """Clocks and heat before and after."""
    before, after = states.before, states.after
    rows = []
    if before.cpu_mhz and after.cpu_mhz:
        rows.append(("clock", f"{before.cpu_mhz:,.0f} MHz before, {after.cpu_mhz:,.0f} MHz after"))
    for first, last in zip(before.devices, after.devices, strict=False):
        rows.append((first.name, f"{_device(first)} before; {_device(last)} after"))
    return rows


def _device(device: DeviceState) -> str:
    known = (
        (device.clock_mhz, "MHz"), (device.memory_clock_mhz, "MHz memory"),
        (device.temperature_c, "\N{DEGREE SIGN}C"), (device.power_w, "W"),
    )  # fmt: skip
    said = [f"{value:,.0f} {unit}" for value, unit in known if value is not None]
    return ", ".join([*said, *(f"held by {limit}" for limit in device.limits)]) or "not told"


def _batch(case: CaseResult) -> str:
    if len(set(case.task_rows)) > 1:
        return f"A mixed batch of {case.case.batch}"
    return _plain_batch(case)


def _plain_batch(case: CaseResult) -> str:
    return f"A batch of {case.case.batch}"


def product_words(ceilings: Ceilings) -> tuple[str, str]:
    """Both ceilings with what they were measured on."""
    sides = f" {TIMES} ".join(f"{side:,}" for side in ceilings.product)
    product = f"{ceilings.flops_per_second / GIGA:,.0f} GFLOP/s in a product of {sides} in {ceilings.dtype}"
    moved = f"{ceilings.bytes_per_second / GIGA:,.1f} GB/s in a sum that moves {ceilings.moved_bytes / 1e6:,.0f} MB"
    return product, moved
