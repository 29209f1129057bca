from __future__ import annotations

import json
from pathlib import Path

import pytest

from utune_deploy.deploy.bench.reading import read_reports, report_from
from utune_deploy.deploy.bench.report import SWEEP_FORMAT, VERSION, write_json
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError

RESULTS = Path(__file__).resolve().parents[3] / "bench" / "results"


def test_a_report_comes_back_as_it_was(report, tmp_path):
    write_json(report, tmp_path / "report.json")
    assert read_reports(tmp_path) == read_reports(tmp_path / "report.json") == {"": report}


def test_everything_that_version_3_may_hold_comes_back(full, tmp_path):
    write_json(full, tmp_path / "report.json")
    assert read_reports(tmp_path) == {"": full}


def test_a_sweep_comes_back_by_comparison(report, tmp_path):
    value = {
        "format": SWEEP_FORMAT, "version": VERSION, "reports": {"x": report.to_json(), "y": report.to_json()}
    }  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps(value))
    assert read_reports(tmp_path) == {"x": report, "y": report}


@pytest.mark.parametrize(
    "path", sorted(RESULTS.rglob("report.json")), ids=lambda path: path.parent.name
)
def test_the_reports_of_the_repository_are_read_whatever_their_version(path):
    stored = json.loads(path.read_text())
    values = stored.get("reports", {"": stored})
    reports = read_reports(path)
    assert list(reports) == list(values)
    for name, report in reports.items():
        value = values[name]
        assert report.subjects[0].engine is None or value["version"] > 1
        again = report.to_json()
        for case, wanted in zip(again["cases"], value["cases"], strict=True):
            for result, old in zip(case["results"], wanted["results"], strict=True):
                assert result == {"work": None, **old}
        assert report_from(again) == report


def spoil(value, place, new):
    for step in place[:-1]:
        value = value[step]
    value[place[-1]] = new


@pytest.mark.parametrize(
    ("place", "new", "told"),
    [
        (("format",), "other", "format utune-bench"),
        (("version",), 99, f"1 to {VERSION}"),
        (("cases", 0, "case", "mix"), "salad", "unknown task mix"),
        (("cases", 0, "results", 0, "samples_ms", 0), -1.0, "positive"),
        (("cases", 0, "results", 0, "samples_ms", 0), float("nan"), "positive"),
        (("cases", 0, "results", 0, "samples_ms"), [1.0], "equally many"),
        (("cases", 0, "results", 0, "subject"), "stranger", "in order"),
        (("settings",), None, "schema"),
        (("machine", "surprise"), 1, "surprise"),
    ],
)
def test_what_is_no_report_is_refused(report, tmp_path, place, new, told):
    value = report.to_json()
    spoil(value, place, new)
    (tmp_path / "report.json").write_text(json.dumps(value))
    with pytest.raises(IncompatibleArtefact) as refused:
        read_reports(tmp_path)
    assert told in str(refused.value)
    assert str(tmp_path / "report.json") in str(refused.value)


def test_a_file_that_is_absent_or_no_json_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such report"):
        read_reports(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(IncompatibleArtefact, match="not JSON"):
        read_reports(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(IncompatibleArtefact, match="no report"):
        read_reports(tmp_path / "x.json")
