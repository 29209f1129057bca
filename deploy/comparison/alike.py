"""Whether two reports come from the same conditions, and what weakens a comparison of them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol

from ...merge.errors import IncompatibleArtefact

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from ..bench.machine import Machine


class Run(Protocol):
    """What reports of every kind say of how they came about."""

    @property
    def machine(self) -> Machine:
        """Where it ran."""
        ...

    @property
    def settings(self) -> object:
        """A dataclass: for how long was measured."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader should doubt."""
        ...


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same in two reports.

    Attributes:
        kind: What `--despite` calls it.
        a: As the first has it.
        b: As the second has it.
    """

    kind: str
    a: str
    b: str

    def __str__(self) -> str:
        """A clause: what differs, and both values."""
        return f"{self.kind}: {self.a} in A, {self.b} in B"


def require_same(what: str, a: str, b: str, where: str) -> None:
    """Refuse what can never be compared.

    Args:
        what: The failure, should they differ.
        a: As the first has it.
        b: As the second has it.
        where: Both files.

    Raises:
        IncompatibleArtefact: They differ.
    """
    if a != b:
        raise IncompatibleArtefact(what, where=where, wanted=f"as in A: {a}", found=f"in B: {b}")


def require_despite(
    found: Sequence[Difference], where: str, despite: Collection[str]
) -> tuple[str, ...]:
    """Refuse differences that were not asked to pass; one sentence for each that was.

    Args:
        found: What differs.
        where: Both files.
        despite: Kinds of difference that do not stop it.

    Raises:
        IncompatibleArtefact: One of a kind that is not in `despite`.
    """
    stopping = [difference for difference in found if difference.kind not in despite]
    if stopping:
        flags = " ".join(f"--despite {difference.kind}" for difference in stopping)
        raise IncompatibleArtefact(
            "the two reports do not come from the same conditions",
            where=where,
            wanted=f"the same {', '.join(difference.kind for difference in stopping)}",
            found="; ".join(map(str, stopping)),
            do=f"measure both the same way, or pass {flags} and read the ratios with that in mind",
        )
    return tuple(f"Different {difference}." for difference in found)


def machine_words(machine: Machine) -> str:
    """Processor, cores, memory and devices in a clause."""
    gib = round(machine.memory_bytes / (1 << 30))  # the same machine reports some MiB more or less
    devices = ", ".join(gpu.split(", driver")[0] for gpu in machine.gpus)
    cores = f"{machine.usable_cores} of {machine.logical_cores} cores"
    return f"{machine.cpu}, {cores}, {gib} GiB{f', {devices}' if devices else ''}"


def surroundings(a: Run, b: Run, besides: Collection[str] = ()) -> Iterator[str]:
    """Other libraries and settings, and what both warned of, one sentence each.

    Args:
        a: The first report.
        b: The second.
        besides: Distributions that are told elsewhere.
    """
    others = [
        f"{name} {first or 'absent'} and {second or 'absent'}"
        for name, first, second in (
            ("Python", a.machine.python, b.machine.python),
            ("system", a.machine.system, b.machine.system),
            *(
                (name, a.machine.versions.get(name), b.machine.versions.get(name))
                for name in sorted({*a.machine.versions, *b.machine.versions})
                if name not in besides
            ),
        )
        if first != second
    ]
    if others:
        yield f"Also different: {'; '.join(others)}."
    for part in fields(a.settings):  # type: ignore[arg-type]
        first, second = getattr(a.settings, part.name), getattr(b.settings, part.name)
        if first != second:
            yield f"The setting {part.name} differs: {first} in A, {second} in B."
    for side, report in (("A", a), ("B", b)):
        yield from (f"{side} warned: {warning}" for warning in report.warnings)
