"""Everything that is owed on a CUDA device, in calls of some minutes each, going on where the last one stopped.

    python bench/gpu/owed.py -o bench/results/gpu --headers ONNXRUNTIME/include [--minutes 9] [--list] [--only STEP]

A step is a command. What it said, how long it took and whether it succeeded is kept in `OUTPUT/steps/NAME.json` with the
device and the digest of the sources; a step that succeeded with the same of both is not run again. A step is not begun where the
time left is less than it is expected to take, and one that takes three times as long is stopped and counts as failed. The
exit code is 0 when every step has succeeded, 3 when one failed, 75 when some are left for another call.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("deploy", "merge", "export", "serving", "bench", "examples")
TAIL = 6000  # characters of a step's output that are kept
LEFT, FAILED = 75, 3
GRACE = 3.0


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: Of its file.
        what: The line of `OWED.md` that it answers.
        command: For bash, with `{output}`, `{work}`, `{headers}` and `{python}` in it.
        seconds: How long it is expected to take on a large device.
        after: Steps without which it makes no sense.
    """

    name: str
    what: str
    command: str
    seconds: float
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """What came of a step."""

    name: str
    what: str
    command: str
    code: int
    seconds: float
    date: str
    device: str
    sources: str
    tail: str


KERNELS = "{work}/libutune.so"
CLI = "{python} -m utune_deploy.deploy"
DELTAS = "examples/digits/deltas/digit.safetensors examples/digits/deltas/parity.safetensors examples/digits/deltas/loop.safetensors"
WEIGHTS = "--weights examples/digits/backbone"


def exported(precision: str, *options: str) -> str:
    """Export of three of the digits' tasks, which checks the engine on the device before it writes it."""
    folder = "-".join(["{work}/digits", precision, *(o.strip("-").split()[0] for o in options)])
    return (
        f"{CLI} export {DELTAS} {WEIGHTS} -o {folder} --provider cuda --precision {precision} "
        f"--force {' '.join(options)}"
    )


STEPS = (
    Step("kernels", "the library of fused kernels builds",
         CLI.replace(".deploy", ".export.kernels") + f" -o {KERNELS} --headers {{headers}}", 120),
    Step("kernels-right", "fused kernels against float64",
         f"UTUNE_KERNELS={KERNELS} {{python}} -m pytest -q tests/export/test_kernels.py", 120, ("kernels",)),
    Step("vit-fp16", "ViT-B/16 fp16: ceiling, one fused task, 64 tasks, batch 1 to 128",
         "{python} bench/gpu/vit_b.py -o {output}/vit_b_fp16 --kernels " + KERNELS, 240, ("kernels",)),
    Step("vit-bf16", "the same in bf16",
         "{python} bench/gpu/vit_b.py -o {output}/vit_b_bf16 --precision bf16 --kernels " + KERNELS, 240, ("kernels",)),
    Step("fp32", "an fp32 engine on the CUDA provider passes check", exported("fp32"), 60),
    Step("tf32", "a tf32 engine passes check", exported("tf32"), 60),
    Step("tf32-kernels", "a tf32 engine with a library that has no kernel for its nodes",
         exported("tf32", f"--kernels {KERNELS}"), 60, ("kernels",)),
    Step("fp16", "fp16 passes check", exported("fp16"), 60),
    Step("bf16", "bf16 passes check", exported("bf16"), 60),
    Step("fp16-kernels", "fp16 with kernels passes check", exported("fp16", f"--kernels {KERNELS}"), 60, ("kernels",)),
    Step("bf16-kernels", "bf16 with kernels passes check", exported("bf16", f"--kernels {KERNELS}"), 60, ("kernels",)),
    Step("fp16-inputs", "fp16 with the bank as inputs passes check", exported("fp16", "--bank inputs"), 60),
    Step("inputs", "bank as inputs costs nothing over constants",
         CLI + " bench {work}/digits-fp16 --against {work}/digits-fp16-bank --provider cuda --resident -b 1 -b 16 "
         "-o {output}/inputs --force", 60, ("fp16", "fp16-inputs")),
    Step("lora", "eight LoRA tasks of ViT-B",
         "{python} bench/random_tasks.py {work}/lora --tasks 8 --rank 16 --kinds lora", 60),
    Step("lora-fp16", "their engine in fp16",
         CLI + " export {work}/lora/task?.safetensors --weights {work}/lora/backbone -o {work}/lora8 "
         "--provider cuda --precision fp16 --max-batch 64 --force", 120, ("lora",)),
    Step("peft", "against PEFT's mixed batch and torch, eager and compiled, and an engine per task",
         CLI + " bench {work}/lora8 --beside peft --beside peft-compiled --beside torch --beside "
         "torch-compiled --beside in-turn --weights {work}/lora/backbone $(for t in {work}/lora/task*.safetensors; do "
         "echo --delta $t; done) --provider cuda -b 8 -b 64 -o {output}/peft --force", 300, ("lora-fp16",)),
)  # fmt: skip


