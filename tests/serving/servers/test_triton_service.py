"""Our service inside a real tritonserver: its tasks change, its queue is fair, nothing is lost at the end."""

from __future__ import annotations

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from utune_deploy.export.bundle import Task
from utune_deploy.export.engine import Device
from utune_deploy.merge.preprocessing import Preprocessing
from utune_deploy.serving.packed import Packed, Probe, write_packed
from utune_deploy.serving.repository.options import ModelOptions
from utune_deploy.serving.servers import triton

HEADS = "bank/heads"
LOWEST = np.finfo(np.float32).min
FRONTS = ("http", "grpc")


def head(seed: int, classes: int = 3) -> np.ndarray:
    """One task's row of the bank, [192, 5]."""
    drawn = np.random.default_rng(seed).standard_normal((192, 5)).astype(np.float32)
    drawn[:, classes:] = 0
    return drawn


def packed(bundle, name: str, weights: np.ndarray, *, wrong: bool = False) -> bytes:
    """A task of three classes with a probe; `wrong` is one whose torch said something else."""
    images = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
    logits = images.reshape(2, -1).astype(np.float64) @ weights[:, :5]
    labels = tuple(f"{name}-{k}" for k in range(5))
    return write_packed(
        Packed(
            Task(name, 0, labels, Preprocessing(size=(8, 8)), "d" * 64),
            bundle.identity,
            bundle.backbone["fingerprint"],
            {HEADS: weights},
            Probe({"images": images}, logits + wrong, 1e-4),
        )
    )


@pytest.fixture(scope="module")
def wide(banked):
    """The bundle with its bank as an input, where a new task of five classes fits every mask of the engine's."""
    return banked


@pytest.fixture(scope="module")
def server(banked, triton_environment, tmp_path_factory):
    options = ModelOptions(
        task_control=True, keep=tmp_path_factory.mktemp("kept"), max_queue=40, priority_levels=3
    )
    with triton.running(
        banked, environment=triton_environment, device=Device(threads=1), options=options
    ) as process:
        yield process


def url(process, front: str) -> str:
    return f"{front}://{getattr(process.addresses, front)}"


def infer(client, images: np.ndarray, names: list[str], **options):
    module = tritonclient.grpc if "grpc" in type(client).__module__ else tritonclient.http
    given = module.InferInput("images", list(images.shape), "FP32")
    task = module.InferInput("task", [len(names), 1], "BYTES")
    given.set_data_from_numpy(images)
    task.set_data_from_numpy(np.array([[name.encode()] for name in names], dtype=object))
    return client.infer("tiny", [given, task], **options)
