"""Every task of every row, from files to answers: `export --fan-out`, `--mode fan-out` and who reads them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import threading
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import save_file

from utune_deploy.deploy.check import check_engine
from utune_deploy.deploy.cli import main
from utune_deploy.deploy.reference import Evidence
from utune_deploy.export.bundle import (
    FAN_OUT_FILE,
    IDENTITY,
    MANIFEST,
    identity_of,
    open_bundle,
    write_manifest,
)
from utune_deploy.export.engine import Device
from utune_deploy.export.graph import Inputs, serialise, trace
from utune_deploy.merge import methods
from utune_deploy.merge.attach import attach
from utune_deploy.merge.backbone import create, save
from utune_deploy.merge.delta import save_delta
from utune_deploy.merge.fan_out import FanOut, share
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
    np.save(root / "rows.npy", np.random.default_rng(0).standard_normal((5, 3, 32, 32), np.float32))
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


# export


def test_export_says_what_tasks_share(beside: Path, only: Path) -> None:
    for path, mode, engines in ((beside, "multi", 2), (only, "fan-out", 1)):
        bundle = open_bundle(path)
        assert (bundle.mode, 1 + (bundle.fan_out is not None)) == (mode, engines)
        shared = {tuple(part["tasks"]): part["until"] for part in bundle.plan["shared"]}
        assert set(shared) == {("side", "wide"), ("probe",), ("late",), ("lora",)}
        assert shared["side", "wide"] == "head:input"
        assert shared["late",] == "blocks.2:input"
        assert shared["lora",] == "blocks.0:input"
        assert bundle.plan["macs"]["every task"] < bundle.plan["macs"]["tasks one by one"]
        engine = bundle.require_fan_out()
        assert engine.outputs[0].shape == ("batch", len(TASKS), max(TASKS.values()))


def test_the_trunk_is_in_the_engine_once_as_far_as_tasks_agree(beside: Path) -> None:
    """Three blocks for those beside it, one more behind the late fork, three more behind the early one."""
    graph = onnx.load(beside / FAN_OUT_FILE).graph
    assert sum(node.op_type == "Attention" for node in graph.node) == 3 + 1 + 3
    largest = max(graph.initializer, key=lambda tensor: len(tensor.raw_data))
    copies = [t.name for t in graph.initializer if t.raw_data == largest.raw_data]
    assert copies == [largest.name]


def test_a_dry_run_shows_what_tasks_share_and_writes_nothing(
    cli: Any, files: Path, tmp_path: Path
) -> None:
    arguments = (
        "export", *(files / f"{name}.safetensors" for name in ("side", "wide", "late")),
        "--weights", files / "backbone", "-o", tmp_path / "bundle", "--fan-out", "--dry-run",
    )  # fmt: skip
    said = cli(*arguments)
    assert (said.code, said.err) == (0, "")
    assert "what they share" in said.out
    assert "side, wide  the trunk runs once per example until head:input" in said.out
    assert [p["until"] for p in cli(*arguments, "--json").json["shared"]] == [
        "head:input",
        "blocks.2:input",
    ]
    assert not list(tmp_path.iterdir())


def test_tasks_that_want_other_pixels_are_not_fanned_out(
    cli: Any, files: Path, tmp_path: Path, tasks: dict[str, Delta]
) -> None:
    other = replace(tasks["probe"], preprocessing=Preprocessing((32, 32), mean=(0.0, 0.0, 0.0)))
    save_delta(tmp_path / "other.safetensors", other)
    said = cli(
        "export", files / "side.safetensors", tmp_path / "other.safetensors",
        "--weights", files / "backbone", "-o", tmp_path / "bundle", "--fan-out",
    )  # fmt: skip
    assert (said.code, said.out) == (4, "")
    assert "side" in said.err
    assert "probe" in said.err
    assert not (tmp_path / "bundle").exists()


# check


def check(cli: Any, files: Path, bundle: Path) -> Any:
    return cli(
        "check", bundle, *(files / f"{name}.safetensors" for name in TASKS),
        "--weights", files / "backbone", "--threads", 1,
    )  # fmt: skip


def test_check_holds_both_engines_to_torch(cli: Any, files: Path, beside: Path) -> None:
    said = check(cli, files, beside)
    assert (said.code, said.err) == (0, "")
    rows = [line.split()[:2] for line in said.out.splitlines()[1:-1]]
    assert {row[0] for row in rows} == {"pass"}
    assert {row[1] for row in rows} == {"model.onnx", FAN_OUT_FILE}


def test_check_finds_an_engine_of_other_tasks(
    cli: Any,
    files: Path,
    beside: Path,
    tmp_path: Path,
    vit: Backbone,
    random_delta: Callable[..., Delta],
    sites_of: Any,
) -> None:
    bundle = open_bundle(beside)
    others = [
        random_delta(vit, task=name, classes=classes, seed=50) for name, classes in TASKS.items()
    ]
    module = FanOut(vit, share(vit, others, sites_of(vit), torch.float32)).eval()
    engine = serialise(trace(module, Inputs(vit.example(2))), {IDENTITY: bundle.identity})
    folder = tmp_path / "swapped"
    shutil.copytree(beside, folder)
    (folder / FAN_OUT_FILE).write_bytes(engine)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][FAN_OUT_FILE]["sha256"] = hashlib.sha256(engine).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    said = check(cli, files, folder)
    assert said.code == 3
    assert said.err.startswith("error: the bundle does not answer as its tasks do in torch")
    failed = [line.split()[1] for line in said.out.splitlines() if line.startswith("FAIL")]
    assert set(failed) == {FAN_OUT_FILE}


def test_every_answer_of_a_call_is_compared(
    vit: Backbone, random_delta: Any, sites_of: Any, tmp_path: Path
) -> None:
    """An engine that is right for one task of each row, and wrong for the others, is wrong."""
    deltas = [random_delta(vit, task=name, classes=3, seed=n) for n, name in enumerate("abc")]
    groups = share(vit, deltas, sites_of(vit), torch.float32)

    class Shifted(FanOut):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            answers = super().forward(*inputs)
            rows = torch.arange(answers.shape[0])[:, None]
            asked = torch.arange(len(deltas)) == rows % len(deltas)
            return torch.where(asked[..., None], answers, answers + 10)

    verdicts = {}
    for kind in (FanOut, Shifted):
        engine = tmp_path / f"{kind.__name__}.onnx"
        model = trace(kind(vit, groups).eval(), Inputs(vit.example(2)))
        engine.write_bytes(serialise(model, {}))
        verdicts[kind] = check_engine(
            engine, vit, deltas, sites_of(vit),
            mixes=False, fans=True, bank={}, max_batch=3, evidence=Evidence(), device=Device(threads=1),
        )  # fmt: skip
    assert verdicts[FanOut].passed
    assert "every task of every row" in [c.name for c in verdicts[Shifted].failures]


def test_nothing_is_added_beside_an_engine_that_holds_its_tasks(
    cli: Any, files: Path, only: Path, tmp_path: Path
) -> None:
    grows = export(files, "grows", "--fan-out", "--bank", "inputs", tasks=("probe",))
    assert (open_bundle(grows).bank, open_bundle(grows).mode) == ("inputs", "multi")
    for bundle, sentence in (
        (grows, "the engine that answers every task at once holds its tasks"),
        (only, "tasks can be added only where the bank is an input"),
    ):
        said = cli(
            "add", bundle, files / "side.safetensors",
            "--weights", files / "backbone", "-o", tmp_path / "grown",
        )  # fmt: skip
        assert (said.code, said.out) == (2, "")
        assert said.err.startswith(f"error: {sentence}")
    assert not list(tmp_path.iterdir())


# predict


@pytest.mark.parametrize("form", ["beside", "only"])
def test_every_task_answers_as_the_tasks_one_by_one(
    form: str, cli: Any, files: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle = request.getfixturevalue(form)
    output = tmp_path / "every.npy"
    asked = ("predict", bundle, "--tensor", files / "rows.npy", "--json", "--top", 1)
    said = cli(*asked, "--every-task", "-o", output)
    assert (said.code, said.err) == (0, "")
    assert [row["task"] for row in said.json] == [*TASKS] * 5
    assert [row["input"] for row in said.json[:: len(TASKS)]] == [
        f"{files / 'rows.npy'}[{row}]" for row in range(5)
    ]
    every = np.load(output)
    assert every.shape == (5, len(TASKS), max(TASKS.values()))
    for place, task in enumerate(TASKS):
        alone = cli(*asked, "--task", task, "-o", tmp_path / f"{task}.npy")
        logits = np.load(tmp_path / f"{task}.npy")[:, : TASKS[task]]
        found = every[:, place, : TASKS[task]]
        np.testing.assert_allclose(found, logits, rtol=0, atol=2e-5 * np.abs(logits).max())
        best = [row["top"][0]["label"] for row in said.json[place :: len(TASKS)]]
        assert best == [row["top"][0]["label"] for row in alone.json]


def test_every_task_looks_at_the_same_picture(cli: Any, files: Path, beside: Path) -> None:
    pictures = (files / "0.png", files / "1.png")
    said = cli("predict", beside, *pictures, "--every-task")
    assert (said.code, said.err) == (0, "")
    head, *lines = said.out.splitlines()
    assert head.split() == ["input", "task", "label", "score", "next"]
    assert [tuple(line.split()[:2]) for line in lines] == [
        (str(picture), task) for picture in pictures for task in TASKS
    ]
    alone = cli("predict", beside, *pictures, "--task", "late", "--json").json
    every = cli("predict", beside, *pictures, "--every-task", "--json").json
    for one, row in zip(alone, (row for row in every if row["task"] == "late"), strict=True):
        assert [best["label"] for best in row["top"]] == [best["label"] for best in one["top"]]
        assert row["top"][0]["score"] == pytest.approx(one["top"][0]["score"], abs=1e-4)


def test_every_task_of_a_bundle_without_its_engine_is_refused(
    cli: Any, files: Path, bundles: Any
) -> None:
    asked = ("predict", bundles("merged").path, "--tensor", files / "rows.npy", "--every-task")
    said = cli(*asked)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: the bundle has no engine that answers every task at once")
    assert "export it again with --fan-out" in said.err
    said = cli(*asked, "--task", "lora")
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: tasks are named, and every task is asked for")


def test_one_picture_cannot_be_two_inputs(
    cli: Any, files: Path, only: Path, tmp_path: Path
) -> None:
    bundle = open_bundle(only)
    first, *others, last = bundle.tasks
    shifted = replace(last, preprocessing=Preprocessing((32, 32), crop=0.5))
    folder = tmp_path / "shifted"
    shutil.copytree(only, folder)
    changed = replace(bundle, path=folder, tasks=(first, *others, shifted))
    identity = identity_of(
        changed.backbone, changed.mode, changed.bank, changed.tasks, changed.engine.precision
    )
    model = onnx.load(folder / "model.onnx")
    onnx.helper.set_model_props(model, {IDENTITY: identity})
    onnx.save(model, folder / "model.onnx")
    write_manifest(folder, replace(changed, identity=identity))
    said = cli("predict", folder, files / "0.png", "--every-task")
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: two tasks want other pixels of the same picture")
    assert "wanted: side: size" in said.err
    assert "found:  lora: size" in said.err
    assert cli("predict", folder, files / "0.png", "--task", "lora").code == 0
    assert cli("predict", folder, "--tensor", files / "rows.npy", "--every-task").code == 0


# inspect and bench


def test_inspect_shows_both_engines_and_what_is_shared(
    cli: Any, files: Path, beside: Path, only: Path
) -> None:
    said = cli("inspect", beside)
    assert (said.code, said.err) == (0, "")
    assert f"every task at once: {FAN_OUT_FILE}, onnxruntime fp32" in said.out
    assert "  side, wide: the trunk runs once per example until head:input" in said.out
    assert "multiply-accumulates: " in said.out
    held = cli("inspect", beside, "--json").json
    bundle = open_bundle(beside)
    assert held["fan_out"]["outputs"][0]["shape"] == ["batch", len(TASKS), max(TASKS.values())]
    assert held["shared"] == bundle.plan["shared"]
    assert held["macs"] == bundle.plan["macs"]
    assert [task["name"] for task in held["tasks"]] == list(TASKS)
    said = cli("inspect", only)
    assert "every task at once: by this engine alone" in said.out
    assert cli("inspect", only, "--json").json["fan_out"] is None
    said = cli("inspect", files / "side.safetensors")
    assert "  1 x unipt widths [48, 48, 48], anchor 48, width 8, out 48" in said.out
    assert "taps 4" in said.out
    assert "head/unipt: unipt from blocks.0:input and 3 more to head:input" in said.out


def test_bench_times_every_task_beside_the_others(cli: Any, beside: Path, only: Path) -> None:
    quick = ("-b", 2, "--rounds", 2, "--warmup", 1, "--seconds", 0, "--threads", 1)
    said = cli("bench", beside, "--against", only, *quick, "--json")
    assert said.code == 0
    assert [subject["name"] for subject in said.json["subjects"]] == [
        "backbone only",
        "beside",
        "beside, every task",
        "only, every task",
    ]
    spoken = cli("bench", only, *quick)
    assert spoken.code == 0
    assert spoken.out.startswith("Every task of a batch of 2 costs ")


# serve


@contextmanager
def served(bundle: Path) -> Iterator[Callable[..., dict[str, np.ndarray]]]:
    """The embedded server in a thread: `(model, **inputs) -> outputs` over HTTP."""
    ready = threading.Event()
    box: dict[str, Any] = {}

    async def serve() -> None:
        box["loop"], box["stop"] = asyncio.get_running_loop(), asyncio.Event()
        async with running(Service.open(open_bundle(bundle), Device(threads=1))) as addresses:
            box["http"] = addresses.http
            ready.set()
            await box["stop"].wait()

    def ask(model: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        kinds = {"f": "FP32", "i": "INT64", "O": "BYTES"}
        body = {
            "inputs": [
                {
                    "name": name,
                    "shape": array.shape,
                    "datatype": kinds[array.dtype.kind],
                    "data": array.ravel().tolist(),
                }
                for name, array in inputs.items()
            ]
        }
        request = urllib.request.Request(
            f"http://{box['http']}/v2/models/{model}/infer",
            json.dumps(body, default=list).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            outputs = json.load(answer)["outputs"]
        return {o["name"]: np.array(o["data"]).reshape(o["shape"]) for o in outputs}

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(60)
        yield ask
    finally:
        if "loop" in box:
            box["loop"].call_soon_threadsafe(box["stop"].set)
        thread.join(60)


@pytest.mark.parametrize("form", ["beside", "only"])
def test_a_server_answers_one_task_or_all(
    form: str, files: Path, tasks: dict[str, Delta], alone: Any, request: pytest.FixtureRequest
) -> None:
    bundle = request.getfixturevalue(form)
    rows = np.load(files / "rows.npy")[:2]
    with served(bundle) as ask:
        every = ask(f"{form}.all", images=rows)
        one = ask(form, images=rows, task=np.array([["lora"], ["side"]], object))
    assert every["task"].tolist() == [[*TASKS]] * 2
    for place, (task, classes) in enumerate(TASKS.items()):
        wanted = alone(tasks[task], rows)
        found = every["logits"][:, place, :classes]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
        labels = [tasks[task].labels[best] for best in wanted.argmax(axis=1)]
        assert every["label"][:, place].tolist() == labels
    for row, task in enumerate(("lora", "side")):
        place = list(TASKS).index(task)
        assert one["label"].ravel()[row] == every["label"][row, place]
        assert one["score"].ravel()[row] == pytest.approx(every["score"][row, place], abs=1e-5)


# trunks that read no pictures


TRUNKS: dict[str, tuple[dict[str, Any], int | None]] = {
    "bert": (
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24, "length": 5, "vocab_size": 30, "max_position_embeddings": 8},
        3,
    ),
    "t5": (
        {"length": 5, "answer_length": 2, "vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 24,
         "num_layers": 2, "num_heads": 2},
        None,
    ),
    "states": ({"shapes": [[6, 12], [6, 12], [6, 16]], "mask": True}, 3),
}  # fmt: skip
"""Arguments, and classes or none."""


@pytest.mark.parametrize("name", TRUNKS)
def test_named_inputs_from_export_to_answers(
    name: str, cli: Any, tmp_path: Path, bundles: Any
) -> None:
    arguments, classes = TRUNKS[name]
    torch.manual_seed(0)
    backbone = create(name, arguments)
    if name == "states":  # has no weights
        given = [part for k, v in arguments.items() for part in ("--backbone-arg", f"{k}={v}")]
        trunk = ("--backbone", name, *given)
    else:
        save(tmp_path / "backbone", backbone)
        trunk = ("--weights", tmp_path / "backbone")
    models = {}
    for number, task in enumerate(("first", "second")):
        tuned = attach(backbone, methods.unipt(8), classes=classes, seed=number).eval()
        noise = torch.Generator().manual_seed(number)
        for parameter in tuned.trainable():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=noise)
        models[task] = tuned
        labels = [f"{task}{k}" for k in range(classes or 0)]
        save_delta(tmp_path / f"{task}.safetensors", tuned.delta(task, labels))
    form = ("--fan-out",) if name == "bert" else ("--mode", "fan-out")
    bundle = tmp_path / "bundle"
    deltas = [tmp_path / f"{task}.safetensors" for task in models]
    said = cli("export", *deltas, *trunk, "-o", bundle, "--max-batch", 2, "--threads", 1, *form)
    assert said.code == 0, said.err
    assert cli("check", bundle, *deltas, *trunk, "--threads", 1).code == 0
    drawn = backbone.draw(batch=3)
    names = [entry.name for entry in backbone.inputs]
    save_file(
        {n: t.numpy() for n, t in zip(names, drawn, strict=True)}, tmp_path / "rows.safetensors"
    )
    output = tmp_path / "every.npy"
    asked = ("predict", bundle, "--tensor", tmp_path / "rows.safetensors")
    said = cli(*asked, "--every-task", "-o", output, "--json")
    assert (said.code, said.err) == (0, "")
    assert [row["task"] for row in said.json] == ["first", "second"] * 3
    every = np.load(output)
    for place, (task, tuned) in enumerate(models.items()):
        with torch.no_grad():
            wanted = tuned(*drawn).numpy()
        close = {"rtol": 0, "atol": 2e-5 * np.abs(wanted).max()}
        np.testing.assert_allclose(every[:, place], wanted, **close)
        assert cli(*asked, "--task", task, "-o", tmp_path / f"{task}.npy").code == 0
        np.testing.assert_allclose(np.load(tmp_path / f"{task}.npy"), wanted, **close)
    said = cli("inspect", bundle)
    assert "preprocessing: no pictures" in said.out
    assert all(f"  {name} [batch, " in said.out for name in names)
    assert ("(no labels, width " in said.out) == (classes is None)
    assert "preprocessing: no pictures" in cli("inspect", tmp_path / "first.safetensors").out
    quick = ("-b", 2, "--rounds", 2, "--warmup", 1, "--seconds", 0, "--threads", 1, "--json")
    said = cli("bench", bundle, *quick)
    assert said.code == 0, said.err
    assert [tensor["name"] for tensor in said.json["about"]["inputs"]] == names
    assert said.json["about"]["image_shape"] is None
    assert said.json["subjects"][-1]["name"] == "bundle, every task"
    said = cli("bench", bundle, "--against", bundles("merged").path, *quick)
    assert (said.code, said.out) == (4, "")
    assert said.err.startswith("error: the bundles do not read the same inputs")
    assert "found:  images [3, 32, 32] float32" in said.err
