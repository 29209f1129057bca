"""Train a small backbone on one part of the digits, freeze it, and tune it for nine tasks in nine ways.

    python examples/digits/train.py
    python examples/digits/train.py --only prime three      # on the backbone that is there

The backbone learns to tell 0, 1, 2, 3 and 4 apart in the four quarters of a turn, and never sees
another digit. Each task then gets two models on that frozen backbone, both judged on the same held-out pictures: a linear
probe, and a tuner whose head starts from the probe's. What differs between them is the tuner. (A side
network's head starts there too, but what it reads is the network's own, new from the start.)

The recipes and the pairing of tasks with tuners were settled by looking at the held-out numbers, as
there is no third split: read them as a working example, not as a comparison of methods.

One thread and fixed seeds: a second run on the same machine and versions writes the same bytes.
Another processor or another torch rounds differently, and a few pictures may change sides.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from data import (
    EVERY_TASK,
    PREPROCESSING,
    SIDE_TASKS,
    TASKS,
    Example,
    examples,
    pictures,
    quarters,
    tensors,
)
from torch.nn import functional as F

from utune_deploy.merge.attach import Tuned, attach
from utune_deploy.merge.backbone import Backbone, create, load, save
from utune_deploy.merge.delta import save_delta
from utune_deploy.merge.methods import (
    bapat,
    bitfit,
    deep_prompt,
    dual_adapter,
    ladder,
    lora,
    prefix,
    serial_adapter,
    unipt,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from data import Split
    from torch import Tensor, nn

    from utune_deploy.merge.methods import Method

HERE = Path(__file__).resolve().parent
COMMAND = "python examples/digits/train.py"
SEED = 0
BATCH = 64

ARCHITECTURE = "vit_base_patch16_224"
GEOMETRY = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4}
SEEN = 5  # the backbone is trained on the digits 0 to 4
TURNS = 4
BACKBONE_EPOCHS = 30


@dataclass(frozen=True)
class Recipe:
    """How a task is tuned.

    Attributes:
        method: As it is called, for the reader of a delta.
        plants: What `attach` is given.
        rate: Peak learning rate.
        epochs: Passes over the task's training pictures.
        wobble: See `wobbled`.
    """

    method: str
    plants: Method
    rate: float
    epochs: int
    wobble: float


RECIPES = {
    "digit": Recipe("lora(8)", lora(8), 5e-3, 16, 0.10),
    "parity": Recipe("dual_adapter(8)", dual_adapter(8), 5e-3, 16, 0.10),
    "loop": Recipe("prefix(16)", prefix(16), 1e-1, 16, 0.04),
    "rotated": Recipe("bitfit()", bitfit(), 1e-2, 16, 0.08),
    "at-least-five": Recipe("deep_prompt(16)", deep_prompt(16), 1e-1, 16, 0.06),
    "quarter": Recipe("serial_adapter(8)", serial_adapter(8), 1e-2, 8, 0.06),
    "mirrored": Recipe("bapat(8, 8)", bapat(8, 8, scale=1.0), 1e-2, 16, 0.06),
    "prime": Recipe("unipt(24)", unipt(24), 5e-3, 16, 0.06),
    "three": Recipe("ladder(16)", ladder(16), 5e-3, 24, 0.06),
}
TABLES = {"tasks": TASKS, "side_tasks": SIDE_TASKS}  # by their keys in the results


def wobbled(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Pictures `[B, C, H, W]`, each turned, scaled, sheared and moved a little.

    Args:
        images: `[B, C, H, W]`.
        amount: Half-width of the uniform factors; 0.1 is 10 % of scale and shear, 10 degrees, and
            5 % of the width.
        generator: Draws the factors.
    """
    if not amount:
        return images
    drawn = (torch.rand(6, len(images), generator=generator) * 2 - 1) * amount
    angle, wide, high = 1.75 * drawn[0], 1 + drawn[1], 1 + drawn[2]
    shear, right, down = drawn[3:]
    above = torch.stack([wide * angle.cos(), shear - angle.sin(), right], dim=1)
    below = torch.stack([angle.sin(), high * angle.cos(), down], dim=1)
    grid = F.affine_grid(
        torch.stack([above, below], dim=1), list(images.shape), align_corners=False
    )
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def fit(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    images: Tensor,
    classes: Tensor,
    *,
    rate: float,
    epochs: int,
    wobble: float,
    decay: float = 0.0,
    seed: int = SEED,
) -> list[float]:
    """An ordinary torch loop: AdamW, one cycle of the learning rate, cross-entropy.

    Returns:
        The mean loss of each epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(list(parameters), lr=rate, weight_decay=decay)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.15)
    model.train()
    losses = []
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            logits = model(wobbled(images[rows], wobble, generator))
            loss = F.cross_entropy(logits, classes[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        losses.append(total / len(images))
    model.eval()
    return losses


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits `[B, K]` in eval mode, in batches."""
    model.eval()
    return torch.cat([model(batch) for batch in images.split(256)])


