"""The README's numbers from the stored reports, between marker comments; nothing there is typed by hand.

    python bench/tables.py            write them into README.md
    python bench/tables.py --check    leave with 1 where they are not those of the reports
    python bench/tables.py --pages    draw the reports' pages again

A block is `<!-- NAME: python bench/tables.py -->`, the text, `<!-- end of NAME -->`. The arithmetic bounds are the reports'
own since version 3 of their format; those of older reports were counted from the same graphs (`export.macs`) and stand
here as `bound_before_version_3`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utune_deploy.deploy.bench.page import write_html
from utune_deploy.deploy.bench.reading import read_reports

if TYPE_CHECKING:
    from utune_deploy.deploy.bench.report import Report, Result

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Line:
    """One row of a table: what the README calls a subject, and the bound of its ratio where its report has none."""

    says: str
    subject: str
    bound_before_version_3: str


VIT_B = (
    Line("one task, rank-64 dual adapters, fused", "fused", "1.028"),
    Line("eight such tasks, a different one in every row", "tasks8", "1.028"),
    Line("sixty-four such tasks in one engine, eight of them in the batch", "tasks64", "1.028"),
    Line("one LoRA task, folded", "folded", "1"),
)
FAN_OUT = (
    (
        "every_task",
        "16 single-task runs",
        Line(
            "one picture answered for 16 UniPT tasks beside ViT-B/16, one engine",
            "every task at once",
            "0.101",
        ),
    ),
    (
        "mixed_rows",
        "a single-task engine per row",
        Line(
            "16 pictures, each of another of these tasks, one engine",
            "one engine, mixed rows",
            "1.000",
        ),
    ),
    (
        "clip4clip",
        "the formula in its own order",
        Line("UniPT on CLIP4Clip's frames, contracted", "contracted", "0.068"),
    ),
)


def vit_b() -> str:
    """The engines beside their backbone."""
    report = _report("vit_b_dual64")
    base = report.cases[0].results[0]
    rows = [f"| backbone only | {base.summary.p50_ms:.0f} ms | 1 | |"]
    for line in VIT_B:
        found = _result(report, line.subject)
        p50 = f"{found.summary.p50_ms:.0f} ms"
        rows.append(
            f"| {line.says} | {p50} | {_ratio(found, '95 % CI ')} | {_bound(report, line)} |"
        )
    head = "| engine | p50 | against the bare backbone | arithmetic bound |\n|---|---|---|---|"
    return "\n".join([head, *rows])


def peft() -> str:
    """PEFT's mixed batch beside one engine of the same tasks."""
    report = _report("peft_mixed")
    eager, compiled = (
        _result(report, f"PEFT, mixed batch{suffix}") for suffix in ("", ", compiled")
    )
    return (
        f"PEFT takes {_ratio(eager, '95 % CI ')} times as long eager, and {_ratio(compiled)} through "
        "`torch.compile`."
    )


def fan_out() -> str:
    """One trunk pass for many side networks."""
    rows = [
        f"| {line.says} | {against} | {_ratio(_result(_report(f'fan_out/{folder}'), line.subject), '95 % CI ')} "
        f"| {_bound(_report(f'fan_out/{folder}'), line)} |"
        for folder, against, line in FAN_OUT
    ]
    return "\n".join(["| | time against | ratio | arithmetic bound |\n|---|---|---|---|", *rows])


BLOCKS = {"vit_b": vit_b, "peft": peft, "fan_out": fan_out}


def filled(text: str) -> str:
    """The text with every block made from the reports.

    Raises:
        SystemExit: A block is not there exactly once.
    """
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name}: python bench/tables.py -->", f"<!-- end of {name} -->"
        if (text.count(begin), text.count(end)) != (1, 1) or text.index(end) < text.index(begin):
            raise SystemExit(f"{README.name}: wanted once and in order: {begin} and {end}")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{make()}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--pages", action="store_true")
    options = parser.parse_args()
    if options.pages:
        for path in sorted(RESULTS.rglob("report.json")):
            (report,) = read_reports(path).values()
            write_html(report, path.with_name("report.html"))
    text = README.read_text(encoding="utf-8")
    made = filled(text)
    if options.check and made != text:
        raise SystemExit(
            f"{README.name} does not say what the reports say: run python bench/tables.py"
        )
    README.write_text(made, encoding="utf-8")


def _report(folder: str) -> Report:
    (report,) = read_reports(RESULTS / folder).values()
    return report


def _result(report: Report, subject: str) -> Result:
    (case,) = report.cases
    return next(result for result in case.results if result.subject == subject)


def _bound(report: Report, line: Line) -> str:
    (case,) = report.cases
    bound = case.bound(_result(report, line.subject))
    return line.bound_before_version_3 if bound is None else f"{bound:.3f}"


def _ratio(result: Result, of: str = "") -> str:
    ratio = result.ratio
    assert ratio is not None  # a baseline has none, and no line names one
    return f"**{ratio.median:.3f}** ({of}{ratio.low:.3f} to {ratio.high:.3f})"


if __name__ == "__main__":
    main()
