r"""`utune-deploy load` beside NVIDIA's perf_analyzer on one running server.

    python bench/load_agreement.py BUNDLE --perf-analyzer FILE --libraries DIR -o bench/results/load/agreement.json

Serves the bundle and lets both measure it in turn, the first of each pair being the other one every time, with the same
rows and tasks, binary tensors, over gRPC and HTTP, with callers that wait and with requests at an even rate. Latencies count
from sending in both. Prints the median of the pairs' ratios, ours over perf_analyzer's, with its bootstrap interval.
docs/protocol.md says where perf_analyzer comes from and which libraries it wants.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utune_deploy.deploy.bench.machine import load_now, read_machine
from utune_deploy.deploy.bench.summary import paired_ratio
from utune_deploy.export.bundle import open_bundle
from utune_deploy.serving import perf_analyzer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from utune_deploy.export.bundle import Bundle

CODE = "from utune_deploy.deploy.cli import main; main()"
QUANTITIES = ("p50", "p90", "p99", "answers")


@contextmanager
def served(bundle: Path, threads: int) -> Iterator[dict[str, str]]:
    """The embedded server in a process of its own: `host:port` by front."""
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, "serve", str(bundle), *ports, "--threads", str(threads)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        addresses = {}
        for line in process.stdout:
            name, _, rest = line.partition(" ")
            if name in ("http", "grpc"):
                addresses[name] = rest.strip().removeprefix("http://")
            if line.startswith("Ctrl-C"):
                break
        if len(addresses) != 2:
            raise SystemExit("the server did not start")
        yield addresses
    finally:
        process.terminate()
        process.wait(60)


def theirs(options: Any, bundle: Bundle, front: str, address: str, case: str, folder: Path) -> dict:
    """perf_analyzer's numbers, in ms and answers per second: three windows, whatever their spread."""
    level = case.split()[-1]
    driven = (
        ["--concurrency-range", level]
        if case.startswith("callers")
        else ["--request-rate-range", level, "--request-distribution", "constant"]
    )
    command = [
        str(options.perf_analyzer), "-m", bundle.name, "-u", address, "-i", front, *driven,
        "--input-data", str(folder / "rows.json"), "-p", str(int(options.seconds * 1000 / 3)),
        "-r", "3", "-s", "999", "-f", str(folder / "out.csv"),
    ]  # fmt: skip
    environment = {**os.environ, "LD_LIBRARY_PATH": str(options.libraries)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"perf_analyzer failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    with (folder / "out.csv").open() as file:
        (row,) = csv.DictReader(file)
    found = {f"p{q}": float(row[f"p{q} latency"]) / 1000 for q in (50, 90, 99)}
    return {**found, "answers": float(row["Inferences/Second"])}


def ours(options: Any, front: str, address: str, case: str, folder: Path) -> dict:
    """The same of `utune-deploy load`, from its JSON."""
    level = case.split()[-1]
    driven = ["--concurrency"] if case.startswith("callers") else ["--constant", "--rate"]
    command = [
        sys.executable, "-c", CODE, "-q", "load", f"{front}://{address}", *driven, level,
        "--input", str(folder / "rows.npz"), "--seconds", str(options.seconds), "--warmup", "0.5", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"load failed:\n{done.stderr}")
    (step,) = json.loads(done.stdout)["steps"]
    samples = np.array(step["samples_ms"])
    if not case.startswith("callers"):  # perf_analyzer counts from sending
        samples -= np.array(step["lags_ms"])
    found = {f"p{q}": float(np.percentile(samples, q)) for q in (50, 90, 99)}
    lag = step["lag"]["p99_ms"]
    return {**found, "answers": step["answered_per_second"], "lag p99": lag, "errors": len(step["errors"])}  # fmt: skip


def agree(options: Any) -> dict[str, Any]:
    """Pairs of measurements, and the ratio of their medians."""
    bundle = open_bundle(options.bundle)
    cases = [f"callers {n}" for n in options.concurrency] + [f"rate {r:g}" for r in options.rate]
    measured: dict[str, dict[str, list[dict]]] = {}
    with (
        tempfile.TemporaryDirectory() as name,
        served(options.bundle, options.threads) as addresses,
    ):
        folder = Path(name)
        write_rows(bundle, folder)
        for pair in range(options.pairs):
            for front in ("grpc", "http"):
                for case in cases:
                    both = measured.setdefault(f"{front}, {case}", {"ours": [], "theirs": []})
                    turns = ("ours", "theirs") if pair % 2 else ("theirs", "ours")
                    for who in turns:
                        if who == "ours":
                            found = ours(options, front, addresses[front], case, folder)
                        else:
                            found = theirs(options, bundle, front, addresses[front], case, folder)
                        both[who].append(found)
            print(f"pair {pair + 1} of {options.pairs}", file=sys.stderr, flush=True)
    ratios = {
        name: {
            quantity: asdict(
                paired_ratio(
                    [run[quantity] for run in both["ours"]],
                    [run[quantity] for run in both["theirs"]],
                    seed=0,
                )
            )
            for quantity in QUANTITIES
        }
        for name, both in measured.items()
    }
    print(*lines(ratios, measured), sep="\n")
    return {"ratios": ratios, "measured": measured, "tasks": len(bundle.tasks)}


def lines(ratios: dict, measured: dict[str, dict[str, list[dict]]]) -> Iterator[str]:
    """The table of the results' README: ratios with their intervals, and the median p50 of both in ms."""
    heads = ("ours / perf_analyzer", *QUANTITIES, "p50 of both, ms", "quickest", "our lag, p99")
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for name, both in measured.items():
        cells = [
            f"{r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f})" for r in ratios[name].values()
        ]
        p50 = {who: [run["p50"] for run in both[who]] for who in ("ours", "theirs")}
        medians = ", ".join(f"{np.median(values):.2f}" for values in p50.values())
        quickest = ", ".join(f"{min(values):.2f}" for values in p50.values())
        lag = np.median([run["lag p99"] for run in both["ours"]])
        yield f"| {' | '.join([name, *cells, medians, quickest, f'{lag:.2f}'])} |"


def write_rows(bundle: Bundle, folder: Path) -> None:
    """The same rows for both: `rows.json` of perf_analyzer, `rows.npz` of `load`."""
    requests = perf_analyzer.requests(bundle)
    (folder / "rows.json").write_text(json.dumps(requests, separators=(",", ":")))
    names = [name for name in requests["data"][0] if name != "task"]
    dtypes = {tensor.name: tensor.dtype for tensor in bundle.engine.inputs}
    rows = {
        name: np.stack(
            [
                np.reshape(entry[name]["content"], entry[name]["shape"]).astype(dtypes[name])
                for entry in requests["data"]
            ]
        )
        for name in names
    }
    np.savez(folder / "rows.npz", **rows)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--perf-analyzer", type=Path, required=True)
    parser.add_argument("--libraries", type=Path, default=Path(), help="Folder of those it wants.")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--rate", type=float, nargs="*", default=[100.0])
    parser.add_argument("--threads", type=int, default=1, help="Of the server's engine.")
    parser.add_argument("--seconds", type=float, default=6.0, help="Of each measurement.")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    facts = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": asdict(read_machine()),
        "seconds": options.seconds,
        "load before": load_now(),
    }
    result = {**agree(options), **facts, "load after": load_now()}
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
