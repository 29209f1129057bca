"""The two servers over the same models, each on the ports that the suites have written into them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf import text_format
from google.protobuf.json_format import ParseDict
from tritonclient.grpc import model_config_pb2

from utune_deploy.serving.servers.triton import inspect_environment

from .behaviour import SETS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

HTTP, GRPC, METRICS = 8000, 8001, 8002
MEMORY = f"conformance{os.getpid()}"  # how the shared memory of tritonserver's stubs begins
ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


@contextlib.contextmanager
def serving(engine: str, models: str, *, control: bool, triton: Path) -> Iterator[Path]:
    """A server over a set of models; gives its log.

    Args:
        engine: `embedded` or `triton`.
        models: A name in `SETS`, or the folder of a bundle.
        control: Whether clients may load and unload models.
        triton: The environment with nvidia-pytriton.
    """
    for port in (HTTP, GRPC, METRICS):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                raise SystemExit(f"port {port} is in use; the suites have it written into them")
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        log = Path(folder) / "log"
        if engine == "triton" and models in SETS:
            command, environment = _triton(Path(folder), SETS[models], control, triton)
        else:
            options = ["--engine", engine, "--triton-env", str(triton)]
            command = [sys.executable, "-m", "tests.conformance.serve", models, *options]
            command += ["--control"] if control else []
            environment = dict(os.environ)
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait(process, log)
            yield log
        finally:
            _end(process)


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, urllib.error.URLError):
            if urllib.request.urlopen(f"http://127.0.0.1:{HTTP}/v2/health/ready").status == 200:
                return
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(15)
    # Stubs outlive their server; the group is the session that was started above.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for region in Path("/dev/shm").glob(f"{MEMORY}*"):
        region.unlink(missing_ok=True)


def _triton(
    folder: Path, configs: Mapping[str, Mapping[str, Any]], control: bool, environment: Path
) -> tuple[list[str], dict[str, str]]:
    """The command of tritonserver over Python-backend models, and its variables."""
    fit = inspect_environment(environment)
    for name, config in configs.items():
        version = folder / "models" / name / "1"
        version.mkdir(parents=True)
        shutil.copy(HERE / "behaviour.py", version)
        shutil.copy(HERE / "triton_model.py", version / "model.py")
        own = {"name": name, **({} if "platform" in config else {"backend": "python"}), **config}
        (version / "config.json").write_text(json.dumps(own))
        message = ParseDict(own, model_config_pb2.ModelConfig())
        (version.parent / "config.pbtxt").write_text(text_format.MessageToString(message))
    for part in ("backends", "caches"):
        shutil.copytree(fit.wheel / part, folder / part)
    shutil.copy2(fit.stub, folder / "backends" / "python")
    command = [
        str(fit.wheel / "bin" / "tritonserver"),
        f"--model-repository={folder / 'models'}",
        f"--backend-directory={folder / 'backends'}",
        f"--cache-directory={folder / 'caches'}",
        f"--backend-config=python,shm-region-prefix-name={MEMORY}",
        "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1",
        "--metrics-address=127.0.0.1",
        "--exit-timeout-secs=3",
    ]
    if control:
        command += ["--model-control-mode=explicit", "--load-model=*"]
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    variables["PATH"] = f"{environment.absolute() / 'bin'}{os.pathsep}{variables.get('PATH', '')}"
    variables["LD_LIBRARY_PATH"] = os.pathsep.join(map(str, fit.libraries))
    return command, variables
