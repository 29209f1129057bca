"""The servers under load: right answers while tasks change, what a change costs, throughput against the bare engine.

    python bench/serving.py changes   BUNDLE --deltas TASKS --weights BACKBONE   answers, and latencies, while tasks come and go
    python bench/serving.py speed     BUNDLE [--triton-env ENV]                  throughput and latency beside the engine itself
    python bench/serving.py add       BUNDLE --delta TASK                        a task's way to its first answer, step by step
    python bench/serving.py thousand  BUNDLE --delta TASK                        a thousand tasks: memory, listing, answers
    python bench/serving.py separate  BUNDLE --singles BUNDLES --triton-env ENV  one mixed model against one Triton model per task

Each prints a table, and writes JSON with `-o`. The server runs in a process of its own, the load in another.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import psutil
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http.aio as http_aio
from tritonclient.utils import InferenceServerException

from utune_deploy.deploy.bench.machine import read_machine
from utune_deploy.deploy.pack import Layout, pack
from utune_deploy.deploy.task import Task
from utune_deploy.export.bundle import open_bundle
from utune_deploy.export.engine import Device
from utune_deploy.merge.delta import load_delta
from utune_deploy.merge.files import digest
from utune_deploy.serving.client import Client
from utune_deploy.serving.service import Service
from utune_deploy.serving.tasks.packed import Packed, write_packed

TOLERANCE = 1e-4  # of the largest logit: other batch sizes sum in other orders
FRONTS = ("grpc", "http", "json")
WARMUP = 2.0  # seconds


# the server


@contextlib.contextmanager
def server(bundle: Path, *options: str, engine: str = "embedded"):
    """A served bundle: its process and its addresses by front."""
    command = [
        shutil.which("utune-deploy"), "serve", str(bundle), "--engine", engine,
        "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", *options,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        addresses = {}
        for line in process.stdout:
            found = re.match(r"(http|grpc)\s+(?:http://)?(\S+)", line)
            if found:
                addresses[found[1]] = found[2]
            if line.startswith("Ctrl-C"):
                break
        if len(addresses) != 2:
            raise SystemExit("the server did not start")
        yield process, addresses
    finally:
        process.terminate()
        process.wait(60)


def memory(pid: int) -> float:
    """Resident MB of a process and its children."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(process.memory_info().rss for process in family) / 1e6


# the load


@dataclass
class Seen:
    """What callers saw: of each request when it began and ended, and whether its answer was right."""

    begun: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    gone: int = 0  # requests of a task that was being removed


async def callers(
    addresses, model, images, plan, fronts, concurrency, seconds, seen: Seen, stop=None
):
    """So many callers in a closed loop; `plan(number)` gives a request's rows, tasks and accepted answers."""
    until = time.perf_counter() + seconds
    number = iter(range(1 << 60))

    async def caller(front: str) -> None:
        module = grpc_aio if front == "grpc" else http_aio
        url = addresses["grpc" if front == "grpc" else "http"]
        binary = {} if front == "grpc" else {"binary_data": front == "http"}
        async with module.InferenceServerClient(url) as client:
            while time.perf_counter() < until and not (stop and stop.is_set()):
                rows, tasks, accepted = plan(next(number))
                batch = images[rows]
                names = np.array([[t if front == "json" else t.encode()] for t in tasks], object)
                lib = sys.modules["tritonclient.grpc" if front == "grpc" else "tritonclient.http"]
                inputs = [
                    lib.InferInput("images", list(batch.shape), "FP32").set_data_from_numpy(
                        batch, **binary
                    ),
                    lib.InferInput("task", [len(tasks), 1], "BYTES").set_data_from_numpy(
                        names, **binary
                    ),
                ]
                wanted = [lib.InferRequestedOutput("logits", **binary)]
                begun = time.perf_counter()
                try:
                    answer = await client.infer(model, inputs, outputs=wanted)
                except InferenceServerException as error:
                    if "unknown task" in str(error) and accepted and accepted[-1] is None:
                        seen.gone += 1
                        continue
                    seen.lost.append(str(error)[:200])
                    continue
                except Exception as error:
                    seen.lost.append(repr(error)[:200])
                    continue
                seen.begun.append(begun)
                seen.ended.append(time.perf_counter())
                found = answer.as_numpy("logits")
                right = not accepted or any(a is not None and _close(found, a) for a in accepted)
                if not right:
                    seen.wrong.append(f"{front} {tasks}")

    await asyncio.gather(*(caller(fronts[i % len(fronts)]) for i in range(concurrency)))


