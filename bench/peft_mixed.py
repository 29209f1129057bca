"""A batch whose rows belong to eight LoRA adapters: one engine against PEFT's mixed batch, in one run.

    python bench/peft_mixed.py runs/peft_mixed -o bench/results/peft_mixed

ViT-B/16 at 224, fp32, LoRA of rank 16 on qkv and a classifier of its own per task, random weights: time does
not read values. The adapters are saved by PEFT and read by our importer, and before anything is timed all
subjects must answer alike. Against the engine: PEFT's `adapter_names`, eager and through `torch.compile`; the
folded engine of each task called in turn for its row; the backbone alone.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import peft
import torch

from utune_deploy.deploy.bench.case import Case
from utune_deploy.deploy.bench.measure import measure
from utune_deploy.deploy.bench.page import write_html
from utune_deploy.deploy.bench.report import About, Settings, TaskFacts, write_json
from utune_deploy.deploy.bench.subject import Subject, open_subject
from utune_deploy.deploy.bench.table import print_table
from utune_deploy.deploy.graphs import backbone_engine, finish
from utune_deploy.export.engine import Device
from utune_deploy.export.graph import Inputs, serialise, trace
from utune_deploy.export.targets.onnxruntime import OnnxRuntimeSession
from utune_deploy.merge.backbone import create, wrap
from utune_deploy.merge.bank import stack
from utune_deploy.merge.fold import fold
from utune_deploy.merge.importers.peft import read_peft
from utune_deploy.merge.mixed import Mixed
from utune_deploy.merge.sites import measure as measure_sites

if TYPE_CHECKING:
    from utune_deploy.merge.backbone import Backbone

NAME, TASKS, RANK, CLASSES, BATCH = "vit_base_patch16_224", 8, 16, 100, 8
AGREES = 1e-4  # of the largest logit, between fp32 engines of the same task


def main() -> None:
    """Build, compare answers, time, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = Device(threads=options.threads)
    tuned = adapters(options.scratch)
    backbone = wrap(plain(), NAME, {})
    names = [f"task{n}" for n in range(TASKS)]
    sites = measure_sites(backbone)
    foreign = [read_peft(options.scratch / name, backbone) for name in names]
    deltas = [f.delta(n, backbone) for f, n in zip(foreign, names, strict=True)]
    bank = stack(deltas, torch.float32)
    mixed = trace(Mixed(backbone, bank).eval(), Inputs(backbone.example(2), torch.tensor([0, 1])))
    finish(mixed, "fp32")
    folded = []
    for delta in deltas:
        alone = create(NAME, {"num_classes": CLASSES}).model
        alone.load_state_dict(dict(fold(delta, backbone, sites=sites).tensors))
        model = trace(alone, Inputs(backbone.example(2)))
        finish(model, "fp32")
        folded.append(OnnxRuntimeSession(serialise(model, {}), device))
    engine = serialise(mixed, {})
    bare = backbone_engine(create(NAME, {"num_classes": CLASSES}))
    subjects = [
        open_subject(
            f"{TASKS} tasks, one engine",
            f"LoRA of rank {RANK} on qkv, another task in every row",
            lambda: OnnxRuntimeSession(engine, device),
        ),
        open_subject(
            "backbone only",
            "the frozen model without any tuner",
            lambda: OnnxRuntimeSession(bare, device),
            takes_task=False,
        ),
        Subject(
            "an engine per task, in turn",
            "each row through its own task's folded engine",
            lambda images, task: np.concatenate(
                [folded[t].run(images[row : row + 1]) for row, t in enumerate(task)]
            ),
            folded[0].provider,
        ),
        *peft_subjects(tuned, names),
    ]
    require_same(subjects, backbone)
    facts = (
        ("backbone", NAME),
        ("precision", "fp32"),
        ("torch", torch.__version__),
        ("peft", peft.__version__),
    )
    tasks = tuple(TaskFacts(name, row, CLASSES) for row, name in enumerate(names))
    report = measure(
        subjects,
        [Case(BATCH)],
        about=About("8 LoRA adapters on ViT-B/16", tasks, backbone.input_size, BATCH, facts),
        settings=Settings(
            warmup_rounds=2, min_rounds=options.rounds, min_seconds=0, settle_calls=0
        ),
        threads=options.threads,
    )
    print_table(report)
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(report, options.output / "report.json")
    write_html(report, options.output / "report.html")


def plain() -> torch.nn.Module:
    """The backbone, the same weights each time."""
    torch.manual_seed(0)
    return create(NAME, {"num_classes": CLASSES}).model


def adapters(scratch: Path) -> peft.PeftModel:
    """PEFT's model with its adapters, which it also saves."""
    config = peft.LoraConfig(
        r=RANK, target_modules=["qkv"], modules_to_save=["head"], init_lora_weights=False
    )
    model = peft.get_peft_model(plain(), config, adapter_name="task0")
    for number in range(1, TASKS):
        model.add_adapter(f"task{number}", config)
    noise = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.normal_(std=0.02, generator=noise)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for a model on a hub
        model.save_pretrained(str(scratch))
    return model.eval()


def peft_subjects(model: peft.PeftModel, names: list[str]) -> list[Subject]:
    """The same model eager and compiled."""
    compiled = torch.compile(model)

    def runner(call):
        def run(images: np.ndarray, task: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                given = torch.from_numpy(images)
                return call(given, adapter_names=[names[t] for t in task]).numpy()

        return run

    return [
        Subject("PEFT, mixed batch", "adapter_names, eager", runner(model), "torch"),
        Subject(
            "PEFT, mixed batch, compiled", "adapter_names, torch.compile", runner(compiled), "torch"
        ),
    ]


def require_same(subjects: list[Subject], backbone: Backbone) -> None:
    """All but the bare backbone answer alike."""
    images = backbone.example(BATCH).numpy()
    task = np.arange(BATCH, dtype=np.int64) % TASKS
    answers = {s.name: s.run(images, task) for s in subjects if s.name != "backbone only"}
    wanted = answers["PEFT, mixed batch"]
    for name, found in answers.items():
        error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
        print(f"{name}: {error:.1e} of the largest logit from PEFT's")
        if not error <= AGREES:
            raise SystemExit(f"{name} answers otherwise: {error:.1e} > {AGREES}")


if __name__ == "__main__":
    main()
