"""A random backbone and random tasks for it: benchmarks need no training, time does not read values.

python bench/random_tasks.py runs/vit_b --backbone vit_base_patch16_224 --tasks 8 --rank 64
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from utune_deploy.merge.attach import attach
from utune_deploy.merge.backbone import create, save
from utune_deploy.merge.delta import save_delta
from utune_deploy.merge.methods import deep_prompt, dual_adapter, lora, prefix, serial_adapter
from utune_deploy.merge.sites import measure

METHODS = {
    "dual": dual_adapter,
    "lora": lora,
    "serial": serial_adapter,
    "prefix": prefix,
    "prompt": deep_prompt,
}


def main() -> None:
    """Write `OUTPUT/backbone` and `OUTPUT/task0.safetensors` and so on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", default=["dual"], choices=list(METHODS))
    options = parser.parse_args()

    torch.manual_seed(0)
    backbone = create(options.backbone)
    save(options.output / "backbone", backbone)
    sites = measure(backbone)
    for number in range(options.tasks):
        kind = options.kinds[number % len(options.kinds)]
        tuned = attach(
            backbone, METHODS[kind](options.rank), classes=options.classes, seed=number, sites=sites
        )
        noise = torch.Generator().manual_seed(number)
        for parameter in tuned.trainable():
            parameter.data.normal_(std=0.02, generator=noise)
        labels = [f"class {index}" for index in range(options.classes)]
        path = options.output / f"task{number}.safetensors"
        save_delta(path, tuned.delta(f"task{number}", labels), force=True)
        print(f"{path}: {kind}, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
