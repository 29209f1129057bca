"""NVIDIA Triton without a container: the tritonserver of the nvidia-pytriton wheel, supervised.

The wheel lives in an environment of its own, because its Python backend answers with garbage under
numpy 2. Three of its ways are met here: the stub that runs `model.py` must lie beside the backend,
so the backends are copied out; the stub must find the wheel's libraries and the interpreter's own
libpython, or loading never ends; stubs outlive their server, so the whole process group is ended.

Linux only, glibc 2.35 or newer. Tried with nvidia-pytriton 0.7.0, which carries Triton 2.51.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil

from ...export.engine import CPU
from ...merge.errors import MissingDependency, UsageError
from ..registry import MAX_DELAY_MS
from ..rejections import ServerFailed
from ..repository import write_repository
from ..repository.options import ModelOptions
from ..triton.alias_folder import is_alias
from ..watching import logs
from .ports import Addresses, free_port, host_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ...export.bundle import Bundle
    from ...export.engine import Device

LOAD_SECONDS = 120
EXIT_SECONDS = 10
IDLE_EXIT_SECONDS = 1
POLL_SECONDS = 0.05
LOG_LINES = 30
INSTALL = "pip install 'nvidia-pytriton>=0.7' 'numpy<2' onnxruntime safetensors"

_PROBE = """
import importlib.metadata as m, importlib.util as u, json, sys, sysconfig
def version(*names):
    for name in names:
        try:
            return m.version(name)
        except m.PackageNotFoundError:
            pass