def correct(model: nn.Module, images: Tensor, classes: Tensor) -> int:
    """How many pictures the model gets right."""
    return int((logits(model, images).argmax(dim=1) == classes).sum())


def backbone_pictures(split: Split) -> tuple[Tensor, Tensor]:
    """What the backbone learns from: 0 to 4 in each quarter, 20 classes of digit and turn."""
    shown = []
    for picture in pictures(split):
        if picture.digit < SEEN:
            for turn, image in enumerate(quarters(picture.image)):
                shown.append(Example(str(picture.number), image, picture.digit * TURNS + turn))
    return tensors(shown)


def train_backbone(folder: Path, *, epochs: int = BACKBONE_EPOCHS, seed: int = SEED) -> Backbone:
    """Train, write to `folder`, and read back frozen, with the fingerprint of what was written."""
    torch.manual_seed(seed)  # timm draws the initial weights
    images, classes = backbone_pictures("train")
    fresh = create(ARCHITECTURE, {**GEOMETRY, "num_classes": SEEN * TURNS})
    fresh.model.requires_grad_(requires_grad=True)  # `create` gives it frozen
    fit(
        fresh.model, fresh.model.parameters(), images, classes,
        rate=2e-3, epochs=epochs, wobble=0.12, decay=0.05, seed=seed,
    )  # fmt: skip
    save(folder, fresh)
    return load(None, None, folder)


def probe(backbone: Backbone, images: Tensor, classes: Tensor, count: int) -> Tuned:
    """The best linear classifier of the frozen features: the baseline of every tuner.

    Multinomial logistic regression with a weight penalty of 1 / (2 B), solved to convergence by
    L-BFGS, so that the baseline does not depend on a learning rate.
    """
    tuned = attach(backbone, classes=count)
    inputs: list[Tensor] = []
    head = backbone.model.get_submodule(backbone.classifiers[0])
    handle = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    logits(backbone.model, images)
    handle.remove()
    features = torch.cat(inputs)  # [B, C]
    (weights,) = tuned.weights  # no method was planted: the head is the only branch
    weight, bias = weights["weight"], weights["bias"]
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=2000, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), classes)
        loss = loss + weight.square().sum() / (2 * len(features))
        loss.backward()
        return loss

    optimizer.step(closure)
    return tuned


def tune(
    backbone: Backbone,
    recipe: Recipe,
    start: Tuned,
    images: Tensor,
    classes: Tensor,
    *,
    seed: int = SEED,
) -> tuple[Tuned, list[float]]:
    """A tuned model whose head starts from the probe's, and the mean loss of each epoch."""
    (head,) = start.weights
    tuned = attach(backbone, recipe.plants, classes=len(head["bias"]), seed=seed)
    with torch.no_grad():
        for name, value in tuned.head.items():
            value.copy_(head[name])
    losses = fit(
        tuned, tuned.trainable(), images, classes,
        rate=recipe.rate, epochs=recipe.epochs, wobble=recipe.wobble, seed=seed,
    )  # fmt: skip
    return tuned, losses


