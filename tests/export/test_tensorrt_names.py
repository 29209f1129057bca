"""Every name of TensorRT and CUDA that our code uses is in what they publish, by class.

`tensorrt_names/*.json` hold the members of the published bindings of TensorRT 10 and 11. In our code an
object's class is told by the name of its variable.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from utune_deploy.export.targets.tensorrt import builder

if TYPE_CHECKING:
    from types import ModuleType

HERE = Path(__file__).parent
CODE = Path(builder.__file__).parent
VERSIONS = ("10", "11")
OBJECTS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "timings": "ITimingCache",
    "_runtime": "Runtime",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "context": "IExecutionContext",
    "refitter": "Refitter",
    "reader": "OnnxParserRefitter",
    "wanted": "Weights",
    "e": "ParserError",
}
BASES = {"Recorder": "ILogger", "Monitor": "IProgressMonitor"}
NOT = {("session.py", "builder"), ("session.py", "profile")}  # our module, our dataclass
OURS = {"cuda.py", "folder.py", "library.py", "plan.py", "recipe.py", "tuner_names.py"}
"""Files that speak to no object of TensorRT; their `builder` is our module."""


@pytest.fixture(scope="module", params=VERSIONS)
def published(request: pytest.FixtureRequest) -> dict[str, set[str]]:
    entry = json.loads((HERE / "tensorrt_names" / f"{request.param}.json").read_text())
    assert entry["version"].split(".")[0] == request.param
    return {name: set(members) for name, members in entry["classes"].items()}


def name_of(node: ast.expr) -> str | None:
    """`x` of `x` and of `anything.x`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


def used() -> set[tuple[str, str]]:
    """Class and member of all that our code reads, calls, sets or overrides; member "" of a class alone."""
    found: set[tuple[str, str]] = set()
    for file in sorted(CODE.glob("*.py")):
        if file.name in OURS:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                parts = ast.unparse(node).split(".")
                if "trt" in parts[:-1]:
                    chain = parts[parts.index("trt") + 1 :]
                    if not chain[0].startswith("__"):
                        found.add((chain[0], ".".join(chain[1:])))
                elif (name := name_of(node.value)) in OBJECTS and (file.name, name) not in NOT:
                    found.add((OBJECTS[name], node.attr))
            if isinstance(node, ast.Call) and name_of(node.func) == "member":
                _, enum, value = node.args
                if isinstance(enum, ast.Constant) and isinstance(value, ast.Constant):
                    found.add((enum.value, value.value))
            if isinstance(node, ast.ClassDef) and node.name in BASES:
                found |= {
                    (BASES[node.name], inner.name)
                    for inner in node.body
                    if isinstance(inner, ast.FunctionDef) and inner.name not in ("__init__", "last")
                }
    found |= {("HardwareCompatibilityLevel", level) for level in builder.HARDWARE.values()}
    return found


def test_the_search_sees_what_the_code_does() -> None:
    assert {
        ("BuilderFlag", "REFIT_INDIVIDUAL"),
        ("HardwareCompatibilityLevel", "AMPERE_PLUS"),
        ("IBuilderConfig", "progress_monitor"),
        ("IExecutionContext", "execute_async_v3"),
        ("ILogger", "log"),
        ("IProgressMonitor", "step_complete"),
        ("INetworkDefinition", "mark_weights_refittable"),
        ("OnnxParser", "parse_from_file"),
        ("OnnxParserRefitter", "refit_from_file"),
        ("ParserError", "desc"),
        ("Refitter", "get_missing_weights"),
        ("Runtime", "engine_host_code_allowed"),
        ("Weights", "size"),
    } <= used()


def test_every_name_that_we_use_is_published(published: dict[str, set[str]]) -> None:
    missing = {
        f"{kind}.{member}"
        for kind, member in used()
        if kind not in published
        or (member and member.split(".")[0] not in published[kind] | {"__init__"})
    }
    assert not missing


def test_the_stand_in_invents_no_name(tensorrt: ModuleType, published: dict[str, set[str]]) -> None:
    invented = {
        f"{name}.{member}"
        for name, kind in vars(tensorrt).items()
        if isinstance(kind, type) and kind.__module__ == tensorrt.__name__
        for member in vars(kind)
        if not member.startswith("_") and member not in published.get(name, set())
    }
    assert not invented


def test_cuda_has_the_functions_that_we_call(tensorrt: ModuleType) -> None:
    called = {
        node.attr
        for node in ast.walk(ast.parse((CODE / "cuda.py").read_text()))
        if isinstance(node, ast.Attribute) and node.attr.startswith("cuda") and node.attr != "cuda"
    }
    assert {"cudaMalloc", "cudaGraphLaunch", "cudaMemcpyDeviceToHost"} <= called
    script = """
import json, cuda.bindings.runtime as r
kinds = r, r.cudaMemcpyKind, r.cudaStreamCaptureMode, r.cudaDeviceAttr, r.cudaError_t
print(json.dumps([name for kind in kinds for name in dir(kind)]))
"""
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    if said.returncode:
        pytest.skip("cuda-python is not installed: pip install cuda-python")
    assert called <= set(json.loads(said.stdout))
    assert {name for name in dir(tensorrt.standin_cuda) if name.startswith("cuda")} <= set(
        json.loads(said.stdout)
    )