pytriton = u.find_spec("pytriton")
print(json.dumps({
    "python": "%d.%d" % sys.version_info[:2],
    "libdir": sysconfig.get_config_var("LIBDIR"),
    "libpython": sysconfig.get_config_var("INSTSONAME"),
    "pytriton": pytriton and list(pytriton.submodule_search_locations)[0],
    "numpy": version("numpy"),
    "onnxruntime": version("onnxruntime", "onnxruntime-gpu"),
    "safetensors": version("safetensors"),
}))
"""


@dataclass(frozen=True)
class TritonEnvironment:
    """A Python environment that was found fit to run tritonserver.

    Attributes:
        path: Its folder.
        wheel: `pytriton/tritonserver` inside it.
        stub: The program that runs `model.py` under this environment's Python version.
        libraries: Folders for `LD_LIBRARY_PATH`: the interpreter's libpython first, then the wheel's.
    """

    path: Path
    wheel: Path
    stub: Path
    libraries: tuple[Path, ...]


def serve_triton(
    bundle: Bundle,
    *,
    environment: Path,
    host: str = "127.0.0.1",
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    device: Device = CPU,
    max_delay_ms: float = MAX_DELAY_MS,
    default_timeout_ms: float | None = None,
    max_queued_rows: int | None = None,
    max_task_rows: int | None = None,
    rate: float | None = None,
    rates: Mapping[str, float] | None = None,
    weights: Mapping[str, float] | None = None,
    rows: int | None = None,
    keep: Path | None = None,
    task_control: bool = True,
    aliases: bool = False,
    otlp: str | None = None,
    load_seconds: float = LOAD_SECONDS,
    on_ready: Callable[[Addresses], None] | None = None,
) -> None:
    """Serve a bundle with tritonserver until Ctrl-C or SIGTERM, then end it and return.

    Args:
        bundle: What to serve.
        environment: A virtual environment with nvidia-pytriton, numpy below 2 and onnxruntime.
        host: Address that HTTP, gRPC and metrics listen on.
        http_port: Port of HTTP; 0 picks a free one.
        grpc_port: Port of gRPC; 0 picks a free one.
        metrics_port: Port of Prometheus metrics; 0 picks a free one.
        device: Where the engine runs.
        max_delay_ms: Longest that a request waits for company.
        default_timeout_ms: As of `Batcher`.
        max_queued_rows: As of `Batcher`.
        max_task_rows: As of `Batcher`.
        rate: As of `Batcher`.
        rates: As of `Batcher`.
        weights: As of `Batcher`.
        rows: See `Service.open`.
        keep: See `Service.open`.
        task_control: Whether clients may add, change and remove tasks.
        aliases: Have a model NAME.TASK for each task too.
        otlp: Where traces go, an OTLP/HTTP collector's URL; None traces nothing.
        load_seconds: Longest that loading may take.
        on_ready: Called once, when requests are answered.

    Raises:
        MissingDependency: The environment lacks something.
        UsageError: A port cannot be had, or a setting makes no sense.
        ServerFailed: tritonserver did not start in time, or ended by itself.
    """
    options = ModelOptions(
        max_delay_ms=max_delay_ms,
        timeout_ms=default_timeout_ms or 0,
        max_queued=max_queued_rows or 0,
        max_task_queued=max_task_rows or 0,
        rate=rate,
        rates=tuple((rates or {}).items()),
        weights=tuple((weights or {}).items()),
        rows=rows,
        keep=keep,
        task_control=task_control,
    )
    with (
        _stop_signals() as stopped,
        running(
            bundle,
            environment=environment,
            host=host,
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            device=device,
            options=options,
            aliases=aliases,
            otlp=otlp,
            load_seconds=load_seconds,
            stopped=stopped,
        ) as server,
    ):
        if on_ready is not None and not stopped():
            on_ready(server.addresses)
        while not stopped():
            server.check_alive()
            time.sleep(POLL_SECONDS)
        logs.stopping()
    logs.stopped()


@contextlib.contextmanager
def running(
    bundle: Bundle,
    *,
    environment: Path,
    host: str = "127.0.0.1",
    http_port: int = 0,
    grpc_port: int = 0,
    metrics_port: int = 0,
    device: Device = CPU,
    options: ModelOptions | None = None,
    aliases: bool = False,
    otlp: str | None = None,
    load_seconds: float = LOAD_SECONDS,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[TritonProcess]:
    """A tritonserver that is ready; leaving the block ends its process group.

    Its folder, with the log in it, is kept when it fails and removed otherwise. See `serve_triton`
    for the arguments; `options` are those of the repository, by default with tasks that clients may
    change, and `stopped` breaks off the wait for readiness.
    """
    collector = None if otlp is None else traces_url(otlp)
    fit = inspect_environment(environment, needs_safetensors=bundle.bank == "inputs")
    ports = [free_port(host, port) for port in (http_port, grpc_port, metrics_port)]
    folder = Path(tempfile.mkdtemp(prefix="utune-triton-"))
    options = ModelOptions(task_control=True) if options is None else options
    try:
        write_repository(
            bundle,
            folder / "models",
            device=device,
            # The bundle stays out of what is polled: a hard link to one of its files, as another server's repository
            # has it, would count as a change, and the model be loaded anew without its tasks.
            options=replace(options, sockets=folder / "sockets", in_place=True),
            aliases=aliases,
        )
        _compile(fit, folder / "models")
        process = TritonProcess(fit, folder, host, ports, collector)
        try:
            process.wait_until_ready(load_seconds, stopped)
            yield process
        finally:
            process.end()
    except ServerFailed:
        raise  # the message points at the log in the folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


class TritonProcess:
    """A tritonserver and its stubs, in a session and process group of their own.

    Attributes:
        addresses: Where it answers once ready.
        log: Its output.
    """

    def __init__(
        self,
        environment: TritonEnvironment,
        folder: Path,
        host: str,
        ports: list[int],
        collector: str | None = None,
    ) -> None:
        """Start it over the repository in `folder/models`; `collector` is the URL that traces are posted to."""
        http_port, grpc_port, metrics_port = ports
        self.addresses = Addresses(*(host_port(host, port) for port in ports))
        self.log = folder / "tritonserver.log"
        self._folder = folder
        self._connect_to = host.strip("[]"), http_port
        self._memory = f"utune_{uuid.uuid4().hex[:12]}"
        for part in ("backends", "caches"):
            shutil.copytree(environment.wheel / part, folder / part)
        shutil.copy2(environment.stub, folder / "backends" / "python")
        command = [
            str(environment.wheel / "bin" / "tritonserver"),
            f"--model-repository={folder / 'models'}",
            f"--backend-directory={folder / 'backends'}",
            f"--cache-directory={folder / 'caches'}",
            f"--backend-config=python,shm-region-prefix-name={self._memory}",
            f"--http-address={host}",
            f"--grpc-address={host}",
            f"--metrics-address={host}",
            f"--http-port={http_port}",
            f"--grpc-port={grpc_port}",
            f"--metrics-port={metrics_port}",
            # Polling lets the model be drained by taking its folder away. Explicit control would too,
            # but whoever reaches the port could then load a model, which is to run code.
            "--model-control-mode=poll",
            "--repository-poll-secs=1",
            "--disable-auto-complete-config",
            f"--exit-timeout-secs={EXIT_SECONDS // 2}",
        ]
        if collector is not None:
            command += [
                "--trace-config=mode=opentelemetry",
                "--trace-config=level=TIMESTAMPS",
                "--trace-config=rate=1",
                f"--trace-config=opentelemetry,url={collector}",
                "--trace-config=opentelemetry,resource=service.name=utune-deploy",
            ]
        # What would lead the stub to another Python than the environment's is taken away.
        variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        variables["PATH"] = f"{environment.path / 'bin'}{os.pathsep}{variables.get('PATH', '')}"
        variables["PYTHONNOUSERSITE"] = "1"
        variables["VIRTUAL_ENV"] = str(environment.path)
        variables["LD_LIBRARY_PATH"] = os.pathsep.join(
            [*map(str, environment.libraries), *filter(None, [variables.get("LD_LIBRARY_PATH")])]
        )
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables,
                cwd=folder,
                start_new_session=True,
            )

    def wait_until_ready(self, seconds: float, stopped: Callable[[], bool]) -> None:
        """Return when every model answers, or when `stopped` says so.

        Raises:
            ServerFailed: It ended, or did not come up in time.
        """
        deadline = time.monotonic() + seconds
        while not stopped():
            self.check_alive()
            if self._are_ready(self._models()):
                return
            if time.monotonic() > deadline:
                raise self._failure(f"tritonserver was not ready after {seconds:g} s")
            time.sleep(POLL_SECONDS)

    def check_alive(self) -> None:
        """Do nothing while it runs.

        Raises:
            ServerFailed: It has ended.
        """
        if self._has_ended():
            raise self._failure("tritonserver ended by itself")

    def end(self) -> None:
        """Drain it, then end it and its stubs; returns when none of the group is left."""
        patience = EXIT_SECONDS
        try:
            if self._drain():
                patience = IDLE_EXIT_SECONDS
            if not self._has_ended():
                self._process.terminate()
            self._wait(self._has_ended, patience)
        finally:
            group = self._process.pid  # of its own session, so its pid is the group's number
            # Stubs ignore SIGTERM. Until the leader is waited for, its number cannot be another's.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            self._wait(lambda: not _living(group), patience)
            self._process.wait()
            for region in Path("/dev/shm").glob(f"{self._memory}*"):
                region.unlink(missing_ok=True)

    def _drain(self) -> bool:
        """Take the models away: what was taken is answered, what comes now is refused.

        Without it, tritonserver goes on serving clients that keep their connections busy, and cuts
        their requests when its patience ends. A model is gone when its stub is.

        Returns:
            Whether nothing is left to answer.
        """
        repository = self._folder / "models"
        models = self._models()
        lasting = [name for name in models if not is_alias(repository / name)]
        if self._has_ended() or not lasting or not self._are_ready(lasting):
            return False
        for name in models:
            with contextlib.suppress(
                FileNotFoundError
            ):  # an alias whose task has just been removed
                (repository / name).rename(self._folder / f"drained-{name}")
        leader = self._process.pid
        return self._wait(lambda: _living(leader) <= {leader}, EXIT_SECONDS)

    @staticmethod
    def _wait(condition: Callable[[], bool], seconds: float) -> bool:
        """Whether the condition came true in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _has_ended(self) -> bool:
        """Whether the leader is gone, without reaping it."""
        if self._process.returncode is not None:
            return True
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, flags) is not None

    def _models(self) -> list[str]:
        """What stands in the repository now: the models themselves write and remove aliases."""
        folders = (self._folder / "models").iterdir()
        return sorted(path.name for path in folders if not path.name.startswith("."))

    def _are_ready(self, models: list[str]) -> bool:
        return all(map(self._is_ready, models))

    def _is_ready(self, model: str) -> bool:
        try:
            return self._ask("GET", f"/v2/models/{model}/ready")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def _ask(self, method: str, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(*self._connect_to, timeout=5)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _failure(self, what: str) -> ServerFailed:
        lines = self.log.read_text(errors="replace").splitlines()
        telling = [line for line in lines if line.startswith("E") or "error" in line.lower()]
        shown = (telling or lines)[-LOG_LINES:]
        return ServerFailed(
            what,
            where=self.log,
            found="\n" + "\n".join(shown) if shown else "an empty log",
            do="read the log; `--engine embedded` serves the same bundle without tritonserver",
        )


def traces_url(url: str) -> str:
    """Where a collector of OTLP over HTTP takes traces: at its own path, or the standard one.

    Raises:
        UsageError: It is no such address.
    """
    try:
        parts = urlsplit(url)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
    except ValueError:
        parts, wrong = urlsplit(""), True
    if wrong or parts.query or parts.fragment:
        raise UsageError(
            "this is no address of an OTLP collector",
            wanted="http://HOST:4318, or with a path of its own",
            found=url,
        )
    return url if parts.path.strip("/") else f"{url.rstrip('/')}/v1/traces"


def inspect_environment(environment: Path, *, needs_safetensors: bool = False) -> TritonEnvironment:
    """The environment, once everything that tritonserver needs is seen in it.

    Args:
        environment: A virtual environment's folder.
        needs_safetensors: Whether the bundle's bank is an input.

    Raises:
        MissingDependency: Something is missing, or numpy is 2 or newer.
    """
    if sys.platform != "linux":
        raise MissingDependency(
            "tritonserver runs on Linux only",
            found=sys.platform,
            do="serve with `--engine embedded`, or in NVIDIA's container",
        )
    environment = environment.absolute()
    python = environment / "bin" / "python"
    if not python.is_file():
        raise MissingDependency(
            "there is no Python environment for tritonserver",
            where=environment,
            wanted="a virtual environment with bin/python",
            do=f"python3 -m venv {environment} && {environment}/bin/{INSTALL}",
        )
    facts = _probe(python)

    def lacks(what: str, *, wanted: object, found: object, do: str) -> MissingDependency:
        return MissingDependency(what, where=environment, wanted=wanted, found=found, do=do)

    install = f"{environment}/bin/{INSTALL}"
    wheel = Path(facts["pytriton"] or environment) / "tritonserver"
    if not (wheel / "bin" / "tritonserver").is_file():
        raise lacks(
            "the environment has no tritonserver",
            wanted="the nvidia-pytriton wheel (Linux, glibc 2.35 or newer)",
            found="none",
            do=install,
        )
    if not facts["numpy"] or int(facts["numpy"].split(".")[0]) >= 2:
        raise lacks(
            "the environment has a numpy that tritonserver answers garbage with",
            wanted="numpy below 2",
            found=facts["numpy"] or "none",
            do=install,
        )
    for package in ("onnxruntime", *(("safetensors",) if needs_safetensors else ())):
        if not facts[package]:
            raise lacks(
                f"the environment has no {package}", wanted=package, found="none", do=install
            )
    stub = wheel / "python_backend_stubs" / facts["python"] / "triton_python_backend_stub"
    if not stub.is_file():
        raise lacks(
            "the wheel has no stub for the environment's Python",
            wanted=", ".join(sorted(path.name for path in stub.parents[1].glob("*"))),
            found=facts["python"],
            do="make the environment with one of these versions",
        )
    name = f"libpython{facts['python']}.so.1.0"
    libdir = Path(facts["libdir"] or "/nowhere")
    if not (libdir / name).is_file():
        raise lacks(
            "the environment's Python has no shared library",
            wanted=libdir / name,
            found=f"{facts['libpython']} in {libdir}",
            do=f"apt install libpython{facts['python']}, or make the environment with a Python "
            "that was built with --enable-shared",
        )
    return TritonEnvironment(
        path=environment,
        wheel=wheel,
        stub=stub,
        libraries=(libdir, wheel.parents[1] / "nvidia_pytriton.libs"),
    )


def _probe(python: Path) -> dict[str, Any]:
    try:
        # -I: neither the caller's PYTHONPATH nor its folder may answer for the environment.
        answer = subprocess.run(
            [str(python), "-I", "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as cause:
        raise MissingDependency(
            "the Python of tritonserver's environment does not run",
            where=python,
            found=str(getattr(cause, "stderr", None) or cause).strip().splitlines()[-1:],
            do="make the environment again",
        ) from cause


def _living(group: int) -> set[int]:
    """The processes of a group that still run; one that only waits to be reaped does not."""
    members = set()
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(OSError):
            running = process.info["status"] != psutil.STATUS_ZOMBIE
            if running and os.getpgid(process.pid) == group:
                members.add(process.pid)
    return members


def _compile(environment: TritonEnvironment, models: Path) -> None:
    """Write the byte code that the stub would write on its first import.

    The stub heeds no variable that forbids it, and polling would take the new files for a new
    version of the model and load it a second time.
    """
    command = [
        str(environment.path / "bin" / "python"),
        "-I",
        "-m",
        "compileall",
        "-q",
        str(models),
    ]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came; inside the block they no longer end the process."""
    caught: list[int] = []  # a list, because setting an Event inside a handler can deadlock
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def handle(number: int, _frame: object) -> None:
        caught.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
