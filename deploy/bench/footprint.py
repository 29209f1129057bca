"""What a subject takes in memory and on disk, measured in a fresh process that opens nothing else.

    python -m utune_deploy.deploy.bench.footprint BUNDLE_OR_ONNX --rows ROWS.npz [--fan-out] [--threads N] ...

prints a `Footprint` as JSON. In the benchmark's own process the second engine of a kind grows it by less than the
first: the runtime is loaded, and what the first left free is used again. Here the runtime is loaded and has run a model
of one node before anything is counted, and what is counted is the engine's.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from onnx import TensorProto, helper

from ...export.bundle import open_bundle
from ...export.engine import IMAGES, LOGITS, TASK, Device
from ...export.targets.onnxruntime import OnnxRuntimeSession
from ...merge.errors import CheckFailed
from .source import Source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ...export.engine import Rows

LONGEST_S = 600
OPSET = 17  # of the model of one node; any that the runtime knows
PROCESS = Path("/proc/self")
RESET_PEAK = "5"
"""Written to `clear_refs`: the peak begins again at what is resident now (Linux, proc(5))."""


@dataclass(frozen=True)
class Footprint:
    """An engine alone in a process. Memory is resident, on the host, beyond what the loaded runtime takes.

    Attributes:
        disk_bytes: Engine file and bank file.
        opened_bytes: Growth when the engine is open.
        called_bytes: Growth after its first call: what serving it takes.
        peak_bytes: The most that it was, opening and first call included; None where the system does not tell.
        open_ms: Time to open it, its files in the system's cache or not, as they were.
        first_call_ms: Time of the first call.
        batch: Rows of that call.
    """

    disk_bytes: int
    opened_bytes: int
    called_bytes: int
    peak_bytes: int | None
    open_ms: float
    first_call_ms: float
    batch: int


def measure_footprint(source: Source, rows: Rows, task: NDArray[np.int64]) -> Footprint:
    """Open an engine in a process of its own and call it once.

    Args:
        source: The engine.
        rows: What it is given: the array of its one input, or arrays by name.
        task: `[B]` rows of the bank; passed over by an engine that has no `task` input.

    Raises:
        CheckFailed: The process failed.
    """
    given = dict(rows) if isinstance(rows, dict) else {IMAGES: rows}
    if source.takes_task:
        given[TASK] = task
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder, "rows.npz"), **given)  # type: ignore[arg-type]
        if isinstance(source.model, bytes):
            path = Path(folder, "model.onnx")
            path.write_bytes(source.model)
        else:
            path = source.model if isinstance(source.model, Path) else source.model.path
        command = [sys.executable, "-m", __spec__.name, path, "--rows", Path(folder, "rows.npz")]
        command += _options(source)
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True, text=True, check=False, timeout=LONGEST_S,
        )  # fmt: skip
    if done.returncode:
        raise CheckFailed(
            "a subject's memory could not be measured in a process of its own",
            where=path,
            found=(done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1],
            do="leave it out with --no-footprint",
        )
    return Footprint(**json.loads(done.stdout))


def _options(source: Source) -> list[object]:
    device = source.device
    return [
        *(["--fan-out"] if source.fan_out else []),
        *(["--tf32"] if source.tf32 else []),
        *("--provider", device.provider),
        *(["--threads", device.threads] if device.threads else []),
        *(["--kernels", device.kernels] if device.kernels else []),
        # a model in memory is no engine that is opened again
        *(["--prepared", device.prepared] if source.file and device.prepared else []),
        *([] if device.arena else ["--no-arena"]),
        *(["--memory-mb", device.memory_mb] if device.memory_mb else []),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure in this process, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("engine", type=Path, help="a bundle, or an ONNX model")
    parser.add_argument("--rows", type=Path, required=True, help="inputs by name, task among them")
    parser.add_argument("--fan-out", action="store_true")
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kernels", type=Path)
    parser.add_argument("--prepared", type=Path)
    parser.add_argument("--no-arena", dest="arena", action="store_false")
    parser.add_argument("--memory-mb", type=int)
    options = parser.parse_args(arguments)
    device = Device(**{field.name: getattr(options, field.name) for field in fields(Device)})
    with np.load(options.rows) as stored:
        given = {name: stored[name] for name in stored.files}
    task = given.pop(TASK, None)
    engine = open_bundle(options.engine) if options.engine.is_dir() else options.engine
    source = Source(engine, device, task is not None, options.fan_out, options.tf32)
    print(json.dumps(asdict(_measure(source, given, task))))  # noqa: T201 it is what the parent reads


def _measure(
    source: Source, rows: dict[str, NDArray[Any]], task: NDArray[np.int64] | None
) -> Footprint:
    OnnxRuntimeSession(_small(), source.device).run(np.zeros((1, 1), np.float32))
    gc.collect()
    knows_peak = _reset_peak()
    start = psutil.Process().memory_info().rss
    began = time.perf_counter()
    session = source.open()
    open_ms = 1e3 * (time.perf_counter() - began)
    opened = psutil.Process().memory_info().rss
    began = time.perf_counter()
    session.run(rows if len(rows) > 1 else next(iter(rows.values())), task)
    first_call_ms = 1e3 * (time.perf_counter() - began)
    called = psutil.Process().memory_info().rss
    return Footprint(
        disk_bytes=source.disk_bytes,
        opened_bytes=opened - start,
        called_bytes=called - start,
        peak_bytes=max(_peak(), opened, called) - start if knows_peak else None,
        open_ms=open_ms,
        first_call_ms=first_call_ms,
        batch=len(next(iter(rows.values()))),
    )


def _reset_peak() -> bool:
    """Whether the system tells a peak, which then begins now."""
    try:
        (PROCESS / "clear_refs").write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def _peak() -> int:
    """The most that was resident since the reset, in bytes. The kernel updates it late, so it may be a little low."""
    found = re.search(r"VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text())
    assert found is not None  # a system that resets it has it
    return 1024 * int(found[1])


def _small() -> bytes:
    """A model of one node."""
    given, answer = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1])
        for name in (IMAGES, LOGITS)
    )
    node = helper.make_node("Relu", [IMAGES], [LOGITS])
    graph = helper.make_graph([node], "small", [given], [answer])
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()


if __name__ == "__main__":
    main()
