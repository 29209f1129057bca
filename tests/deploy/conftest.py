"""What the tests of this room share: six tasks of every kind, exported once in every form."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

    from utune_deploy.deploy.task import Task
    from utune_deploy.export.bundle import Bundle
    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta

CLASSES = {"lora": 5, "dual": 3, "serial": 7, "prefix": 2, "prompt": 4, "bias": 6}
MAX_BATCH = 6


class Said(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """The command line in this process: `(*arguments) -> Said`."""
    from utune_deploy.deploy.cli import main

    def cli(*arguments: object) -> Said:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        return Said(int(left.value.code or 0), *capfd.readouterr())

    return cli


@pytest.fixture
def shell() -> Callable[..., Said]:
    """The command line in a process of its own: `(*arguments, **of subprocess.run) -> Said`."""

    def shell(*arguments: object, **settings: Any) -> Said:
        script = "from utune_deploy.deploy.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            capture_output=True, text=True, check=False, timeout=120, **settings,
        )  # fmt: skip
        return Said(done.returncode, done.stdout, done.stderr)

    return shell


@pytest.fixture(scope="session")
def vit(vit: Backbone) -> Backbone:
    """The small ViT on one thread: two threads wait for each other longer than these models run."""
    import torch

    torch.set_num_threads(1)
    return vit


@pytest.fixture(scope="session")
def deltas(vit: Backbone, random_delta: Callable[..., Delta]) -> dict[str, Delta]:
    """One task of every kind, with ranks and class counts of their own."""
    from utune_deploy.merge import methods

    kinds = {
        "lora": methods.lora(2),
        "dual": methods.dual_adapter(3),
        "serial": methods.serial_adapter(4),
        "prefix": methods.prefix(2),
        "prompt": methods.deep_prompt(3),
        "bias": methods.bitfit(),
    }
    return {
        kind: random_delta(vit, method, task=kind, classes=CLASSES[kind], seed=number)
        for number, (kind, method) in enumerate(kinds.items())
    }


@pytest.fixture(scope="session")
def as_task() -> Callable[[Delta], Task]:
    """A delta with the digest that its file would have."""
    import hashlib

    from utune_deploy.deploy.task import Task

    return lambda delta: Task(delta, hashlib.sha256(delta.task.encode()).hexdigest())


@pytest.fixture(scope="session")
def bundles(
    vit: Backbone,
    deltas: dict[str, Delta],
    as_task: Callable[[Delta], Task],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Bundle]:
    """Exported bundles by form, each made when it is first asked for."""
    from utune_deploy.deploy.build import export_bundle
    from utune_deploy.export.engine import Device

    root = tmp_path_factory.mktemp("bundles")
    made: dict[str, Bundle] = {}

    def bundles(form: str) -> Bundle:
        if form not in made:
            tasks, settings = {
                "constants": (list(deltas), {}),
                "inputs": (list(deltas), {"bank": "inputs"}),
                "merged": (["lora"], {}),
                "parallel": (["prompt"], {}),
            }[form]
            made[form] = export_bundle(
                root / form, vit, [as_task(deltas[task]) for task in tasks],
                max_batch=MAX_BATCH, device=Device(threads=1), **settings,
            )  # fmt: skip
        return made[form]

    return bundles


@pytest.fixture(scope="session")
def alone(vit: Backbone, sites_of: Callable[..., Any]) -> Callable[[Delta, np.ndarray], np.ndarray]:
    """One task by itself in torch: `(delta, images) -> logits`."""
    import torch

    from utune_deploy.merge.attach import restore

    def alone(delta: Delta, images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return restore(vit, delta, sites_of(vit))(torch.from_numpy(images)).numpy()

    return alone


@pytest.fixture(scope="session")
def images() -> Callable[..., np.ndarray]:
    """Seeded noise: `(batch, seed) -> [B, 3, 32, 32]`."""
    import numpy as np

    def images(batch: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((batch, 3, 32, 32), np.float32)

    return images


@pytest.fixture(scope="session")
def picture() -> Callable[[int], bytes]:
    """A PNG of 40 x 36 coloured pixels: `(seed) -> bytes`."""
    import numpy as np
    from PIL import Image

    def picture(seed: int) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (36, 40, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        return buffer.getvalue()

    return picture


@pytest.fixture(scope="session")
def served() -> Callable[[Any], Any]:
    """`with served(service) as addresses`: the embedded server in a thread."""
    import asyncio
    import threading
    from contextlib import contextmanager

    from utune_deploy.serving.servers.embedded import running

    @contextmanager
    def served(service: Any) -> Iterator[Any]:
        ready = threading.Event()
        box: dict[str, Any] = {}

        async def serve() -> None:
            box["loop"], box["stop"] = asyncio.get_running_loop(), asyncio.Event()
            async with running(service) as addresses:
                box["addresses"] = addresses
                ready.set()
                await box["stop"].wait()

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        try:
            assert ready.wait(60)
            yield box["addresses"]
        finally:
            if "loop" in box:
                box["loop"].call_soon_threadsafe(box["stop"].set)
            thread.join(60)

    return served


@pytest.fixture(scope="session")
def load_report() -> Callable[..., Any]:
    """A load that never ran, of known times: `(loop, levels, **changes) -> Report`."""
    import numpy as np

    from utune_deploy.deploy.bench.machine import Load, Machine
    from utune_deploy.deploy.load.cautions import find_cautions
    from utune_deploy.deploy.load.drive import Run, Sample
    from utune_deploy.deploy.load.numbers import numbers
    from utune_deploy.deploy.load.report import Asked, Input, Report
    from utune_deploy.deploy.load.saturation import saturation
    from utune_deploy.deploy.load.step import CLOSED, Settings, Step

    def statistics(requests: int) -> dict[str, Any]:
        parts = {"queue": 1000, "compute_input": 10, "compute_infer": 2000, "compute_output": 30}
        spent = {
            part: {"count": requests, "ns": us * 1000 * requests} for part, us in parts.items()
        }
        return {
            "inference_count": str(2 * requests), "execution_count": str(requests),
            "inference_stats": {**spent, "success": {"count": requests, "ns": requests}},
        }  # fmt: skip

    def run_of(step: Step) -> Run:
        """Latencies of 5 ms and an exponential tail, the longer the more is asked for; each tenth fails."""
        random = np.random.default_rng(int(step.level))
        count = 300
        due = np.arange(count) * 10**7 + 10**9
        sent = due + random.integers(20_000, 60_000, count)
        took = (5e6 + 1e5 * step.level + random.exponential(1e6, count)).astype(np.int64)
        run = Run(10**9, 4 * 10**9, before=statistics(7), after=statistics(7 + count))
        run.says = {"503": "the queue is full"}
        for number, (a, b, c) in enumerate(zip(due, sent, sent + took, strict=True)):
            status = "503" if step.level > 50 and number % 10 == 0 else "ok"
            run.samples.append(Sample(int(a), int(b), int(b) + 7000, int(c) - 3000, int(c), status))
        return run

    def make(loop: str = CLOSED, levels: tuple[float, ...] = (1, 2, 8), **changes: Any) -> Report:
        steps = [Step(loop, level) for level in levels]
        results = tuple(numbers(run_of(step), step, 2) for step in steps)
        machine = Machine(
            "Some Xeon", 2, 2, 2, 8 << 30, "powersave", (), "Linux 6 x86_64", "3.11", {"numpy": "2.0"}
        )  # fmt: skip
        load = Load(0.5, 2.5)
        fields: dict[str, Any] = {
            "url": "http://127.0.0.1:8000", "server": {"name": "utune-deploy", "version": "0.1.0"},
            "model": "digits",
            "asked": Asked(
                2, "uniform", "binary", "drawn", 64, 1234, {"a": 64, "b": 64},
                (Input("images", "FP32", (3, 8, 8)), Input("task", "BYTES", (1,))),
            ),
            "loop": loop, "steps": results,
            "saturation": None if loop == CLOSED else saturation(results),
            "settings": Settings(), "changing": None, "machine": machine, "load": load,
            "date": "2026-11-28T12:00:00+00:00", "command": "utune-deploy load http://127.0.0.1:8000",
            "warnings": find_cautions(steps, results, machine, load),
        }  # fmt: skip
        return Report(**{**fields, **changes})

    return make
