"""Engines as ONNX Runtime prepares them for one processor, kept in a folder and mapped from it.

When ONNX Runtime opens a model it rewrites the graph and packs the weights for the processor's products: seconds, and
memory that each session has for itself, as large as the weights. Kept in a file, both are done once: whoever opens the
engine again maps the packed weights, so that sessions and processes on one machine share them.

    FOLDER/KEY/
      model.onnx      the graph as it runs, with its small weights
      weights.bin     the others, packed
      entry.json      what the key is made of, and the sizes of the two files

The key is a digest of everything that decides what ONNX Runtime makes: the engine's own digest, the runtime's build, the
processor, the settings. An entry of anything else is never opened; none is ever removed here.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...merge.errors import IncompatibleArtefact, UsageError, UtuneError
from ...merge.files import atomic_folder, canonical_json
from .private import ort

if TYPE_CHECKING:
    from collections.abc import Mapping

GRAPH, WEIGHTS, ENTRY = "model.onnx", "weights.bin", "entry.json"
SMALLEST = (1 << 20) + 1
"""Bytes of a weight; smaller ones stay in the graph's file. ONNX Runtime 1.31 begins what is larger on a page, and the rest
wherever the last one ended, from where its products read past a processor's boundary and end the process."""
ALIGNMENT = 64  # bytes, of what is packed: as wide as a register of AVX-512
PACKED = re.compile(
    rb"\+\d+\|(\d+);\d+;\d"
)  # one packed weight in the graph's file: where it begins in WEIGHTS
PROCESSOR = ("model name", "flags", "CPU implementer", "CPU part", "Features")
"""Of Linux' /proc/cpuinfo, on x86 and on Arm: what decides which products ONNX Runtime has."""


def prepared(
    model: Path, folder: Path, digest: str, options: ort.SessionOptions, settings: Mapping[str, Any]
) -> Path:
    """The engine as ONNX Runtime prepares it on this machine, made if it is not there.

    Args:
        model: The engine's file.
        folder: Where prepared engines are kept.
        digest: SHA-256 of the engine's file.
        options: Those that the engine would be opened with; used up.
        settings: What of them changes the graph that runs, for the key.

    Returns:
        An ONNX model whose graph is final, to be opened without optimisation.

    Raises:
        UsageError: `folder` cannot be written to.
        IncompatibleArtefact: ONNX Runtime cannot load the engine.
    """
    facts = {
        "engine": digest,
        "runtime": f"{ort.__version__} {ort.get_build_info()}",
        "processor": _processor(),
        "settings": dict(settings),
    }
    key = hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:32]
    entry = folder / key
    if not _is_whole(entry):
        try:
            _prepare(model, entry, options, facts)
        except UtuneError:
            raise
        except OSError as cause:
            if not _is_whole(entry):  # another process may have been quicker
                raise UsageError(
                    "prepared engines cannot be kept here", where=folder, found=cause.strerror or str(cause),
                    do="name a folder that can be written to, or leave --prepared out",
                ) from cause  # fmt: skip
    return entry / GRAPH


def _prepare(
    model: Path, entry: Path, options: ort.SessionOptions, facts: Mapping[str, Any]
) -> None:
    with atomic_folder(entry) as fresh:
        options.optimized_model_filepath = str(fresh / GRAPH)
        for name, value in (
            ("optimized_model_external_initializers_file_name", WEIGHTS),
            ("optimized_model_external_initializers_min_size_in_bytes", str(SMALLEST)),
            ("save_external_prepacked_constant_initializers", "1"),
        ):
            options.add_session_config_entry(f"session.{name}", value)
        try:
            ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except Exception as cause:
            raise IncompatibleArtefact(
                "ONNX Runtime cannot prepare the engine", where=model, found=str(cause).splitlines()[0],
                do=f"make sure that {entry.parent} has room for a copy of it, or leave --prepared out",
            ) from cause  # fmt: skip
        astray = [at for at in PACKED.findall((fresh / GRAPH).read_bytes()) if int(at) % ALIGNMENT]
        if astray:
            raise IncompatibleArtefact(
                "ONNX Runtime kept packed weights where the processor cannot read them",
                where=model, wanted=f"multiples of {ALIGNMENT} bytes", found=f"{len(astray)} that are none",
                do="leave --prepared out",
            )  # fmt: skip
        sizes = {file.name: file.stat().st_size for file in sorted(fresh.iterdir())}
        (fresh / ENTRY).write_text(json.dumps({**facts, "bytes": sizes}, indent=2) + "\n")


def _is_whole(entry: Path) -> bool:
    """An entry is there, and its files are as long as they were."""
    try:
        sizes = json.loads((entry / ENTRY).read_text())["bytes"]
        return all((entry / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _processor() -> str:
    """What this machine's processor is and can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.system()} {platform.machine()} {platform.processor()}"
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    said = "; ".join(fields[name] for name in PROCESSOR if name in fields)
    return f"{platform.machine()}; {said}"
