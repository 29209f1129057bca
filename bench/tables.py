"""The README's numbers from the stored reports, between marker comments; nothing there is typed by hand.

    python bench/tables.py            write them into README.md
    python bench/tables.py --check    leave with 1 where they are not those of the reports
    python bench/tables.py --pages    draw the reports' pages again

A block is `<!-- NAME: python bench/tables.py -->`, the text, `<!-- end of NAME -->`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from utune_deploy.deploy.bench.reading import read_reports
from utune_deploy.deploy.bench.report import FORMAT, SWEEP_FORMAT
from utune_deploy.deploy.bench.summary import paired_ratio
from utune_deploy.deploy.bench.views.page import write_html, write_sweep_html

if TYPE_CHECKING:
    from utune_deploy.deploy.bench.report import CaseResult, Result
    from utune_deploy.deploy.bench.summary import Ratio

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
SEED = 0  # of the bootstrap


BATCH = 8  # of the README's tables


class Line(NamedTuple):
    """One row of a table: what the README calls a subject of a comparison."""

    says: str
    comparison: str
    subject: str


TASKS = "tasks in one engine"
ENGINES = (
    Line("one task, rank-64 dual adapters, fused", TASKS, "one task"),
    Line("eight such tasks, a different one in every row", TASKS, "8 tasks"),
    Line("sixty-four such tasks in one engine, eight of them in the batch", TASKS, "64 tasks"),
    Line("one LoRA task, folded", TASKS, "one LoRA task, folded"),
    Line("Swin-B, one task of BAPAT of rank 16", "Swin-BAPAT", "one Swin-BAPAT task"),
    Line("ViT-B, sixteen tasks of UniPT beside it", "UniPT", "16 UniPT tasks"),
    Line("the same, every row answered for all sixteen", "UniPT", "16 UniPT tasks, every task"),
)
WAYS = "other ways to serve eight tasks"
OTHERS = (
    Line("an engine per task, each called with its rows", WAYS, "an engine per task, in turn"),
    Line("the same graph without our passes, in ONNX Runtime", WAYS, "unfused"),
    Line("the same mixed batch in torch, eager", WAYS, "torch, eager"),
    Line("through `torch.compile`", WAYS, "torch, compiled"),
    Line("our engine with the backbone's products in int8", "precision", "8 tasks in int8"),
)
PEFT = (
    Line("PEFT's `adapter_names`, eager", "beside PEFT", "PEFT, mixed batch"),
    Line("through `torch.compile`", "beside PEFT", "PEFT, mixed batch, compiled"),
    Line("an engine per task, folded, each called with its row", "beside PEFT", "an engine per task, in turn"),
)  # fmt: skip
FAN_OUT = {
    "every_task": (
        "one picture answered for 16 UniPT tasks beside ViT-B/16, one engine",
        "16 single-task runs",
        "every task at once",
    ),
    "mixed_rows": (
        "16 pictures, each of another of these tasks, one engine",
        "a single-task engine per row",
        "one engine, mixed rows",
    ),
    "clip4clip": (
        "UniPT on CLIP4Clip's frames, contracted",
        "the formula in its own order",
        "contracted",
    ),
}


def engines() -> str:
    """Engines beside their own backbone."""
    rows = []
    for line in ENGINES:
        case = _case(line.comparison)
        found = _result(case, line.subject)
        rows.append(
            f"| {line.says} | {case.results[0].summary.p50_ms:.0f} ms | {found.summary.p50_ms:.0f} ms "
            f"| {_ratio(found.ratio, '95 % CI ')} | {case.bound(found):.3f} |"
        )
    head = "| engine, batch of 8 | backbone only | engine | ratio | arithmetic bound |\n|---|---|---|---|---|"
    return "\n".join([head, *rows])


def others() -> str:
    """What else serves the same tasks, beside our engine of the same run: a row alone, and a batch."""
    rows = []
    for lines, what in ((OTHERS, "8 tasks"), (PEFT, "8 LoRA tasks")):
        for line in lines:
            cells = [what, line.says]
            for batch in (1, BATCH):
                case = _case(line.comparison, batch)
                found, ours = _result(case, line.subject), _result(case, what)
                ratio = paired_ratio(found.samples_ms, ours.samples_ms, SEED)
                cells.append(_ratio(ratio, "95 % CI "))
            rows.append(f"| {' | '.join(cells)} |")
    head = (
        f"| tasks | served by | time beside ours, one row | a batch of {BATCH} |\n|---|---|---|---|"
    )
    return "\n".join([head, *rows])


def fan_out() -> str:
    """One trunk pass for many side networks."""
    bounds = json.loads((RESULTS / "fan_out" / "bounds.json").read_text(encoding="utf-8"))
    rows = []
    for folder, (says, against, subject) in FAN_OUT.items():
        (report,) = read_reports(RESULTS / "fan_out" / folder).values()
        (case,) = report.cases
        ratio = _ratio(_result(case, subject).ratio, "95 % CI ")
        rows.append(f"| {says} | {against} | {ratio} | {bounds[folder]:.3f} |")
    return "\n".join(["| | time against | ratio | arithmetic bound |\n|---|---|---|---|", *rows])


BLOCKS = {"engines": engines, "others": others, "fan_out": fan_out}


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


def draw_pages() -> None:
    """Every page of a report anew, as the code now draws it."""
    for path in sorted(RESULTS.rglob("report.json")):
        kind = json.loads(path.read_text(encoding="utf-8"))["format"]
        page = path.with_name("report.html")
        if kind == FORMAT:
            (report,) = read_reports(path).values()
            write_html(report, page)
        elif kind == SWEEP_FORMAT:
            write_sweep_html(read_reports(path), path.parent.name, page)


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--pages", action="store_true")
    options = parser.parse_args()
    if options.pages:
        draw_pages()
    text = README.read_text(encoding="utf-8")
    made = filled(text)
    if options.check and made != text:
        raise SystemExit(
            f"{README.name} does not say what the reports say: run python bench/tables.py"
        )
    README.write_text(made, encoding="utf-8")


def _case(comparison: str, batch: int = BATCH) -> CaseResult:
    report = read_reports(RESULTS / "report")[comparison]
    return next(case for case in report.cases if case.case.batch == batch)


def _result(case: CaseResult, subject: str) -> Result:
    return next(result for result in case.results if result.subject == subject)


def _ratio(ratio: Ratio | None, of: str = "") -> str:
    assert ratio is not None  # a baseline has none, and no line names one
    return f"**{ratio.median:.3f}** ({of}{ratio.low:.3f} to {ratio.high:.3f})"


if __name__ == "__main__":
    main()
