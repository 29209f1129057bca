"""The main job, end to end: trained deltas, one checked engine, answers from real servers.

    python examples/digits/demo.py

Runs the command line as a person would (every command is printed), asks the servers over HTTP and
gRPC with tasks mixed in flight, compares every answer with torch, asks one picture for every task in
one run of another engine, and ends with a report in `runs/demo/`. Whatever it starts it stops.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import tritonclient.grpc as grpc
import tritonclient.http as http
from data import EVERY_TASK, SIDE_TASKS, TASKS, examples, tensors, write_png

from utune_deploy.deploy.bench.report import Settings, write_json
from utune_deploy.deploy.bench.run import bench
from utune_deploy.deploy.bench.table import print_table
from utune_deploy.deploy.bench.views.page import Section, write_html
from utune_deploy.export.bundle import open_bundle
from utune_deploy.export.engine import Device
from utune_deploy.merge.attach import restore
from utune_deploy.merge.backbone import load
from utune_deploy.merge.delta import load_delta
from utune_deploy.merge.errors import MissingDependency
from utune_deploy.serving.servers.triton import inspect_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BACKBONE = HERE / "backbone"
RUNS = ROOT / "runs" / "demo"
TRITON = ROOT / ".venv-triton"
MAX_BATCH = 16
CLIENTS = 4  # of each protocol, at once
AT_ONCE = (*SIDE_TASKS, "digit")  # the last tunes the trunk itself, and shares less of it
START_SECONDS = 90


@dataclass(frozen=True)
class Row:
    """One picture and its question.

    Attributes:
        task: The task's name.
        number: Its place among the task's test pictures.
    """

    task: str
    number: int


@dataclass(frozen=True)
class Truth:
    """What torch says of a task's test pictures.

    Attributes:
        images: `[n, 3, 32, 32]` float32.
        classes: The right classes, `[n]`.
        logits: Torch's, float32, `[n, K]`.
        labels: Class names.
    """

    images: NDArray[np.float32]
    classes: NDArray[np.int64]
    logits: NDArray[np.float32]
    labels: tuple[str, ...]


def main() -> None:
    """Run the demo; leaves with 1 when an answer differs from torch's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--triton-env", type=Path, default=TRITON)
    arguments = parser.parse_args()
    began = time.perf_counter()
    shutil.rmtree(RUNS, ignore_errors=True)
    RUNS.mkdir(parents=True)
    stored = {task: relative(HERE / "deltas" / f"{task}.safetensors") for task in EVERY_TASK}
    deltas = [stored[task] for task in TASKS]
    weights = ["--weights", os.path.relpath(BACKBONE)]
    pictures = RUNS / "pictures"
    write_png(pictures, EVERY_TASK.values())

    title("1  Merge what folds")
    for task in ("digit", "rotated"):
        merged = RUNS / f"{task}-merged.safetensors"
        run("merge", stored[task], *weights, "-o", relative(merged))
    say("A tuner with an activation inside does not fold, and is refused:")
    refused = RUNS / "parity-merged.safetensors"
    run("merge", stored["parity"], *weights, "-o", relative(refused), expect=2)

    title(f"2  Export one engine for {len(TASKS)} tasks, each tuned in another way")
    bundle = RUNS / "digits"
    run(
        "export", *deltas, *weights, "-o", relative(bundle), "--images", relative(pictures),
        "--max-batch", str(MAX_BATCH),
    )  # fmt: skip

    title("3  Check it against torch, claim by claim")
    run("check", relative(bundle), *deltas, *weights, "--images", relative(pictures))

    title("4  Ask in process")
    shown = [min((pictures / task).iterdir()) for task in TASKS]
    asked = [word for task in TASKS for word in ("--task", task)]
    run("predict", relative(bundle), *map(relative, shown), *asked)

    title("5  Ask real servers: every test picture of every task, tasks mixed in flight")
    truths = {task: truth(task) for task in TASKS}
    sections: list[Section] = []
    wrong = 0
    servers = [("embedded", [])]
    try:
        inspect_environment(arguments.triton_env)
        servers.append(("triton", ["--triton-env", str(arguments.triton_env)]))
    except MissingDependency as missing:
        say(f"Triton is left out on this machine: {missing}")
    for server, options in servers:
        answers, seconds = ask_server(server, options, bundle, truths)
        wrong += compare(server, answers, truths, seconds, sections)

    title("6  One picture, every task: the trunk runs once, as far as tasks agree on it")
    every = RUNS / "every"
    run(
        "export", *(stored[task] for task in AT_ONCE), *weights, "--fan-out",
        "-o", relative(every), "--images", relative(pictures), "--max-batch", str(MAX_BATCH),
    )  # fmt: skip
    digits = sorted((pictures / "digit").iterdir())
    three = next(path for path in digits if path.stem.endswith("-3"))  # prime, and a multiple
    run("predict", relative(every), "--every-task", relative(three))
    wrong += compare_at_once(every, sections)

    title("7  Latency, against the bare backbone in the same run")
    engine = open_bundle(bundle)
    report = bench(
        engine, [], batches=(1, 8, MAX_BATCH), mixes=("uniform",), device=Device(threads=1),
        settings=Settings(warmup_rounds=5, min_rounds=200, min_seconds=1.0),
    )  # fmt: skip
    print_table(report)
    checks = [("comparison", "rows", "error", "budget", "verdict")] + [
        (c["name"], str(c["rows"]), f"{c['error']:.1e}", f"{c['budget']:.1e}", "passed")
        for c in engine.check["comparisons"]
    ]
    sections.append(Section("Check", checks, "Engine against torch in float64; see docs/check.md."))
    write_json(report, RUNS / "report.json")
    write_html(report, RUNS / "report.html", sections=sections)

    say(f"\nreport  {RUNS / 'report.html'}")
    say(f"took    {time.perf_counter() - began:.0f} s")
    if wrong:
        say(f"FAILED  {wrong} answers differ from torch's")
        sys.exit(1)
    say("done    every answer of every server and engine equals torch's, image by image")


