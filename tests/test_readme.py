"""The README's numbers are those of the stored reports."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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


def test_every_number_of_a_block_is_in_the_report(tables):
    value = json.loads((tables.RESULTS / "report" / "report.json").read_text())
    block = tables.engines()
    for line in tables.ENGINES:
        cases = value["reports"][line.comparison]["cases"]
        (case,) = (case for case in cases if case["case"]["batch"] == tables.BATCH)
        found = {result["subject"]: result for result in case["results"]}
        bare, own = case["results"][0], found[line.subject]
        (row,) = (row for row in block.splitlines() if row.startswith(f"| {line.says} |"))
        assert (
            f"| {np.median(bare['samples_ms']):.0f} ms | {np.median(own['samples_ms']):.0f} ms |"
            in row
        )
        paired = np.median(np.array(own["samples_ms"]) / np.array(bare["samples_ms"]))
        assert f"**{paired:.3f}**" in row
        assert f"| {own['work']['macs'] / bare['work']['macs']:.3f} |" in row


def test_what_stands_beside_is_held_to_our_engine_round_by_round(tables):
    value = json.loads((tables.RESULTS / "report" / "report.json").read_text())
    block = tables.others()
    for lines, ours in ((tables.OTHERS, "8 tasks"), (tables.PEFT, "8 LoRA tasks")):
        for line in lines:
            (row,) = (r for r in block.splitlines() if r.startswith(f"| {ours} | {line.says} |"))
            cells = row.split(" | ")[2:]
            for batch, cell in zip((1, tables.BATCH), cells, strict=True):
                cases = value["reports"][line.comparison]["cases"]
                (case,) = (case for case in cases if case["case"]["batch"] == batch)
                found = {
                    result["subject"]: np.array(result["samples_ms"]) for result in case["results"]
                }
                ratio = np.median(found[line.subject] / found[ours])
                assert cell.startswith(f"**{ratio:.3f}**")


@pytest.mark.parametrize(
    "change", ["95 % CI", "end of engines", "<!-- others: python bench/tables.py -->"]
)
def test_a_readme_that_was_changed_by_hand_fails(tables, tmp_path, monkeypatch, change):
    text = tables.README.read_text(encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text(text.replace(change, "changed"))
    monkeypatch.setattr(tables, "README", readme)
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit) as left:
        tables.main()
    assert left.value.code
    assert "changed" in readme.read_text()  # checking writes nothing
    if change == "95 % CI":
        monkeypatch.setattr(sys, "argv", ["tables.py"])
        tables.main()
        assert readme.read_text() == text


def test_it_runs_as_a_command():
    command = [sys.executable, ROOT / "bench" / "tables.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
