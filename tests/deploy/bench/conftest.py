"""A clock that only subjects move, and a report made with it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from utune_deploy.deploy.bench.case import Case
from utune_deploy.deploy.bench.ceilings import Ceilings
from utune_deploy.deploy.bench.footprint import Footprint
from utune_deploy.deploy.bench.machine import Load, Machine, Memory
from utune_deploy.deploy.bench.measure import measure
from utune_deploy.deploy.bench.nodes import NodeTime, NodeTimes
from utune_deploy.deploy.bench.report import (
    TIMED,
    About,
    CaseResult,
    Report,
    Result,
    Settings,
    SubjectFacts,
    TaskFacts,
)
from utune_deploy.deploy.bench.state import DeviceState, State, States
from utune_deploy.deploy.bench.subject import Subject
from utune_deploy.deploy.bench.summary import paired_ratio, summarise
from utune_deploy.deploy.bench.work import GraphFacts, Work


@dataclass
class FakeClock:
    """Nanoseconds; `log` keeps who was called."""

    now: int = 0
    log: list[str] = field(default_factory=list)

    def __call__(self) -> int:
        return self.now

    def subject(self, name, durations_ms, note="", **facts):
        """A subject that takes the given durations in turn, and the last one from then on."""
        durations = iter(durations_ms)
        last = [durations_ms[-1]]

        def run(images, task):
            self.log.append(name)
            last[0] = next(durations, last[0])
            self.now += round(last[0] * 1e6)
            return np.zeros((len(images), 3), np.float32)

        return Subject(name, note, run, **facts)


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def about():
    return About(
        name="three tasks",
        tasks=(TaskFacts("pets", 0, 37), TaskFacts("flowers", 2, 102), TaskFacts("birds", 5, 200)),
        image_shape=(3, 4, 4),
        max_batch=16,
        facts=(("backbone", "vit_tiny"),),
    )


@pytest.fixture
def report(clock, about):
    """Three subjects, five cases, every latency known: no two rows share a number."""
    noise = np.random.default_rng(0).uniform(1, 1.2, 4000)
    subjects = [
        clock.subject(
            "backbone", list(10 * noise), "frozen", provider="CPU", opened_bytes=90 << 20
        ),
        clock.subject("mixed", list(10.7 * noise[::-1]), "all tasks", provider="CPU"),
        clock.subject("separate", list(17 * noise), "one engine each", provider="CPU"),
    ]
    cases = [Case(1, "one"), Case(4, "one"), Case(1), Case(4), Case(8, "zipf")]
    return measure(
        subjects,
        cases,
        about=about,
        settings=Settings(warmup_rounds=2, min_rounds=30, min_seconds=0, seed=3),
        threads=2,
        command="utune-deploy bench pets --batch 1",
        clock=clock,
    )


@pytest.fixture
def full(report):
    """The report with everything that version 3 may hold, every number chosen."""
    counts = {"backbone": (0, None), "mixed": (8, 4), "separate": (64, 4)}
    counts |= {"wide": (64, 8)}
    parts = ("attention", "tuner branches", "FFN", "norms")
    subjects, macs = [], {}
    for index, (name, (tasks, rank)) in enumerate(counts.items()):
        macs[name] = 1_000_000 * (4 + index)
        case = report.cases[3].case
        subjects.append(
            replace(
                report.subjects[min(index, 2)],
                name=name,
                opened_bytes=None,
                task_count=tasks,
                engine="onnxruntime, fp32, opset 23",
                rank=rank,
                graph=GraphFacts(1_000_000 * (1 + tasks), 10 + index, 2),
                footprint=Footprint(
                    1_100_000, 2_000_000, 3_000_000 + 50_000 * tasks, None if index else 9_000_000, 12.5, 4.25, 4
                ),
                nodes=NodeTimes(
                    case, 5, 12.0, 10.0, 9, 2,
                    tuple(NodeTime(part, 3, ms) for part, ms in zip(parts, (5.0, 2.0, 2.0, 1.0), strict=True)),
                    (NodeTime("MatMul", 9, 9.99), NodeTime("Shape", 1, 0.01)),
                ),
            )
        )  # fmt: skip
    cases = tuple(
        replace(
            case,
            results=tuple(
                replace(
                    case.results[min(index, 2)],
                    subject=name,
                    work=Work(case.case.batch * macs[name], 4_000_000, 100_000 * case.case.batch),
                )
                for index, name in enumerate(counts)
            ),
        )
        for case in report.cases
    )
    device = DeviceState("A Device", 1400, None, 70, 250.5, ("SwPowerCap",))
    return replace(
        report,
        subjects=tuple(subjects),
        cases=cases,
        ceilings=Ceilings("CPU", "float32", 5e10, (1024, 1024, 1024), 8e9, 192_000_000),
        states=States(State(2000.0, (device,)), State(1500.0, (device,))),
        machine=replace(report.machine, cache_bytes=32 << 20),
    )


@pytest.fixture
def planted(about):
    """`planted({(batch, mix): {subject: samples}}, **changes)`: a report whose samples are given."""

    def build(cases, **changes):
        names = list(next(iter(cases.values())))
        machine = Machine(
            "A Fast One", 2, 2, 2, 8 << 30, None, (), "Linux 6 x86_64", "3.11.7",
            {"utune-deploy": "0.1.0", "numpy": "2.4.6", "onnxruntime-gpu": "1.31.1"},
        )  # fmt: skip
        results = []
        for (batch, mix), samples in cases.items():
            first = samples[names[0]]
            case = Case(batch, mix)
            results.append(
                CaseResult(
                    case,
                    tuple(case.task_rows([task.row for task in about.tasks], 0).tolist()),
                    tuple(
                        Result(
                            name,
                            tuple(map(float, samples[name])),
                            summarise(samples[name], batch),
                            paired_ratio(samples[name], first, 0) if name != names[0] else None,
                        )
                        for name in names
                    ),
                )
            )
        facts = {
            "about": replace(
                about, facts=(("backbone", "vit"), ("engine", "onnxruntime, fp32, opset 23"))
            ),
            "timed": TIMED,
            "subjects": tuple(SubjectFacts(name, "", "CPU", 100 << 20) for name in names),
            "cases": tuple(results),
            "settings": Settings(min_rounds=len(first)),
            "threads": 2,
            "machine": machine,
            "load": Load(0.1, 1.0),
            "memory": Memory(1 << 30, 1 << 30, 1 << 30),
            "date": "2026-11-28T09:00:00+00:00",
            "command": "utune-deploy bench pets",
        }
        return Report(**{**facts, **changes})

    return build
