"""What an export costs in time, memory and bytes, and what each further task adds to it.

python bench/export_cost.py runs/export_cost --backbone vit_base_patch16_224 --rank 64 --tasks 1 8 64 \
    -o bench/results/export/vit_b.json

Each export runs in a process of its own, beside nothing else; every one of its tasks is checked. Memory is that
process's largest resident set, less what the interpreter takes with torch, timm, onnx and onnxruntime imported.
Random tasks are made first, once. Prints a table of them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from utune_deploy.deploy.bench.machine import read_machine

IMPORTS = "import torch, timm, onnx, onnx_ir, onnxscript, onnxruntime"


def main() -> None:
    """Make the tasks, export each number of them, write JSON and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="Random tasks and bundles are put here.")
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--kind", default="dual")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--bank", choices=["constants", "inputs"], default="constants")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()

    _make_tasks(options)
    empty = _measured([sys.executable, "-c", IMPORTS])["peak_mb"]
    weights = options.folder / "backbone" / "backbone.safetensors"
    backbone = weights.stat().st_size / 1e6
    runs = [_export(options, count, empty) for count in sorted(options.tasks)]
    fit = _line([run["tasks"] for run in runs], [run["seconds"] for run in runs])
    result = {
        "backbone": options.backbone,
        "kind": options.kind,
        "rank": options.rank,
        "bank": options.bank,
        "precision": options.precision,
        "max_batch": options.max_batch,
        "backbone_mb": backbone,
        "imports_mb": empty,
        "runs": runs,
        "seconds_per_further_task": fit,
        "machine": asdict(read_machine()),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    print("| tasks | seconds | peak MB | of the backbone | bundle MB |")
    print("|---|---|---|---|---|")
    for run in runs:
        print(
            f"| {run['tasks']} | {run['seconds']:.0f} | {run['peak_mb']:.0f} "
            f"| {run['peak_mb'] / backbone:.2f} | {run['bytes'] / 1e6:.0f} |"
        )
    if fit is not None:
        print(f"\n{fit:.3f} s per further task")


def _make_tasks(options) -> None:
    """Random tasks, unless as many are there."""
    if not (options.folder / f"task{max(options.tasks) - 1}.safetensors").exists():
        script = Path(__file__).parent / "random_tasks.py"
        subprocess.run(
            [
                sys.executable, script, options.folder, "--backbone", options.backbone,
                "--tasks", str(max(options.tasks)), "--rank", str(options.rank),
                "--kinds", options.kind,
            ],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip


def _export(options, count: int, empty: float) -> dict[str, float]:
    """One export in a process of its own."""
    bundle = options.folder / f"bundle{count}"
    shutil.rmtree(bundle, ignore_errors=True)
    deltas = [str(options.folder / f"task{number}.safetensors") for number in range(count)]
    run = _measured(
        [
            sys.executable,
            "-c",
            "from utune_deploy.deploy.cli import main; main()",
            "export",
            *deltas,
            "--weights",
            str(options.folder / "backbone"),
            "-o",
            str(bundle),
            "--bank",
            options.bank,
            "--precision",
            options.precision,
            "--max-batch",
            str(options.max_batch),
            *(["--mode", "multi"] if count == 1 else []),
        ]
    )
    size = sum(file.stat().st_size for file in bundle.iterdir())
    shutil.rmtree(bundle)
    return {"tasks": count, **run, "peak_mb": run["peak_mb"] - empty, "bytes": size}


def _measured(command: list[str]) -> dict[str, float]:
    """Seconds on the wall and of all processors, and largest resident set, of one process."""
    begun, used = time.perf_counter(), _processor_seconds()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = _wait(process)
    if status:
        raise SystemExit(f"{' '.join(command[:5])} ... failed")
    return {
        "seconds": time.perf_counter() - begun,
        "processor_seconds": _processor_seconds() - used,
        "peak_mb": usage.ru_maxrss * 1024 / 1e6,
    }


def _wait(process: subprocess.Popen) -> tuple[int, int, resource.struct_rusage]:
    return os.wait4(process.pid, 0)


def _processor_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def _line(tasks: list[int], seconds: list[float]) -> float | None:
    """The slope of the least-squares line; None of one point."""
    return float(np.polyfit(tasks, seconds, 1)[0]) if len(tasks) > 1 else None


if __name__ == "__main__":
    main()
