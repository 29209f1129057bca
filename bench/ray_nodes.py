r"""Two nodes against one, what Ray adds to a lone request, and what a dying node costs.

    python bench/random_tasks.py runs/vit_t --backbone vit_tiny_patch16_224 --tasks 8 --rank 16
    utune-deploy export runs/vit_t/task*.safetensors --weights runs/vit_t/backbone -o runs/vit_t/bundle \
        --bank inputs --max-batch 8 --threads 1
    python bench/ray_nodes.py runs/vit_t/bundle

Nodes are Ray's own processes on this machine, of one processor each, and every engine has one thread. Fronts,
Ray's own processes and this client share the processors with the engines, so what the client and the front take is measured
and said. Callers send a request of one row when their last one is answered, tasks in turn; variants take turns.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import tritonclient.grpc as triton
from rich.console import Console
from rich.table import Table

from utune_deploy.export.bundle import open_bundle
from utune_deploy.export.engine import row_inputs
from utune_deploy.serving.servers.ray import library

if TYPE_CHECKING:
    from collections.abc import Iterator

    from utune_deploy.export.bundle import Bundle


class Server:
    """`utune-deploy serve` in a process of its own."""

    def __init__(self, bundle: Path, *options: str) -> None:
        code = "from utune_deploy.deploy.cli import main; main()"
        ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", str(bundle), *ports, "--threads", "1", *options],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.address = ""
        for line in self.process.stdout:
            if line.startswith("grpc"):
                self.address = line.split()[1]
            if line.startswith("Ctrl-C"):
                break
        if not self.address:
            raise SystemExit("the server did not start")

    def cpu(self) -> float:
        """Seconds of processor time that the process has used."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def stop(self) -> None:
        """Let it drain and end."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[Server]:
    """A server inside the block."""
    server = Server(bundle, *options)
    try:
        yield server
    finally:
        server.stop()


class Callers:
    """Closed loops, each asking one row at a time and once."""

    def __init__(self, bundle: Bundle, address: str, count: int) -> None:
        self.latencies: list[float] = []
        self.lost: list[Exception] = []
        self._stop = threading.Event()
        self._address = address
        self._requests = [self._request(bundle, task.name) for task in bundle.tasks]
        self._name = bundle.name
        self._threads = [threading.Thread(target=self._call, args=(n,)) for n in range(count)]

    @staticmethod
    def _request(bundle: Bundle, task: str) -> list[triton.InferInput]:
        (tensor,) = row_inputs(bundle.engine.inputs)
        shape = [1, *(int(size) for size in tensor.shape[1:])]
        row = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        name = np.array([[task.encode()]], dtype=object)
        return [
            triton.InferInput(tensor.name, shape, "FP32").set_data_from_numpy(row),
            triton.InferInput("task", [1, 1], "BYTES").set_data_from_numpy(name),
        ]

    def _call(self, number: int) -> None:
        outputs = [triton.InferRequestedOutput("logits")]
        with triton.InferenceServerClient(self._address) as client:
            while not self._stop.is_set():
                request = self._requests[number % len(self._requests)]
                number += 1
                start = time.perf_counter()
                try:
                    client.infer(self._name, request, outputs=outputs)
                except Exception as error:
                    self.lost.append(error)
                else:
                    self.latencies.append(time.perf_counter() - start)

    @contextmanager
    def calling(self) -> Iterator[None]:
        """They call inside the block."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()


def measure(bundle: Bundle, server: Server, callers: int, seconds: float) -> dict[str, float]:
    """Requests per second, latencies in ms, and processor time per request of client and front in ms."""
    warm = Callers(bundle, server.address, callers)
    with warm.calling():
        time.sleep(min(3.0, seconds))
    calls = Callers(bundle, server.address, callers)
    mine, its, start = time.process_time(), server.cpu(), time.perf_counter()
    with calls.calling():
        time.sleep(seconds)
    spent = time.perf_counter() - start
    count = len(calls.latencies)
    p50, p99 = np.percentile(np.array(calls.latencies) * 1e3, [50, 99])
    return {
        "per second": count / spent,
        "p50": p50,
        "p99": p99,
        "client": (time.process_time() - mine) / count * 1e3,
        "front": (server.cpu() - its) / count * 1e3,
        "lost": len(calls.lost),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=12, help="per measurement")
    parser.add_argument("--callers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    bundle = open_bundle(asked.bundle)

    # Ray starts its workers as what gives way to everything else; here that would give way to our neighbours.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray spells it so
    library.ray()
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    second = cluster.add_node(num_cpus=1)
    on_ray = ("--engine", "ray", "--ray-address", cluster.address)
    variants = {
        "embedded": (),
        "ray, 1 node": (*on_ray, "--replicas", "1"),
        "ray, 2 nodes": (*on_ray, "--replicas", "2"),
    }
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    try:
        for _ in range(asked.rounds):
            for name, options in variants.items():
                with serving(asked.bundle, *options) as server:
                    for callers in (1, asked.callers):
                        figures = measure(bundle, server, callers, asked.seconds)
                        found.setdefault((name, callers), []).append(figures)
                        said = ", ".join(f"{key} {value:.1f}" for key, value in figures.items())
                        print(f"{name}, {callers} callers: {said}", flush=True)
        with serving(asked.bundle, *variants["ray, 2 nodes"]) as server:
            calls = Callers(bundle, server.address, asked.callers)
            with calls.calling():
                time.sleep(5)
                before = len(calls.latencies)
                cluster.remove_node(second, allow_graceful=False)
                time.sleep(10)
            slowest = max(calls.latencies[before:])
    finally:
        cluster.shutdown()

    columns = ("per second", "p50", "p99", "client", "front", "lost")
    table = Table("server", "callers", *columns)
    for (name, callers), rounds in found.items():
        medians = [float(np.median([each[column] for each in rounds])) for column in columns]
        table.add_row(name, str(callers), *(f"{value:.1f}" for value in medians))
    console = Console(width=110)
    console.print(table)
    console.print(f"medians of {asked.rounds} rounds; times in ms; {os.cpu_count()} processors")
    for callers in (1, asked.callers):
        one, two = found["ray, 1 node", callers], found["ray, 2 nodes", callers]
        ratios = [b["per second"] / a["per second"] for a, b in zip(one, two, strict=True)]
        console.print(f"2 nodes against 1, {callers} callers: {np.round(ratios, 2).tolist()}")
    added = [
        b["p50"] - a["p50"]
        for a, b in zip(found["embedded", 1], found["ray, 1 node", 1], strict=True)
    ]
    console.print(f"added to a lone request's p50 by Ray: {np.round(added, 2).tolist()} ms")
    console.print(
        f"a node died: {len(calls.lost)} of {len(calls.latencies) + len(calls.lost)} requests lost,"
        f" the slowest answer behind it took {slowest * 1e3:.0f} ms"
    )


if __name__ == "__main__":
    main()
