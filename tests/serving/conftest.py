"""A bundle that is tiny and whole, clients for it, and both servers over it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from utune_deploy.export.bundle import (
    BANK,
    FAN_OUT_FILE,
    IDENTITY,
    TASKS,
    Bundle,
    Engine,
    Task,
    identity_of,
    open_bundle,
    tasks_digest,
    write_manifest,
)
from utune_deploy.export.engine import IMAGES, LOGITS, TASK, Device, Tensor
from utune_deploy.merge.no_class import NO_CLASS
from utune_deploy.merge.preprocessing import Preprocessing
from utune_deploy.serving.service import Service
from utune_deploy.serving.tasks.packed import Packed, Probe, write_packed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

SIZE = 8
CLASSES = {"pets": 5, "cars": 3, "flowers": 2}
MAX_BATCH = 8
LOWEST = np.float32(NO_CLASS)
TRITON_ENV = "UTUNE_TRITON_ENV"


HEADS = "bank/heads"
FLOORS = "bank/floors"  # [tasks, width]: added to the logits, 0 or the lowest number
WORDS, LENGTH, HIDDEN = 11, 6, 4  # of the engine that reads text beside features


def _pictures() -> tuple[list, dict, tuple[Tensor, ...], int]:
    """images [B, 3, 8, 8] -> flat [B, 192]."""
    nodes = [helper.make_node("Flatten", [IMAGES], ["flat"], axis=1)]
    given = (Tensor(IMAGES, "float32", ("batch", 3, SIZE, SIZE)),)
    return nodes, {}, given, 3 * SIZE * SIZE


def _text() -> tuple[list, dict, tuple[Tensor, ...], int]:
    """input_ids, attention_mask [B, 6], visual_feats [B, 2, 4] -> flat [B, 4], summed over what is seen."""
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["embedded"]),
        helper.make_node("Cast", ["attention_mask"], ["seen"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["seen", "last"], ["seen1"]),
        helper.make_node("Mul", ["embedded", "seen1"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "one"], ["text"], keepdims=0),
        helper.make_node("ReduceSum", ["visual_feats", "one"], ["seen2"], keepdims=0),
        helper.make_node("Add", ["text", "seen2"], ["flat"]),
    ]
    words = np.random.default_rng(5).standard_normal((WORDS, HIDDEN)).astype(np.float32)
    constants = {"words": words, "last": np.array([2], dtype=np.int64)}
    given = (
        Tensor("input_ids", "int64", ("batch", LENGTH), WORDS),
        Tensor("attention_mask", "int64", ("batch", LENGTH)),
        Tensor("visual_feats", "float32", ("batch", 2, HIDDEN)),
    )
    return nodes, constants, given, HIDDEN


def _make_engine(
    names: tuple[str, ...], *, form: str, text: bool, labelled: bool, bank: bool = False
) -> tuple[onnx.ModelProto, tuple[Tensor, ...], Tensor]:
    """One linear head per task over the flat rows.

    `multi`: each row's own head, gathered by `task`; `one`: the first task's; `fan-out`: every head.
    Without labels a task answers with [2, classes of the widest].
    """
    nodes, constants, given, features = _text() if text else _pictures()
    random = np.random.default_rng(7)
    width = max(CLASSES[name] for name in names) * (1 if labelled else 2)
    own = [[k < CLASSES[name] or not labelled for k in range(width)] for name in names]
    heads = random.standard_normal((len(names), features, width)).astype(np.float32)
    answer = [width] if labelled else [2, width // 2]
    per_row = [len(names)] if form == "fan-out" else []
    constants |= {
        HEADS: heads,
        "own": np.array(own),
        "lowest": np.array(LOWEST, dtype=np.float32),
        "one": np.array([1], dtype=np.int64),
        "two": np.array([2], dtype=np.int64),
        "both": np.array([1, 2], dtype=np.int64),
        "row": np.array([0], dtype=np.int64),
        "shape": np.array([0, *per_row, *answer], dtype=np.int64),
    }
    row = TASK if form == "multi" else "row"
    if form == "fan-out":
        nodes += [
            helper.make_node("Unsqueeze", ["flat", "both"], ["lines"]),
            helper.make_node("MatMul", ["lines", HEADS], ["products"]),
            helper.make_node("Squeeze", ["products", "two"], ["raw"]),
            helper.make_node("Where", ["own", "raw", "lowest"], ["answers"]),
        ]
    else:
        nodes += [
            helper.make_node("Unsqueeze", ["flat", "one"], ["lines"]),
            helper.make_node("Gather", [HEADS, row], ["heads"], axis=0),
            helper.make_node("MatMul", ["lines", "heads"], ["products"]),
            helper.make_node("Squeeze", ["products", "one"], ["raw"]),
        ]
        if bank:
            nodes += [
                helper.make_node("Gather", [FLOORS, row], ["floor"], axis=0),
                helper.make_node("Add", ["raw", "floor"], ["answers"]),
            ]
        else:
            nodes += [
                helper.make_node("Gather", ["own", row], ["mask"], axis=0),
                helper.make_node("Where", ["mask", "raw", "lowest"], ["answers"]),
            ]
    nodes.append(helper.make_node("Reshape", ["answers", "shape"], [LOGITS]))
    if form == "multi":
        given = (*given, Tensor(TASK, "int64", ("batch",)))
    if bank:
        del constants[HEADS]
        given = (
            *given,
            Tensor(HEADS, "float32", ("tasks", features, width)),
            Tensor(FLOORS, "float32", ("tasks", width)),
        )
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    used = {name for node in nodes for name in node.input}
    logits = Tensor(LOGITS, "float32", ("batch", *per_row, *answer))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(t.name, kinds[t.dtype], t.shape) for t in given],
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, logits.shape)],
        [numpy_helper.from_array(v, name) for name, v in constants.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model, given, logits


def _write_bundle(
    folder: Path,
    names: tuple[str, ...],
    *,
    form: str = "multi",
    beside: bool = False,
    text: bool = False,
    labelled: bool = True,
    bank: bool = False,
) -> Bundle:
    """A bundle of one engine, or with a second one beside it that answers every task.

    With `bank` the heads are an input of the engine and stand in a file of their own.
    """
    folder.mkdir(parents=True)

    def engine(file: str, form: str) -> tuple[onnx.ModelProto, Engine]:
        model, inputs, logits = _make_engine(
            names, form=form, text=text, labelled=labelled, bank=bank
        )
        return model, Engine(
            target="onnxruntime",
            file=file,
            precision="fp32",
            opset=18,
            max_batch=MAX_BATCH,
            inputs=inputs,
            outputs=(logits,),
        )

    tasks = tuple(
        Task(
            name=name,
            row=index,
            labels=tuple(f"{name}-{k}" for k in range(CLASSES[name] if labelled else 0)),
            preprocessing=Preprocessing(size=(SIZE, SIZE)),
            delta=f"{index:064x}",
            width=None if labelled else max(CLASSES[name] for name in names),
        )
        for index, name in enumerate(names)
    )
    model, main = engine("model.onnx", form)
    second, fan_out = engine(FAN_OUT_FILE, "fan-out") if beside else (None, None)
    bundle = Bundle(
        path=folder,
        name="tiny",
        mode="parallel" if form == "one" else form,
        bank="inputs" if bank else "constants",
        engine=main,
        tasks=tasks,
        backbone={"architecture": "tiny", "fingerprint": "f" * 64},
        plan={},
        check={},
        versions={},
        identity="",
        fan_out=fan_out,
    )
    identity = identity_of(
        bundle.backbone, bundle.mode, bundle.bank, tasks, "fp32", main.inputs, fan_out
    )
    if bank:
        constants, _, _ = _make_engine(names, form=form, text=text, labelled=labelled)
        held = {t.name: numpy_helper.to_array(t) for t in constants.graph.initializer}
        floors = np.where(held["own"], np.float32(0), LOWEST).astype(np.float32)
        save_file({HEADS: held[HEADS], FLOORS: floors}, folder / BANK, {TASKS: tasks_digest(tasks)})
    for proto, file in ((model, "model.onnx"), (second, FAN_OUT_FILE)):
        if proto is not None:
            helper.set_model_props(proto, {IDENTITY: identity})
            onnx.save(proto, folder / file)
    write_manifest(folder, replace(bundle, identity=identity))
    return open_bundle(folder)


HEAD, OWN = (
    "bank/head/weight",
    "bank/head/own",
)  # [tasks, 192, 5], [tasks, 5]: 1 where a class is the task's


def _row_of(classes: int, seed: int) -> dict[str, np.ndarray]:
    """A task's row of the bank: a seeded head, and which of the five classes are its own."""
    random = np.random.default_rng([classes, seed])
    width = max(CLASSES.values())
    return {
        HEAD: random.standard_normal((3 * SIZE * SIZE, width)).astype(np.float32),
        OWN: (np.arange(width) < classes).astype(np.float32),
    }


