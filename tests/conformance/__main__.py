"""What other people wrote, run against the embedded server and against real Triton; writes a table.

    python -m tests.conformance --client DIR --server DIR --oip DIR --triton-env DIR --tools PYTHON
        [--kserve PYTHON] [--perf-analyzer FILE] [--only SUITE ...] [--out FOLDER]

`client`, `server` and `oip` are checkouts of github.com/triton-inference-server/{client,server} (the server's at
the release of real Triton here) and github.com/kserve/open-inference-protocol. `tools` is a Python with
tritonclient[all], pytest, requests, schemathesis, boofuzz and grpcio-tools; `kserve` one with kserve, which cannot
share a process with tritonclient. None of their code is in this repository.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tests.serving.conftest import CLASSES, _write_bundle
from utune_deploy.serving import perf_analyzer

from .servers import GRPC, HERE, HTTP, ROOT, serving

if TYPE_CHECKING:
    from collections.abc import Callable

ENGINES = ("triton", "embedded")
CONCURRENCY = 4
FUZZ_CASES = 300  # of each of 20 addresses


@dataclass
class Score:
    """How a suite ended.

    Attributes:
        passed: Tests that did.
        total: Of so many.
        failed: The names of the others.
        text: What is shown instead of numbers.
    """

    passed: int = 0
    total: int = 0
    failed: list[str] = field(default_factory=list)
    text: str = ""

    def __str__(self) -> str:
        return self.text or f"{self.passed} of {self.total}"

    def add(self, name: str, passed: bool) -> None:
        self.total += 1
        self.passed += passed
        if not passed:
            self.failed.append(name)


@dataclass
class Bench:
    """Where things are, and how a server is started."""

    asked: argparse.Namespace
    engine: str
    folder: Path
    bundle: Path

    def serving(self, models: str, *, control: bool = False) -> Any:
        return serving(self.engine, models, control=control, triton=self.asked.triton_env)

    def call(self, command: list[Any], *, cwd: Path, name: str, seconds: float = 120) -> Any:
        """A finished process; what it said is kept in the results' `logs`, which are not committed."""
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        log = self.asked.logs / f"{self.engine}.{name}.log"
        with log.open("w") as output:
            try:
                done = subprocess.run(
                    list(map(str, command)),
                    cwd=cwd,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=seconds,
                )
                code = done.returncode
            except subprocess.TimeoutExpired:
                code = -1
        return code, log.read_text(errors="replace")


def examples(bench: Bench, pattern: str, models: str) -> Score:
    score = Score()
    folder = bench.asked.client / "src/python/examples"
    skipped = re.compile("cudashm|image|memory_growth|^grpc_client")
    names = sorted(
        path.name
        for path in folder.glob("*.py")
        if re.match(pattern, path.name) and not skipped.search(path.name)
    )
    # The ones that unload a model come last, with a server of their own.
    plain = [name for name in names if "model_control" not in name]
    for group in (plain, [name for name in names if name not in plain]):
        with bench.serving(models, control=True):
            for name in group:
                code, said = bench.call([bench.asked.tools, name], cwd=folder, name=name)
                score.add(name, code == 0 and "FAILED" not in said)
    return score


def unit_tests(bench: Bench) -> Score:
    folder = bench.asked.client / "src/python/library/tests"
    names = ["test_inference_server_client.py", "test_shared_memory.py"]
    _, said = bench.call([bench.asked.tools, "-m", "pytest", "-q", *names], cwd=folder, name="unit")
    passed = int((re.findall(r"(\d+) passed", said) or ["0"])[-1])
    failed = int((re.findall(r"(\d+) failed", said) or ["0"])[-1])
    return Score(passed, passed + failed)


def qa(bench: Bench, file: str, models: str) -> Score:
    path = bench.asked.server / "qa" / file
    with bench.serving(models):
        _, said = bench.call(
            [bench.asked.tools, path.name, "-v"], cwd=path.parent, name=path.stem, seconds=300
        )
    score = Score()
    results = re.findall(r"^(test_\w+) .*?\.\.\. .*?\b(ok|FAIL|ERROR)$", said, re.M | re.S)
    for name, result in results:
        score.add(name, result == "ok")
    return score