def title(text: str) -> None:
    """A heading."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def say(text: str) -> None:
    """A line."""
    print(text, flush=True)


def relative(path: Path) -> str:
    """A path as a person would type it."""
    return os.path.relpath(path)


def command(*words: str) -> list[str]:
    """A call of the command line in this environment."""
    return [str(Path(sys.executable).with_name("utune-deploy")), *words]


def run(*words: str, expect: int = 0) -> None:
    """Print a command, run it, and insist on its exit code."""
    print(f"\n$ utune-deploy {shlex.join(words)}", flush=True)
    done = subprocess.run(command(*words), check=False, cwd=Path.cwd())
    if done.returncode != expect:
        sys.exit(f"utune-deploy {words[0]} ended with {done.returncode}, not {expect}")


def truth(task: str) -> Truth:
    """Torch's answers to a task's test pictures, from its delta alone."""
    stored = load_delta(HERE / "deltas" / f"{task}.safetensors")
    images, classes = tensors(examples(EVERY_TASK[task], "test"), stored.preprocessing)
    model = restore(load(None, None, BACKBONE), stored).eval()
    with torch.no_grad():
        logits = model(images)
    return Truth(images.numpy(), classes.numpy(), logits.numpy(), stored.labels)


def ask_server(
    server: str, options: Sequence[str], bundle: Path, truths: dict[str, Truth]
) -> tuple[dict[tuple[str, str], dict[Row, tuple[NDArray[np.float32], str]]], float]:
    """Start a server, ask it everything over HTTP and gRPC at once, stop it.

    Returns:
        Logits and label by row, by server and protocol; and the seconds that asking took.
    """
    http_port, grpc_port, metrics_port = free_ports(3)
    words = [
        "serve", relative(bundle), "--engine", server, *options, "--http-port", str(http_port),
        "--grpc-port", str(grpc_port), "--metrics-port", str(metrics_port),
    ]  # fmt: skip
    rows = [
        Row(task, number) for task, known in truths.items() for number in range(len(known.classes))
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    sizes = np.random.default_rng(1).integers(1, MAX_BATCH + 1, size=len(rows))
    requests: list[list[Row]] = []
    at = 0
    for size in sizes:
        if at >= len(rows):
            break
        requests.append([rows[index] for index in order[at : at + size]])
        at += size
    with running(words, http_port):
        began = time.perf_counter()
        protocols: dict[str, Callable[[], Callable[[list[Row]], Any]]] = {
            "HTTP": lambda: http_client(http_port, bundle.name, truths),
            "gRPC": lambda: grpc_client(grpc_port, bundle.name, truths),
        }
        with ThreadPoolExecutor(CLIENTS * len(protocols)) as pool:
            futures = {
                (server, protocol): [
                    pool.submit(ask_all, make, requests[client::CLIENTS])
                    for client in range(CLIENTS)
                ]
                for protocol, make in protocols.items()
            }
            answers = {
                key: {row: answer for future in parts for row, answer in future.result().items()}
                for key, parts in futures.items()
            }
        seconds = time.perf_counter() - began
    return answers, seconds


def ask_all(
    make: Callable[[], Callable[[list[Row]], tuple[NDArray[np.float32], list[str]]]],
    requests: Sequence[list[Row]],
) -> dict[Row, tuple[NDArray[np.float32], str]]:
    """One client's requests, one after the other."""
    ask = make()
    found = {}
    for rows in requests:
        logits, labels = ask(rows)
        found.update({row: (logits[i], labels[i]) for i, row in enumerate(rows)})
    return found


