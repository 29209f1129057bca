"""What prepared engines save: time to open, and memory of several processes that open the same engine.

python bench/prepared.py runs/vit_b/tasks64 --processes 1 2 4 -o bench/results/export/prepared.json

Each process opens the bundle, answers one batch of eight pictures and waits until all have; then their proportional set
sizes, in which a shared page counts once, are added up, less those of as many processes that opened a model of one
node. First without and then with a folder of prepared engines, which is filled before. What the engine's calls take is
compared call by call in one process. A bundle of pictures, Linux only. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
from onnx import TensorProto, helper

from utune_deploy.deploy.bench.machine import read_machine
from utune_deploy.export.bundle import open_bundle
from utune_deploy.export.engine import TASK, Device, row_inputs
from utune_deploy.export.targets.onnxruntime import OnnxRuntimeSession

CALLS = 21  # pairs of calls, the first of them left out
BATCH = 8
EMPTY = "nothing"


def main() -> None:
    """Measure, write JSON and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--one", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        _be_one(options.bundle, options.one)
        return
    with tempfile.TemporaryDirectory(dir=options.bundle.parent) as folder:
        began = time.perf_counter()
        open_bundle(options.bundle).open_session(Device(prepared=Path(folder)))
        prepare_s = time.perf_counter() - began
        result = {
            "bundle": options.bundle.name,
            "prepare_s": prepare_s,
            "prepared_mb": sum(f.stat().st_size for f in Path(folder).rglob("*.*")) / 1e6,
            "calls": _calls(options.bundle, Path(folder)),
            "runs": [
                {"processes": count, "prepared": bool(where), **_together(options.bundle, where, count)}
                for count in options.processes
                for where in ("", folder)
            ],
            "machine": asdict(read_machine()),
        }  # fmt: skip
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    print("| processes | prepared | open, s | memory, MB |")
    print("|---|---|---|---|")
    for run in result["runs"]:
        print(
            f"| {run['processes']} | {'yes' if run['prepared'] else 'no'} | {run['open_s']:.2f} | {run['memory_mb']:.0f} |"
        )
    calls = result["calls"]
    print(
        f"\na call of the prepared engine: {calls['ratio']:.3f} of the other's {calls['ms']:.0f} ms; ",
        end="",
    )
    print(f"equal bit for bit: {calls['equal']}; prepared in {prepare_s:.1f} s")


def _rows(bundle: Path) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    opened = open_bundle(bundle)
    noise, engine = np.random.default_rng(0), opened.engine
    rows = {
        tensor.name: noise.standard_normal((BATCH, *tensor.shape[1:]), np.float32)
        for tensor in row_inputs(engine.inputs)
    }
    takes = any(tensor.name == TASK for tensor in engine.inputs)
    return rows, np.arange(BATCH) % len(opened.tasks) if takes else None


def _calls(bundle: Path, folder: Path) -> dict[str, object]:
    """What a call takes, and whether both engines answer the same."""
    rows, task = _rows(bundle)
    sessions = [open_bundle(bundle).open_session(Device(prepared=p)) for p in (None, folder)]
    pairs = []
    for number in range(CALLS):
        pair = {}
        for which in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            sessions[which].run(rows, task)
            pair[which] = time.perf_counter() - began
        pairs.append(pair)
    return {
        "batch": BATCH,
        "ms": 1e3 * statistics.median(pair[0] for pair in pairs[1:]),
        "ratio": statistics.median(pair[1] / pair[0] for pair in pairs[1:]),
        "equal": bool(np.array_equal(*(session.run(rows, task) for session in sessions))),
    }


def _together(bundle: Path, folder: str, count: int) -> dict[str, float]:
    """Seconds that one takes to open, the median, and MB that all take together."""
    empty, _ = _started(bundle, EMPTY, count)
    memory, opened = _started(bundle, folder, count)
    return {"open_s": statistics.median(opened), "memory_mb": (memory - empty) / 1e6}


def _started(bundle: Path, folder: str, count: int) -> tuple[int, list[float]]:
    """Bytes of processes that stand beside each other, and the seconds in which each opened its engine."""
    command = [sys.executable, __file__, str(bundle), "--one", folder]
    processes, opened = [], []
    for _ in range(count):  # one after the other: what is timed is not their contention
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        opened.append(float(process.stdout.readline()))
    memory = sum(psutil.Process(process.pid).memory_full_info().pss for process in processes)
    for process in processes:
        process.communicate("")
    return memory, opened


def _be_one(bundle: Path, folder: str) -> None:
    """Open, answer, say in how many seconds it was open, and wait for the end of the input."""
    rows, task = _rows(bundle)
    opened = open_bundle(bundle)
    _nothing()
    began = time.perf_counter()
    if folder != EMPTY:
        session = opened.open_session(Device(prepared=Path(folder) if folder else None))
    took = time.perf_counter() - began
    if folder != EMPTY:
        session.run(rows, task)
    print(took, flush=True)
    sys.stdin.read()


def _nothing() -> None:
    """Load the runtime with a model of one node."""
    value = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1])
    graph = helper.make_graph(
        [helper.make_node("Neg", ["images"], ["logits"])], "g", [value], [out]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    OnnxRuntimeSession(model.SerializeToString()).run(np.zeros(1, np.float32))


if __name__ == "__main__":
    main()
