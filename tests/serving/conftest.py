"""A bundle that is tiny and whole, clients for it, and both servers over it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from utune_deploy.export.bundle import (
    IDENTITY,
    Bundle,
    Engine,
    Task,
    identity_of,
    open_bundle,
    write_manifest,
)
from utune_deploy.export.engine import IMAGES, LOGITS, TASK, Tensor
from utune_deploy.merge.preprocessing import Preprocessing
from utune_deploy.serving.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 8
CLASSES = {"pets": 5, "cars": 3, "flowers": 2}
MAX_BATCH = 8
LOWEST = np.finfo(np.float32).min
TRITON_ENV = "UTUNE_TRITON_ENV"


def _write_bundle(folder: Path, names: tuple[str, ...], *, mixes: bool) -> Bundle:
    """images [B, 3, 8, 8], task [B] -> one linear head per task, gathered by row."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(7)
    width = max(CLASSES[name] for name in names)
    features = 3 * SIZE * SIZE
    bank = random.standard_normal((len(names), features, width)).astype(np.float32)
    own = np.array([[k < CLASSES[name] for k in range(width)] for name in names])
    constants = {
        "bank": bank,
        "own": own,
        "lowest": np.array(LOWEST, dtype=np.float32),
        "one": np.array([1], dtype=np.int64),
    }
    if not mixes:
        constants["row"] = np.array([0], dtype=np.int64)
    row = TASK if mixes else "row"
    nodes = [
        helper.make_node("Flatten", [IMAGES], ["flat"], axis=1),
        helper.make_node("Unsqueeze", ["flat", "one"], ["lines"]),
        helper.make_node("Gather", ["bank", row], ["heads"], axis=0),
        helper.make_node("MatMul", ["lines", "heads"], ["products"]),
        helper.make_node("Squeeze", ["products", "one"], ["raw"]),
        helper.make_node("Gather", ["own", row], ["mask"], axis=0),
        helper.make_node("Where", ["mask", "raw", "lowest"], [LOGITS]),
    ]
    shape = ["batch", 3, SIZE, SIZE]
    inputs = [helper.make_tensor_value_info(IMAGES, TensorProto.FLOAT, shape)]
    engine_inputs = [Tensor(IMAGES, "float32", tuple(shape))]
    if mixes:
        inputs.append(helper.make_tensor_value_info(TASK, TensorProto.INT64, ["batch"]))
        engine_inputs.append(Tensor(TASK, "int64", ("batch",)))
    graph = helper.make_graph(
        nodes,
        "tiny",
        inputs,
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", width])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    tasks = tuple(
        Task(
            name=name,
            row=index,
            labels=tuple(f"{name}-{k}" for k in range(CLASSES[name])),
            preprocessing=Preprocessing(size=(SIZE, SIZE)),
            delta=f"{index:064x}",
        )
        for index, name in enumerate(names)
    )
    bundle = Bundle(
        path=folder,
        name="tiny",
        mode="multi" if mixes else "parallel",
        bank="constants",
        engine=Engine(
            target="onnxruntime",
            file="model.onnx",
            precision="fp32",
            opset=18,
            max_batch=MAX_BATCH,
            inputs=tuple(engine_inputs),
            outputs=(Tensor(LOGITS, "float32", ("batch", width)),),
        ),
        tasks=tasks,
        backbone={"architecture": "tiny"},
        plan={},
        check={},
        versions={},
        identity="",
    )
    identity = identity_of(bundle.backbone, bundle.mode, bundle.bank, tasks, "fp32")
    helper.set_model_props(model, {IDENTITY: identity})
    onnx.save(model, folder / "model.onnx")
    write_manifest(folder, replace(bundle, identity=identity))
    return open_bundle(folder)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Three tasks of 5, 3 and 2 classes."""
    return _write_bundle(tmp_path_factory.mktemp("bundles") / "three", tuple(CLASSES), mixes=True)


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One task, and an engine that takes no row."""
    return _write_bundle(tmp_path_factory.mktemp("bundles") / "one", ("cars",), mixes=False)


@pytest.fixture(scope="session")
def service(bundle: Bundle) -> Service:
    """The reference: the same bundle in this process."""
    return Service.open(bundle, threads=1)


@pytest.fixture(scope="session")
def rows():
    """`rows(n, seed)` -> images [n, 3, 8, 8] and a task name per row, all tasks mixed."""

    def make(count: int, seed: int = 0) -> tuple[np.ndarray, list[str]]:
        random = np.random.default_rng(seed)
        images = random.standard_normal((count, 3, SIZE, SIZE)).astype(np.float32)
        names = list(CLASSES)
        return images, [names[(seed + i) % len(names)] for i in range(count)]

    return make


@pytest.fixture(scope="session")
def embed():
    """`with embed(service, **settings) as addresses`: the embedded server in a thread."""
    from utune_deploy.serving.servers.embedded import running

    @contextmanager
    def start(service: Service, **settings) -> Iterator:
        ready = threading.Event()
        box: dict = {}

        async def main() -> None:
            box["loop"], box["stop"] = asyncio.get_running_loop(), asyncio.Event()
            async with running(service, **settings) as addresses:
                box["addresses"] = addresses
                ready.set()
                await box["stop"].wait()

        def run() -> None:
            try:
                asyncio.run(main())
            except BaseException as error:
                box["error"] = error
            finally:
                ready.set()

        thread = threading.Thread(target=run)
        thread.start()
        ready.wait()
        try:
            if "error" in box:
                raise box["error"]
            yield box["addresses"]
        finally:
            if "addresses" in box:
                box["loop"].call_soon_threadsafe(box["stop"].set)
            thread.join()
            if "error" in box:
                raise box["error"]

    return start


@pytest.fixture(scope="session")
def child():
    """`with child(verb, bundle, *settings) as process`: a server in a process of its own.

    The process prints its HTTP and gRPC addresses in one line once it answers.
    """
    script = """
import sys
from pathlib import Path, PosixPath
from utune_deploy.export.bundle import open_bundle
from utune_deploy.merge.errors import UtuneError
from utune_deploy.serving.servers import server

name, bundle, settings = sys.argv[1], open_bundle(Path(sys.argv[2])), eval(sys.argv[3])
settings["on_ready"] = lambda addresses: print(addresses.http, addresses.grpc, flush=True)
try:
    getattr(server(name), "serve_" + name)(bundle, **settings)
except UtuneError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""

    @contextmanager
    def start(name: str, bundle: Bundle, **settings) -> Iterator[subprocess.Popen]:
        # A path is written as `PosixPath(...)`; the script gives that name a meaning.
        process = subprocess.Popen(
            [sys.executable, "-c", script, name, str(bundle.path), repr(settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    return start


@pytest.fixture(scope="session")
def triton_environment() -> Path:
    """The environment that holds tritonserver."""
    if TRITON_ENV not in os.environ:
        pytest.skip(f"{TRITON_ENV} names no environment with nvidia-pytriton in it")
    return Path(os.environ[TRITON_ENV])
