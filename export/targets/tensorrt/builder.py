"""Build the TensorRT plan of a recipe, on the machine that will run it.

    python build.py

`utune-deploy export --target tensorrt --prepare` copies this file beside the recipe and the ONNX file.
It needs Python 3.10 and the `tensorrt` package, 10 or 11, and nothing else. It writes

    model.plan     the engine
    plan.json      what it is, with digests; `TensorRTSession` opens nothing without it
    layers.json    what TensorRT made of the graph, layer by layer
    timing.cache   measurements that make the next build faster, with its digest in timing.cache.sha256

and leaves with 0, 1 (the build failed), 2 (a recipe or ONNX file that is not right), 5 (no TensorRT, or
none of 10 or 11) or 130 (Ctrl-C). What TensorRT answers with False, None or -1 stops the build.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

RECIPE_FORMAT, RECIPE_VERSION = "utune-tensorrt-recipe", 1
PLAN_FORMAT, PLAN_VERSION = "utune-tensorrt-plan", 1
RECIPE, PLAN, ABOUT, LAYERS = "recipe.json", "model.plan", "plan.json", "layers.json"
MAJORS = (10, 11)
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")
HARDWARE = {
    "none": "NONE",
    "ampere-plus": "AMPERE_PLUS",
    "same-compute-capability": "SAME_COMPUTE_CAPABILITY",
}
WEIGHTS = ("plain", "stripped", "refit")
CHECKS = ("passed", "unchecked")
FREE = ("batch", "tasks")  # names of the axes whose size a profile sets
FIELDS = {
    "format": str,
    "version": int,
    "onnx": dict,
    "precision": str,
    "inputs": list,
    "profiles": list,
    "tasks": (list, type(None)),
    "workspace": int,
    "optimization_level": int,
    "timing_cache": (str, type(None)),
    "hardware_compatibility": str,
    "version_compatible": bool,
    "weights": str,
    "refit": list,
    "identity": str,
    "check": str,
}


class Stopped(Exception):
    """The build ends here; `code` is the exit code."""

    code = 1


class Failed(Stopped):
    """TensorRT did not build what was asked for."""


class BadRecipe(Stopped):
    """The recipe, or a file that it names, is not right."""

    code = 2


class NoTensorRT(Stopped):
    """TensorRT is not here, or is of a version that this file was not written for."""

    code = 5


class Cancelled(Stopped):
    """Ctrl-C."""

    code = 130


# the recipe


def problems(recipe: dict[str, Any]) -> list[str]:
    """What is wrong with the fields of a recipe, in sentences; none if it is right."""
    found = [f"{name} is missing" for name in FIELDS if name not in recipe]
    found += [f"{name} is not a field of a recipe" for name in recipe if name not in FIELDS]
    found += [
        f"{name} is {recipe[name]!r}, which is of the wrong type"
        for name, kind in FIELDS.items()
        if name in recipe
        and (not isinstance(recipe[name], kind) or (kind is int and recipe[name] is True))
    ]
    if found:
        return found
    for name, wanted in (
        ("format", (RECIPE_FORMAT,)),
        ("version", (RECIPE_VERSION,)),
        ("precision", PRECISIONS),
        ("hardware_compatibility", tuple(HARDWARE)),
        ("weights", WEIGHTS),
        ("check", CHECKS),
        ("optimization_level", (0, 1, 2, 3, 4, 5)),
    ):
        if recipe[name] not in wanted:
            found.append(f"{name} is {recipe[name]!r}, not one of {', '.join(map(str, wanted))}")
    if set(recipe["onnx"]) != {"file", "sha256"}:
        found.append("onnx does not hold file and sha256")
    found += [
        f"{name!r} is not a plain file name"
        for name in (recipe["onnx"].get("file"), recipe["timing_cache"])
        if name is not None and (not name or Path(name).name != name)
    ]
    if not recipe["profiles"]:
        found.append("profiles is empty")
    ranges = [(f"profile {i}", sizes) for i, sizes in enumerate(recipe["profiles"])]
    ranges += [] if recipe["tasks"] is None else [("tasks", recipe["tasks"])]
    found += [
        f"{name} is {sizes!r}, not min, opt, max with 1 <= min <= opt <= max"
        for name, sizes in ranges
        if not _is_range(sizes)
    ]
    found += [f"input {entry!r} is not right" for entry in recipe["inputs"] if not _is_input(entry)]
    if not found:
        axes = {axis for entry in recipe["inputs"] for axis in entry["shape"]}
        if "batch" not in axes:
            found.append("no input has a batch axis")
        if ("tasks" in axes) != (recipe["tasks"] is not None):
            found.append("tasks sets the size of an axis that no input has, or is missing")
    if recipe["workspace"] < 1:
        found.append(f"workspace is {recipe['workspace']} bytes")
    if (recipe["weights"] == "refit") != bool(recipe["refit"]):
        found.append("refit names weights exactly where weights is 'refit'")
    if len(set(map(str, recipe["refit"]))) != len(recipe["refit"]):
        found.append("refit names a tensor twice")
    if recipe["version_compatible"] and recipe["weights"] != "plain":
        found.append("a version-compatible plan cannot be refitted: weights must be 'plain'")
    return found


def _is_range(sizes: object) -> bool:
    return (
        isinstance(sizes, list)
        and len(sizes) == 3
        and all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
        and 1 <= sizes[0] <= sizes[1] <= sizes[2]
    )


def _is_input(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and set(entry) == {"name", "dtype", "shape"}
        and isinstance(entry["shape"], list)
        and all(isinstance(axis, int) or axis in FREE for axis in entry["shape"])
    )


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe of a folder, its ONNX file verified.

    Raises:
        BadRecipe: Either is missing, malformed or not the one that was written.
    """
    path = folder / RECIPE
    try:
        recipe = json.loads(path.read_text())
    except (OSError, ValueError) as cause:
        raise BadRecipe(f"{path} cannot be read: {cause}") from cause
    if not isinstance(recipe, dict):
        raise BadRecipe(f"{path} is not a recipe")
    if found := problems(recipe):
        raise BadRecipe(f"{path}: {'; '.join(found)}")
    onnx = folder / recipe["onnx"]["file"]
    if not onnx.is_file():
        raise BadRecipe(f"{onnx} is missing")
    if digest(onnx.read_bytes()) != recipe["onnx"]["sha256"]:
        raise BadRecipe(f"{onnx} is not the file that the recipe was written for: copy both again")
    return recipe


