"""tritonserver under supervision: what must be there, and that nothing of it stays."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc

from utune_deploy.export.engine import Device
from utune_deploy.merge.errors import MissingDependency, UsageError
from utune_deploy.serving.rejections import ServerFailed
from utune_deploy.serving.servers import server, triton
from utune_deploy.serving.servers.ports import listen

SHARED, PREFIX = Path("/dev/shm"), "shm-region-prefix-name="
FACTS = {
    "python": "3.11",
    "libdir": "lib",
    "libpython": "libpython3.11.so.1.0",
    "pytriton": "site/pytriton",
    "numpy": "1.26.4",
    "onnxruntime": "1.20",
    "safetensors": "0.5",
}


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A folder that looks like a fit environment, and what its Python would say of itself."""
    facts = {**FACTS, "pytriton": str(tmp_path / "site/pytriton"), "libdir": str(tmp_path / "lib")}
    for name in (
        "bin/python",
        "lib/libpython3.11.so.1.0",
        "site/pytriton/tritonserver/bin/tritonserver",
        "site/pytriton/tritonserver/python_backend_stubs/3.11/triton_python_backend_stub",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(triton, "_probe", lambda python: facts)
    return tmp_path, facts


def test_a_fit_environment_is_accepted(environment):
    folder, _ = environment
    fit = triton.inspect_environment(folder, needs_safetensors=True)
    assert fit.libraries == (folder / "lib", folder / "site" / "nvidia_pytriton.libs")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"numpy": "2.4.6"}, "numpy"),
        ({"numpy": None}, "numpy"),
        ({"onnxruntime": None}, "no onnxruntime"),
        ({"safetensors": None}, "no safetensors"),
        ({"pytriton": None}, "no tritonserver"),
        ({"python": "3.19"}, "no stub"),
        ({"libdir": "/nowhere"}, "no shared library"),
        ({"libdir": None}, "no shared library"),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(environment, changes, sentence):
    folder, facts = environment
    facts.update(changes)
    with pytest.raises(MissingDependency, match=sentence) as refused:
        triton.inspect_environment(folder, needs_safetensors=True)
    assert refused.value.exit_code == 5
    assert refused.value.details["do"]


def test_no_environment_at_all(tmp_path):
    with pytest.raises(MissingDependency, match="no Python environment") as refused:
        triton.inspect_environment(tmp_path / "none")
    assert "nvidia-pytriton" in refused.value.details["do"]