def http_client(
    port: int, model: str, truths: dict[str, Truth]
) -> Callable[[list[Row]], tuple[NDArray[np.float32], list[str]]]:
    """NVIDIA's HTTP client; every third request is JSON instead of binary."""
    client = http.InferenceServerClient(f"127.0.0.1:{port}")
    sent = iter(range(1 << 30))

    def ask(rows: list[Row]) -> tuple[NDArray[np.float32], list[str]]:
        images, tasks = batch(rows, truths)
        binary = next(sent) % 3 != 0
        inputs = [
            http.InferInput("images", images.shape, "FP32"),
            http.InferInput("task", tasks.shape, "BYTES"),
        ]
        inputs[0].set_data_from_numpy(images, binary_data=binary)
        inputs[1].set_data_from_numpy(tasks, binary_data=binary)
        outputs = [http.InferRequestedOutput(n, binary_data=binary) for n in ("logits", "label")]
        return unpack(client.infer(model, inputs, outputs=outputs))

    return ask


def grpc_client(
    port: int, model: str, truths: dict[str, Truth]
) -> Callable[[list[Row]], tuple[NDArray[np.float32], list[str]]]:
    """NVIDIA's gRPC client."""
    client = grpc.InferenceServerClient(f"127.0.0.1:{port}")

    def ask(rows: list[Row]) -> tuple[NDArray[np.float32], list[str]]:
        images, tasks = batch(rows, truths)
        inputs = [
            grpc.InferInput("images", images.shape, "FP32"),
            grpc.InferInput("task", tasks.shape, "BYTES"),
        ]
        inputs[0].set_data_from_numpy(images)
        inputs[1].set_data_from_numpy(tasks)
        return unpack(client.infer(model, inputs))

    return ask


