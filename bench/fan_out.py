"""One trunk pass for sixteen side networks, and UniPT's vector form against its formula; ratios of one run.

    python bench/fan_out.py runs/fan_out -o bench/results/fan_out

Weights are random: time does not read values. Three reports and a table of them with the multiply-accumulates
counted from the same graphs, the arithmetic bound of each ratio.

- `every_task`: one picture, ViT-B/16 at 224, answered for 16 UniPT tasks by one fan-out engine, against the
  single-task engine called 16 times.
- `mixed_rows`: 16 pictures, each of its own task, through one engine, against the single-task engine called
  for each picture.
- `clip4clip`: the image side network of CLIP4Clip (13 states of 50 x 768, 512 channels, 12 frames), contracted
  against the formula in its own order.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from utune_deploy.deploy.bench.case import Case
from utune_deploy.deploy.bench.measure import measure
from utune_deploy.deploy.bench.report import About, Settings, TaskFacts, write_json
from utune_deploy.deploy.bench.subject import Subject
from utune_deploy.deploy.bench.views.page import write_html
from utune_deploy.export.graph import Inputs, clean, merge_equal, serialise, trace
from utune_deploy.export.macs import macs
from utune_deploy.export.passes import rewrite
from utune_deploy.export.targets.onnxruntime import OnnxRuntimeSession
from utune_deploy.merge import methods as m
from utune_deploy.merge.attach import attach
from utune_deploy.merge.backbone import create
from utune_deploy.merge.bank import stack
from utune_deploy.merge.fan_out import FanOut, share
from utune_deploy.merge.mixed import Mixed, Single
from utune_deploy.merge.sites import measure as measure_sites
from utune_deploy.merge.tuners.unipt import UniPT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from utune_deploy.deploy.bench.report import Report
    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

TASKS = 16
CLASSES = 100
AGREES = 1e-4  # relative, between engines of the same task
FOLDERS = ("every_task", "mixed_rows", "clip4clip")  # of the reports, in the order of the table
STATES, TOKENS, CHANNELS, WIDTH, FRAMES = 13, 50, 768, 512, 12


@dataclass(frozen=True)
class Built:
    """An engine and its multiply-accumulates for one example."""

    file: bytes
    macs: int


def main() -> None:
    """Build, compare answers, time, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    settings = Settings(warmup_rounds=2, min_rounds=options.rounds, min_seconds=0, settle_calls=0)
    rows = sixteen_tasks(options.backbone, settings, options.output)
    rows += clip4clip(Settings(), options.output)
    head = "| what | against | time | multiply-accumulates |\n|---|---|---|---|\n"
    table = head + "".join(f"| {a} | {b} | {c} | {d} |\n" for a, b, c, d in rows)
    (options.output / "README.md").write_text(f"{HEADER}\n{table}")
    bounds = {folder: float(row[3]) for folder, row in zip(FOLDERS, rows, strict=True)}
    (options.output / "bounds.json").write_text(json.dumps(bounds, indent=1) + "\n")
    print(table)


HEADER = """Made by `bench/fan_out.py`; medians of paired ratios with their 95 % intervals, and the bound that
the multiply-accumulates of the same graphs set. Reports with machine, versions and raw samples are beside it.
"""


def sixteen_tasks(name: str, settings: Settings, output: Path) -> list[tuple[str, ...]]:
    """Both ways to serve sixteen side networks beside one trunk."""
    torch.manual_seed(0)
    backbone = create(name)
    sites = measure_sites(backbone)
    deltas = []
    for number in range(TASKS):
        tuned = attach(backbone, m.unipt(), classes=CLASSES, seed=number, sites=sites)
        deltas.append(tuned.delta(f"task{number}", [f"class {k}" for k in range(CLASSES)]))
    images = backbone.example(2)
    bank = stack(deltas, torch.float32)
    single = build(Single(backbone, stack(deltas[:1], torch.float32)), Inputs(images))
    groups = share(backbone, deltas, sites, torch.float32)
    every = build(FanOut(backbone, groups), Inputs(images), shared=True)
    mixed = build(Mixed(backbone, bank), Inputs(images, torch.tensor([0, 1])))
    bare = build(backbone.model, Inputs(images))
    sessions = {
        n: OnnxRuntimeSession(b.file)
        for n, b in {"one": single, "every": every, "mixed": mixed, "bare": bare}.items()
    }
    _require_same(sessions, backbone)
    about = _about(f"{name}, {TASKS} UniPT tasks", backbone, deltas)
    found = []
    for folder, subjects, batch, counted in (
        (
            "every_task",
            [
                _calls("tasks one by one", sessions["one"], TASKS, together=True),
                _subject("every task at once", "the fan-out engine.", sessions["every"]),
                _subject("backbone only", "without any tuner.", sessions["bare"]),
            ],
            1,
            every.macs / (TASKS * single.macs),
        ),
        (
            "mixed_rows",
            [
                _calls("an engine per row", sessions["one"], 1, together=False),
                _subject("one engine, mixed rows", "a task per row.", sessions["mixed"], task=True),
                _subject("backbone only", "without any tuner.", sessions["bare"]),
            ],
            TASKS,
            mixed.macs / single.macs,
        ),
    ):
        report = measure(subjects, [Case(batch)], about=about, settings=settings)
        write(report, output / folder)
        found.append(_row(report, counted))
    return found


