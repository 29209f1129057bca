"""A random backbone and random tasks for it: benchmarks need no training, time does not read values.

python bench/random_tasks.py runs/vit_b --backbone vit_base_patch16_224 --tasks 8 --rank 64
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from utune_deploy.merge import methods as m
from utune_deploy.merge.attach import attach
from utune_deploy.merge.backbone import create, save
from utune_deploy.merge.delta import save_delta
from utune_deploy.merge.sites import measure

METHODS = {
    "dual": m.dual_adapter,
    "lora": m.lora,
    "serial": m.serial_adapter,
    "prefix": m.prefix,
    "prompt": m.deep_prompt,
    "shallow": m.shallow_prompt,
    "bapat": lambda rank: m.bapat(rank, rank),
    "patt": m.patt,
    "block": lambda rank: m.u_tuner("adapter", rank, op="block"),
    "embedding": lambda rank: m.u_tuner("adapter", rank, op="embedding"),
    "bypass": m.bypass,
    "side": lambda _: m.side_tuning("fcn4"),
    "bitfit": lambda _: m.bitfit(),
    "norms": lambda _: m.norm_tuning(),
    "ia3": lambda _: m.ia3(),
    "ssf": lambda _: m.ssf(),
    "oft": lambda _: m.oft(32),
    "lokr": lambda rank: m.lokr(rank, 8),
    "unipt": lambda _: m.unipt(),
}


def main() -> None:
    """Write `OUTPUT/backbone` and `OUTPUT/task0.safetensors` and so on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", default=["dual"], choices=[*METHODS, "all"])
    options = parser.parse_args()

    kinds = list(METHODS) if options.kinds == ["all"] else options.kinds
    torch.manual_seed(0)
    backbone = create(options.backbone)
    save(options.output / "backbone", backbone)
    sites = measure(backbone)
    for number in range(options.tasks):
        kind = kinds[number % len(kinds)]
        tuned = attach(
            backbone, METHODS[kind](options.rank), classes=options.classes, seed=number, sites=sites
        )
        noise = torch.Generator().manual_seed(number)
        for parameter in tuned.trainable():
            parameter.data.normal_(std=0.02, generator=noise)
        labels = [f"class {index}" for index in range(options.classes)]
        path = options.output / f"task{number}.safetensors"
        name = f"task{number}" if len(kinds) == 1 else f"{kind}{number}"
        save_delta(path, tuned.delta(name, labels), force=True)
        print(f"{path}: {kind}, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