def main(steps: tuple[Step, ...] = STEPS) -> None:
    """Run what is left, in order, while there is time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="what need not be kept")
    parser.add_argument("--headers", type=Path, help="ONNX Runtime's C headers, for the kernels")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--only", action="append", choices=[step.name for step in steps])
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    kept = options.output / "steps"
    device, sources = name_of_device(), digest_of_sources()
    done = {
        step.name: found
        for step in steps
        if (found := read(kept / f"{step.name}.json"))
        and (found.device, found.sources, found.code) == (device, sources, 0)
    }
    wanted = [step for step in steps if options.only is None or step.name in options.only]
    if options.list:
        for step in wanted:
            print(f"{'done' if step.name in done else 'owed'}  {step.name:14} {step.what}")
        return
    for folder in (kept, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    places = {
        "output": options.output,
        "work": options.work,
        "headers": options.headers or "HEADERS",
        "python": sys.executable,
    }
    deadline = time.monotonic() + 60 * options.minutes
    failed, left = [], []
    for step in wanted:
        if step.name in done:
            continue
        if any(name not in done for name in step.after) or (
            deadline - time.monotonic() < step.seconds
        ):
            left.append(step.name)
            continue
        found = run(step, places, device, sources)
        text = json.dumps(asdict(found), indent=1) + "\n"
        (kept / f"{step.name}.json").write_text(text, encoding="utf-8")
        print(
            f"{'ok' if found.code == 0 else 'FAILED':7}{found.seconds:6.0f} s  {step.name}: {step.what}"
        )
        if found.code == 0:
            done[step.name] = found
        else:
            failed.append(step.name)
            print(found.tail)
    print(f"done {len(done)}, failed {failed or 'none'}, left {left or 'none'}")
    sys.exit(FAILED if failed else LEFT if left else 0)


def run(step: Step, places: dict[str, object], device: str, sources: str) -> Done:
    """Run one step to its end, or to its limit."""
    command = step.command.format(**places)
    began, started = datetime.now().astimezone(), time.monotonic()
    try:
        ended = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=GRACE * step.seconds, check=False, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        code, said = ended.returncode, ended.stdout
    except subprocess.TimeoutExpired as stopped:
        output = stopped.stdout or b""
        code = 124
        said = output.decode(errors="replace") if isinstance(output, bytes) else output
    return Done(
        step.name,
        step.what,
        command,
        code,
        round(time.monotonic() - started, 1),
        began.isoformat(timespec="seconds"),
        device,
        sources,
        said[-TAIL:],
    )


def read(path: Path) -> Done | None:
    """What an earlier call left; None where it left nothing that can be read."""
    try:
        return Done(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def name_of_device() -> str:
    """As the driver calls it; without one, results are kept apart as nobody's."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "no CUDA device"
    return answer.stdout.strip().splitlines()[0]


def digest_of_sources() -> str:
    """SHA-256 of the sources that a result depends on; there may be no git where this runs."""
    total = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh"):
                total.update(f"{path.relative_to(ROOT)}\n".encode())
                total.update(path.read_bytes())
    return total.hexdigest()[:16]


if __name__ == "__main__":
    main()
