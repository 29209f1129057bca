"""The README's numbers are those of the stored reports."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from utune_deploy.deploy.bench.work import Work

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tables():
    spec = importlib.util.spec_from_file_location("bench_tables", ROOT / "bench" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_readme_says_what_the_reports_say(tables):
    text = tables.README.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run python bench/tables.py"


def test_every_number_of_a_block_is_in_a_report(tables):
    value = json.loads((tables.RESULTS / "vit_b_dual64" / "report.json").read_text())
    (case,) = value["cases"]
    for result in case["results"]:
        assert f"{result['summary']['p50_ms']:.0f} ms" in tables.vit_b()
        if result["ratio"]:
            assert (
                f"{result['ratio']['low']:.3f} to {result['ratio']['high']:.3f}" in tables.vit_b()
            )


def test_a_bound_is_the_reports_own_where_it_has_one(tables):
    report = tables._report("vit_b_dual64")
    line = tables.Line("", "fused", "old")
    (case,) = report.cases
    old = [replace(result, work=None) for result in case.results]
    counted = [replace(result, work=Work(1000 + 31 * n, 1, 1)) for n, result in enumerate(old)]
    for results, wanted in ((old, "old"), (counted, None)):
        changed = replace(report, cases=(replace(case, results=tuple(results)),))
        number = [result.subject for result in results].index("fused")
        assert tables._bound(changed, line) == (wanted or f"{1 + 0.031 * number:.3f}")


@pytest.mark.parametrize(
    "change", ["1.048", "end of vit_b", "<!-- peft: python bench/tables.py -->"]
)
def test_a_readme_that_was_changed_by_hand_fails(tables, tmp_path, monkeypatch, change):
    text = tables.README.read_text(encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text(text.replace(change, "1.000"))
    monkeypatch.setattr(tables, "README", readme)
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit) as left:
        tables.main()
    assert left.value.code
    assert "1.000" in readme.read_text()  # checking writes nothing
    if change == "1.048":
        monkeypatch.setattr(sys, "argv", ["tables.py"])
        tables.main()
        assert readme.read_text() == text


def test_it_runs_as_a_command():
    command = [sys.executable, ROOT / "bench" / "tables.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
