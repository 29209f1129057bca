"""The TensorRT target against a stand-in: what it asks, and that no False, None or -1 goes unheard."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from utune_deploy.export.engine import Device, Tensor
from utune_deploy.export.targets import target
from utune_deploy.export.targets.tensorrt import builder, folder, library
from utune_deploy.export.targets.tensorrt.plan import read_plan
from utune_deploy.export.targets.tensorrt.recipe import Profile, Recipe, default_profiles
from utune_deploy.export.targets.tensorrt.session import TensorRTSession
from utune_deploy.merge.errors import (
    IncompatibleArtefact,
    MissingDependency,
    UsageError,
    UtuneError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

TASKS = 3
STANDINS = Path(__file__).parent / "standins"
ROWS = (
    Tensor("images", "float32", ("batch", 3, 4, 4)),
    Tensor("task", "int64", ("batch",)),
)
BANK = (
    Tensor("bank/head/weight", "float32", ("tasks", 48, 3)),
    Tensor("bank/head/bias", "float32", ("tasks", 1, 3)),
)
REFIT = {"weights": "refit", "refit": tuple(tensor.name for tensor in BANK)}


@pytest.fixture
def prepared(
    tiny_engine: Callable[..., bytes], tiny_bank: Callable[..., Any], tmp_path: Path
) -> Callable[..., Path]:
    """A folder for the GPU host: `(reads_bank=False, **of Recipe) -> path`."""

    def prepared(*, reads_bank: bool = False, **settings: Any) -> Path:
        bank = tiny_bank(TASKS)
        onnx = tiny_engine(None if reads_bank else bank)
        recipe = Recipe(
            **{
                "onnx": folder.ONNX,
                "sha256": builder.digest(onnx),
                "precision": "fp32",
                "inputs": (*ROWS, *BANK) if reads_bank else ROWS,
                "profiles": default_profiles(16),
                "identity": "me",
                "check": "passed",
                "tasks": Profile(1, TASKS, 4) if reads_bank else None,
                **settings,
            }
        )
        path = tmp_path / "prepared"
        path.mkdir()
        folder.write_folder(path, recipe, onnx, [], bank if reads_bank else {})
        return path

    return prepared


@pytest.fixture
def built(prepared: Callable[..., Path], tensorrt: ModuleType) -> Callable[..., Path]:
    """A plan, built by the stand-in: `(**of prepared) -> path of the plan`."""

    def built(**settings: Any) -> Path:
        path = prepared(**settings)
        about = builder.build(path, builder.read_recipe(path), tensorrt)
        if about["gpu"] is None:  # the stand-in's device
            about["gpu"] = {"name": "standin", "compute_capability": [9, 0]}
            (path / builder.ABOUT).write_text(json.dumps(about))
        return path / builder.PLAN

    return built


def expected(bank: dict[str, np.ndarray], images: np.ndarray, task: np.ndarray) -> np.ndarray:
    flat = images.reshape(len(images), 1, -1)
    return (flat @ bank["bank/head/weight"][task] + bank["bank/head/bias"][task])[:, 0]


def edit(path: Path, /, **fields: Any) -> None:
    about = path.with_name(builder.ABOUT)
    about.write_text(json.dumps({**json.loads(about.read_text()), **fields}))


# the library


def test_without_tensorrt_one_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependency) as caught:
        library.tensorrt()
    assert caught.value.exit_code == 5
    assert "utune-deploy[tensorrt]" in caught.value.details["do"]
    assert "--prepare" in caught.value.details["do"]


@pytest.mark.parametrize("version", ["8.6.1", "9.3", "12.0.1"])
def test_other_versions_are_refused(version: str, tensorrt: ModuleType) -> None:
    tensorrt.__version__ = version
    with pytest.raises(MissingDependency, match="10 or 11"):
        library.tensorrt()


def test_without_cuda_python_one_error_says_how_to_get_it(
    built: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = built()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingDependency, match="runtime for Python"):
        TensorRTSession(plan)


# the build


def test_a_plan_is_what_the_recipe_says(prepared: Callable[..., Path], tensorrt: Any) -> None:
    path = prepared(reads_bank=True, hardware_compatibility="ampere-plus", optimization_level=4)
    said: list[str] = []
    about = builder.build(path, builder.read_recipe(path), tensorrt, said.append)
    head = json.loads((path / "model.plan").read_bytes().partition(b"\n")[0])
    assert head["flags"] == []  # TF32 cleared
    assert (head["hardware"], head["level"], head["workspace"]) == ("AMPERE_PLUS", 4, 4 << 30)
    assert head["profiles"][1]["images"] == [[2, 3, 4, 4], [8, 3, 4, 4], [8, 3, 4, 4]]
    assert head["profiles"][1]["bank/head/bias"] == [[1, 1, 3], [3, 1, 3], [4, 1, 3]]
    assert said == ["Building Engine (2 steps)"]
    assert about["plan"]["sha256"] == builder.digest((path / "model.plan").read_bytes())
    assert about["tensorrt"] == tensorrt.__version__
    assert json.loads((path / "layers.json").read_text()) == {"Layers": []}
    assert json.loads((path / "plan.json").read_text()) == about
    assert read_plan(path / "model.plan").identity == "me"


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"precision": "tf32"}, ["TF32"]),
        ({"weights": "stripped"}, ["STRIP_PLAN"]),
        (REFIT, ["REFIT_INDIVIDUAL"]),
        ({"version_compatible": True}, ["VERSION_COMPATIBLE"]),
    ],
)
def test_flags_follow_the_recipe(
    settings: dict[str, Any], flags: list[str], built: Callable[..., Path]
) -> None:
    head = json.loads(built(**settings).read_bytes().partition(b"\n")[0])
    assert head["flags"] == flags
    assert head["refit"] == list(settings.get("refit", ()))


BUILDING = {
    "Builder": "makes no Builder",
    "Runtime": "makes no Runtime",
    "Refitter": "makes no Refitter",
    "create_network": "no network",
    "parse_from_file": "blocks.0 (Attention): no importer; blocks.0 (Attention): no importer",
    "create_builder_config": "no builder configuration",
    "create_optimization_profile": "no profile",
    "set_shape": "inconsistent",
    "add_optimization_profile": "refuses profile 0",
    "get_input": "the recipe says",
    "create_timing_cache": "timing cache cannot be read",
    "set_timing_cache": "another version's",
    "serialize": "timing cache cannot be kept",
    "build_serialized_network": "build_serialized_network was told to fail",
    "deserialize_cuda_engine": "the plan cannot be opened: deserialize_cuda_engine was told",
    "num_optimization_profiles": "9 profiles",
    "create_engine_inspector": "no inspector",
    "mark_weights_refittable": "knows no weights 'bank/head/weight'",
    "refittable": "cannot be refitted",
    "get_all_weights": "cannot refit bank/head/weight, bank/head/bias",
}


@pytest.mark.parametrize("fault", BUILDING)
def test_whatever_tensorrt_refuses_stops_the_build(
    fault: str, prepared: Callable[..., Path], tensorrt: Any
) -> None:
    path = prepared(**REFIT)
    tensorrt.faults.add(fault)
    before = sorted(path.iterdir())
    with pytest.raises(builder.Failed) as caught:
        builder.build(path, builder.read_recipe(path), tensorrt)
    assert BUILDING[fault] in str(caught.value)
    assert sorted(path.iterdir()) == before


def test_what_a_version_does_not_have_is_named(prepared: Any, tensorrt: Any) -> None:
    path = prepared(**REFIT)
    tensorrt.BuilderFlag = type("BuilderFlag", (), {"TF32": 0})
    with pytest.raises(builder.Failed, match=r"has no BuilderFlag\.REFIT_INDIVIDUAL"):
        builder.build(path, builder.read_recipe(path), tensorrt)


def test_measurements_are_used_again_if_they_are_the_recorded_ones(
    prepared: Callable[..., Path], tensorrt: Any
) -> None:
    path = prepared()
    recipe = builder.read_recipe(path)
    for times in (1, 2):
        about = builder.build(path, recipe, tensorrt)
        assert (path / "timing.cache").read_bytes() == b"measured" * times
        assert about["timing_cache"]["sha256"] == builder.digest(b"measured" * times)
    (path / "timing.cache").write_bytes(b"from elsewhere")
    with pytest.raises(builder.BadRecipe, match="sha256sum"):
        builder.build(path, recipe, tensorrt)
    (path / "timing.cache.sha256").write_text(
        builder.digest(b"from elsewhere") + "  timing.cache\n"
    )
    builder.build(path, recipe, tensorrt)


def test_no_timing_cache_is_kept_where_none_is_wanted(built: Callable[..., Path]) -> None:
    plan = built(timing_cache=None)
    assert not list(plan.parent.glob("timing*"))


# the copied script


def alone(path: Path, *, standin: bool = True, **settings: str) -> subprocess.CompletedProcess[str]:
    """`python build.py` in a folder, without utune-deploy."""
    where = {"PATH": os.environ["PATH"], "PYTHONPATH": str(STANDINS) if standin else "", **settings}
    return subprocess.run(
        [sys.executable, "build.py"], cwd=path, env=where,
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_the_script_builds_alone(prepared: Callable[..., Path], tensorrt: ModuleType) -> None:
    path = prepared()
    done = alone(path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr.endswith("wrote model.plan for TensorRT 11.4.0.106\n")
    edit(path / "model.plan", gpu=None)
    assert TensorRTSession(path / "model.plan").metadata == {"utune.identity": "me"}


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        ("build_serialized_network", 1, "cannot build the engine"),
        ("onnx", 2, "not the file"),
        ("recipe", 2, "cannot be read"),
        ("version", 5, "9.0 is here"),
        ("absent", 5, "pip install tensorrt"),
    ],
)
def test_the_script_leaves_with_a_code_for_each_failure(
    fault: str, code: int, says: str, prepared: Callable[..., Path]
) -> None:
    path = prepared()
    if fault == "onnx":
        (path / "model.onnx").write_bytes(b"other")
    if fault == "recipe":
        (path / "recipe.json").write_text("{")
    version = {"STANDIN_TENSORRT": "9.0"} if fault == "version" else {}
    done = alone(path, standin=fault != "absent", STANDIN_FAULTS=fault, **version)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert done.stderr.startswith("error: ") or "Building Engine" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (path / "model.plan").exists()


def test_ctrl_c_ends_the_build_and_leaves_nothing(prepared: Callable[..., Path]) -> None:
    path = prepared()
    where = {"PATH": os.environ["PATH"], "PYTHONPATH": str(STANDINS), "STANDIN_FAULTS": "slow"}
    running = subprocess.Popen(
        [sys.executable, "build.py"], cwd=path, env=where, stderr=subprocess.PIPE, text=True,
        # a shell's background job ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert running.stderr is not None
    assert running.stderr.readline().startswith("Building Engine")
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "stopping at the next step" in said
    assert "Traceback" not in said
    assert not (path / "model.plan").exists()


# opening


def test_a_plan_answers_as_its_graph_does(
    built: Callable[..., Path], tiny_bank: Any, pictures: Any
) -> None:
    session = target("tensorrt").open_session(built(), Device("cuda"))
    assert session.provider == "TensorRT"
    assert session.metadata == {"utune.identity": "me"}
    for batch in (1, 2, 8, 9, 16, 1):
        images, task = pictures(batch), np.arange(batch) % TASKS
        found = session.run(np.asfortranarray(images), task)
        np.testing.assert_allclose(found, expected(tiny_bank(TASKS), images, task), atol=1e-5)


CHANGED = {
    "another version": (
        {"tensorrt": "11.3.1"},
        IncompatibleArtefact,
        "another version of TensorRT",
    ),
    "another major": ({"tensorrt": "10.16"}, IncompatibleArtefact, "another version of TensorRT"),
    "another device": (
        {"gpu": {"name": "T4", "compute_capability": [7, 5]}},
        IncompatibleArtefact,
        "another kind of GPU",
    ),
    "another tasks": ({"identity": "you"}, IncompatibleArtefact, "other tasks"),
    "another format": ({"format": "cake"}, IncompatibleArtefact, "malformed"),
    "no version": ({"tensorrt": "new"}, IncompatibleArtefact, "malformed"),
    "another plan": ({"plan": {"sha256": "0"}}, IncompatibleArtefact, "not the one that was built"),
    "tf32": ({"precision": "tf32"}, UsageError, "TF32"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_what_does_not_belong_here_is_refused_before_tensorrt_sees_it(
    change: str, built: Callable[..., Path], tensorrt: Any
) -> None:
    plan = built()
    fields, error, says = CHANGED[change]
    edit(plan, **fields)
    tensorrt.Runtime = None
    with pytest.raises(error, match=says):
        TensorRTSession(plan, identity="me")


def test_a_damaged_plan_or_none_is_refused(built: Callable[..., Path]) -> None:
    plan = built()
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(IncompatibleArtefact, match="not the one that was built"):
        TensorRTSession(plan)
    plan.with_name("plan.json").unlink()
    with pytest.raises(IncompatibleArtefact, match="missing or malformed"):
        TensorRTSession(plan)
    plan.unlink()
    with pytest.raises(UsageError, match="no TensorRT plan"):
        TensorRTSession(plan)


@pytest.mark.parametrize(
    ("built_by", "here", "opens"),
    [("11.3", "11.4.0.106", True), ("10.9", "11.4", True), ("11.5", "11.4", False)],
)
def test_a_version_compatible_plan_opens_later(
    built_by: str, here: str, opens: bool, built: Callable[..., Path], tensorrt: Any
) -> None:
    plan = built(version_compatible=True)
    tensorrt.__version__ = here
    edit(plan, tensorrt=built_by)
    if opens:
        TensorRTSession(plan)
    else:
        with pytest.raises(IncompatibleArtefact, match="another version"):
            TensorRTSession(plan)


def test_hardware_compatibility_widens_the_devices(
    built: Callable[..., Path], tensorrt: Any
) -> None:
    plan = built(hardware_compatibility="ampere-plus")
    edit(plan, gpu={"name": "A100", "compute_capability": [8, 0]})
    TensorRTSession(plan)
    tensorrt.standin_cuda.capability = [7, 5]
    with pytest.raises(IncompatibleArtefact, match="another kind of GPU"):
        TensorRTSession(plan)


OPENING = {
    "cudaGetDevice": (MissingDependency, "no CUDA device"),
    "cudaDeviceGetAttribute": (UtuneError, "CUDA reports an error"),
    "cudaStreamCreateWithFlags": (UtuneError, "CUDA reports an error"),
    "cudaStreamSynchronize": (UtuneError, "CUDA reports an error"),
    "Runtime": (MissingDependency, "TensorRT cannot start"),
    "deserialize_cuda_engine": (IncompatibleArtefact, "cannot open the plan"),
    "num_optimization_profiles": (IncompatibleArtefact, "not the engine that its description"),
    "get_tensor_location": (IncompatibleArtefact, "not the engine that its description"),
    "create_execution_context": (UtuneError, "no execution context"),
    "set_optimization_profile_async": (UtuneError, "refuses optimization profile 0"),
    "Refitter": (UtuneError, "cannot be refitted"),
    "refit_from_file": (UtuneError, "cannot take the weights"),
    "get_missing_weights": (UtuneError, "needs more weights: bank/other"),
    "refit_cuda_engine": (UtuneError, "could not refit"),
}


@pytest.mark.parametrize("fault", OPENING)
def test_whatever_is_refused_while_opening_is_raised(
    fault: str, built: Callable[..., Path], tensorrt: Any
) -> None:
    plan = built(weights="stripped")
    tensorrt.faults.add(fault)
    error, says = OPENING[fault]
    with pytest.raises(error, match=says):
        TensorRTSession(plan)


def test_only_a_cuda_device_runs_it(built: Callable[..., Path]) -> None:
    for device in (Device("cpu"), Device("cuda", threads=2), Device("cuda", kernels=Path("k.so"))):
        with pytest.raises(UsageError, match="runs on a CUDA device"):
            TensorRTSession(
                built() if not device.threads and not device.kernels else Path(), device
            )


def test_a_stripped_plan_takes_its_weights_from_the_graph(
    built: Callable[..., Path], tiny_bank: Any, pictures: Any
) -> None:
    plan = built(weights="stripped")
    images, task = pictures(3), np.array([2, 0, 1])
    found = TensorRTSession(plan).run(images, task)
    np.testing.assert_allclose(found, expected(tiny_bank(TASKS), images, task), atol=1e-5)
    plan.with_name("model.onnx").write_bytes(b"another graph")
    with pytest.raises(IncompatibleArtefact, match="stripped plan needs the ONNX file"):
        TensorRTSession(plan)


# running


RUNNING = {
    "set_input_shape": (UsageError, "refuses the shape"),
    "infer_shapes": (UsageError, "shape is not known"),
    "get_tensor_shape": (UsageError, "shape is not known"),
    "set_tensor_address": (UtuneError, "refuses the address"),
    "execute_async_v3": (UtuneError, "does not run the engine"),
    "cudaMalloc": (UtuneError, "CUDA reports an error"),
    "cudaMemcpyAsync": (UtuneError, "CUDA reports an error"),
}


@pytest.mark.parametrize("fault", RUNNING)
def test_whatever_is_refused_while_running_is_raised(
    fault: str, built: Callable[..., Path], tensorrt: Any, pictures: Any
) -> None:
    session = TensorRTSession(built())
    tensorrt.faults.add(fault)
    error, says = RUNNING[fault]
    with pytest.raises(error, match=says):
        session.run(pictures(2), np.array([0, 1]))
    tensorrt.faults.clear()
    session.run(pictures(2), np.array([0, 1]))


def test_rows_that_do_not_fit_are_refused(built: Callable[..., Path], pictures: Any) -> None:
    session = TensorRTSession(built())
    task = np.array([0, 1])
    for inputs, rows, says in (
        (pictures(2), None, "needs a task row"),
        (pictures(3), task, "one number of rows"),
        (pictures(2).astype(np.float64), task, "another type or shape"),
        (pictures(2)[..., :3], task, "another type or shape"),
        (pictures(2), task.astype(np.int32), "another type or shape"),
        (pictures(17), np.zeros(17, np.int64), "batch of this size"),
        (pictures(0), np.zeros(0, np.int64), "batch of this size"),
        ({"pixels": pictures(2)}, task, "not those that the engine reads"),
    ):
        with pytest.raises(UsageError, match=says):
            session.run(inputs, rows)


def test_threads_do_not_mix_their_rows(
    built: Callable[..., Path], tiny_bank: Any, pictures: Any
) -> None:
    session, bank = TensorRTSession(built()), tiny_bank(TASKS)

    def once(number: int) -> bool:
        batch = 1 + number % 12
        images, task = pictures(batch), (np.arange(batch) + number) % TASKS
        return np.allclose(session.run(images, task), expected(bank, images, task), atol=1e-5)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(once, range(60)))


def test_nothing_stays_on_the_device_when_a_session_is_gone(
    built: Callable[..., Path], tensorrt: Any, pictures: Any
) -> None:
    session = TensorRTSession(built())
    session.run(pictures(2), np.array([0, 1]))
    assert tensorrt.standin_cuda.allocated
    del session
    gc.collect()
    assert not tensorrt.standin_cuda.allocated


# the bank


def test_a_bank_that_is_an_input_is_replaced(
    built: Callable[..., Path], tiny_bank: Any, pictures: Any
) -> None:
    session = TensorRTSession(built(reads_bank=True), bank=tiny_bank(TASKS))
    images, task = pictures(3), np.array([0, 2, 1])
    bound = session.bind(images, task)
    for bank in (tiny_bank(TASKS), tiny_bank(TASKS, 1), tiny_bank(4, 2)):
        session.replace_bank(bank)
        np.testing.assert_allclose(
            session.run(images, task), expected(bank, images, task), atol=1e-5
        )
    bound.run()  # it reads the bank that there was
    np.testing.assert_allclose(bound.fetch(), expected(tiny_bank(TASKS), images, task), atol=1e-5)
    session.replace_bank(tiny_bank(5))  # more tasks than the profiles have room for
    with pytest.raises(UsageError, match="refuses the shape"):
        session.run(images, task)


def test_another_bank_is_refused(built: Callable[..., Path], tiny_bank: Any) -> None:
    plan, bank = built(reads_bank=True), tiny_bank(TASKS)
    with pytest.raises(IncompatibleArtefact, match="does not hold the tensors"):
        TensorRTSession(plan)
    with pytest.raises(IncompatibleArtefact, match="another type or shape"):
        TensorRTSession(plan, bank={n: a.astype(np.float16) for n, a in bank.items()})
    with pytest.raises(IncompatibleArtefact, match="another type or shape"):
        TensorRTSession(plan, bank={n: a[..., :2] for n, a in bank.items()})


# bound batches


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_bound_batch_runs_as_often_as_it_is_fed(
    cuda_graph: bool, built: Callable[..., Path], tensorrt: Any, tiny_bank: Any, pictures: Any
) -> None:
    session, bank = TensorRTSession(built(), cuda_graph=cuda_graph), tiny_bank(TASKS)
    images, task = pictures(3), np.array([0, 1, 2])
    bound = session.bind(images, task)
    for number in range(3):
        images, task = images + number, np.roll(task, number)
        bound.feed({"images": images, "task": task})
        session.run(pictures(5), np.zeros(5, np.int64))  # does not disturb it
        bound.run()
        np.testing.assert_allclose(bound.fetch(), expected(bank, images, task), atol=1e-5)
    calls = tensorrt.standin_cuda.calls
    assert calls.count("cudaStreamBeginCapture") == int(cuda_graph)
    assert calls.count("cudaGraphLaunch") == 3 * int(cuda_graph)
    for wrong in ({"images": images[:2]}, {"task": task.astype(np.int32)}, {"pixels": images}):
        with pytest.raises(UsageError, match="type and shape that were bound"):
            bound.feed(wrong)


@pytest.mark.parametrize(
    "fault",
    [
        "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphLaunch",
        "execute_async_v3",
    ],
)  # fmt: skip
def test_a_graph_that_cannot_be_recorded_is_an_error(
    fault: str, built: Callable[..., Path], tensorrt: Any, pictures: Any
) -> None:
    bound = TensorRTSession(built(), cuda_graph=True).bind(pictures(2), np.array([0, 1]))
    tensorrt.faults.add(fault)
    with pytest.raises(UtuneError):
        bound.run()


# refit


def test_weights_are_replaced_and_recorded_graphs_made_anew(
    built: Callable[..., Path], tensorrt: Any, tiny_bank: Any, pictures: Any
) -> None:
    session = TensorRTSession(built(**REFIT), cuda_graph=True)
    images, task = pictures(3), np.array([0, 2, 1])
    bound = session.bind(images, task)
    bound.run()
    first = session.run(images, task)
    for seed in (1, 0):
        bank = tiny_bank(TASKS, seed)
        session.refit({name: np.asfortranarray(array) for name, array in bank.items()})
        np.testing.assert_allclose(
            session.run(images, task), expected(bank, images, task), atol=1e-5
        )
        bound.run()
        np.testing.assert_array_equal(bound.fetch(), session.run(images, task))
    np.testing.assert_array_equal(session.run(images, task), first)
    assert tensorrt.standin_cuda.calls.count("cudaStreamBeginCapture") == 3


def test_weights_that_do_not_fit_are_refused_and_nothing_changes(
    built: Callable[..., Path], tensorrt: Any, tiny_bank: Any, pictures: Any
) -> None:
    session, bank = TensorRTSession(built(**REFIT)), tiny_bank(TASKS, 1)
    images, task = pictures(2), np.array([0, 1])
    before = session.run(images, task)
    for wrong, error in (
        ({"trunk": bank["bank/head/bias"]}, UsageError),
        ({"bank/head/bias": bank["bank/head/bias"].astype(np.float16)}, IncompatibleArtefact),
        ({"bank/head/bias": bank["bank/head/bias"][:2]}, IncompatibleArtefact),
    ):
        with pytest.raises(error):
            session.refit(wrong)
    for fault in ("get_weights_prototype", "set_named_weights", "get_missing_weights", "Refitter"):
        tensorrt.faults.add(fault)
        with pytest.raises(UtuneError):
            session.refit(bank)
        tensorrt.faults.clear()
    np.testing.assert_array_equal(session.run(images, task), before)


def test_after_half_a_refit_nothing_answers(
    built: Callable[..., Path], tensorrt: Any, tiny_bank: Any, pictures: Any
) -> None:
    session = TensorRTSession(built(**REFIT))
    bound = session.bind(pictures(2), np.array([0, 1]))
    tensorrt.faults.add("refit_cuda_engine")
    with pytest.raises(UtuneError, match="could not refit"):
        session.refit(tiny_bank(TASKS, 1))
    tensorrt.faults.clear()
    for call in (
        lambda: session.run(pictures(2), np.array([0, 1])),
        bound.run,
        lambda: session.refit(tiny_bank(TASKS, 1)),
    ):
        with pytest.raises(IncompatibleArtefact, match="since a refit failed"):
            call()


def test_a_refit_waits_for_what_is_running(
    built: Callable[..., Path], tiny_bank: Any, pictures: Any
) -> None:
    session, bank = TensorRTSession(built(**REFIT)), tiny_bank(TASKS, 1)
    lane = session._lanes[1]
    refitting = threading.Thread(target=session.refit, args=(bank,))
    with lane.lock:  # a run of batch 2
        refitting.start()
        refitting.join(0.2)
        assert refitting.is_alive()
    refitting.join(10)
    assert not refitting.is_alive()
    images, task = pictures(2), np.array([0, 1])
    np.testing.assert_allclose(session.run(images, task), expected(bank, images, task), atol=1e-5)


def test_a_plain_plan_cannot_be_refitted(built: Callable[..., Path], tiny_bank: Any) -> None:
    with pytest.raises(UsageError, match="weights replaced"):
        TensorRTSession(built()).refit(tiny_bank(TASKS))


def test_a_plan_moves_with_its_description(
    built: Callable[..., Path], tmp_path: Path, pictures: Any
) -> None:
    plan = built()
    (tmp_path / "elsewhere").mkdir()
    for name in ("model.plan", "plan.json"):
        shutil.copy(plan.with_name(name), tmp_path / "elsewhere")
    TensorRTSession(tmp_path / "elsewhere" / "model.plan").run(pictures(1), np.array([0]))
