"""ViT-B/16 at 224 in half precision on one CUDA device: the bare backbone, one fused task, 64 tasks in a batch.

    python bench/gpu/vit_b.py -o bench/results/gpu/vit_b --kernels libutune.so [--precision bf16]

Every engine runs on ONNX Runtime's CUDA provider with its inputs and answers on the device and its kernels
replayed as one CUDA graph. Weights are random: time does not read values. `ceiling.json` holds what the
device itself does: a large product and a large copy through torch, and the backbone's fraction of them.
Before anything is timed, the engine with fused kernels is held to the same engine without, on one batch.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from utune_deploy.deploy.bench.case import Case
from utune_deploy.deploy.bench.measure import measure
from utune_deploy.deploy.bench.report import (
    TIMED_ON_DEVICE,
    About,
    Settings,
    TaskFacts,
    write_json,
)
from utune_deploy.deploy.bench.subject import open_subject
from utune_deploy.deploy.bench.table import print_table
from utune_deploy.deploy.bench.views.page import write_html
from utune_deploy.deploy.graphs import finish
from utune_deploy.export.engine import Device
from utune_deploy.export.graph import Inputs, serialise, trace
from utune_deploy.export.macs import macs
from utune_deploy.export.passes.gathered import RANKS
from utune_deploy.export.targets.onnxruntime import OnnxRuntimeSession
from utune_deploy.merge import methods as m
from utune_deploy.merge.attach import attach
from utune_deploy.merge.backbone import create
from utune_deploy.merge.bank import stack
from utune_deploy.merge.mixed import Alone, Mixed
from utune_deploy.merge.sites import measure as measure_sites

TASKS, RANK, CLASSES = 64, 64, 100
BATCHES = (1, 8, 64, 128)
AGREES = 0.02  # of the largest logit, between two engines in half precision


def main() -> None:
    """Write the report and the ceiling."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--kernels", type=Path, required=True)
    parser.add_argument("--precision", choices=["fp16", "bf16"], default="fp16")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    engines, macs_of_backbone = build(options.precision)
    fused, plain = (
        Device("cuda", kernels=kernels) for kernels in (options.kernels.resolve(), None)
    )
    require_same(engines["mixed"], fused, plain)
    subjects = [
        open_subject(name, note, opener(engines[key], device), takes_task=task, resident=True)
        for name, note, key, device, task in (
            ("backbone only", "the frozen model without any tuner", "bare", plain, False),
            ("one task, fused", f"dual adapters of rank {RANK}", "alone", fused, False),
            (f"{TASKS} tasks", "another one in every row", "mixed", fused, True),
            (f"{TASKS} tasks, standard operators", "without our kernels", "mixed", plain, True),
        )
    ]
    names = [f"class {n}" for n in range(CLASSES)]
    tasks = tuple(TaskFacts(f"task{n}", n, len(names)) for n in range(TASKS))
    facts = (("precision", options.precision), ("tuner", f"dual adapters, rank {RANK}"))
    about = About("ViT-B/16 at 224", tasks, (3, 224, 224), max(BATCHES), facts)
    report = measure(
        subjects,
        [Case(batch) for batch in BATCHES],
        about=about,
        settings=Settings(warmup_rounds=5, min_rounds=options.rounds, min_seconds=1.0),
        timed=TIMED_ON_DEVICE,
    )
    print_table(report)
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(report, options.output / "report.json")
    write_html(report, options.output / "report.html")
    ceiling = measure_ceiling(options.precision)
    reached = {
        str(case.case.batch): 2 * macs_of_backbone * case.case.batch
        / (case.results[0].summary.p50_ms * 1e9) / ceiling["product_tflops"]
        for case in report.cases
    }  # fmt: skip
    found = {**ceiling, "macs_per_image": macs_of_backbone, "fraction_of_product": reached}
    (options.output / "ceiling.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def build(precision: str) -> tuple[dict[str, bytes], int]:
    """The engines by name, and the backbone's multiply-accumulates for one image."""
    torch.manual_seed(0)
    backbone = create("vit_base_patch16_224", {"num_classes": CLASSES})
    sites = measure_sites(backbone)
    tuned = attach(backbone, m.dual_adapter(RANK), classes=CLASSES, seed=0, sites=sites)
    noise = torch.Generator().manual_seed(0)
    for parameter in tuned.trainable():
        parameter.data.normal_(std=0.02, generator=noise)
    first = tuned.delta("task0", [f"class {n}" for n in range(CLASSES)])
    deltas = [first]
    for number in range(1, TASKS):  # other values of the same shapes
        noise.manual_seed(number)
        tensors = {
            branch: {
                name: value if name == "scale" else torch.randn(value.shape, generator=noise) * 0.02
                for name, value in own.items()
            }
            for branch, own in first.tensors.items()
        }
        deltas.append(replace(first, task=f"task{number}", tensors=tensors))
    images = backbone.example(2)
    alone = stack(deltas[:1], torch.float32, ranks=RANKS)
    many = stack(deltas, torch.float32, ranks=RANKS)
    traced = {
        "bare": trace(backbone.model, Inputs(images)),
        "alone": trace(Alone(backbone, alone).eval(), Inputs(images)),
        "mixed": trace(Mixed(backbone, many).eval(), Inputs(images, torch.tensor([0, 1]))),
    }
    counted = 0
    for name, model in traced.items():
        finish(model, precision)
        if name == "bare":
            counted = macs(model).total
    return {name: serialise(model, {}) for name, model in traced.items()}, counted


def opener(engine: bytes, device: Device):
    """Opens an engine when asked to."""
    return lambda: OnnxRuntimeSession(engine, device, cuda_graph=True)


def require_same(engine: bytes, fused: Device, plain: Device) -> None:
    """The fused kernels answer as the standard operators do, another task in every row."""
    images = np.random.default_rng(0).standard_normal((TASKS, 3, 224, 224)).astype(np.float32)
    rows = np.arange(TASKS, dtype=np.int64)
    found, wanted = (OnnxRuntimeSession(engine, d).run(images, rows) for d in (fused, plain))
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    print(f"kernels against standard operators: {error:.1e} of the largest logit")
    if not error <= AGREES:
        raise SystemExit(f"the kernels answer otherwise: {error:.1e} > {AGREES}")


def measure_ceiling(precision: str) -> dict[str, float | str]:
    """A product of 8192 x 8192 x 8192 and a copy of 1 GiB, medians of device time."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    source = torch.randn(1 << 29, device="cuda").to(dtype)
    target = torch.empty_like(source)
    product = _median_ms(lambda: a @ b)
    copy = _median_ms(lambda: target.copy_(source))
    return {
        "device": torch.cuda.get_device_name(),
        "product_tflops": 2 * 8192**3 / product / 1e9,
        "copy_tb_per_s": 2 * source.numel() * source.element_size() / copy / 1e9,
    }


def _median_ms(call, times: int = 20) -> float:
    found = []
    for _ in range(times + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return float(np.median(found[3:]))


if __name__ == "__main__":
    main()
