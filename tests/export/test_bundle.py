"""A bundle reads back as it was written; each kind of damage has its own sentence and exit code."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from utune_deploy.export.bundle import (
    BANK,
    FAN_OUT,
    FAN_OUT_FILE,
    FORMAT,
    IDENTITY,
    MANIFEST,
    TASKS,
    VERSION,
    Bundle,
    Engine,
    Task,
    identity_of,
    open_bundle,
    tasks_digest,
    write_manifest,
)
from utune_deploy.export.engine import IMAGES, LOGITS, TASK, Device, Tensor
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.merge.preprocessing import Preprocessing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BACKBONE = {"architecture": "tiny", "arguments": {"img_size": 4}, "fingerprint": "f" * 64}


@pytest.fixture
def write(tmp_path: Path, tiny_engine: Any, tiny_bank: Any) -> Callable[..., Bundle]:
    """A bundle of the tiny engine: `(folder name, task names, bank) -> Bundle`."""

    def write(
        where: str,
        names: tuple[str, ...] = ("cats", "dogs"),
        bank: str = "constants",
        change: Callable[[Bundle], Bundle] = lambda bundle: bundle,
    ) -> Bundle:
        folder = tmp_path / where
        folder.mkdir()
        tasks = tuple(
            Task(
                name=name,
                row=row,
                labels=tuple(f"{name} {i}" for i in range(3)),
                preprocessing=Preprocessing((4, 4), crop=0.9),
                delta=hashlib.sha256(name.encode()).hexdigest(),
            )
            for row, name in enumerate(names)
        )
        tensors = tiny_bank(len(names), seed=len(where))
        given = [Tensor(IMAGES, "float32", ("batch", 3, 4, 4)), Tensor(TASK, "int64", ("batch",))]
        if bank == "inputs":
            given += [Tensor(k, "float32", ("tasks", *v.shape[1:])) for k, v in tensors.items()]
        bundle = Bundle(
            path=folder,
            name="tiny",
            mode="multi",
            bank=bank,
            engine=Engine(
                "onnxruntime", "model.onnx", "fp32", 23, 8, tuple(given),
                (Tensor(LOGITS, "float32", ("batch", 3)),),
            ),
            tasks=tasks,
            backbone=BACKBONE,
            plan={"mode": "multi", "why": "a test"},
            check={"passed": True, "comparisons": []},
            versions={"python": "3"},
            identity="",
        )  # fmt: skip
        bundle = change(bundle)
        identity = identity_of(
            BACKBONE, bundle.mode, bank, bundle.tasks, "fp32", tuple(given), bundle.fan_out
        )
        bundle = replace(bundle, identity=identity)
        inside = None if bank == "inputs" else tensors
        engine = tiny_engine(inside, {IDENTITY: bundle.identity})
        (folder / "model.onnx").write_bytes(engine)
        if bundle.fan_out is not None:
            (folder / FAN_OUT_FILE).write_bytes(engine)
        if bank == "inputs":
            save_file(tensors, folder / BANK, metadata={TASKS: tasks_digest(bundle.tasks)})
        write_manifest(folder, bundle)
        return bundle

    return write


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def adopt(folder: Path, name: str, other: Path) -> None:
    """Take a file of another bundle, and its digest with it."""
    shutil.copy(other / name, folder / name)
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    edit(folder, lambda manifest: manifest["files"][name].update(sha256=digest))


@pytest.mark.parametrize("bank", ["constants", "inputs"])
def test_a_bundle_reads_back_as_it_was_written(
    bank: str, write: Callable[..., Bundle], tiny_bank: Any, pictures: Any
) -> None:
    written = write("b", bank=bank)
    bundle = open_bundle(written.path)
    assert bundle == written
    assert bundle.read_engine() == (written.path / "model.onnx").read_bytes()
    assert set(bundle.read_bank()) == (set(tiny_bank(1)) if bank == "inputs" else set())
    session = bundle.open_session(Device(threads=1))
    assert session.metadata[IDENTITY] == bundle.identity
    tensors, images = tiny_bank(2, seed=1), pictures(2)
    wanted = images.reshape(2, 1, -1) @ tensors["bank/head/weight"] + tensors["bank/head/bias"]
    np.testing.assert_allclose(session.run(images, np.arange(2)), wanted[:, 0], rtol=0, atol=1e-5)


def test_the_manifest_is_json_for_people_and_lists_every_other_file(
    write: Callable[..., Bundle],
) -> None:
    bundle = write("b", bank="inputs")
    text = (bundle.path / MANIFEST).read_text()
    manifest = json.loads(text)
    assert text == json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    assert (manifest["format"], manifest["version"]) == (FORMAT, VERSION)
    assert sorted(manifest["files"]) == [BANK, "model.onnx"]
    for name, facts in manifest["files"].items():
        data = (bundle.path / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_the_same_bundle_has_the_same_manifest(write: Callable[..., Bundle]) -> None:
    assert (write("a").path / MANIFEST).read_bytes() == (write("b").path / MANIFEST).read_bytes()


def test_a_bundle_may_be_moved(write: Callable[..., Bundle], tmp_path: Path) -> None:
    bundle = write("b")
    bundle.path.rename(tmp_path / "elsewhere")
    assert open_bundle(tmp_path / "elsewhere").identity == bundle.identity


def test_what_older_bundles_say_of_themselves_has_not_changed() -> None:
    task = Task("cats", 0, ("a", "b"), Preprocessing((4, 4)), "d" * 64)
    given = (Tensor("bank/up", "float32", ("tasks", 4, 2)),)
    assert [
        identity_of(BACKBONE, "multi", "constants", (task,), "fp32"),
        identity_of(BACKBONE, "multi", "inputs", (task,), "fp32", given),
        tasks_digest((task,)),
    ] == [
        "8eb3a4af0f1ee82db1653165d9ad8fd0215693cd3753d015fce004573dd5e4ab",
        "25f61d97050ecc9f0f6364ddde24b6a250db9df9638261366e72d5b8ac5277a3",
        "5170eb5788889416b4e78fa6c4e1af3b41c5fcd9db3d8f36b7e6847a51bad087",
    ]


def test_a_plain_manifest_has_no_field_more(write: Callable[..., Bundle]) -> None:
    manifest = json.loads((write("b").path / MANIFEST).read_text())
    assert "fan_out" not in manifest
    assert set(manifest["tasks"][0]) == {"name", "row", "labels", "preprocessing", "delta"}
    for tensor in manifest["engine"]["inputs"] + manifest["engine"]["outputs"]:
        assert set(tensor) == {"name", "dtype", "shape"}


def beside(bundle: Bundle) -> Bundle:
    """The bundle with a second engine that answers every task."""
    logits = Tensor(LOGITS, "float32", ("batch", len(bundle.tasks), 3))
    inputs = bundle.engine.inputs[:1]
    return replace(
        bundle,
        fan_out=replace(bundle.engine, file=FAN_OUT_FILE, inputs=inputs, outputs=(logits,)),
    )


def test_a_second_engine_reads_back_and_opens(write: Callable[..., Bundle]) -> None:
    written, plain = write("b", change=beside), write("p")
    bundle = open_bundle(written.path)
    assert bundle == written
    assert bundle.engine_of_all == bundle.fan_out
    assert bundle.identity != plain.identity
    assert sorted(json.loads((written.path / MANIFEST).read_text())["files"]) == [
        FAN_OUT_FILE,
        "model.onnx",
    ]
    assert bundle.open_fan_out(Device(threads=1)).metadata[IDENTITY] == bundle.identity
    assert plain.engine_of_all is None
    with pytest.raises(UsageError, match="no engine that answers every task") as caught:
        plain.open_fan_out()
    assert caught.value.exit_code == 2


def test_the_only_engine_may_be_the_one_of_all_tasks(write: Callable[..., Bundle]) -> None:
    bundle = open_bundle(write("b", change=lambda b: replace(b, mode=FAN_OUT)).path)
    assert bundle.engine_of_all == bundle.engine
    assert bundle.open_fan_out(Device(threads=1)).metadata[IDENTITY] == bundle.identity


def test_a_second_engine_of_constants_binds_the_tasks_even_where_the_bank_is_an_input(
    write: Callable[..., Bundle],
) -> None:
    cats, cars = (
        write(where, names, bank="inputs", change=beside)
        for where, names in (("a", ("cats", "dogs")), ("b", ("cars", "dogs")))
    )
    assert cats.identity != cars.identity
    fan_out = replace(
        cats.fan_out or cats.engine, inputs=(*cats.engine.inputs[:1], Tensor("bank/up", "float32", ("tasks", 2)))
    )  # fmt: skip
    facts = (BACKBONE, "multi", "inputs")
    assert identity_of(*facts, cats.tasks, "fp32", (), fan_out) == identity_of(
        *facts, cars.tasks, "fp32", (), fan_out
    )


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda m: m["files"].pop(FAN_OUT_FILE), "the manifest does not list every file of the bundle"),
        (lambda m: m["fan_out"].update(file="../x.onnx"), "the manifest names a file outside the bundle"),
        (lambda m: m["fan_out"].pop("outputs"), "the manifest lacks a field"),
        (lambda m: m.update(fan_out=None), "the manifest lacks a field"),
        (lambda m: m.pop("fan_out"), "the manifest was edited: its identity is not that of its tasks and backbone"),
        (lambda m: m["fan_out"].update(precision="fp16"), "the manifest was edited: its identity is not that of its tasks and backbone"),
    ],
)  # fmt: skip
def test_a_second_engine_is_held_to_the_manifest(
    spoil: Any, sentence: str, write: Callable[..., Bundle]
) -> None:
    path = write("b", change=beside).path
    edit(path, spoil)
    refused(path, sentence)


def test_a_second_engine_of_another_bundle_is_refused_when_its_digest_came_along(
    write: Callable[..., Bundle],
) -> None:
    here, there = write("a", change=beside), write("b", ("cars", "bikes"), change=beside)
    adopt(here.path, FAN_OUT_FILE, there.path)
    with pytest.raises(IncompatibleArtefact, match="belongs to another bundle") as caught:
        open_bundle(here.path).open_fan_out()
    assert caught.value.details["where"].endswith(FAN_OUT_FILE)


def without_labels(bundle: Bundle) -> Bundle:
    return replace(bundle, tasks=tuple(replace(t, labels=(), width=3) for t in bundle.tasks))


@pytest.mark.parametrize("bank", ["constants", "inputs"])
def test_tasks_without_labels_have_a_width(bank: str, write: Callable[..., Bundle]) -> None:
    written = write("b", bank=bank, change=without_labels)
    bundle = open_bundle(written.path)
    assert bundle == written
    assert [(task.labels, task.width) for task in bundle.tasks] == [((), 3)] * 2
    edit(written.path, lambda m: m["tasks"][0].update(width=4))
    refused(
        written.path,
        "the manifest was edited: its identity is not that of its tasks and backbone"
        if bank == "constants"
        else "the bank does not hold the tasks that the manifest names",
    )


@pytest.mark.parametrize("width", [None, 0, -1, 2.0, True, "3"])
def test_a_width_that_is_none_is_refused(width: object, write: Callable[..., Bundle]) -> None:
    path = write("b", change=without_labels).path
    edit(path, lambda m: m["tasks"][0].update(width=width))
    assert "width of cats" in refused(path, "the manifest lacks a field").details["found"]
    edit(path, lambda m: m["tasks"][0].pop("width"))
    refused(path, "the manifest lacks a field")


def test_labels_for_some_tasks_and_none_for_others_are_refused(
    write: Callable[..., Bundle],
) -> None:
    def mix(bundle: Bundle) -> Bundle:
        first, second = bundle.tasks
        return replace(bundle, tasks=(first, replace(second, labels=(), width=3)))

    error = refused(
        write("b", change=mix).path, "some tasks of the bundle have labels and others have none"
    )
    assert error.details["found"] == "none for dogs"


def test_ids_may_state_what_they_lie_below(write: Callable[..., Bundle]) -> None:
    def state(bundle: Bundle) -> Bundle:
        first, *others = bundle.engine.inputs
        ids = Tensor("input_ids", "int64", ("batch", 6), 30522)
        return replace(bundle, engine=replace(bundle.engine, inputs=(first, ids, *others)))

    written = write("b", change=state)
    assert open_bundle(written.path) == written
    entry = json.loads((written.path / MANIFEST).read_text())["engine"]["inputs"][1]
    assert entry == {"name": "input_ids", "dtype": "int64", "shape": ["batch", 6], "high": 30522}
    edit(written.path, lambda m: m["engine"]["inputs"][1].update(high="many"))
    refused(written.path, "the manifest lacks a field")


def test_tasks_are_found_by_name(write: Callable[..., Bundle]) -> None:
    bundle = write("b")
    assert bundle.task("dogs").row == 1
    with pytest.raises(UsageError, match="unknown task") as caught:
        bundle.task("birds")
    assert caught.value.exit_code == 2
    assert caught.value.details["wanted"] == "one of cats, dogs"


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "merged"},
        {"bank": "inputs"},
        {"precision": "fp16"},
        {"backbone": {**BACKBONE, "fingerprint": "0" * 64}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_identity_follows_what_decides_the_answers(change: dict[str, Any]) -> None:
    task = Task("cats", 0, ("a", "b"), Preprocessing((4, 4)), "d" * 64)
    facts: dict[str, Any] = {
        "backbone": BACKBONE, "mode": "multi", "bank": "constants", "tasks": (task,), "precision": "fp32",
    }  # fmt: skip
    assert identity_of(**facts) == identity_of(**facts)
    assert identity_of(**{**facts, **change}) != identity_of(**facts)
    for other in (
        replace(task, name="dogs"),
        replace(task, row=1),
        replace(task, labels=("b", "a")),
        replace(task, preprocessing=Preprocessing((4, 4), crop=0.5)),
        replace(task, delta="0" * 64),
    ):
        assert identity_of(**{**facts, "tasks": (other,)}) != identity_of(**facts)


def test_the_identity_of_an_engine_whose_bank_is_an_input_follows_its_inputs() -> None:
    """Tasks can be added to such a bundle, so they are not part of what the engine is."""
    task = Task("cats", 0, ("a", "b"), Preprocessing((4, 4)), "d" * 64)
    given = Tensor("bank/up", "float32", ("tasks", 4, 2))

    def identity(tasks: tuple[Task, ...], *inputs: Tensor) -> str:
        return identity_of(BACKBONE, "multi", "inputs", tasks, "fp32", inputs)

    assert identity((task,), given) == identity((task, replace(task, row=1)), given)
    for other in (
        replace(given, name="bank/down"),
        replace(given, dtype="float16"),
        replace(given, shape=("tasks", 4, 3)),
    ):
        assert identity((task,), other) != identity((task,), given)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")])
def test_no_bundle_is_a_usage_error(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "b")
    with pytest.raises(UsageError, match="there is no bundle") as caught:
        open_bundle(tmp_path / "b")
    assert caught.value.exit_code == 2
    assert MANIFEST in caught.value.details["wanted"]


def refused(path: Path, sentence: str) -> IncompatibleArtefact:
    with pytest.raises(IncompatibleArtefact) as caught:
        open_bundle(path)
    assert caught.value.what == sentence
    assert caught.value.exit_code == 4
    assert str(path) in caught.value.details["where"]
    return caught.value


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"3", b'"text"', b"{}", b'{"format": "utune-bundle"}', b"\xff\xfe"],
)
def test_a_malformed_manifest_is_refused(data: bytes, write: Callable[..., Bundle]) -> None:
    path = write("b").path
    (path / MANIFEST).write_bytes(data)
    error = refused(path, "the manifest is malformed")
    assert error.__cause__ is not None


@pytest.mark.parametrize(("key", "value"), [("format", "zip"), ("version", 2), ("version", "1")])
def test_an_unknown_format_or_version_is_refused(
    key: str, value: object, write: Callable[..., Bundle]
) -> None:
    path = write("b").path
    edit(path, lambda manifest: manifest.update({key: value}))
    error = refused(path, "the bundle has an unknown format or version")
    assert str(value) in error.details["found"]
    assert error.details["wanted"] == f"{FORMAT} version {VERSION}"
    assert "export it again" in error.details["do"]


FIELDS = [
    "name", "mode", "bank", "engine", "tasks", "backbone", "plan", "check", "versions", "identity", "files",
    "engine.target", "engine.file", "engine.precision", "engine.opset", "engine.max_batch", "engine.inputs",
    "engine.outputs", "engine.inputs.0.name", "engine.inputs.0.dtype", "engine.inputs.0.shape",
    "tasks.0.name", "tasks.0.row", "tasks.0.labels", "tasks.0.delta", "tasks.0.preprocessing",
    "files.model.onnx.sha256",
]  # fmt: skip


def walk(manifest: Any, path: str) -> tuple[Any, str]:
    """The container of a dotted field, and its last name."""
    *parents, last = path.replace("model.onnx", "model onnx").split(".")
    for parent in parents:
        manifest = manifest[int(parent) if parent.isdigit() else parent.replace(" ", ".")]
    return manifest, last


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_refused(field: str, write: Callable[..., Bundle]) -> None:
    path = write("b").path

    def remove(manifest: dict[str, Any]) -> None:
        container, last = walk(manifest, field)
        del container[last]

    edit(path, remove)
    error = refused(path, "the manifest lacks a field")
    assert field.rpartition(".")[2] in error.details["found"]


@pytest.mark.parametrize("field", ["engine", "tasks", "files", "tasks.0.labels", "engine.inputs"])
def test_a_field_of_another_type_is_refused(field: str, write: Callable[..., Bundle]) -> None:
    path = write("b").path

    def spoil(manifest: dict[str, Any]) -> None:
        container, last = walk(manifest, field)
        container[last] = 3

    edit(path, spoil)
    refused(path, "the manifest lacks a field")


def test_preprocessing_that_makes_no_sense_is_refused(write: Callable[..., Bundle]) -> None:
    path = write("b").path
    edit(path, lambda manifest: manifest["tasks"][0]["preprocessing"].update(crop=2.0))
    refused(path, "the preprocessing has a field that is surplus or out of range")


@pytest.mark.parametrize("name", ["model.onnx", BANK])
def test_a_file_that_is_not_listed_is_refused(name: str, write: Callable[..., Bundle]) -> None:
    path = write("b", bank="inputs").path
    edit(path, lambda manifest: manifest["files"].pop(name))
    refused(path, "the manifest does not list every file of the bundle")


@pytest.mark.parametrize("name", ["model.onnx", BANK])
def test_a_missing_file_is_refused(name: str, write: Callable[..., Bundle]) -> None:
    path = write("b", bank="inputs").path
    (path / name).unlink()
    error = refused(path, "a file of the bundle is missing")
    assert error.details["where"].endswith(name)


@pytest.mark.parametrize("name", ["model.onnx", BANK])
@pytest.mark.parametrize("damage", ["a bit", "a byte more", "cut", "empty"])
def test_a_changed_file_is_refused(name: str, damage: str, write: Callable[..., Bundle]) -> None:
    path = write("b", bank="inputs").path
    data = (path / name).read_bytes()
    changed = {
        "a bit": data[:-1] + bytes([data[-1] ^ 1]), "a byte more": data + b"\0", "cut": data[:-1], "empty": b"",
    }  # fmt: skip
    (path / name).write_bytes(changed[damage])
    error = refused(path, "a file of the bundle is not the one that was shipped")
    assert error.details["wanted"] == f"sha256 {hashlib.sha256(data).hexdigest()}"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["tasks"][0].update(name="lions"),
        lambda m: m["tasks"][0]["labels"].reverse(),
        lambda m: m["tasks"].reverse(),
        lambda m: m["tasks"].pop(),
        lambda m: m["tasks"][0]["preprocessing"].update(crop=0.5),
        lambda m: m["backbone"].update(fingerprint="0" * 64),
        lambda m: m.update(mode="parallel"),
        lambda m: m["engine"].update(precision="fp16"),
        lambda m: m.update(identity="0" * 64),
    ],
)
def test_an_edited_manifest_is_refused(change: Any, write: Callable[..., Bundle]) -> None:
    path = write("b").path
    edit(path, change)
    refused(path, "the manifest was edited: its identity is not that of its tasks and backbone")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["tasks"][0]["labels"].reverse(),
        lambda m: m["tasks"].pop(),
        lambda m: m["tasks"][0].update(name="birds"),
    ],
)
def test_a_bank_binds_the_tasks_of_its_manifest(change: Any, write: Callable[..., Bundle]) -> None:
    path = write("b", bank="inputs").path
    edit(path, change)
    refused(path, "the bank does not hold the tasks that the manifest names")


def test_a_bank_of_another_bundle_is_refused_when_its_digest_came_along(
    write: Callable[..., Bundle],
) -> None:
    here, there = write("a", bank="inputs"), write("b", ("cars", "bikes"), bank="inputs")
    adopt(here.path, BANK, there.path)
    refused(here.path, "the bank does not hold the tasks that the manifest names")


def test_a_file_outside_the_bundle_is_refused(write: Callable[..., Bundle]) -> None:
    path = write("b").path
    edit(path, lambda m: m["engine"].update(file="../model.onnx"))
    refused(path, "the manifest names a file outside the bundle")


def test_an_engine_of_another_bundle_is_refused(write: Callable[..., Bundle]) -> None:
    here, there = write("a"), write("b", ("cars", "bikes"))
    shutil.copy(there.path / "model.onnx", here.path / "model.onnx")
    refused(here.path, "a file of the bundle is not the one that was shipped")


def test_an_engine_of_another_bundle_is_refused_when_its_digest_came_along(
    write: Callable[..., Bundle],
) -> None:
    here, there = write("a"), write("b", ("cars", "bikes"))
    adopt(here.path, "model.onnx", there.path)
    bundle = open_bundle(here.path)
    with pytest.raises(IncompatibleArtefact) as caught:
        bundle.open_session()
    assert caught.value.what == "the engine belongs to another bundle"
    assert caught.value.details["wanted"] == f"identity {here.identity}"
    assert caught.value.details["found"] == f"identity {there.identity}"


def test_an_engine_without_an_identity_is_refused(
    write: Callable[..., Bundle], tiny_engine: Any, tiny_bank: Any, tmp_path: Path
) -> None:
    bundle = write("a")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.onnx").write_bytes(tiny_engine(tiny_bank(2)))
    adopt(bundle.path, "model.onnx", tmp_path / "other")
    with pytest.raises(IncompatibleArtefact, match="belongs to another bundle") as caught:
        open_bundle(bundle.path).open_session()
    assert caught.value.details["found"] == "identity none"


def test_a_bank_of_another_bundle_is_refused(write: Callable[..., Bundle]) -> None:
    here, there = write("a", bank="inputs"), write("bb", ("cars", "bikes"), bank="inputs")
    shutil.copy(there.path / BANK, here.path / BANK)
    refused(here.path, "a file of the bundle is not the one that was shipped")


def test_a_bank_of_other_tensors_is_refused_when_its_digest_came_along(
    write: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = write("a", bank="inputs")
    (tmp_path / "other").mkdir()
    about = {TASKS: tasks_digest(bundle.tasks)}
    save_file({"bank/other": np.zeros((2, 3), np.float32)}, tmp_path / "other" / BANK, about)
    adopt(bundle.path, BANK, tmp_path / "other")
    with pytest.raises(IncompatibleArtefact, match="the bank does not hold the tensors"):
        open_bundle(bundle.path).open_session()


def test_a_bank_of_bfloat16_is_read(write: Callable[..., Bundle]) -> None:
    bundle = write("b", bank="inputs")
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in bundle.read_bank().items()}
    save_file(half, bundle.path / BANK, metadata={TASKS: tasks_digest(bundle.tasks)})
    write_manifest(bundle.path, bundle)
    found = open_bundle(bundle.path).read_bank()
    assert set(found) == set(half)
    for name, value in half.items():
        assert found[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found[name], value)
