"""A tritonserver over a repository that a test writes, and what its aliases answer."""

from __future__ import annotations

import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.http as http

from utune_deploy.export.engine import Device
from utune_deploy.serving.servers import triton
from utune_deploy.serving.servers.ports import Addresses, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

ONE = Device(threads=1)
IMAGES = np.random.default_rng(5).standard_normal((32, 3, 8, 8)).astype(np.float32)
SECONDS = 20.0


@contextmanager
def started(
    environment: Path, folder: Path, mode: str, monkeypatch, *, prefix: Sequence[str] = ()
) -> Iterator[Addresses]:
    """The addresses of a tritonserver over `folder/models` that comes by its models in this mode."""
    start = subprocess.Popen

    def with_mode(command, **settings):
        words = [
            f"--model-control-mode={mode}" if "--model-control-mode" in word else word
            for word in command
        ]
        load = ["--load-model=*"] if mode == "explicit" else []
        return start([*prefix, *words, *load], **settings)

    fit = triton.inspect_environment(environment, needs_safetensors=True)
    with monkeypatch.context() as patch:
        patch.setattr(triton.subprocess, "Popen", with_mode)
        ports = [free_port("127.0.0.1", 0) for _ in range(3)]
        process = triton.TritonProcess(fit, folder, "127.0.0.1", ports)
    try:
        process.wait_until_ready(60, lambda: False)
        yield process.addresses
        process.check_alive()
    finally:
        monkeypatch.setattr(
            triton, "EXIT_SECONDS", 0.5
        )  # nothing goes with its folder in this mode
        process.end()


def until(condition, seconds: float = SECONDS) -> float:
    """Wait for it; how long that took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds
        time.sleep(0.01)
    return time.monotonic() - begin


def pixels(rows: int = 3, kinds=http) -> list:
    given = kinds.InferInput("images", [rows, 3, 8, 8], "FP32")
    given.set_data_from_numpy(IMAGES[:rows])
    return [given]


def answers_as(web, model: str, made) -> bool:
    """Whether an alias gives a task's logits and labels, and its class names."""
    classes = [http.InferRequestedOutput("logits", class_count=1)]
    reply = web.infer(model, pixels())
    best = [cell.decode() for cell in reply.as_numpy("label").ravel()]
    said = web.infer(model, pixels(), outputs=classes).as_numpy("logits").ravel()
    wanted = [made.labels[k] for k in made.logits(IMAGES[:3]).argmax(axis=1)]
    return (
        made.answers(IMAGES[:3], reply.as_numpy("logits"))
        and best == wanted
        and [cell.decode().split(":")[2] for cell in said] == wanted
    )


def asker(addresses: Addresses, front: str, model: str, *right) -> Callable:
    """For `under_load`: requests of an alias or of the model, which must answer as one of these tasks does."""
    kinds = http if front == "http" else grpc
    inputs = pixels(2, kinds)
    if model == "tiny":
        named = kinds.InferInput("task", [2, 1], "BYTES")
        named.set_data_from_numpy(np.array([[right[0].name.encode()]] * 2, dtype=object))
        inputs.append(named)

    @contextmanager
    def opened() -> Iterator[Callable]:
        with kinds.InferenceServerClient(getattr(addresses, front)) as client:

            def once(_: int) -> str | None:
                logits = client.infer(model, inputs).as_numpy("logits")
                return None if any(made.answers(IMAGES[:2], logits) for made in right) else model

            yield once

    return opened