def batch(rows: list[Row], truths: dict[str, Truth]) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Images `[B, 3, 32, 32]` and task names `[B, 1]`."""
    images = np.stack([truths[row.task].images[row.number] for row in rows])
    return images, np.array([[row.task] for row in rows], dtype=object)


def unpack(answer: Any) -> tuple[NDArray[np.float32], list[str]]:
    """Logits `[B, K]` and labels."""
    labels = answer.as_numpy("label")[:, 0]  # bytes, or text when the answer was JSON
    return answer.as_numpy("logits"), [
        label.decode() if isinstance(label, bytes) else label for label in labels
    ]


def compare(
    server: str,
    answers: dict[tuple[str, str], dict[Row, tuple[NDArray[np.float32], str]]],
    truths: dict[str, Truth],
    seconds: float,
    sections: list[Section],
) -> int:
    """Print accuracy per task and hold every answer to torch; the number that differ."""
    rows = [("task", "pictures", "torch", "HTTP", "gRPC", "labels differ", "largest logit error")]
    wrong = 0
    for task, known in truths.items():
        count = len(known.classes)
        right = {"torch": int((known.logits.argmax(1) == known.classes).sum())}
        differ, error = 0, 0.0
        for (_, protocol), found in answers.items():
            classes = []
            for number in range(count):
                logits, label = found[Row(task, number)]
                logits = logits[: len(known.labels)]
                classes.append(known.labels.index(label))
                differ += label != known.labels[int(known.logits[number].argmax())]
                error = max(error, float(np.abs(logits - known.logits[number]).max()))
            right[protocol] = int((np.array(classes) == known.classes).sum())
        wrong += differ
        shares = [f"{right[name] / count:.1%}" for name in ("torch", "HTTP", "gRPC")]
        rows.append((task, str(count), *shares, str(differ), f"{error:.1e}"))
    total = sum(len(found) for found in answers.values())
    title(f"   {server}: {total} answers in {seconds:.1f} s, {2 * CLIENTS} clients at once")
    say_rows(rows)
    some = answers[server, "gRPC"]
    for task, known in truths.items():
        labels = [f"{known.labels[known.classes[n]]} -> {some[Row(task, n)][1]}" for n in range(5)]
        say(f"   {task:14} {TASKS[task].question:48} {', '.join(labels)}")
    note = f"{total} answers over HTTP and gRPC, {2 * CLIENTS} clients at once, tasks mixed in every batch."
    sections.append(Section(f"Accuracy through the {server} server", rows, note))
    return wrong


def compare_at_once(bundle: Path, sections: list[Section]) -> int:
    """Ask the fan-out engine for all held-out pictures, and hold every task's answers to torch.

    Returns:
        The number of labels that differ.
    """
    opened = open_bundle(bundle)
    session = opened.open_fan_out(Device(threads=1))
    truths = {task.name: truth(task.name) for task in opened.tasks}
    images = truths[AT_ONCE[0]].images
    if not all(np.array_equal(known.images, images) for known in truths.values()):
        sys.exit(f"{', '.join(truths)} do not show the same pictures: no run can answer them all")
    began = time.perf_counter()
    answers = np.concatenate(
        [session.run(images[at : at + MAX_BATCH]) for at in range(0, len(images), MAX_BATCH)]
    )  # [n, T, K]
    seconds = time.perf_counter() - began
    rows = [("task", "pictures", "torch", "fan-out", "labels differ", "largest logit error")]
    wrong = 0
    for row, (task, known) in enumerate(truths.items()):
        found = answers[:, row, : len(known.labels)]
        shares = [
            f"{(logits.argmax(1) == known.classes).mean():.1%}" for logits in (known.logits, found)
        ]
        differ = int((found.argmax(1) != known.logits.argmax(1)).sum())
        error = float(np.abs(found - known.logits).max())
        wrong += differ
        rows.append((task, str(len(images)), *shares, str(differ), f"{error:.1e}"))
    title(
        f"   fan-out: {len(images)} pictures, {answers[..., 0].size} answers in {seconds:.1f} s, one thread"
    )
    say_rows(rows)
    note = f"All {len(truths)} tasks of a picture in one run of one engine: {bundle.name}."
    sections.append(Section("One picture, every task", rows, note))
    return wrong


def say_rows(rows: Sequence[Sequence[str]]) -> None:
    """A table, its first row the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        say("   " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)))


@contextmanager
def running(words: Sequence[str], port: int) -> Iterator[None]:
    """A server while the block runs; stopped with Ctrl-C, as a person would."""
    print(f"\n$ utune-deploy {shlex.join(words)}", flush=True)
    process = subprocess.Popen(command(*words))
    try:
        wait_until_ready(process, port)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=60)
    if code:
        sys.exit(f"the server ended with {code}")


def wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait for `/v2/health/ready`."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            sys.exit(f"the server ended with {process.returncode} before it was ready")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    sys.exit(f"the server was not ready after {START_SECONDS} s")


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


if __name__ == "__main__":
    main()
