"""`utune-deploy compare`: two reports of `bench` or two of `load`, and whether the second is slower."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ..options import PATH, force_option, json_option, setting

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ..comparison.compared import Compared
    from ..console import Console

KINDS = {
    "bench": ("machine", "runtime", "backbone", "engine", "precision", "provider", "threads"),
    "load": ("machine", "server", "protocol", "encoding", "mix", "changing"),
}
"""What `--despite` takes, by the verb that wrote the reports."""

LONGER = {"bench": "--rounds", "load": "--seconds"}
"""The option that makes a measurement longer."""


class Share(click.ParamType):
    """A part of one, as `5%` or `0.05`."""

    name = "share"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The fraction; above 0 and below 1."""
        text = str(value).strip()
        try:
            found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            found = 0.0
        if not 0 < found < 1:
            self.fail(f"{text!r} is no share between 0 and 1, such as 5% or 0.05.", param, ctx)
        return found


@click.command("compare")
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@click.option(
    "--threshold",
    type=Share(),
    default="5%",
    show_default=True,
    help="The change that matters: slower beyond it, with the whole interval, exits with 3.",
)
@click.option(
    "--confidence",
    type=Share(),
    default="95%",
    show_default=True,
    help="Coverage of every interval.",
)
@click.option(
    "--baseline",
    show_default="backbone only",
    help="Subject of both bench reports that the others are put beside.",
)
@click.option(
    "--pair",
    "pairs",
    metavar="B_NAME=A_NAME",
    multiple=True,
    help="Subject of a bench report that is named otherwise in A; repeatable.",
)
@click.option(
    "--despite",
    type=click.Choice(tuple(dict.fromkeys(chain(*KINDS.values())))),
    metavar="KIND",
    multiple=True,
    help="Compare although this differs; repeatable. "
    + " ".join(f"Of {verb}: {', '.join(kinds)}." for verb, kinds in KINDS.items()),
)
@click.option("--markdown", type=PATH, help="Also write a table for a pull request.")
@json_option
@force_option
@click.pass_obj
def command(
    console: Console,
    a: Path,
    b: Path,
    threshold: float,
    confidence: float,
    baseline: str | None,
    pairs: tuple[str, ...],
    despite: tuple[str, ...],
    markdown: Path | None,
    as_json: bool,
    force: bool,
) -> None:
    """Hold report B to report A, case by case, and fail where B is slower.

    Both are of bench, or both of load. The two runs are not paired. Where two bench reports both timed the bare backbone, the verdict rests on the ratio
    of their ratios to it, which cancels how fast the machine was on each day. Loads have no baseline.
    """
    from ...merge.errors import CheckFailed
    from ...merge.files import atomic_file, refuse_existing

    if markdown is not None:
        refuse_existing(markdown, force=force, inputs=(a, b))
    verb = _written_by(a, b)
    _refuse_meaningless(verb, baseline, pairs, despite)
    common: dict[str, Any] = {
        "names": (str(a), str(b)),
        "threshold": threshold,
        "confidence": confidence,
        "despite": despite,
    }
    found = _loads(a, b, common) if verb == "load" else _benches(a, b, common, baseline, pairs)
    comparison = found.comparison
    if as_json:
        console.json(comparison.to_json())
    else:
        found.show()
    if markdown is not None:
        with atomic_file(markdown) as temporary:
            temporary.write_text(found.markdown(), encoding="utf-8")
        console.say(f"wrote {markdown}")
    if comparison.failures:
        raise CheckFailed(
            f"worse than {a} by more than the threshold",
            where=b,
            wanted=comparison.allowed,
            found="; ".join(comparison.failures),
            do=f"look for the cause, or measure again with more {LONGER[verb]} on a quiet machine",
        )


class Found(NamedTuple):
    """A comparison and its views."""

    comparison: Compared
    show: Callable[[], None]
    markdown: Callable[[], str]


def _benches(
    a: Path, b: Path, common: dict[str, Any], baseline: str | None, pairs: tuple[str, ...]
) -> Found:
    from ..bench.compare import compare
    from ..bench.compare_views import print_comparison, to_markdown
    from ..bench.reading import read_reports
    from ..bench.subject import BARE

    comparison = compare(
        read_reports(a),
        read_reports(b),
        baseline=BARE if baseline is None else baseline,
        renamed=dict(map(setting, pairs)),
        **common,
    )
    return Found(
        comparison, partial(print_comparison, comparison), partial(to_markdown, comparison)
    )


def _loads(a: Path, b: Path, common: dict[str, Any]) -> Found:
    from ..load.compare import compare
    from ..load.compare_views import print_comparison, to_markdown
    from ..load.reading import read_report

    comparison = compare(read_report(a), read_report(b), **common)
    return Found(
        comparison, partial(print_comparison, comparison), partial(to_markdown, comparison)
    )


def _written_by(a: Path, b: Path) -> str:
    """The verb that wrote both files.

    Raises:
        UsageError: There is no such file.
        IncompatibleArtefact: One is no report that can be compared, or they are of two verbs.
    """
    from ...merge.errors import IncompatibleArtefact
    from ..bench.report import FORMAT, SWEEP_FORMAT
    from ..load.report import FORMAT as LOAD_FORMAT
    from ..records import format_of, read_value

    verbs = {FORMAT: "bench", SWEEP_FORMAT: "bench", LOAD_FORMAT: "load"}
    formats = [format_of(read_value(path)) for path in (a, b)]
    for path, found in zip((a, b), formats, strict=True):
        if found not in verbs:
            raise IncompatibleArtefact(
                "the file is no report that can be compared",
                where=path,
                wanted=f"format {', '.join(verbs)}",
                found=found,
            )
    first, second = (verbs[found] for found in formats)
    if first != second:
        raise IncompatibleArtefact(
            "the two reports are of different verbs",
            where=f"{a} and {b}",
            wanted="two of bench, or two of load",
            found=f"{first} in A, {second} in B",
        )
    return first


def _refuse_meaningless(
    verb: str, baseline: str | None, pairs: tuple[str, ...], despite: tuple[str, ...]
) -> None:
    """Refuse options that say nothing of such reports.

    Raises:
        UsageError: One was given.
    """
    from ...merge.errors import UsageError

    other = [kind for kind in despite if kind not in KINDS[verb]]
    if other:
        raise UsageError(
            f"reports of {verb} have no such conditions",
            where="--despite",
            wanted=", ".join(KINDS[verb]),
            found=", ".join(other),
        )
    given = [option for option, value in (("--baseline", baseline), ("--pair", pairs)) if value]
    if verb == "load" and given:
        raise UsageError(
            "a load has no subjects: its steps are matched by their level",
            found=" and ".join(given),
            do="leave it out",
        )
