"""`utune-deploy compare`: two bench reports, and whether the second is slower."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..options import PATH, force_option, json_option, setting

if TYPE_CHECKING:
    from pathlib import Path

    from ..console import Console

KINDS = ("machine", "runtime", "backbone", "engine", "precision", "provider", "threads")


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
    default="backbone only",
    show_default=True,
    help="Subject of both reports that the others are put beside.",
)
@click.option(
    "--pair",
    "pairs",
    metavar="B_NAME=A_NAME",
    multiple=True,
    help="Subject that is named otherwise in A; repeatable.",
)
@click.option(
    "--despite",
    type=click.Choice(KINDS),
    multiple=True,
    help="Compare although this differs; repeatable.",
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
    baseline: str,
    pairs: tuple[str, ...],
    despite: tuple[str, ...],
    markdown: Path | None,
    as_json: bool,
    force: bool,
) -> None:
    """Hold bench report B to report A, case by case, and fail where B is slower.

    The two runs are not paired. Where both timed the bare backbone, the verdict rests on the ratio of their
    ratios to it, which cancels how fast the machine was on each day.
    """
    from ...merge.errors import CheckFailed
    from ...merge.files import atomic_file, refuse_existing
    from ..bench.compare import compare
    from ..bench.compare_views import print_comparison, to_markdown
    from ..bench.reading import read_reports

    if markdown is not None:
        refuse_existing(markdown, force=force, inputs=(a, b))
    comparison = compare(
        read_reports(a),
        read_reports(b),
        names=(str(a), str(b)),
        threshold=threshold,
        confidence=confidence,
        baseline=baseline,
        renamed=dict(map(setting, pairs)),
        despite=despite,
    )
    if as_json:
        console.json(comparison.to_json())
    else:
        print_comparison(comparison)
    if markdown is not None:
        with atomic_file(markdown) as temporary:
            temporary.write_text(to_markdown(comparison), encoding="utf-8")
        console.say(f"wrote {markdown}")
    if comparison.too_slow:
        raise CheckFailed(
            f"slower than {a} by more than the threshold",
            where=b,
            wanted=f"at most {1 + threshold:g} times",
            found="; ".join(
                f"{row.label}: {row.judged.ratio:.3f} ({row.judged.low:.3f} to {row.judged.high:.3f})"
                for row in comparison.too_slow
            ),
            do="look for the cause, or measure again with more --rounds on a quiet machine",
        )