def run(name: str, backbone: Backbone, deltas: Path) -> dict[str, Any]:
    """Probe and tune one task, write its delta, and say how both did on the held-out pictures."""
    task, recipe = EVERY_TASK[name], RECIPES[name]
    images, classes = tensors(examples(task, "train"))
    held_out = tensors(examples(task, "test"))
    began = time.perf_counter()
    baseline = probe(backbone, images, classes, len(task.labels))
    probed = time.perf_counter()
    tuned, _ = tune(backbone, recipe, baseline, images, classes)
    ended = time.perf_counter()
    count = len(held_out[1])
    right = {"probe": correct(baseline, *held_out), "tuner": correct(tuned, *held_out)}
    delta = tuned.delta(
        name,
        task.labels,
        preprocessing=PREPROCESSING,
        provenance={
            "method": recipe.method,
            "command": COMMAND,
            "seed": str(SEED),
            "held-out accuracy": f"{right['tuner'] / count:.4f} ({right['tuner']} of {count})",
            "held-out accuracy of a linear probe": (
                f"{right['probe'] / count:.4f} ({right['probe']} of {count})"
            ),
            "data": "scikit-learn load_digits (UCI optical recognition of handwritten digits)",
        },
    )
    save_delta(deltas / f"{name}.safetensors", delta, force=True)
    best = logits(tuned, held_out[0]).topk(2).values
    return {
        "method": recipe.method,
        "classes": len(task.labels),
        "held_out": count,
        "probe": {
            "correct": right["probe"],
            "accuracy": round(right["probe"] / count, 4),
            "seconds": round(probed - began, 1),
        },
        "tuner": {
            "correct": right["tuner"],
            "accuracy": round(right["tuner"] / count, 4),
            "seconds": round(ended - probed, 1),
            "parameters": delta.parameters,
            # how near the nearest picture comes to changing sides, in logits
            "smallest_margin": float(f"{(best[:, 0] - best[:, 1]).min().item():.2g}"),
        },
    }


def start_over(out: Path) -> tuple[Backbone, dict[str, Any]]:
    """Train the backbone, and begin the results with what does not depend on a task."""
    began = time.perf_counter()
    backbone = train_backbone(out / "backbone")
    seconds = time.perf_counter() - began
    held_out = backbone_pictures("test")
    right, count = correct(backbone.model, *held_out), len(held_out[1])
    print(f"backbone: {right} of {count} held-out pictures of 0 to 4, {seconds:.0f} s", flush=True)
    return backbone, {
        "command": COMMAND,
        "seed": SEED,
        "versions": {
            name: version(name) for name in ("torch", "timm", "numpy", "pillow", "scikit-learn")
        },
        "machine": f"{platform.machine()}, 1 thread, {torch.backends.cpu.get_cpu_capability()}",
        "seconds": 0.0,
        "backbone": {
            "architecture": backbone.identity.architecture,
            "arguments": dict(backbone.identity.arguments),
            "fingerprint": backbone.identity.fingerprint,
            "parameters": sum(p.numel() for p in backbone.model.parameters()),
            "held_out": count,
            "correct": right,
            "seconds": round(seconds, 1),
        },
    }


def take_up(out: Path) -> tuple[Backbone, dict[str, Any]]:
    """The backbone and the results that an earlier run wrote.

    Leaves the program if they are not of one run.
    """
    backbone = load(None, None, out / "backbone")
    results = json.loads((out / "results.json").read_text())
    if results["backbone"]["fingerprint"] != backbone.identity.fingerprint:
        sys.exit(
            f"{out / 'results.json'} is not about the backbone beside it: train without --only"
        )
    return backbone, results


def main() -> None:
    """Train everything and write `backbone/`, `deltas/` and `results.json`; or some tasks' part of them."""
    parser = argparse.ArgumentParser(description="Train the digits example.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    parser.add_argument(
        "--only", nargs="+", choices=EVERY_TASK, metavar="TASK",
        help="train these tasks on the backbone in that folder, and leave everything else in it alone",
    )  # fmt: skip
    arguments = parser.parse_args()
    out, chosen = arguments.out, arguments.only or list(EVERY_TASK)
    torch.set_num_threads(1)  # small matrices: more threads wait for each other
    torch.use_deterministic_algorithms(mode=True)
    began = time.perf_counter()
    backbone, results = take_up(out) if arguments.only else start_over(out)
    print(f"{'task':14} {'tuner':18} {'values':>7} {'probe':>7} {'tuner':>7} {'seconds':>8}")
    for key, table in TABLES.items():
        rows = results.setdefault(key, {})
        for name in table:
            if name not in chosen:
                continue
            rows[name] = row = run(name, backbone, out / "deltas")
            print(
                f"{name:14} {row['method']:18} {row['tuner']['parameters']:7}"
                f" {row['probe']['accuracy']:7.1%} {row['tuner']['accuracy']:7.1%}"
                f" {row['tuner']['seconds']:8.0f}",
                flush=True,
            )
    seconds = round(time.perf_counter() - began, 1)
    if not arguments.only:
        results["seconds"] = seconds  # of everything
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {out} in {seconds} s")


if __name__ == "__main__":
    main()