def _facts(name: str, classes: int, seed: int, row: int = 0) -> Task:
    return Task(
        name=name,
        row=row,
        labels=tuple(f"{name}-{seed}-{k}" for k in range(classes)),
        preprocessing=Preprocessing(size=(SIZE, SIZE)),
        delta=f"{seed:064x}",
    )


@dataclass(frozen=True)
class Made:
    """A task and what it must answer."""

    packed: Packed

    @property
    def name(self) -> str:
        return self.packed.task.name

    @property
    def labels(self) -> tuple[str, ...]:
        return self.packed.task.labels

    @property
    def data(self) -> bytes:
        return write_packed(self.packed)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Of the task's own classes, in float64."""
        flat = images.reshape(len(images), -1).astype(np.float64)
        return flat @ self.packed.tensors[HEAD].astype(np.float64)[:, : len(self.labels)]

    def answers(self, images: np.ndarray, logits: np.ndarray) -> bool:
        """Whether these are the task's logits, `[n, 5]` or its own alone."""
        wanted = self.logits(images)
        own, padding = np.split(np.asarray(logits, np.float64), [wanted.shape[1]], axis=-1)
        return (
            own.shape == wanted.shape
            and np.allclose(own, wanted, rtol=1e-5, atol=1e-3)
            and bool((padding == LOWEST).all())
        )

    def changed(self, **changes: object) -> Made:
        """The same with other fields, of the task where it has them."""
        task = {k: v for k, v in changes.items() if k in Task.__dataclass_fields__}
        rest = {k: v for k, v in changes.items() if k not in task}
        return Made(replace(self.packed, task=replace(self.packed.task, **task), **rest))


