"""The repository root is the package: what ships, what is loaded when, and which way imports run."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from utune_deploy.deploy.verbs import GROUPS

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="reads pyproject.toml, which Python 3.10 cannot")

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("deploy", "export", "merge", "serving")
HEAVY = {"torch", "torchvision", "timm", "onnxruntime", "onnx", "onnx_ir", "onnxscript", "tensorrt"}
SLOW = {
    "numpy",
    "PIL",
    "rich",
    "safetensors",
    "starlette",
    "uvicorn",
    "grpc",
    "tritonclient",
    "jinja2",
}
VERBS = [verb for verbs in GROUPS.values() for verb in verbs]
MACHINES = (
    "/" + "work/",
    "/" + "tmp/dev",
    "/" + "root/",
    "/" + "home/",
)  # not spelled out: see below


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Every file of the repository that is not ignored."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


# what ships


def test_every_folder_with_code_is_a_package_that_ships(project: dict) -> None:
    listed = project["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    found = {"utune_deploy"}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            found.add(".".join(("utune_deploy", *path.parent.relative_to(ROOT).parts)))
    assert set(listed) == found
    for package in found:
        assert ROOT.joinpath(*package.split(".")[1:], "__init__.py").is_file(), package


def test_every_other_file_of_a_package_ships(project: dict, files: list[Path]) -> None:
    data = project["tool"]["setuptools"]["package-data"]
    assert (ROOT / "py.typed").is_file()
    assert "py.typed" in data["utune_deploy"]
    for path in files:
        parts = path.relative_to(ROOT).parts
        if parts[0] not in ROOMS or path.suffix == ".py":
            continue
        package = ".".join(("utune_deploy", *parts[:-1]))
        assert any(fnmatch(parts[-1], pattern) for pattern in data.get(package, [])), path


def test_no_other_module_stands_at_the_root() -> None:
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("package", ["", *ROOMS])
def test_the_rooms_say_what_they_are_and_import_nothing(package: str) -> None:
    body = ast.parse((ROOT / package / "__init__.py").read_text()).body
    assert len(body) == 1
    assert ast.get_docstring(ast.Module(body, []))


def test_the_installed_package_is_this_folder() -> None:
    import utune_deploy

    assert Path(utune_deploy.__file__).resolve().parent == ROOT


def test_the_command_is_the_front_door(project: dict) -> None:
    assert project["project"]["scripts"] == {"utune-deploy": "utune_deploy.deploy.cli:main"}


def test_every_import_from_outside_is_a_declared_dependency(project: dict) -> None:
    spelled = {
        "PIL": "pillow", "google": "protobuf", "grpc": "grpcio", "onnxruntime": "onnxruntime-gpu",
        "yaml": "pyyaml",
        "markupsafe": "jinja2",  # jinja2's own string type, and a hard dependency of it
    }  # fmt: skip
    declared = {
        re.split(r"[\[<>=~! ]", entry)[0].replace("-", "_")
        for entry in project["project"]["dependencies"]
    }
    own = {"utune_deploy", *sys.stdlib_module_names}
    optional = {
        "peft",
        "ray",
        "tensorrt",
        "transformers",
        "tritonserver",
        "triton_python_backend_utils",
        "pytriton",
    }
    missing = {}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    names = [node.module]
                for top in {name.split(".")[0] for name in names} - own - optional:
                    if spelled.get(top, top).replace("-", "_") not in declared:
                        missing[top] = path.relative_to(ROOT)
    assert not missing


# what is loaded when


def loaded(code: str) -> set[str]:
    """Top-level modules that a fresh Python has loaded after `code`."""
    script = f"import sys\n{code}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


RUN = """
from utune_deploy.deploy.cli import main
try:
    main({arguments})
except SystemExit as left:
    assert not left.code, left.code
"""


def test_importing_the_package_loads_nothing() -> None:
    assert not loaded("import utune_deploy") & (HEAVY | SLOW | {"click"})


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_the_front_door_opens_without_libraries(arguments: list[str]) -> None:
    assert not loaded(RUN.format(arguments=arguments)) & (HEAVY | SLOW)


def test_the_help_of_every_verb_is_lean() -> None:
    code = "".join(RUN.format(arguments=[verb, "--help"]) for verb in VERBS)
    assert not loaded(code) & (HEAVY | SLOW)


def test_serving_loads_numpy_and_no_model_library() -> None:
    found = loaded("import utune_deploy.serving.service")
    assert not found & HEAVY
    assert "numpy" in found


@pytest.mark.parametrize(
    "module", ["export.bundle", "export.engine", "export.parity", "merge.errors"]
)
def test_what_a_server_reads_loads_no_model_library(module: str) -> None:
    assert not loaded(f"import utune_deploy.{module}") & HEAVY


def test_a_server_opens_a_bundle_without_torch() -> None:
    found = loaded("import utune_deploy.export.targets.onnxruntime")
    assert not found & (HEAVY - {"onnxruntime"})


# which way imports run


def test_the_floors_are_kept() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    if not command.exists():
        pytest.skip("import-linter is not installed: pip install utune-deploy[dev]")
    done = subprocess.run(
        [command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_imports_inside_the_package_are_relative() -> None:
    absolute = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and any(
            name.split(".")[0] in ("utune_deploy", *ROOMS)
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if not node.level
                else []
            )
        )
    ]
    assert not absolute


def test_no_file_knows_the_machine_that_it_was_written_on(files: list[Path]) -> None:
    found = [
        f"{path.relative_to(ROOT)}: {machine}"
        for path in files
        for machine in MACHINES
        if machine.encode() in path.read_bytes()
    ]
    assert not found