def fuzz(bench: Bench) -> Score:
    folder = bench.folder / f"fuzz-{bench.engine}" / "L0_http_fuzz"
    shutil.copytree(bench.asked.server / "qa/L0_http_fuzz", folder)
    shutil.copytree(bench.asked.server / "qa/common", folder.parent / "common")
    with bench.serving("http", control=True):
        code, said = bench.call(
            [bench.asked.tools, HERE / "short_fuzz.py", FUZZ_CASES],
            cwd=folder,
            name="fuzz",
            seconds=1200,
        )
    verdict = "no failure" if code == 0 else f"rc {code}: {said[-200:]}"
    return Score(int(code == 0), 1, [] if code == 0 else [verdict], verdict)


def schemathesis(bench: Bench, models: str, model: str) -> Score:
    schema = yaml.safe_load(
        (bench.asked.oip / "specification/protocol/open_inference_rest.yaml").read_text()
    )
    paths = {}
    for path, item in schema["paths"].items():
        # The published file has a literal ${NAME} in its paths, "/v2/" with a slash, and no path without version.
        item = json.loads(json.dumps(item))
        for parameter in item.get("parameters", ()):
            one = {"MODEL_NAME": model, "MODEL_VERSION": "1"}[parameter["name"]]
            parameter["schema"]["enum"] = [one]
        fixed = path.replace("${", "{").rstrip("/")
        paths[fixed] = item
        if "{MODEL_VERSION}" in fixed:
            bare = json.loads(json.dumps(item))
            bare["parameters"] = [p for p in bare["parameters"] if p["name"] != "MODEL_VERSION"]
            for entry in bare.values():
                if isinstance(entry, dict) and "operationId" in entry:
                    entry["operationId"] += "-bare"
            paths[fixed.replace("/versions/{MODEL_VERSION}", "")] = bare
    schema["paths"] = paths
    file = bench.folder / "oip.yaml"
    file.write_text(yaml.safe_dump(schema))
    with bench.serving(models):
        code, said = bench.call(
            [bench.asked.tools.parent / "schemathesis", "run", file]
            + ["--url", f"http://127.0.0.1:{HTTP}", "-n", "300", "--seed", "1", "--mode", "all"]
            + ["--phases", "examples,coverage,fuzzing"]
            + [
                "--checks",
                "not_a_server_error,response_schema_conformance,content_type_conformance",
            ],
            cwd=bench.folder,
            name=f"schemathesis-{model}",
            seconds=600,
        )
    cases = re.findall(r"(\d+) generated", said)
    failures = re.findall(r"(\d+) (?:unique )?failures?", said)
    found = int(failures[-1]) if failures else 0
    text = f"{found} failures in {cases[-1] if cases else '?'} cases"
    return Score(
        text=text, passed=int(code == 0), total=1, failed=re.findall(r"^_+ (.+) _+$", said, re.M)
    )


def lines(bench: Bench, command: list[Any], name: str) -> Score:
    """A client that prints PASS or FAIL for each question."""
    with bench.serving("http"):
        code, said = bench.call(command, cwd=bench.folder, name=name)
    score = Score()
    for verdict, question in re.findall(r"^(PASS|FAIL) (.*)$", said, re.M):
        score.add(question, verdict == "PASS")
    if code:
        score.add(f"rc {code}", False)
    return score


def oip_grpc(bench: Bench) -> Score:
    proto = bench.asked.oip / "specification/protocol/open_inference_grpc.proto"
    made = bench.folder / f"proto-{bench.engine}"
    made.mkdir()
    return lines(bench, [bench.asked.tools, HERE / "oip_client.py", proto, made], "oip_grpc")


def kserve(bench: Bench) -> Score:
    return lines(bench, [bench.asked.kserve, HERE / "kserve_client.py"], "kserve")


