from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from utune_deploy.deploy.bench.case import Case
from utune_deploy.deploy.bench.cautions import P99_SAMPLES, find_cautions
from utune_deploy.deploy.bench.machine import Load
from utune_deploy.deploy.bench.report import CaseResult, Result, SubjectFacts
from utune_deploy.deploy.bench.summary import summarise

QUIET = [10.0, 10.1] * (P99_SAMPLES // 2)


@pytest.fixture
def machine(report):
    return replace(report.machine, usable_cores=2, governor="performance")


def case(samples):
    return CaseResult(Case(1), (0,), (Result("A", tuple(samples), summarise(samples, 1), None),))


def facts(*providers):
    return [SubjectFacts(f"subject {p}", "", p, None) for p in providers]


def test_a_clean_run_has_none(machine):
    assert find_cautions([case(QUIET)], facts("CPU", "CPU"), machine, Load(0.1, 2.0)) == ()


@pytest.mark.parametrize(
    ("samples", "providers", "load", "governor", "wanted"),
    [
        ([10.0, 20.0] * 100, ("CPU",), Load(0, 0), None, "33 %"),
        (QUIET, ("CPU",), Load(2.5, 1.0), None, "2.5 before"),
        (QUIET, ("CPU",), Load(0.0, 3.0), None, "3.0 after"),
        (QUIET[:-1], ("CPU",), Load(0, 0), None, "the fewest: 199"),
        (QUIET, ("CPU", "CUDA"), Load(0, 0), None, "CPU, CUDA"),
        (QUIET, ("CPU",), Load(0, 0), "powersave", "powersave"),
    ],
)
def test_each_doubt_is_one_sentence(machine, samples, providers, load, governor, wanted):
    machine = replace(machine, governor=governor)
    (sentence,) = find_cautions([case(samples)], facts(*providers), machine, load)
    assert wanted in sentence
    assert sentence.endswith(".")


def test_a_run_that_became_slower_is_unstable(machine):
    samples = list(np.linspace(10, 10.9, P99_SAMPLES))
    (sentence,) = find_cautions([case(samples)], facts("CPU"), machine, Load(0, 0))
    assert "Unstable" in sentence
    assert "1.06 times" in sentence


def test_few_samples_are_not_called_unstable(machine):
    said = find_cautions([case([10.0, 10.0, 11.0] * 2)], facts("CPU"), machine, Load(0, 0))
    assert not any("Unstable" in sentence for sentence in said)


def test_a_ceiling_below_a_subject_is_none(machine, full):
    low = replace(full.ceilings, flops_per_second=1e6)
    said = find_cautions(full.cases, full.subjects, machine, Load(0, 0), low)
    assert any("of the product's ceiling" in sentence for sentence in said)
    said = find_cautions(full.cases, full.subjects, machine, Load(0, 0), full.ceilings)
    assert not any("ceiling" in sentence for sentence in said)


def test_work_that_is_not_counted_is_named(machine, full):
    results = tuple(replace(result, work=None) for result in full.cases[0].results)
    cases = [replace(full.cases[0], results=results)]
    said = find_cautions(cases, full.subjects[:1], machine, Load(0, 0))
    assert any("The work of backbone is not counted" in sentence for sentence in said)