def test_a_python_that_does_not_run(tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(MissingDependency, match="does not run") as refused:
        triton.inspect_environment(tmp_path)
    assert "broken" in refused.value.details["found"]


def test_an_unknown_server():
    with pytest.raises(UsageError, match="unknown server"):
        server("tomcat")


STAND_IN = """#!{python}
# In place of tritonserver: a child that ignores SIGTERM, as a stub does, and then what is asked.
import os, signal, sys, time
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
print("E0101 loading failed: the stub found no library", flush=True)
{then}
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """`stand_in(then)`: an environment whose tritonserver is a script."""

    def make(then: str) -> None:
        wheel = tmp_path / "wheel"
        for part in ("bin", "backends/python", "caches"):
            (wheel / part).mkdir(parents=True)
        (wheel / "stub").touch()
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "python").symlink_to(sys.executable)
        program = wheel / "bin" / "tritonserver"
        program.write_text(STAND_IN.format(python=sys.executable, then=then))
        program.chmod(0o755)
        fit = triton.TritonEnvironment(tmp_path, wheel, wheel / "stub", ())
        monkeypatch.setattr(triton, "inspect_environment", lambda *_, **__: fit)
        monkeypatch.setattr(triton, "EXIT_SECONDS", 0.2)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    return make


def _below(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "cwd", "status"]):
        here = str(process.info["cwd"] or "").startswith(str(folder))
        if here and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@pytest.mark.parametrize("then", ["time.sleep(600)", "sys.exit(1)"], ids=["hangs", "ends"])
def test_a_server_that_does_not_load_is_ended_with_its_stubs(bundle, stand_in, tmp_path, then):
    stand_in(then)
    with (
        pytest.raises(ServerFailed) as failed,
        triton.running(bundle, environment=tmp_path, load_seconds=1),
    ):
        pass
    assert "the stub found no library" in failed.value.details["found"]
    assert Path(failed.value.details["where"]).is_file()
    assert not _below(tmp_path)


def test_an_interruption_while_loading_leaves_nothing(bundle, stand_in, tmp_path):
    stand_in("time.sleep(600)")
    with triton.running(bundle, environment=tmp_path, stopped=lambda: True):
        pass
    assert not _below(tmp_path)
    assert not list(tmp_path.glob("utune-triton-*"))


@pytest.mark.parametrize("port", ["http_port", "grpc_port", "metrics_port"])
def test_a_port_in_use_is_said_before_anything_starts(bundle, stand_in, tmp_path, port):
    stand_in("time.sleep(600)")
    with listen("127.0.0.1", 0) as taken:
        settings = {port: taken.getsockname()[1]}
        with (
            pytest.raises(UsageError, match="in use"),
            triton.running(bundle, environment=tmp_path, **settings),
        ):
            pass


def test_stopping_the_real_one_cuts_no_request(two_engines, triton_environment):
    """Busy clients of both models are answered or refused in words until nobody listens any more."""
    endings: list[str] = []
    pixels = np.zeros((1, 3, 8, 8), np.float32)

    def ask(address: str, model: str, started: threading.Event) -> None:
        client = tritonclient.grpc.InferenceServerClient(address)
        images = tritonclient.grpc.InferInput("images", [1, 3, 8, 8], "FP32")
        task = tritonclient.grpc.InferInput("task", [1, 1], "BYTES")
        images.set_data_from_numpy(pixels)
        task.set_data_from_numpy(np.array([[b"pets"]], dtype=object))
        while True:
            try:
                client.infer(model, [images, task] if model == "tiny" else [images])
                started.set()
            except tritonclient.grpc.InferenceServerException as error:
                endings.append(error.status())
                break
        client.close()

    with triton.running(
        two_engines, environment=triton_environment, device=Device(threads=1)
    ) as process:
        started = [threading.Event() for _ in range(4)]
        askers = [
            threading.Thread(target=ask, args=(process.addresses.grpc, model, event))
            for model, event in zip(["tiny", "tiny.all"] * 2, started, strict=True)
        ]
        for asker in askers:
            asker.start()
        for event in started:
            event.wait()
    for asker in askers:
        asker.join()
    assert endings == ["StatusCode.NOT_FOUND"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_real_one_with_0_and_leaves_nothing(
    child, bundle, triton_environment, number
):
    settings = {"http_port": 0, "grpc_port": 0, "metrics_port": 0, "device": Device(threads=1)}
    with child("triton", bundle, environment=triton_environment, **settings) as process:
        assert process.stdout.readline(), process.stderr.read()
        family = psutil.Process(process.pid).children(recursive=True)
        assert {"tritonserver", "triton_python_b"} <= {member.name()[:15] for member in family} or (
            len(family) >= 2
        )
        words = [word for member in family for word in member.cmdline()]
        (memory,) = {w.partition(PREFIX)[2] for w in words if PREFIX in w}
        assert list(SHARED.glob(f"{memory}*"))
        os.kill(process.pid, number)
        assert process.wait() == 0
        stopping, stopped = process.stderr.read().splitlines()
        assert "stopping: what was taken is answered" in stopping
        assert stopped.endswith("stopped")
    # The group is killed before its leader is waited for; init may still be reaping its orphans.
    while any(m.is_running() and m.status() != psutil.STATUS_ZOMBIE for m in family):
        time.sleep(0.01)
    assert not list(SHARED.glob(f"{memory}*"))