def _close(found, wanted) -> bool:
    own = wanted > -1e30
    return bool(
        found.shape == wanted.shape
        and (found[~own] < -1e30).all()
        and np.abs(found[own] - wanted[own]).max() <= TOLERANCE * np.abs(wanted[own]).max()
    )


def percentiles(seconds) -> dict[str, float]:
    """In milliseconds."""
    values = np.sort(np.asarray(seconds)) * 1e3
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 95, 99)} | {
        "max": float(values[-1]),
        "requests": len(values),
    }


# the measurements


def changes(options) -> dict:
    """Mixed requests on all fronts at rising concurrency, with and without tasks that come and go."""
    bundle = open_bundle(options.bundle)
    reference = Service.open(bundle)
    random = np.random.default_rng(0)
    shape = bundle.engine.inputs[0].shape[1:]
    images = random.standard_normal((8, *shape)).astype(np.float32)
    names = [task.name for task in bundle.tasks]
    layout = Layout.of(bundle)
    packs = [_pack(path, layout) for path in options.deltas]
    for data, _ in packs:
        reference.add(data)
    known = {}
    for name in [*names, *(n for _, n in packs)]:
        for row in range(len(images)):
            known[name, row] = reference.answer(images[row : row + 1], [name]).logits[0]

    def plan(number: int):
        mix = np.random.default_rng(number)
        count = int(mix.integers(1, 4))
        rows = mix.integers(len(images), size=count)
        if number % 16 == 0:  # a task that comes and goes, alone: it may be gone
            name = packs[number // 16 % len(packs)][1]
            return rows[:1], [name], [known[name, rows[0]][None], None]
        tasks = [names[i] for i in mix.integers(len(names), size=count)]
        return rows, tasks, [np.stack([known[t, r] for t, r in zip(tasks, rows, strict=True)])]

    results = []
    with server(options.bundle) as (_, addresses):
        for concurrency in options.concurrency:
            entry = {"concurrency": concurrency}
            for mode in ("still", "changing"):
                seen, changed = Seen(), []
                with _further(addresses, packs, changed if mode == "changing" else None):
                    asyncio.run(
                        callers(
                            addresses, bundle.name, images, plan,
                            options.fronts, concurrency, options.seconds, seen,
                        )
                    )  # fmt: skip
                took = np.array(seen.ended) - np.array(seen.begun)
                during = _during(seen, changed)
                entry[mode] = {
                    **percentiles(took),
                    "wrong": len(seen.wrong),
                    "lost": len(seen.lost),
                    "refused as removed": seen.gone,
                    "changes": len(changed),
                    "examples": (seen.wrong + seen.lost)[:3],
                    **({"during": percentiles(took[during])} if during.any() else {}),
                }
            results.append(entry)
            print(_line(entry), flush=True)
    return {"runs": results, "tasks": len(names), "seconds": options.seconds}


@contextlib.contextmanager
def _further(addresses, packs, changed: list | None):
    """The further tasks are served: they stay as they are, or come and go, which `changed` then lists.

    The load is the same in both, and asks them about as often as the others: a task that is asked more than
    its share waits longer, whatever changes.
    """
    with Client(f"grpc://{addresses['grpc']}", deadline_s=60) as client:
        if changed is None:
            for data, _ in packs:
                client.add(data)
            yield
            for _, name in packs:
                client.remove(name)
            return
    stop = threading.Event()
    changer = threading.Thread(target=_change, args=(addresses, packs, stop, changed))
    changer.start()
    try:
        yield
    finally:
        stop.set()
        changer.join()


def _change(addresses, packs, stop, changed) -> None:
    """Add, update and remove the further tasks, one change after the other, with a pause between."""
    with Client(f"grpc://{addresses['grpc']}", deadline_s=60) as client:
        there: set[str] = set()
        turn = 0
        while not stop.is_set():
            data, name = packs[turn % len(packs)]
            begun = time.perf_counter()
            if name not in there:
                client.add(data)
                there.add(name)
                kind = "add"
            elif turn % 3 == 0:
                client.remove(name)
                there.discard(name)
                kind = "remove"
            else:
                client.update(data)
                kind = "update"
            changed.append((kind, begun, time.perf_counter()))
            turn += 1
            stop.wait(0.25)
        for name in there:
            client.remove(name)


def _during(seen: Seen, changed) -> np.ndarray:
    """Which requests overlapped an addition or update."""
    begun, ended = np.array(seen.begun), np.array(seen.ended)
    hit = np.zeros(len(begun), bool)
    for kind, start, end in changed:
        if kind != "remove":
            hit |= (begun < end) & (ended > start)
    return hit


def _line(entry) -> str:
    still, changing = entry["still"], entry["changing"]
    during = changing.get("during", {"p99": float("nan")})
    return (
        f"concurrency {entry['concurrency']:3}: still p50 {still['p50']:.1f} p99 {still['p99']:.1f} ms; "
        f"changing p50 {changing['p50']:.1f} p99 {changing['p99']:.1f}, during a change p99 {during['p99']:.1f} ms "
        f"({during['p99'] / still['p99']:.2f} x); {changing['changes']} changes, "
        f"wrong {still['wrong'] + changing['wrong']}, lost {still['lost'] + changing['lost']} "
        f"of {still['requests'] + changing['requests']}"
    )


def _pack(path: Path, layout: Layout) -> tuple[bytes, str]:
    packed = pack(Task(load_delta(path), digest(path)), layout)
    return write_packed(packed), packed.task.name


def speed(options) -> dict:
    """Rows per second at saturation and latency of one caller, beside the engine in a process of its own."""
    bundle = open_bundle(options.bundle)
    shape = bundle.engine.inputs[0].shape[1:]
    images = np.random.default_rng(0).standard_normal((8, *shape)).astype(np.float32)
    names = [task.name for task in bundle.tasks]
    engines = ["embedded"] + (["triton"] if options.triton_env else [])
    extra = {"triton": ["--triton-env", str(options.triton_env)], "embedded": []}

    def plan(number: int):
        return [number % 8], [names[number % len(names)]], []

    rates = {name: [] for name in ("in process", *engines)}
    alone = {name: [] for name in ("in process", *engines)}
    for _ in range(options.rounds):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rate, one = pool.apply(_in_process, (options.bundle, options.seconds))
        rates["in process"].append(rate)
        alone["in process"].append(one)
        for engine in engines:
            with server(options.bundle, *extra[engine], engine=engine) as (_, addresses):
                for concurrency, into in ((1, alone), (options.saturate, rates)):
                    seen = Seen()
                    asyncio.run(
                        callers(addresses, bundle.name, images, plan, ["grpc"], concurrency, WARMUP, Seen())
                    )  # fmt: skip
                    begun = time.perf_counter()
                    asyncio.run(
                        callers(
                            addresses, bundle.name, images, plan, ["grpc"], concurrency,
                            options.seconds, seen,
                        )
                    )  # fmt: skip
                    took = np.array(seen.ended) - np.array(seen.begun)
                    spent = max(seen.ended) - begun
                    into[engine].append(
                        len(took) / spent if concurrency > 1 else float(np.median(took) * 1e3)
                    )
    result = {
        "rows per second": {k: [round(v, 2) for v in vs] for k, vs in rates.items()},
        "ms alone, p50": {k: [round(v, 3) for v in vs] for k, vs in alone.items()},
        "batch": bundle.engine.max_batch,
        "callers": options.saturate,
    }
    base, one = np.median(rates["in process"]), np.median(alone["in process"])
    for engine in engines:
        print(
            f"{engine}: {np.median(rates[engine]):.2f} rows/s, {np.median(rates[engine]) / base:.3f} of the engine in "
            f"process ({base:.2f}); one caller {np.median(alone[engine]):.2f} ms, {np.median(alone[engine]) - one:+.2f} ms "
            f"to the engine's {one:.2f}"
        )
    return result


def _in_process(path: Path, seconds: float) -> tuple[float, float]:
    """Rows per second of full mixed batches, and the median of single rows in milliseconds."""
    bundle = open_bundle(path)
    session = bundle.open_session(Device())
    size = bundle.engine.max_batch
    shape = bundle.engine.inputs[0].shape[1:]
    images = np.random.default_rng(0).standard_normal((size, *shape)).astype(np.float32)
    task = np.arange(size) % len(bundle.tasks)

    def loop(rows: int, limit: float) -> list[float]:
        took, until = [], time.perf_counter() + limit
        while time.perf_counter() < until:
            begun = time.perf_counter()
            session.run(images[:rows], task[:rows])
            took.append(time.perf_counter() - begun)
        return took

    loop(size, WARMUP)
    full = loop(size, seconds)
    loop(1, WARMUP / 2)
    return size * len(full) / sum(full), float(np.median(loop(1, seconds)) * 1e3)


def add(options) -> dict:
    """The steps of adding a task, in process, and the whole over gRPC; medians in milliseconds."""
    bundle = open_bundle(options.bundle)
    layout = Layout.of(bundle)
    data, name = _pack(options.delta, layout)
    shape = bundle.engine.inputs[0].shape[1:]
    image = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
    service = Service.open(bundle)
    service.warm()
    steps: dict[str, list[float]] = {}

    def timed(step: str, work, *args, **settings):
        begun = time.perf_counter()
        result = work(*args, **settings)
        steps.setdefault(step, []).append((time.perf_counter() - begun) * 1e3)
        return result

    tasks = service.require_tasks()
    for _ in range(options.rounds):
        timed("engine alone, one row", service.answer, image, [bundle.tasks[0].name])
        staged = timed("stage: read, hold to the slots, keep", tasks.stage, data, update=False)
        timed("write its row of the bank", service.resident.fetch, staged.version)
        timed("publish", tasks.publish, staged, update=False)
        timed("first answer", service.answer, image, [name])
        tasks.remove(name)
    with server(options.bundle) as (_, addresses), Client(f"grpc://{addresses['grpc']}") as client:
        row = image[0]
        client.ask(row, task=bundle.tasks[0].name)
        for _ in range(options.rounds):
            timed("over gRPC: one row", client.ask, row, task=bundle.tasks[0].name)
            timed("over gRPC: add, probe included", client.add, data)
            timed("over gRPC: first answer", client.ask, row, task=name)
            client.remove(name)
    result = {step: round(float(np.median(took)), 2) for step, took in steps.items()}
    for step, took in result.items():
        print(f"{step:40} {took:8.2f} ms")
    own = sum(result[s] for s in list(result)[1:5]) - result["engine alone, one row"]
    print(f"{'in process, beyond the engine call':40} {own:8.2f} ms")
    wire = (
        result["over gRPC: add, probe included"]
        + result["over gRPC: first answer"]
        - 2 * result["over gRPC: one row"]
    )
    print(f"{'over gRPC, beyond two engine calls':40} {wire:8.2f} ms")
    return {**result, "beyond the engine": round(own, 2), "beyond, over gRPC": round(wire, 2)}


def thousand(options) -> dict:
    """A thousand tasks of their own tensors in one server: memory, listing, right answers."""
    bundle = open_bundle(options.bundle)
    layout = Layout.of(bundle)
    packed = pack(Task(load_delta(options.delta), digest(options.delta)), layout)
    service = Service.open(bundle)
    shape = bundle.engine.inputs[0].shape[1:]
    image = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
    service.add(write_packed(packed))
    plain = service.answer(image, [packed.task.name]).logits[0, : len(packed.task.labels)]
    row_mb = service.resident.row_bytes / 1e6
    (bias,) = [n for n in packed.tensors if n.endswith("head.0/bias")]
    service.close()
    del service

    def shifted(number: int) -> bytes:
        """The task under another name, its logits shifted by a vector that the name decides."""
        from dataclasses import replace

        tensors = dict(packed.tensors)
        tensors[bias] = tensors[bias].copy()
        tensors[bias][: len(plain)] += shift(number)
        task = replace(packed.task, name=f"t{number}")
        return write_packed(Packed(task, packed.identity, packed.fingerprint, tensors))

    def shift(number: int) -> np.ndarray:
        return np.random.default_rng(number).standard_normal(len(plain)).astype(np.float32)

    rows = str(options.count + len(bundle.tasks) + 16)
    with contextlib.ExitStack() as opened:
        p, addresses = opened.enter_context(server(options.bundle, "--rows", rows))
        client = opened.enter_context(Client(f"grpc://{addresses['grpc']}", deadline_s=120))
        client.ask(image[0], task=bundle.tasks[0].name)
        before = memory(p.pid)
        took = []
        for number in range(options.count):
            data = shifted(number)
            begun = time.perf_counter()
            client.add(data)
            took.append((time.perf_counter() - begun) * 1e3)
            if number % 100 == 99:
                print(f"{number + 1} tasks, {np.median(took[-100:]):.1f} ms each", flush=True)
        after = memory(p.pid)
        begun = time.perf_counter()
        listed = client.tasks()
        listing = (time.perf_counter() - begun) * 1e3
        wrong = 0
        for number in range(0, options.count, max(1, options.count // 200)):
            found = client.ask(image[0], task=f"t{number}").logits
            wanted = plain + shift(number)
            wrong += bool(np.abs(found - wanted).max() > TOLERANCE * np.abs(wanted).max())
    result = {
        "tasks listed": len(listed),
        "listing ms": round(listing, 1),
        "add ms, first 100": round(float(np.median(took[:100])), 1),
        "add ms, last 100": round(float(np.median(took[-100:])), 1),
        "wrong of 200 asked": wrong,
        "resident MB grew": round(after - before, 1),
        "bank MB grew": round(options.count * row_mb, 1),
        "ratio": round((after - before) / (options.count * row_mb), 4),
    }
    for name, value in result.items():
        print(f"{name:24} {value}")
    return result


def separate(options) -> dict:
    """The tasks of a bundle in one Triton model, and each in a model of its own, at the same mix of requests."""
    mixed = open_bundle(options.bundle)
    singles = [open_bundle(path) for path in options.singles]
    names = [single.tasks[0].name for single in singles]
    shape = mixed.engine.inputs[0].shape[1:]
    images = np.random.default_rng(0).standard_normal((8, *shape)).astype(np.float32)
    found: dict[str, list[dict]] = {"one model": [], "a model per task": []}
    for _ in range(options.rounds):
        for kind, bundles in (("one model", [mixed]), ("a model per task", singles)):
            with tritonserver(bundles, options.triton_env) as (process, addresses):
                for warm, seconds in ((True, WARMUP), (False, options.seconds)):
                    seen = Seen()
                    begun = time.perf_counter()
                    if kind == "one model":
                        load = callers(
                            addresses, mixed.name, images,
                            lambda n: ([n % 8], [names[n % len(names)]], []),
                            ["grpc"], options.saturate, seconds, seen,
                        )  # fmt: skip
                        asyncio.run(load)
                    else:
                        asyncio.run(
                            _spread(addresses, singles, images, options.saturate, seconds, seen)
                        )
                    if warm:
                        continue
                    took = np.array(seen.ended) - np.array(seen.begun)
                    found[kind].append(
                        {
                            "rows per second": len(took) / (max(seen.ended) - begun),
                            **percentiles(took),
                            "MB": memory(process),
                            "lost": len(seen.lost),
                        }
                    )
    result = {
        kind: {key: round(float(np.median([r[key] for r in runs])), 2) for key in runs[0]}
        for kind, runs in found.items()
    }
    for kind, values in result.items():
        print(f"{kind:18} " + ", ".join(f"{key} {value}" for key, value in values.items()))
    return {"tasks": len(names), "callers": options.saturate, **result}


async def _spread(addresses, bundles, images, concurrency, seconds, seen) -> None:
    """The callers, each asking the bundles' models in turn."""
    until = time.perf_counter() + seconds
    lib = sys.modules["tritonclient.grpc"]

    async def caller(first: int) -> None:
        number = first
        async with grpc_aio.InferenceServerClient(addresses["grpc"]) as client:
            while time.perf_counter() < until:
                batch = images[number % 8 : number % 8 + 1]
                rows = lib.InferInput("images", list(batch.shape), "FP32")
                wanted = [lib.InferRequestedOutput("logits")]
                model = bundles[number % len(bundles)].name
                number += 1
                begun = time.perf_counter()
                try:
                    await client.infer(model, [rows.set_data_from_numpy(batch)], outputs=wanted)
                except InferenceServerException as error:
                    seen.lost.append(str(error)[:200])
                    continue
                seen.begun.append(begun)
                seen.ended.append(time.perf_counter())

    await asyncio.gather(*(caller(i) for i in range(concurrency)))


@contextlib.contextmanager
def tritonserver(bundles, environment: Path):
    """A tritonserver over several bundles: its process id, and its addresses by front."""
    from tempfile import TemporaryDirectory

    from utune_deploy.serving.repository import write_repository
    from utune_deploy.serving.servers import triton
    from utune_deploy.serving.servers.ports import free_port

    with TemporaryDirectory(prefix="utune-bench-") as temporary:
        folder = Path(temporary)
        for bundle in bundles:
            write_repository(bundle, folder / "models")
        fit = triton.inspect_environment(environment, needs_safetensors=True)
        triton._compile(fit, folder / "models")
        ports = [free_port("127.0.0.1", 0) for _ in range(3)]
        process = triton.TritonProcess(fit, folder, "127.0.0.1", ports)
        try:
            process.wait_until_ready(120, lambda: False)
            yield (
                process._process.pid,
                {
                    "grpc": process.addresses.grpc,
                    "http": process.addresses.http,
                },
            )
        finally:
            process.end()


def main() -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["changes", "speed", "add", "thousand", "separate"])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--deltas", type=Path, nargs="*", default=[])
    parser.add_argument("--delta", type=Path)
    parser.add_argument("--singles", type=Path, nargs="*", default=[])
    parser.add_argument("--fronts", nargs="+", choices=FRONTS, default=list(FRONTS))
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--saturate", type=int, default=32)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--triton-env", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="A JSON file.")
    options = parser.parse_args()
    result = globals()[options.what](options)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "command": "python bench/serving.py " + " ".join(sys.argv[1:]),
            "date": time.strftime("%Y-%m-%d"),
            "load": os.getloadavg()[0],
            "machine": asdict(read_machine()),
        }
        options.output.write_text(
            json.dumps({"about": about, **result}, indent=2, default=str) + "\n"
        )


if __name__ == "__main__":
    main()
