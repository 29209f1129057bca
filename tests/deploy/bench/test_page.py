from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from utune_deploy.deploy.bench import wording
from utune_deploy.deploy.bench.summary import Ratio
from utune_deploy.deploy.bench.views.page import Section, render_html, write_html, write_sweep_html
from utune_deploy.deploy.bench.views.trends import Point, overhead_chart
from utune_deploy.deploy.page.drawing import Axis

VOID = {"meta", "br", "input"}
SVG_EMPTY = {"line", "circle", "rect", "path", "polygon", "polyline"}


class Reader(HTMLParser):
    """Collects cells, texts and attributes, and holds every tag to being closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.cells, self.texts = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag in ("td", "th", "text", "dd", "pre"):
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in SVG_EMPTY
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if "td" in self.open or {"th", "text", "dd", "pre"} & set(self.open):
            self.cells[-1] += data


def read(html):
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def test_every_number_stands_in_a_table(report):
    cells = [cell.strip() for cell in read(render_html(report)).cells]
    for case in report.cases:
        assert case.case.label in cells
        for result in case.results:
            numbers, ratio = result.summary, result.ratio
            for value in (
                numbers.min_ms,
                numbers.mean_ms,
                numbers.std_ms,
                numbers.max_ms,
                numbers.p50_ms,
                numbers.p90_ms,
                numbers.p95_ms,
                numbers.p99_ms,
            ):
                assert wording.milliseconds(value) in cells
            assert wording.rate(numbers.images_per_second) in cells
            assert f"{100 * numbers.cv:.1f} %" in cells
            if ratio is not None:
                for value in (ratio.median, ratio.low, ratio.high):
                    assert f"{value:.3f}" in cells
    for _, text in (*wording.facts(report), *wording.environment(report), *report.about.facts):
        assert text in cells
    for task in report.about.tasks:
        assert task.name in cells
    assert report.command in cells


def test_verdict_conditions_and_warnings_are_said(report):
    text = "".join(read(render_html(replace(report, warnings=("it was late",)))).texts)
    assert wording.verdict(report) in text
    assert report.timed in text
    assert "it was late" in text


def test_a_clean_run_shows_no_warnings(report):
    assert 'class="warnings"' not in render_html(replace(report, warnings=()))


def test_the_page_fetches_nothing_and_runs_nothing(report):
    html = render_html(report)
    assert not re.search(r"https?://|url\(|@import|xlink", html)
    reader = read(html)
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & set(reader.tags)
    names = {name for name, _ in reader.attributes}
    assert not {"src", "href", "srcset"} & names
    assert not [name for name in names if name.startswith("on")]


def test_there_are_four_charts_without_a_number_that_is_none(report):
    html = render_html(report)
    assert html.count("<svg") == 4
    assert not re.search(r'="[^"]*\b(nan|inf)\b', html)


def test_charts_take_their_colours_from_the_style_sheet(report):
    for name, value in read(render_html(report)).attributes:
        assert name not in ("fill", "stroke", "style"), value


def test_one_batch_size_has_no_chart_against_batch_size(report):
    html = render_html(replace(report, cases=report.cases[:1]))
    assert html.count("<svg") == 2


def test_a_baseline_alone_has_no_ratios(report):
    cases = tuple(replace(case, results=case.results[:1]) for case in report.cases)
    html = render_html(replace(report, subjects=report.subjects[:1], cases=cases))
    assert html.count("<svg") == 3
    assert "Cost beside" not in html


def test_equal_samples_can_be_drawn(report):
    """No spread at all: axes still need a length."""
    case = report.cases[0]
    results = tuple(replace(result, samples_ms=(5.0,) * 30) for result in case.results)
    read(render_html(replace(report, cases=(replace(case, results=results),))))


def test_sections_of_the_caller_become_tables(report):
    sections = [
        Section(
            "Accuracy per task", [("task", "top-1"), ("pets", "93.2 %"), ("cars", 0.5)], "held out"
        ),
        ("Answers", [("picture", "answer"), ("cat.jpg", "Abyssinian")]),
    ]
    html = render_html(report, sections)
    reader = read(html)
    assert {"Accuracy per task", "held out", "Answers"} <= set(reader.texts)
    assert {"93.2 %", "0.5", "cat.jpg", "Abyssinian"} <= set(reader.cells)
    assert '<td class="n">93.2 %</td>' in html
    assert "<td>Abyssinian</td>" in html


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", '"><img src=x onerror=y>', "a & b"]
)
def test_every_text_is_escaped(report, hostile):
    case = report.cases[0]
    results = tuple(replace(result, subject=hostile) for result in case.results)
    subjects = tuple(
        replace(s, name=hostile, note=hostile, provider=hostile) for s in report.subjects
    )
    task = replace(report.about.tasks[0], name=hostile)
    about = replace(report.about, name=hostile, tasks=(task,), facts=((hostile, hostile),))
    report = replace(
        report,
        about=about,
        subjects=subjects,
        cases=(replace(case, results=results), *report.cases[1:]),
        command=hostile,
        timed=hostile,
        warnings=(hostile,),
        machine=replace(report.machine, cpu=hostile, versions={hostile: hostile}),
    )
    html = render_html(report, [(hostile, [(hostile,), (hostile,)], hostile)])
    reader = read(html)
    assert not {"script", "img"} & set(reader.tags)
    assert "<script" not in html
    assert html.count("<title>") == 5  # the page's and one per chart
    assert hostile in reader.cells


def test_the_file_is_written_whole(report, tmp_path):
    path = tmp_path / "new" / "report.html"
    write_html(report, path, [("More", [("a",), (1,)])])
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert text.rstrip().endswith("</html>")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_axes_map_ends_and_choose_round_ticks():
    axis = Axis(0, 100, 10, 110)
    assert (axis(0), axis(50), axis(100)) == (10, 60, 110)
    assert axis.ticks(5) == [0, 20, 40, 60, 80, 100]
    assert Axis(0.98, 1.11, 0, 1).ticks(6) == [1.0, 1.025, 1.05, 1.075, 1.1]
    log = Axis(1, 100, 0, 200, log=True)
    assert log(10) == pytest.approx(100)
    assert log.ticks(5) == [1, 2, 5, 10, 20, 50, 100]


def test_work_memory_and_nodes_have_their_charts_and_tables(full):
    html = render_html(full)
    titles = set(re.findall("<title>(.*?)</title>", html))
    assert {
        "Roofline",
        "Memory against the number of tasks",
        "Time by part of the model",
        "Overhead against the number of tasks",
        "Overhead against the rank",
        "Throughput against latency",
    } <= titles
    assert not re.search(r'="[^"]*\b(nan|inf)\b', html)
    cells = [cell.strip() for cell in read(html).cells]
    for wanted in (
        "1.250",
        "tuner branches",
        "50 %",
        "MatMul",
        "2,000 MHz before, 1,500 MHz after",
    ):
        assert wanted in cells


def test_a_sweep_draws_the_overhead_over_all_its_reports(full, tmp_path):
    few = replace(full, subjects=(full.subjects[0], *full.subjects[1:]))
    write_sweep_html({"a": few, "b": full}, "nightly", tmp_path / "x.html")
    first = (tmp_path / "x.html").read_text().partition("</main>")[0]
    assert "Overhead against the number of tasks" in first
    assert "Roofline" not in first


def test_overheads_are_joined_only_within_a_comparison():
    """And not where two engines of it have as many tasks: they differ in something else."""
    one, many = Ratio(1.0, 1.0, 1.0, 0.95, 9), Ratio(1.2, 1.1, 1.3, 0.95, 9)

    def lines(*points):
        drawn = [(tasks, Point(name, "s", "c", tasks, 8, r, None)) for name, tasks, r in points]
        return overhead_chart([drawn], "number of tasks").count('class="line"')

    assert lines(("a", 1, one), ("a", 8, many)) == 1
    assert lines(("a", 1, one), ("a", 8, many), ("b", 1, one), ("b", 16, many)) == 2
    assert lines(("a", 1, one), ("b", 8, many)) == 0
    assert lines(("a", 8, one), ("a", 8, many)) == 0


def test_a_sweep_folds_each_comparison_under_its_name_and_verdict(report, tmp_path):
    path = tmp_path / "x.html"
    write_sweep_html({"a": report, "<b>": report}, "nightly", path)
    html = path.read_text()
    reader = read(html)
    assert reader.tags.count("details") == reader.tags.count("summary") == 2
    assert f"<summary><h2>&lt;b&gt;</h2> <span>{wording.verdict(report)}</span></summary>" in html
    links = {value for name, value in reader.attributes if name == "href"}
    assert links == {"#comparison-1", "#comparison-2"}
    assert {f"#{value}" for name, value in reader.attributes if name == "id"} >= links
    assert "script" not in reader.tags


def test_a_comparison_alone_is_not_folded(report, tmp_path):
    write_sweep_html({"a": report}, "nightly", tmp_path / "x.html")
    html = (tmp_path / "x.html").read_text()
    assert "<details" not in html
    assert f"<h1>{wording.verdict(report)}</h1>" in html