def clip4clip(settings: Settings, output: Path) -> list[tuple[str, ...]]:
    """The contracted side network and the formula as it is written."""
    tuner = UniPT(
        widths=(CHANNELS,) * STATES, anchor=WIDTH, width=WIDTH, out=WIDTH, norm="none",
        relu_first=True, vector=True, own="first", guard="clamp", eps=1e-6, project="none",
        onto="anchor",
    )  # fmt: skip
    weights = tuner.settle(tuner.init({}, torch.Generator().manual_seed(0)))
    rows = {f"hidden.{n}": torch.randn(FRAMES, TOKENS, CHANNELS) for n in range(STATES)}
    rows["embedding"] = torch.randn(FRAMES, WIDTH)
    built = {
        name: build(_Side(tuner, weights, as_written=name == "as written"), Inputs(rows))
        for name in ("as written", "contracted")
    }
    sessions = {name: OnnxRuntimeSession(b.file) for name, b in built.items()}
    given = {name: tensor.numpy() for name, tensor in rows.items()}
    answers = [session.run(given) for session in sessions.values()]
    assert np.abs(answers[0] - answers[1]).max() <= AGREES * np.abs(answers[0]).max()
    about = About(
        "CLIP4Clip's image side network", (TaskFacts("retrieval", 0, WIDTH),), (TOKENS, CHANNELS)
    )
    subjects = [
        Subject(
            name,
            f"{b.macs / 1e6:.1f} M multiply-accumulates per frame.",
            lambda frames, task, name=name: sessions[name].run(given),
            sessions[name].provider,
        )
        for name, b in built.items()
    ]
    report = measure(subjects, [Case(FRAMES)], about=about, settings=settings)
    write(report, output / "clip4clip")
    return [_row(report, built["contracted"].macs / built["as written"].macs)]


class _Side(nn.Module):
    """A side network alone, on hidden states that are given."""

    def __init__(self, tuner: UniPT, weights: dict[str, Tensor], *, as_written: bool) -> None:
        super().__init__()
        self.tuner, self.as_written = tuner, as_written
        self.names = [name for name in weights if name != "present"]
        for name in self.names:
            self.register_buffer(name, weights[name])

    def forward(self, *rows: Tensor) -> Tensor:
        """`[B, 512]` of the states and the anchor."""
        x = [*rows[:-1], rows[-1][:, None]]
        w = {name: self.get_buffer(name) for name in self.names}
        w["present"] = rows[0].new_ones(())
        form = self.tuner.as_written if self.as_written else self.tuner.branch
        return form(x, w)[:, 0]


def build(module: nn.Module, inputs: Inputs, *, shared: bool = False) -> Built:
    """Trace, rewrite, count; `shared` where several groups run the trunk."""
    model = trace(module.eval(), inputs)
    if shared:
        merge_equal(model)
    rewrite(model)
    return Built(serialise(clean(model), {}), macs(ir.from_proto(ir.to_proto(model))).total)


def _require_same(sessions: dict[str, OnnxRuntimeSession], backbone: Backbone) -> None:
    """The engines answer alike."""
    images = backbone.example(TASKS).numpy()
    mixed = sessions["mixed"].run(images, np.arange(TASKS, dtype=np.int64))
    every = sessions["every"].run(images[:1])[0]
    one = sessions["one"].run(images[:1])
    same = sessions["mixed"].run(images[:1].repeat(TASKS, 0), np.arange(TASKS, dtype=np.int64))
    for found, wanted in ((every, same), (one[0], same[0]), (mixed[0], one[0])):
        assert np.abs(found - wanted).max() <= AGREES * np.abs(wanted).max()


def _subject(name: str, note: str, session: OnnxRuntimeSession, *, task: bool = False) -> Subject:
    def run(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return session.run(images, rows if task else None)

    return Subject(name, note, run, session.provider)


def _calls(name: str, session: OnnxRuntimeSession, times: int, *, together: bool) -> Subject:
    """A single-task engine called in turn: the whole batch for each task, or each row alone."""

    def run(images: np.ndarray, task: np.ndarray) -> np.ndarray:
        if together:
            return [session.run(images) for _ in range(times)][-1]
        return np.concatenate([session.run(images[row : row + 1]) for row in range(len(images))])

    note = f"the engine of one task, called for each {'task' if together else 'row'}."
    return Subject(name, note, run, session.provider)


def _about(name: str, backbone: Backbone, deltas: Sequence[Delta]) -> About:
    tasks = tuple(TaskFacts(d.task, row, CLASSES) for row, d in enumerate(deltas))
    return About(name, tasks, backbone.input_size)


def _row(report: Report, counted: float) -> tuple[str, ...]:
    """The second subject against the first."""
    (case,) = report.cases
    ratio = case.results[1].ratio
    time = f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
    first, second = report.subjects[0].name, report.subjects[1].name
    return second, f"{first}, {report.about.name}", time, f"{counted:.4f}"


def write(report: Report, folder: Path) -> None:
    """JSON and page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(report, folder / "report.json")
    write_html(report, folder / "report.html")


if __name__ == "__main__":
    main()