def load(bench: Bench, protocol: str) -> Score:
    """perf_analyzer's requests per second and median, and our own client's at the same concurrency."""
    port = GRPC if protocol == "grpc" else HTTP
    table = bench.folder / f"{bench.engine}.{protocol}.csv"
    with bench.serving(str(bench.bundle)):
        bench.call(
            [bench.asked.perf_analyzer, "-m", "tiny", "-u", f"127.0.0.1:{port}", "-i", protocol]
            + ["--concurrency-range", CONCURRENCY, "--input-data", bench.folder / "rows.json"]
            + ["-f", table, "-s", "25", "-p", "3000"],
            cwd=bench.folder,
            name=f"perf_analyzer-{protocol}",
            seconds=240,
        )
        url = f"{'grpc' if protocol == 'grpc' else 'http'}://127.0.0.1:{port}"
        own = subprocess.run(
            [sys.executable, HERE / "own_client.py", url, str(CONCURRENCY)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        ).stdout.strip()
    if not table.exists():
        return Score(text=f"no result; own client {own}", total=1, failed=["did not end"])
    row = next(csv.DictReader(table.open()))
    theirs = (
        f"{float(row['Inferences/Second']):.0f}/s, p50 {float(row['p50 latency']) / 1e3:.2f} ms"
    )
    return Score(text=f"{theirs}; own client {own}", passed=1, total=1)


CLIENT, QA = "client `src/python/examples`", "server `qa`"
SUITES: dict[str, tuple[str, str, Callable[[Bench], Score]]] = {
    "examples-http": (
        "tritonclient examples, HTTP",
        "`python simple_http_*.py`",
        lambda bench: examples(bench, "simple_http_", "http"),
    ),
    "examples-grpc": (
        "tritonclient examples, gRPC",
        "`python simple_grpc_*.py grpc_explicit_*.py reuse_infer_objects_client.py`",
        lambda bench: examples(bench, "simple_grpc_|grpc_explicit_|reuse_", "grpc"),
    ),
    "unit": (
        "tritonclient unit tests (they need no server)",
        "`pytest test_inference_server_client.py test_shared_memory.py`",
        unit_tests,
    ),
    "qa-http": (
        "Triton QA L0_http",
        "`python http_test.py`",
        lambda bench: qa(bench, "L0_http/http_test.py", "raw"),
    ),
    "qa-http-aio": (
        "Triton QA L0_http, asyncio",
        "`python python_http_aio_test.py`",
        lambda bench: qa(bench, "L0_http/python_http_aio_test.py", "http"),
    ),
    "qa-grpc-aio": (
        "Triton QA L0_grpc, asyncio",
        "`python python_grpc_aio_test.py`",
        lambda bench: qa(bench, "L0_grpc/python_grpc_aio_test.py", "grpc"),
    ),
    "qa-validation": (
        "Triton QA L0_input_validation",
        "`python input_validation_test.py`",
        lambda bench: qa(bench, "L0_input_validation/input_validation_test.py", "validation"),
    ),
    "qa-queues": (
        "Triton QA L0_metrics, queues",
        "`MAX_BATCH_SIZE=4 MAX_QUEUE_DELAY_US=100000 python metrics_queue_size_test.py`",
        lambda bench: qa(bench, "L0_metrics/metrics_queue_size_test.py", "queues"),
    ),
    "qa-fuzz": (
        "Triton QA L0_http_fuzz (boofuzz)",
        f"`python tests/conformance/short_fuzz.py {FUZZ_CASES}`",
        fuzz,
    ),
    "oip-rest": (
        "OIP OpenAPI, schemathesis, on `simple`",
        "`schemathesis run oip.yaml -n 300 --seed 1 --mode all --phases examples,coverage,fuzzing --checks not_a_server_error,"
        "response_schema_conformance,content_type_conformance`",
        lambda bench: schemathesis(bench, "http", "simple"),
    ),
    "oip-rest-bundle": (
        "the same, on a bundle of pictures",
        "the same",
        lambda bench: schemathesis(bench, str(bench.bundle), "tiny"),
    ),
    "oip-grpc": (
        "OIP gRPC, a client from its .proto",
        "`python tests/conformance/oip_client.py`",
        oip_grpc,
    ),
    "kserve": ("KServe's clients", "`python tests/conformance/kserve_client.py`", kserve),
    "perf-grpc": (
        f"perf_analyzer 2.51.0, gRPC, concurrency {CONCURRENCY}, a tiny bundle",
        "`perf_analyzer -m tiny -i grpc --input-data rows.json -s 25 -p 3000`",
        lambda bench: load(bench, "grpc"),
    ),
    "perf-http": (
        f"perf_analyzer 2.51.0, HTTP, concurrency {CONCURRENCY}, a tiny bundle",
        "`perf_analyzer -m tiny -i http --input-data rows.json -s 25 -p 3000`",
        lambda bench: load(bench, "http"),
    ),
}


_TRACES = "settings of traces are not offered"
_SEQUENCES = "there is no sequence batcher"
WHY = {
    "test_get_trace_settings": _TRACES,
    "test_update_trace_settings": _TRACES,
    "test_wrong_input_shape_tensor_size": "needs a TensorRT model with shape tensors; fails on both",
    "test_sequence_batch_scheduler_direct": _SEQUENCES,
    "test_sequence_batch_scheduler_oldest": _SEQUENCES,
    "test_ensemble_scheduler": "there are no ensembles",
}
"""Of what fails on the embedded server."""


def main() -> None:
    asked = _arguments()
    asked.logs.mkdir(parents=True, exist_ok=True)
    kept = asked.out / "scores.json"
    scores = json.loads(kept.read_text()) if kept.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = _write_bundle(folder / "bundle", tuple(CLASSES))
        perf_analyzer.write(folder / "rows.json", bundle)
        for suite, (title, _, run) in SUITES.items():
            if suite not in (asked.only or SUITES):
                continue
            if (suite == "kserve" and not asked.kserve) or (
                suite.startswith("perf") and not asked.perf_analyzer
            ):
                continue
            for engine in asked.engine or ENGINES:
                score = run(Bench(asked, engine, folder, bundle.path))
                scores.setdefault(suite, {})[engine] = {"score": str(score), "failed": score.failed}
                print(f"{title}: {engine} {score} {score.failed or ''}", flush=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(scores, indent=2, sort_keys=True) + "\n")
    rows = [
        "| suite | command | Triton 2.51 | embedded | not passed by embedded, and why |",
        "|---|---|---|---|---|",
    ]
    for suite, (title, command, _) in SUITES.items():
        if suite in scores:
            triton, own = (scores[suite].get(e, {}) for e in ENGINES)
            failed = "; ".join(
                f"`{test}`: {WHY.get(test, 'not explained')}" for test in own.get("failed", [])
            )
            cells = [title, command, triton.get("score", "-"), own.get("score", "-"), failed]
            rows.append(f"| {' | '.join(cells)} |")
    _into(asked.out / "README.md", "\n".join(rows))


def _into(page: Path, table: str) -> None:
    """Write the table between the page's marks; the page itself is prose and stays."""
    start, end = "<!-- table -->\n", "<!-- /table -->"
    text = page.read_text() if page.exists() else f"# Conformance\n\n{start}{end}\n"
    before, _, rest = text.partition(start)
    page.write_text(f"{before}{start}{table}\n{end}{rest.partition(end)[2]}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("client", "server", "oip", "triton-env", "tools"):
        parser.add_argument(f"--{name}", type=_absolute, required=True)
    parser.add_argument("--kserve", type=_absolute)
    parser.add_argument("--perf-analyzer", type=_absolute)
    parser.add_argument("--only", nargs="*", choices=SUITES)
    parser.add_argument("--engine", nargs="*", choices=ENGINES)
    parser.add_argument("--out", type=_absolute, default=ROOT / "bench/results/conformance")
    parser.add_argument(
        "--logs", type=_absolute, default=Path(tempfile.gettempdir()) / "conformance"
    )
    return parser.parse_args()


def _absolute(text: str) -> Path:
    return Path(text).absolute()  # not resolved: an environment's python is a link


if __name__ == "__main__":
    main()
