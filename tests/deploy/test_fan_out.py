"""Every task of every row, from files to answers: `export --fan-out`, `--mode fan-out` and who reads them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import save_file

from utune_deploy.deploy.cli import main
from utune_deploy.export.bundle import FAN_OUT_FILE, MANIFEST, open_bundle
from utune_deploy.merge import methods
from utune_deploy.merge.attach import attach
from utune_deploy.merge.backbone import create, save
from utune_deploy.merge.delta import save_delta
from utune_deploy.merge.preprocessing import Preprocessing
from utune_deploy.serving.servers.embedded import running
from utune_deploy.serving.service import Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

TASKS = {"side": 3, "wide": 4, "probe": 5, "late": 2, "lora": 3}
"""Two side networks, a head alone, LoRA in the last block, LoRA everywhere, with their class counts."""

MAX_BATCH = 3


@pytest.fixture(scope="module")
def tasks(vit: Backbone, random_delta: Callable[..., Delta]) -> dict[str, Delta]:
    kinds = {
        "side": [methods.unipt(8)],
        "wide": [methods.unipt(8)],
        "probe": [],
        "late": [methods.lora(2, blocks=[2])],
        "lora": [methods.lora(2)],
    }
    return {
        name: random_delta(vit, *kinds[name], task=name, classes=classes, seed=number)
        for number, (name, classes) in enumerate(TASKS.items())
    }


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, vit: Backbone, tasks: dict[str, Delta], picture: Any
) -> Path:
    """A folder with the backbone, a delta per task, two pictures and five rows of noise."""
    root = tmp_path_factory.mktemp("files")
    save(root / "backbone", vit)
    for name, delta in tasks.items():
        save_delta(root / f"{name}.safetensors", delta)
    for number in range(2):
        (root / f"{number}.png").write_bytes(picture(number))
    np.save(
        root / "rows.npy", np.random.default_rng(0).standard_normal((5, 3, 32, 32), np.float32)
    )
    return root


def export(files: Path, output: str, *arguments: str, tasks: Any = TASKS) -> Path:
    """A bundle of the command line."""
    with suppress(SystemExit):
        main([
            "-q", "export", *(str(files / f"{name}.safetensors") for name in tasks),
            "--weights", str(files / "backbone"), "-o", str(files / output),
            "--max-batch", str(MAX_BATCH), "--threads", "1", *arguments,
        ])  # fmt: skip
    return files / output


@pytest.fixture(scope="module")
def beside(files: Path) -> Path:
    """A task per row, and the engine of all tasks beside it."""
    return export(files, "beside", "--fan-out")


@pytest.fixture(scope="module")
def only(files: Path) -> Path:
    """The engine of all tasks alone."""
    return export(files, "only", "--mode", "fan-out")


def test_x(beside, only):
    print(json.dumps(open_bundle(beside).plan["shared"], indent=1))
    print(sorted({i.name for i in onnx.load(beside/"fan_out.onnx").graph.initializer}))
