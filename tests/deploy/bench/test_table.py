from __future__ import annotations

from dataclasses import replace
from io import StringIO

from rich.console import Console

from utune_deploy.deploy.bench.table import print_table
from utune_deploy.deploy.bench.wording import milliseconds, rate, verdict


def printed(report, width=80):
    console = Console(file=StringIO(), width=width)
    print_table(report, console)
    return console.file.getvalue()


def test_the_table_holds_every_number_at_eighty_columns(report):
    text = printed(report)
    for case in report.cases:
        assert case.case.label in text
        for result in case.results:
            numbers = result.summary
            for value in (numbers.p50_ms, numbers.p90_ms, numbers.p95_ms, numbers.p99_ms):
                assert milliseconds(value) in text
            assert rate(numbers.images_per_second) in text
            if result.ratio is not None:
                assert f"{result.ratio.median:.3f}" in text
                assert f"{result.ratio.low:.3f}-{result.ratio.high:.3f}" in text


def test_it_goes_to_standard_output_with_its_warnings(report, capsys):
    print_table(replace(report, warnings=("the moon was full",)))
    captured = capsys.readouterr()
    assert "the moon was full" in captured.out
    assert captured.err == ""


def test_names_are_not_read_as_markup(report):
    subjects = (replace(report.subjects[0], name="[bold]x[/bold]"), *report.subjects[1:])
    case = report.cases[0]
    renamed = replace(case.results[0], subject="[red]x[/red]")
    cases = (replace(case, results=(renamed, *case.results[1:])),)
    text = printed(replace(report, subjects=subjects, cases=cases), width=120)
    assert "[red]x[/red]" in text
    assert "[bold]x[/bold]" in text


def test_the_verdict_speaks_of_the_largest_mixed_batch(report):
    ratio = report.cases[-1].results[1].ratio
    wanted = f"mixed: a mixed batch of 8 costs {ratio.median:.2f}"
    assert verdict(report).startswith(wanted)
    assert verdict(report).endswith(f"(95 % CI {ratio.low:.2f} to {ratio.high:.2f})")


def test_the_verdict_of_unmixed_batches_does_not_call_them_mixed(report):
    unmixed = replace(report, cases=report.cases[:2])
    assert "a batch of 4 costs" in verdict(unmixed)


def test_the_verdict_of_a_baseline_alone_is_its_latency(report):
    cases = tuple(replace(case, results=case.results[:1]) for case in report.cases)
    alone = replace(report, subjects=report.subjects[:1], cases=cases)
    p50 = milliseconds(cases[-1].results[0].summary.p50_ms)
    assert verdict(alone) == f"backbone: {p50} ms for a mixed batch of 8"


def test_a_pipe_gets_the_whole_table(report, capsys, monkeypatch):
    """Nobody sees how wide it is: names of any length leave room for the numbers."""
    monkeypatch.delenv("COLUMNS", raising=False)
    long = "an engine of a name that takes most of a terminal's eighty columns by itself"
    subjects = tuple(replace(s, name=f"{long} {s.name}") for s in report.subjects)
    cases = tuple(
        replace(
            case, results=tuple(replace(r, subject=f"{long} {r.subject}") for r in case.results)
        )
        for case in report.cases
    )
    print_table(replace(report, subjects=subjects, cases=cases))
    lines = capsys.readouterr().out.splitlines()
    ratio = report.cases[0].results[1].ratio
    (row,) = [line for line in lines if f"{ratio.low:.3f}-{ratio.high:.3f}" in line][:1]
    assert row.startswith(f"{long} {report.subjects[1].name}")