def shape_at(entry: dict[str, Any], batch: int, tasks: int) -> tuple[int, ...]:
    """The shape of an input where the free axes have these sizes."""
    sizes: dict[Any, Any] = {"batch": batch, "tasks": tasks}
    return tuple(sizes.get(axis, axis) for axis in entry["shape"])


# TensorRT


def load() -> Any:
    """The `tensorrt` module.

    Raises:
        NoTensorRT: It is not installed, does not load, or is of another version.
    """
    try:
        tensorrt = import_module("tensorrt")
    except ImportError as cause:
        raise NoTensorRT(f"TensorRT does not load: {cause}; pip install tensorrt") from cause
    if int(tensorrt.__version__.split(".")[0]) not in MAJORS:
        raise NoTensorRT(f"TensorRT {tensorrt.__version__} is here, and 10 or 11 is needed")
    return tensorrt


def member(trt: Any, enum: str, name: str) -> Any:
    """A value of one of TensorRT's enumerations.

    Raises:
        Failed: This version does not have it.
    """
    value = getattr(getattr(trt, enum), name, None)
    if value is None:
        raise Failed(f"TensorRT {trt.__version__} has no {enum}.{name}: use a newer one")
    return value


def recorder(trt: Any) -> Any:
    """A logger that keeps warnings and errors, for the one message that is raised."""
    severe = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Recorder(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in severe:
                self.errors.append(msg)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(msg)

        def last(self) -> str:
            return "; ".join((self.errors or self.warnings)[-5:]) or "TensorRT gives no reason"

    return Recorder()


def monitor(trt: Any, cancelled: threading.Event, say: Callable[[str], None]) -> Any:
    """Says each phase of a build as it begins, and ends the build once `cancelled` is set."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                say(f"{phase_name} ({num_steps} steps)")

        def step_complete(self, phase_name: str, step: int) -> bool:
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


def made(what: str, value: Any, logger: Any) -> Any:
    """A value that TensorRT gave; it gives None where it could not."""
    if value is None:
        raise Failed(f"{what}: {logger.last()}")
    return value


def created(kind: Any, *args: Any) -> Any:
    """An object of TensorRT; the last argument is its logger.

    Raises:
        Failed: None could be made, which the bindings tell by a TypeError.
    """
    try:
        return kind(*args)
    except TypeError as cause:
        raise Failed(
            f"TensorRT makes no {kind.__name__}, is there a CUDA device? {args[-1].last()}"
        ) from cause


def gpu() -> dict[str, Any] | None:
    """Name and compute capability of the CUDA device that TensorRT uses; None if unknown."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    numbers = {75: ctypes.c_int(), 76: ctypes.c_int()}  # compute capability, major and minor
    if (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetName(name, len(name), device)
        or any(cuda.cuDeviceGetAttribute(ctypes.byref(n), a, device) for a, n in numbers.items())
    ):
        return None
    return {
        "name": name.value.decode(),
        "compute_capability": [number.value for number in numbers.values()],
    }


# the build


def build(
    folder: Path, recipe: dict[str, Any], trt: Any, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Build the plan of a recipe beside it.

    Args:
        folder: Where recipe and ONNX file stand, and the plan will.
        recipe: What `read_recipe` gave.
        trt: The `tensorrt` module.
        say: Called with a line as each phase begins.

    Returns:
        What `plan.json` holds.

    Raises:
        BadRecipe: The timing cache is not the one that was recorded.
        Failed: TensorRT refuses any part of it.
        Cancelled: Ctrl-C.
    """
    logger = recorder(trt)
    builder = created(trt.Builder, logger)
    strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)  # 11 knows no other
    network = made("no network", builder.create_network(strong), logger)
    parse(folder / recipe["onnx"]["file"], network, trt, logger)
    for name in recipe["refit"]:
        if not network.mark_weights_refittable(name):
            raise Failed(f"TensorRT knows no weights {name!r} to refit: {logger.last()}")
    config = made("no builder configuration", builder.create_builder_config(), logger)
    configure(config, recipe, trt)
    add_profiles(builder, config, network, recipe, logger)
    cache = recipe["timing_cache"]
    use_cache(config, read_cache(folder, cache) if cache else b"", logger)
    plan = serialised(builder, network, config, trt, logger, say)
    layers = inspect(plan, recipe, trt, logger)
    about = {
        "format": PLAN_FORMAT,
        "version": PLAN_VERSION,
        "tensorrt": trt.__version__,
        "gpu": gpu(),
        "plan": {"file": PLAN, "sha256": digest(plan)},
        "timing_cache": None,
        **{
            name: recipe[name]
            for name in ("onnx", "precision", "inputs", "profiles", "tasks", "weights", "refit")
        },
        **{name: recipe[name] for name in ("hardware_compatibility", "version_compatible")},
        "identity": recipe["identity"],
    }
    if cache:
        timings = made("no timing cache", config.get_timing_cache(), logger)
        blob = bytes(made("the timing cache cannot be kept", timings.serialize(), logger))
        write(folder / cache, blob)
        write(folder / f"{cache}.sha256", f"{digest(blob)}  {cache}\n".encode())
        about["timing_cache"] = {"file": cache, "sha256": digest(blob)}
    write(folder / LAYERS, layers.encode())
    write(folder / PLAN, plan)
    write(folder / ABOUT, (json.dumps(about, indent=2, sort_keys=True) + "\n").encode())
    return about


def parse(onnx: Path, network: Any, trt: Any, logger: Any) -> None:
    """Read an ONNX file into a network; every error of the parser is told."""
    parser = created(trt.OnnxParser, network, logger)
    if parser.parse_from_file(str(onnx)):
        return
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    told = [f"{e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors]
    raise Failed(f"TensorRT cannot read {onnx.name}: {'; '.join(told) or logger.last()}")


def configure(config: Any, recipe: dict[str, Any], trt: Any) -> None:
    """Everything of the recipe but profiles and timing cache."""
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe["workspace"])
    if recipe["precision"] == "tf32":
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)  # it is set by default
    if recipe["weights"] == "stripped":
        config.set_flag(member(trt, "BuilderFlag", "STRIP_PLAN"))
    if recipe["weights"] == "refit":
        config.set_flag(member(trt, "BuilderFlag", "REFIT_INDIVIDUAL"))
    if recipe["version_compatible"]:
        config.set_flag(member(trt, "BuilderFlag", "VERSION_COMPATIBLE"))
    level = HARDWARE[recipe["hardware_compatibility"]]
    config.hardware_compatibility_level = member(trt, "HardwareCompatibilityLevel", level)
    config.builder_optimization_level = recipe["optimization_level"]
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED


def add_profiles(
    builder: Any, config: Any, network: Any, recipe: dict[str, Any], logger: Any
) -> None:
    """One optimization profile per range of batch sizes, in the order of the recipe."""
    found = {network.get_input(number).name for number in range(network.num_inputs)}
    if found != (wanted := {entry["name"] for entry in recipe["inputs"]}):
        raise Failed(f"the graph reads {sorted(found)}, and the recipe says {sorted(wanted)}")
    tasks = recipe["tasks"] or [1, 1, 1]
    for number, batch in enumerate(recipe["profiles"]):
        profile = made("no profile", builder.create_optimization_profile(), logger)
        for entry in recipe["inputs"]:
            if not set(entry["shape"]) & set(FREE):
                continue
            shapes = [shape_at(entry, *sizes) for sizes in zip(batch, tasks, strict=True)]
            try:
                profile.set_shape(entry["name"], *shapes)
            except (ValueError, RuntimeError) as cause:
                raise Failed(f"profile {number}, {entry['name']} {shapes}: {cause}") from cause
        if config.add_optimization_profile(profile) != number:
            raise Failed(f"TensorRT refuses profile {number}, batches {batch}: {logger.last()}")


def read_cache(folder: Path, file: str) -> bytes:
    """The timing cache of an earlier build, or none."""
    path = folder / file
    if not path.exists():
        return b""
    blob, seal = path.read_bytes(), folder / f"{file}.sha256"
    if not seal.is_file() or seal.read_text().split()[:1] != [digest(blob)]:
        raise BadRecipe(
            f"{path} is not the timing cache whose digest is in {seal.name}: delete it, or, if you "
            f"trust it, write its digest: sha256sum {file} > {seal.name}"
        )
    return blob


def use_cache(config: Any, blob: bytes, logger: Any) -> None:
    """Let the build use measurements, of this version and device only."""
    cache = made("the timing cache cannot be read", config.create_timing_cache(blob), logger)
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        raise Failed(f"the timing cache is another version's or device's: {logger.last()}")


def serialised(
    builder: Any, network: Any, config: Any, trt: Any, logger: Any, say: Callable[[str], None]
) -> bytes:
    """The plan. It is made in a second thread, so that this one can hear Ctrl-C."""
    cancelled = threading.Event()
    config.progress_monitor = monitor(trt, cancelled, say)
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(builder.build_serialized_network, network, config)
        while True:
            try:
                plan = building.result(timeout=0.2)
                break
            except NotYet:
                continue
            except KeyboardInterrupt:
                say("stopping at the next step")
                cancelled.set()
    if cancelled.is_set():
        raise Cancelled("the build was stopped; nothing was written")
    return bytes(made("TensorRT cannot build the engine", plan, logger))


def inspect(plan: bytes, recipe: dict[str, Any], trt: Any, logger: Any) -> str:
    """Open the plan once: it must hold what was asked for. Returns its layers as JSON."""
    runtime = created(trt.Runtime, logger)
    if recipe["version_compatible"]:
        runtime.engine_host_code_allowed = True  # such a plan brings a runtime; it was made here
    engine = made("the plan cannot be opened", runtime.deserialize_cuda_engine(plan), logger)
    if engine.num_optimization_profiles != len(recipe["profiles"]):
        raise Failed(f"the plan has {engine.num_optimization_profiles} profiles, not the recipe's")
    if recipe["weights"] != "plain" and not engine.refittable:
        raise Failed("the plan cannot be refitted")
    if recipe["refit"]:
        refitter = created(trt.Refitter, engine, logger)
        weights = set(refitter.get_all_weights())
        if missing := [name for name in recipe["refit"] if name not in weights]:
            raise Failed(f"the plan cannot refit {', '.join(missing)}")
    inspector = made("no inspector", engine.create_engine_inspector(), logger)
    return inspector.get_engine_information(trt.LayerInformationFormat.JSON)


# files


def digest(data: bytes) -> str:
    """SHA-256, in hex."""
    return hashlib.sha256(data).hexdigest()


def write(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> NoReturn:
    """Build the recipe beside this file."""
    folder = Path(__file__).resolve().parent

    def say(text: str) -> None:
        sys.stderr.write(f"{text}\n")

    try:
        recipe = read_recipe(folder)
        about = build(folder, recipe, load(), say)
    except Stopped as stopped:
        say(f"error: {stopped}")
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        sys.exit(Cancelled.code)
    say(f"wrote {PLAN} for TensorRT {about['tensorrt']}")
    sys.exit(0)


if __name__ == "__main__":
    main()