def _write_inputs_bundle(
    folder: Path, name: str = "tiny", classes: Mapping[str, int] = CLASSES, seed: int = 0
) -> Bundle:
    """Three tasks in a bundle whose bank is an input of its engine."""
    folder.mkdir(parents=True)
    width = max(CLASSES.values())
    flatten, _, given, features = _pictures()
    nodes = [
        *flatten,
        helper.make_node("Unsqueeze", ["flat", "one"], ["lines"]),
        helper.make_node("Gather", [HEAD, TASK], ["heads"], axis=0),
        helper.make_node("MatMul", ["lines", "heads"], ["products"]),
        helper.make_node("Squeeze", ["products", "one"], ["raw"]),
        helper.make_node("Gather", [OWN, TASK], ["marks"], axis=0),
        helper.make_node("Cast", ["marks"], ["mask"], to=TensorProto.BOOL),
        helper.make_node("Where", ["mask", "raw", "lowest"], [LOGITS]),
    ]
    inputs = (
        *given,
        Tensor(TASK, "int64", ("batch",)),
        Tensor(HEAD, "float32", ("tasks", features, width)),
        Tensor(OWN, "float32", ("tasks", width)),
    )
    outputs = (Tensor(LOGITS, "float32", ("batch", width)),)
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    constants = {"one": np.array([1], dtype=np.int64), "lowest": np.array(LOWEST)}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(t.name, kinds[t.dtype], t.shape) for t in inputs],
        [helper.make_tensor_value_info(t.name, kinds[t.dtype], t.shape) for t in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    tasks = tuple(_facts(n, classes[n], seed, row) for row, n in enumerate(classes))
    rows = [_row_of(classes[n], seed) for n in classes]
    backbone = {"architecture": "tiny", "fingerprint": "f" * 64}
    identity = identity_of(backbone, "multi", "inputs", tasks, "fp32", inputs)
    helper.set_model_props(model, {IDENTITY: identity})
    onnx.checker.check_model(model)
    onnx.save(model, folder / "model.onnx")
    save_file(
        {key: np.stack([row[key] for row in rows]) for key in rows[0]},
        folder / BANK,
        metadata={TASKS: tasks_digest(tasks)},
    )
    engine = Engine("onnxruntime", "model.onnx", "fp32", 18, MAX_BATCH, inputs, outputs)
    facts = {"plan": {"slots": []}, "check": {}, "versions": {}, "identity": identity}
    write_manifest(
        folder, Bundle(folder, name, "multi", "inputs", engine, tasks, backbone, **facts)
    )
    return open_bundle(folder)


@pytest.fixture(scope="session")
def inputs_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The three tasks, of 5, 3 and 2 classes, whose bank is an input."""
    return _write_inputs_bundle(tmp_path_factory.mktemp("bundles") / "inputs")


@pytest.fixture(scope="session")
def later_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of that name, of seed 5, with boats (4 classes) in the place of flowers."""
    folder = tmp_path_factory.mktemp("bundles") / "later"
    return _write_inputs_bundle(folder, classes={"boats": 4, "cars": 3, "pets": 5}, seed=5)


@pytest.fixture(scope="session")
def make_task(inputs_bundle: Bundle) -> Callable[..., Made]:
    """`make_task(name, classes, seed, probe=...)` -> a packed task for `inputs_bundle` and its answers.

    Seed 0 of a shipped task's name is that task.
    """

    def make(name: str, classes: int | None = None, seed: int = 0, *, probe: bool = False) -> Made:
        classes = CLASSES.get(name, 3) if classes is None else classes
        made = Made(
            Packed(
                _facts(name, classes, seed),
                inputs_bundle.identity,
                inputs_bundle.backbone["fingerprint"],
                _row_of(classes, seed),
            )
        )
        if not probe:
            return made
        images = np.random.default_rng(9).standard_normal((2, 3, SIZE, SIZE)).astype(np.float32)
        return made.changed(probe=Probe({IMAGES: images}, made.logits(images), 1e-5))

    return make


@pytest.fixture
def open_live(inputs_bundle: Bundle) -> Iterator[Callable[..., Service]]:
    """`open_live(rows=..., keep=...)` -> a service whose tasks can change; closed at the end."""
    opened: list[Service] = []

    def live(bundle: Bundle = inputs_bundle, **settings) -> Service:
        opened.append(Service.open(bundle, Device(threads=1), **settings))
        return opened[-1]

    yield live
    for service in opened:
        service.close()


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Three tasks of 5, 3 and 2 classes."""
    return _write_bundle(tmp_path_factory.mktemp("bundles") / "three", tuple(CLASSES))


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One task, and an engine that takes no row."""
    return _write_bundle(tmp_path_factory.mktemp("bundles") / "one", ("cars",), form="one")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Three tasks over three named inputs, two of integers."""
    return _write_bundle(tmp_path_factory.mktemp("bundles") / "text", tuple(CLASSES), text=True)


@pytest.fixture(scope="session")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two tasks without labels, each with an answer of [2, 5]."""
    return _write_bundle(
        tmp_path_factory.mktemp("bundles") / "arrays", ("pets", "cars"), labelled=False
    )


@pytest.fixture(scope="session")
def banked(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The three tasks with their heads as an input of the engine."""
    return _write_bundle(tmp_path_factory.mktemp("bundles") / "banked", tuple(CLASSES), bank=True)


@pytest.fixture(scope="session")
def fewer(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of the same name with two of the three tasks: its logits are as wide."""
    return _write_bundle(tmp_path_factory.mktemp("bundles") / "fewer", ("pets", "cars"))


@pytest.fixture(scope="session")
def two_engines(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The three tasks with a second engine beside the first, which answers all of them."""
    return _write_bundle(tmp_path_factory.mktemp("bundles") / "both", tuple(CLASSES), beside=True)


@pytest.fixture(scope="session")
def fan_out(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The three tasks in one engine that answers all of them."""
    return _write_bundle(
        tmp_path_factory.mktemp("bundles") / "fan_out", tuple(CLASSES), form="fan-out"
    )


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Named inputs, tasks without labels, and one engine that answers all of them."""
    return _write_bundle(
        tmp_path_factory.mktemp("bundles") / "everything",
        ("cars", "flowers"),
        form="fan-out",
        text=True,
        labelled=False,
    )


@pytest.fixture(scope="session")
def packed(banked: Bundle):
    """`packed(name, classes, seed, right=True)` -> a packed task for that bundle; a wrong one fails its probe."""

    def make(name: str, classes: int = 4, seed: int = 0, *, right: bool = True) -> bytes:
        random = np.random.default_rng([seed, 77])
        head = random.standard_normal((3 * SIZE * SIZE, 5)).astype(np.float32)
        floor = np.where(np.arange(5) < classes, np.float32(0), LOWEST).astype(np.float32)
        images = random.standard_normal((2, 3, SIZE, SIZE)).astype(np.float32)
        logits = images.reshape(2, -1).astype(np.float64) @ head[:, :classes]
        return write_packed(
            Packed(
                task=Task(
                    name=name,
                    row=0,
                    labels=tuple(f"{name}-{k}" for k in range(classes)),
                    preprocessing=Preprocessing(size=(SIZE, SIZE)),
                    delta=f"{seed:064x}",
                ),
                identity=banked.identity,
                fingerprint="f" * 64,
                tensors={HEADS: head, FLOORS: floor},
                probe=Probe(
                    inputs={IMAGES: images}, logits=logits if right else -logits, budget=1e-4
                ),
            )
        )

    return make


@pytest.fixture(scope="session")
def sentences():
    """`sentences(n, seed)` -> the named inputs of n rows."""

    def make(count: int, seed: int = 0) -> dict[str, np.ndarray]:
        random = np.random.default_rng(seed)
        lengths = random.integers(1, LENGTH + 1, (count, 1))
        return {
            "input_ids": random.integers(0, WORDS, (count, LENGTH)),
            "attention_mask": (np.arange(LENGTH) < lengths).astype(np.int64),
            "visual_feats": random.standard_normal((count, 2, HIDDEN)).astype(np.float32),
        }

    return make


@pytest.fixture(scope="session")
def service(bundle: Bundle) -> Service:
    """The reference: the same bundle in this process."""
    return Service.open(bundle, Device(threads=1))


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
def threaded():
    """`with threaded(server) as addresses`: an async context manager, entered in a thread of its own."""

    @contextmanager
    def start(server) -> Iterator:
        ready = threading.Event()
        box: dict = {}

        async def main() -> None:
            box["loop"], box["stop"] = asyncio.get_running_loop(), asyncio.Event()
            async with server as addresses:
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
def embed(threaded):
    """`with embed(service, **settings) as addresses`: the embedded server in a thread."""
    from utune_deploy.serving.servers.embedded import running

    return lambda service, **settings: threaded(running(service, **settings))


@pytest.fixture(scope="session")
def child():
    """`with child(verb, bundle, *settings) as process`: a server in a process of its own.

    The process prints its HTTP and gRPC addresses in one line once it answers, and logs as `serve` does.
    """
    script = """
import sys
from pathlib import Path, PosixPath
from utune_deploy.export.bundle import open_bundle
from utune_deploy.export.engine import Device
from utune_deploy.merge.errors import UtuneError
from utune_deploy.serving.servers import server
from utune_deploy.serving.watching import logs

logs.configure("text", requests=False)
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
        # A path is written as `PosixPath(...)`, a device as `Device(...)`; the script knows both names.
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
def under_load():
    """`with under_load(*askers) as counts`: each asks again and again, in a thread of its own, while the block runs.

    An asker opens, as a context manager, a function that asks once and returns what was wrong; it is given the
    number of its turn. Nothing may be wrong, and each must have had an answer.
    """

    @contextmanager
    def load(*askers: Callable) -> Iterator[list[int]]:
        wrong: list[object] = []
        counts = [0] * len(askers)
        stop = threading.Event()

        def ask(number: int) -> None:
            with askers[number]() as once:
                while not stop.is_set():
                    try:
                        found = once(counts[number])
                    except Exception as error:
                        found = error
                    wrong.extend([] if found is None else [found])
                    counts[number] += 1

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(askers))]
        for thread in threads:
            thread.start()
        try:
            yield counts
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not wrong, wrong[:3]
        assert min(counts) > 0

    return load


@pytest.fixture(scope="session")
def triton_environment() -> Path:
    """The environment that holds tritonserver."""
    if TRITON_ENV not in os.environ:
        pytest.skip(f"{TRITON_ENV} names no environment with nvidia-pytriton in it")
    return Path(os.environ[TRITON_ENV])
