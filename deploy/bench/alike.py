"""Whether two reports measured the same thing in the same way, and what differs where they did not.

A ratio to the backbone of the same run cancels how fast a machine was that day. It does not cancel which machine it
was: how dear a branch is beside the backbone depends on cores, caches, kernels and number format. So a difference of
one of the `KINDS` stops a comparison unless it is asked for by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..comparison.alike import (
    Difference,
    machine_words,
    require_despite,
    require_same,
    surroundings,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from .machine import Machine
    from .report import Report

KINDS = {
    "machine": "processor, cores, memory and devices",
    "runtime": "the versions of ONNX Runtime and TensorRT, and the devices' driver",
    "backbone": "the architecture",
    "engine": "the target and its opset",
    "precision": "the number format",
    "provider": "where the engines ran",
    "threads": "the engines' threads",
}
"""What must agree, and what it covers."""

RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "tensorrt")
OWN = "utune-deploy"
FEW_ROUNDS = 20
"""Below it the bootstrap of a median rests on so few distinct values that its interval is too short."""


def differences(a: Report, b: Report) -> tuple[Difference, ...]:
    """What differs of the `KINDS`, in their order."""
    pairs = (
        ("machine", machine_words(a.machine), machine_words(b.machine)),
        ("runtime", _runtime(a.machine), _runtime(b.machine)),
        ("backbone", _fact(a, "backbone"), _fact(b, "backbone")),
        ("engine", *_engines(a, b, (0, 2))),
        ("precision", *_engines(a, b, (1,))),
        ("provider", _providers(a, b), _providers(b, a)),
        ("threads", _threads(a), _threads(b)),
    )
    return tuple(Difference(*pair) for pair in pairs if pair[1] != pair[2] and all(pair))


def require_alike(a: Report, b: Report, where: str, despite: Collection[str]) -> tuple[str, ...]:
    """Refuse what cannot be compared; one sentence for each difference that was asked to pass.

    Args:
        a: The first report.
        b: The second.
        where: Both files, for the message.
        despite: Kinds of difference that do not stop it.

    Raises:
        IncompatibleArtefact: They timed different things, or differ in a kind that is not in `despite`.
    """
    require_same("the two reports timed different things", a.timed, b.timed, where)
    require_same("the two reports read different inputs", _reads(a), _reads(b), where)
    return require_despite(differences(a, b), where, despite)


def remarks(a: Report, b: Report) -> Iterator[str]:
    """What weakens a comparison without forbidding it, one sentence each."""
    yield from surroundings(a, b, besides=(*RUNTIMES, OWN))
    rows = {case.case: case.task_rows for case in a.cases}
    other = [c.case.label for c in b.cases if rows.get(c.case, c.task_rows) != c.task_rows]
    if other:
        yield f"Other rows of the bank were asked for in {'; '.join(other)}."
    for side, report in (("A", a), ("B", b)):
        fewest = min(case.results[0].summary.samples for case in report.cases)
        if fewest < FEW_ROUNDS:
            yield (
                f"{side} has cases of {fewest} rounds: below {FEW_ROUNDS} the intervals are too short."
            )


def _runtime(machine: Machine) -> str:
    versions = [f"{name} {machine.versions[name]}" for name in RUNTIMES if name in machine.versions]
    drivers = {
        part for gpu in machine.gpus for part in gpu.split(", ") if part.startswith("driver")
    }
    return ", ".join([*versions, *sorted(drivers)]) or "none named"


def _fact(report: Report, label: str) -> str:
    return dict(report.about.facts).get(label, "")


def _engines(a: Report, b: Report, parts: tuple[int, ...]) -> tuple[str, str]:
    """Parts of `target, precision, opset` of the bundles and of the subjects that both have."""
    shared = {subject.name for subject in a.subjects} & {subject.name for subject in b.subjects}
    found: list[tuple[str, str]] = [(_fact(a, "engine"), _fact(b, "engine"))]
    engines = [{s.name: s.engine for s in report.subjects} for report in (a, b)]
    found += [(engines[0][name] or "", engines[1][name] or "") for name in sorted(shared)]
    for first, second in found:
        if first and second and _parts(first, parts) != _parts(second, parts):
            return _parts(first, parts), _parts(second, parts)
    return "", ""


def _parts(engine: str, parts: tuple[int, ...]) -> str:
    words = engine.split(", ")
    return ", ".join(words[part] for part in parts if part < len(words))


def _providers(report: Report, other: Report) -> str:
    """Providers of the subjects that both have; of all where they share none."""
    names = {subject.name for subject in other.subjects}
    shared = {s.provider for s in report.subjects if s.name in names}
    return ", ".join(sorted(shared or {s.provider for s in report.subjects}))


def _threads(report: Report) -> str:
    return "chosen by the runtime" if report.threads is None else str(report.threads)


def _reads(report: Report) -> str:
    return "; ".join(f"{t.name} {list(t.shape[1:])} {t.dtype}" for t in report.about.reads)
