"""Whether two loads asked the same thing in the same way, and what differs where they did not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...serving.client.address import parse
from ..comparison.alike import (
    Difference,
    machine_words,
    require_despite,
    require_same,
    surroundings,
)
from .wording import inputs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from .report import Report

KINDS = {
    "machine": "the client's processor, cores, memory and devices",
    "server": "what the server calls itself, and its version unless it is utune-deploy",
    "protocol": "the URL's scheme",
    "encoding": "how tensors were sent",
    "mix": "how rows spread over how many tasks",
    "changing": "whether a task came and went meanwhile, and how often",
}
"""What must agree, and what it covers."""

OWN = "utune-deploy"


def require_alike(a: Report, b: Report, where: str, despite: Collection[str]) -> tuple[str, ...]:
    """Refuse what cannot be compared; one sentence for each difference that was asked to pass.

    Args:
        a: The first report.
        b: The second.
        where: Both files, for the message.
        despite: Kinds of difference, keys of `KINDS`, that do not stop it.

    Raises:
        IncompatibleArtefact: They asked different things, or differ in a kind that is not in `despite`.
    """
    require_same("the two loads are of different loops", a.loop, b.loop, where)
    require_same("the two loads sent different inputs", inputs(a), inputs(b), where)
    first, second = (f"{report.asked.rows} rows" for report in (a, b))
    require_same("the requests of the two loads are of different sizes", first, second, where)
    pairs = (
        ("machine", machine_words(a.machine), machine_words(b.machine)),
        ("server", _server(a), _server(b)),
        ("protocol", parse(a.url).scheme, parse(b.url).scheme),
        ("encoding", a.asked.encoding, b.asked.encoding),
        ("mix", _mix(a), _mix(b)),
        ("changing", _changing(a), _changing(b)),
    )
    found = [Difference(*pair) for pair in pairs if pair[1] != pair[2]]
    return require_despite(found, where, despite)


def remarks(a: Report, b: Report) -> Iterator[str]:
    """What weakens a comparison without forbidding it, one sentence each."""
    for what, first, second in (
        ("Servers", a.url, b.url),
        ("Models", a.model, b.model),
        ("Tasks", ", ".join(a.asked.task_rows), ", ".join(b.asked.task_rows)),
        ("Rows", a.asked.source, b.asked.source),
        (OWN, a.server.get("version"), b.server.get("version")),
    ):
        same_kind = what != OWN or _server(a) == _server(b) == OWN
        if first != second and same_kind:
            yield f"{what}: {first} in A, {second} in B."
    yield from surroundings(a, b)


def _server(report: Report) -> str:
    """Its name and version; of our own the version is what two loads may be about."""
    name = report.server.get("name", "")
    version = "" if name == OWN else report.server.get("version", "")
    return f"{name} {version}".strip() or "not named"


def _mix(report: Report) -> str:
    tasks = len(report.asked.task_rows)
    return f"{report.asked.mix} over {tasks} tasks" if tasks else "no tasks"


def _changing(report: Report) -> str:
    return "no task" if report.changing is None else f"a task every {report.changing.every_s:g} s"
