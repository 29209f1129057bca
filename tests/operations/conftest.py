"""What the files of `operations/` are read with."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def operations() -> Path:
    return ROOT / "operations"


@pytest.fixture(scope="session")
def yaml() -> ModuleType:
    return pytest.importorskip("yaml", reason="pip install utune-deploy[dev]")


@pytest.fixture(scope="session")
def read(yaml: ModuleType):
    """`read(path)` -> the documents of a YAML file."""

    def documents(path: Path) -> list[Any]:
        return [entry for entry in yaml.safe_load_all(path.read_text()) if entry is not None]

    return documents


@pytest.fixture(scope="session")
def dockerfile() -> dict[str, list[tuple[str, str]]]:
    """Stage -> its instructions in order, each a word and what follows it, continued lines joined."""
    stages: dict[str, list[tuple[str, str]]] = {"": []}
    stage, line = "", ""
    for text in (ROOT / "Dockerfile").read_text().splitlines():
        if text.lstrip().startswith("#") or not (line + text).strip():
            continue
        line += text.strip()
        if line.endswith("\\"):
            line = line[:-1]
            continue
        word, _, rest = line.partition(" ")
        line = ""
        if word == "FROM":
            stage = rest.split(" AS ")[1]
            stages[stage] = []
        stages[stage].append((word, rest.strip()))
    return stages


@pytest.fixture(scope="session")
def chain(dockerfile):
    """`chain(stage)` -> its instructions behind those of the stages that it is built from."""

    def instructions(stage: str) -> list[tuple[str, str]]:
        own = dockerfile[stage]
        base = own[0][1].split(" AS ")[0]
        return (instructions(base) if base in dockerfile else []) + own

    return instructions


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle of the tests of serving."""
    pytest.importorskip("onnx", reason="writes the bundle's engine")
    # A conftest is no module that can be imported by name, and only its writer is wanted here.
    spec = importlib.util.spec_from_file_location("tiny", ROOT / "tests/serving/conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for their own module
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    return module._write_bundle(folder, tuple(module.CLASSES)).path
