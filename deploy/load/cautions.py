"""What to doubt about a load, said by the load itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..bench.cautions import P99_SAMPLES, busy, governed
from .numbers import LAG_SHARE, STABLE
from .step import WINDOWS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..bench.machine import Load, Machine
    from .numbers import StepResult
    from .step import Step


def find_cautions(
    steps: Sequence[Step],
    results: Sequence[StepResult],
    machine: Machine,
    load: Load,
    *,
    handed_over: bool = False,
) -> tuple[str, ...]:
    """One sentence for each thing that weakens the numbers; none for a clean load.

    Args:
        steps: What was driven.
        results: What came of each.
        machine: The client's.
        load: Of it, before and after.
        handed_over: The server's statistics were left out; see `ModelFacts`.
    """
    pairs = list(zip(steps, results, strict=True))
    sentences = (
        _client_bound(pairs),
        _failed(pairs),
        _unstable(pairs),
        _few_samples(pairs),
        _unseen(results, handed_over=handed_over),
        busy(machine, load, "The client's"),
        governed(machine, "The client's", "a load"),
    )
    return tuple(sentence for sentence in sentences if sentence is not None)


def _client_bound(pairs: Sequence[tuple[Step, StepResult]]) -> str | None:
    labels = [step.label for step, result in pairs if result.client_bound]
    if not labels:
        return None
    return (
        f"Client-bound and not valid: {', '.join(labels)}. The client sent so late that its lag is more than "
        f"{100 * LAG_SHARE:.0f} % of the latency; give it cores or a machine of its own."
    )


def _failed(pairs: Sequence[tuple[Step, StepResult]]) -> str | None:
    failed = [(step, result) for step, result in pairs if result.errors]
    if not failed:
        return None
    total = sum(result.failed for _, result in failed)
    step, result = max(failed, key=lambda pair: pair[1].failed)
    kind = result.errors[0]
    says = f": {kind.says}" if kind.says else ""
    return (
        f"{total:,} requests had no good answer and are in no latency, most of them at {step.label}, where "
        f"{kind.count:,} ended with {kind.status}{says}."
    )


def _unstable(pairs: Sequence[tuple[Step, StepResult]]) -> str | None:
    labels = [step.label for step, result in pairs if not result.stable]
    if not labels:
        return None
    return (
        f"Unstable: {', '.join(labels)}. Throughput or median latency of {WINDOWS} equal parts of the time differ by "
        f"more than {100 * STABLE:.0f} %; measure for longer, or look for what else runs."
    )


def _few_samples(pairs: Sequence[tuple[Step, StepResult]]) -> str | None:
    counts = [result.latency.samples for _, result in pairs if result.latency]
    few = [count for count in counts if count < P99_SAMPLES]
    if not few:
        return None
    return (
        f"p99 needs {P99_SAMPLES} answers to have two beyond it; {len(few)} of {len(pairs)} steps have fewer (the "
        f"fewest: {min(few)}). Read their p99 as about the slowest answer."
    )


def _unseen(results: Sequence[StepResult], *, handed_over: bool) -> str | None:
    if handed_over:
        return (
            "Triton's statistics of this model end where our service takes a request over, and are left out; what it "
            "waited and what the engine took are in the metrics utune_queue_seconds_total and utune_engine_seconds_total."
        )
    if all(result.server is not None for result in results):
        return None
    return "The server's own statistics could not be read in every step: what it did is not known there."
