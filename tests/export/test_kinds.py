"""Every kind of tuner through the exporter, the passes and ONNX Runtime: the numbers of torch in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from utune_deploy.export.graph import Inputs, clean, serialise, trace
from utune_deploy.export.passes import rewrite
from utune_deploy.merge.attach import restore
from utune_deploy.merge.bank import stack
from utune_deploy.merge.lower import lower
from utune_deploy.merge.mixed import Mixed, Single
from utune_deploy.merge.tuner import Branch, Point, Tuner, bind
from utune_deploy.merge.tuners import TUNERS
from utune_deploy.merge.tuners.bias import Bias
from utune_deploy.merge.tuners.bottleneck import Bottleneck
from utune_deploy.merge.tuners.bypass import Bypass
from utune_deploy.merge.tuners.class_and_mean import ClassAndMean
from utune_deploy.merge.tuners.difference import Difference
from utune_deploy.merge.tuners.embedding import Embedding
from utune_deploy.merge.tuners.gain import Gain
from utune_deploy.merge.tuners.gpo import Gpo
from utune_deploy.merge.tuners.kronecker import Kronecker
from utune_deploy.merge.tuners.ladder import Ladder
from utune_deploy.merge.tuners.norm import Norm
from utune_deploy.merge.tuners.perceptron import Perceptron
from utune_deploy.merge.tuners.prefix import Prefix
from utune_deploy.merge.tuners.prompt import Prompt
from utune_deploy.merge.tuners.rotation import Rotation
from utune_deploy.merge.tuners.side_network import SideNetwork
from utune_deploy.merge.tuners.unipt import UniPT
from utune_deploy.merge.tuners.unipt_pyramid import UniPTPyramid

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

TOLERANCE = 2e-5  # of the largest logit, float32 against float64

Planted = tuple[Tuner, str, str]
QKV = ("blocks.1.attn.qkv:input", "blocks.1.attn.qkv:output")
STATES = "blocks.0:input blocks.0:output blocks.1:output blocks.2:output"
HEAD = ("head:input", "head:output")
KINDS: dict[str, list[Planted]] = {
    "bottleneck": [
        (Bottleneck("identity", bias=False), *QKV),
        (Bottleneck("relu", bias=True, norm="in"), "blocks.2.mlp:input", "blocks.2.mlp:output"),
        (Bottleneck("gelu", bias=False, norm="out"), *["blocks.0.attn:output"] * 2),
        (Bottleneck("identity", bias=True), "patch_embed.proj:patches", "patch_embed.proj:output"),
    ],
    "kronecker": [(Kronecker(3, 4), *QKV)],
    "rotation": [(Rotation(8, 6, 0), *[QKV[0]] * 2), (Rotation(8, 6, 1), *[QKV[0]] * 2)],
    "gain": [
        (Gain(shift=True), *[QKV[1]] * 2),
        (Gain(shift=False), *["blocks.2.mlp.fc2:input"] * 2),
    ],
    "bias": [(Bias(), *["blocks.1.mlp.fc1:output"] * 2)],
    "norm": [(Norm(1e-6), "blocks.2.norm1:input", "blocks.2.norm1:output")],
    "prefix": [
        (Prefix(joint_softmax=True), *["blocks.1.attn:keys"] * 2),
        (Prefix(joint_softmax=False), *["blocks.2.attn:keys"] * 2),
    ],
    "prompt": [
        (Prompt(), "blocks.0:tokens", "blocks.2:tokens"),
        (Prompt(joint_softmax=False), *["blocks.1:tokens"] * 2),
    ],
    "side_network": [(SideNetwork("fcn4"), "patch_embed.proj:input", "head:input")],
    "bypass": [
        (
            Bypass(3, "gelu"),
            STATES,
            "norm:input",
        )
    ],
    "unipt": [
        (UniPT((48, 48, 48), 48, 8, 48), STATES, "norm:input"),
        (
            UniPT(
                (48, 48, 48, 48),
                48,
                8,
                48,
                "none",
                relu_first=True,
                vector=True,
                own="first",
                guard="clamp",
                eps=1e-6,
                project="none",
                up="linear",
                onto="anchor",
            ),
            f"{STATES} head:input",
            "head:input",
        ),
    ],
    "unipt_pyramid": [
        (
            UniPTPyramid((3, 3), 48, 8, 48, "batch", gives="mean", cells=(8, 8)),
            "patch_embed.proj:input patch_embed.proj:input patch_embed.proj:output",
            "head:input",
        )
    ],
    "ladder": [(Ladder((48,) * 4, 8, 2, 12, 48, gives="mean"), STATES, "head:input")],
    "gpo": [(Gpo(17, 6, 4), "blocks.2:output", "head:input")],
    "difference": [
        (Difference("weight", (144, 48)), *["blocks.1.attn.qkv:weights"] * 2),
        (Difference("cls_token", (1, 1, 48)), *[":weights"] * 2),
    ],
    "head": [],
    "perceptron": [(Perceptron((9, 6), "gelu", 1e-12), *HEAD)],
    "embedding": [(Embedding(48, unit=True), *HEAD)],
    "class_and_mean": [(ClassAndMean(), "head:input norm:output", "head:output")],
}


def test_every_kind_of_the_table_is_exported() -> None:
    assert set(KINDS) == set(TUNERS), "a new kind belongs into `KINDS`"


@pytest.fixture(scope="module")
def tasks(
    vit: Backbone,
    sites_of: Callable[..., Any],
    random_delta: Callable[..., Delta],
    random_weights: Callable[..., Any],
) -> dict[str, Delta]:
    """One task per kind, of unlike ranks and class counts."""
    made = {}
    for number, (kind, planted) in enumerate(KINDS.items()):
        plain = random_delta(vit, task=kind, classes=2 + number % 4, seed=number)
        branches, tensors = {}, {}
        for place, (tuner, taps, add) in enumerate(planted):
            tap, *others = (Point.parse(text) for text in taps.split())
            branch = Branch(tuner, tap, Point.parse(add), tuple(others))
            sizes = {"r": 1 + number % 3}
            if tuner.join != "weights":
                sizes |= {
                    "in": sites_of(vit).require(tap),
                    "out": sites_of(vit).require(branch.add),
                }
            branches[f"{place}/{kind}"] = branch
            tensors[f"{place}/{kind}"] = random_weights(tuner, sizes, 10 * number + place)
        if TUNERS[kind].answers and branches:  # in the place of the plain task's head
            made[kind] = replace(plain, branches=branches, tensors=tensors)
            continue
        made[kind] = replace(
            plain,
            branches={**branches, **plain.branches},
            tensors={**tensors, **plain.tensors},
        )
    return made


def width(task: Delta) -> int:
    """How many numbers the task answers with."""
    tuner = task.branches[task.head].tuner
    return tuner.answer_width(bind(tuner.shapes, task.tensors[task.head], where=task.task))


@torch.no_grad()
def exact(backbone: Backbone, delta: Delta, images: torch.Tensor) -> np.ndarray:
    """One task alone in float64."""
    tensors = {
        name: {key: tensor.double() for key, tensor in named.items()}
        for name, named in delta.tensors.items()
    }
    task = replace(delta, backbone=backbone.identity, tensors=tensors)
    return restore(backbone, task)(images.double()).numpy()


def engine(model: ir.Model) -> bytes:
    rewrite(model)
    return serialise(clean(model), {})


def require_close(found: np.ndarray, wanted: np.ndarray, task: str) -> None:
    assert found.dtype == np.float32
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < TOLERANCE * np.abs(wanted).max(), task


def test_one_engine_for_all_kinds(vit, vit64, tasks, sites_of, run_onnx) -> None:
    """Those that can share a batch, at batches of 1, 3 and all tasks."""
    mixable = [task for kind, task in tasks.items() if not TUNERS[kind].no_bank]
    bank = stack([lower(vit, task, sites_of(vit)) for task in mixable])
    module = Mixed(vit, bank).eval()
    made = engine(trace(module, Inputs(vit.example(batch=2), torch.tensor([0, 1]))))
    count = len(mixable)
    images = vit.example(batch=count + 3)
    wanted = [exact(vit64, task, images) for task in mixable]
    orders = [[number] for number in range(count)]
    orders += [[count - 1, 0, 5], list(range(count)), [*reversed(range(count)), 0, 0, 3]]
    for order in orders:
        feeds = {
            "images": images[: len(order)].numpy(),
            "task": np.array(order, dtype=np.int64),
        }
        (logits,) = run_onnx(made, feeds)
        for row, number in enumerate(order):
            classes = width(mixable[number])
            alone = wanted[number][row : row + 1]
            require_close(logits[row : row + 1, :classes], alone, mixable[number].task)
            assert (logits[row, classes:] < -1e30).all()


@pytest.mark.parametrize("kind", TUNERS)
def test_one_engine_for_one_kind(kind, vit, vit64, tasks, sites_of, run_onnx) -> None:
    task = tasks[kind]
    module = Single(vit, stack([lower(vit, task, sites_of(vit))])).eval()
    made = engine(trace(module, Inputs(vit.example(batch=2))))
    for batch in (1, 3):
        images = vit.example(batch=batch)
        (logits,) = run_onnx(made, {"images": images.numpy()})
        require_close(logits, exact(vit64, task, images), kind)
