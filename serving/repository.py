"""A Triton model repository from a bundle, complete in itself.

    <repository>/<bundle's name>/
      config.pbtxt       written through Triton's own protobuf
      labels.txt         class names of the logits, when the bundle has one task
      1/model.py         loads `serving/triton_model.py` of the package beside it
      1/bundle/          the bundle, hard-linked where the file system allows it
      1/utune_deploy/    the floors that serving needs; neither torch nor timm

The environment that runs it needs onnxruntime, numpy (below 2 for the tritonserver of the
nvidia-pytriton wheel) and, for a bundle whose bank is an input, safetensors.
"""
# Generated protobuf modules build their classes at import, where a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..export.engine import LOGITS
from ..merge.errors import UsageError
from ..merge.files import atomic_folder, refuse_existing
from . import protocol
from .registry import MAX_DELAY_MS, Registry

if TYPE_CHECKING:
    from ..export.bundle import Bundle

CONFIG = "config.pbtxt"
LABELS = "labels.txt"
MIN_DELAY_US = 100  # microseconds; the delay that was seen to end the stalls, 0 of 2,962 requests
PACKAGE = "utune_deploy"
CARRIED = (
    "__init__.py",
    "merge/__init__.py",
    "merge/errors.py",
    "merge/files.py",
    "merge/preprocessing.py",
    "export/__init__.py",
    "export/bundle.py",
    "export/engine.py",
    "export/targets/*.py",
    "serving/__init__.py",
    "serving/counters.py",
    "serving/protocol.py",
    "serving/registry.py",
    "serving/rejections.py",
    "serving/service.py",
    "serving/triton_model.py",
)
"""Everything that `triton_model.py` imports, as patterns below the package."""

MODEL = '''"""Serve the bundle beside this file with the package beside this file."""

import sys
from pathlib import Path

# First, so that no installed utune_deploy answers in place of the one that was carried here.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from utune_deploy.serving.triton_model import TritonPythonModel  # noqa: E402, F401
'''

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def write_repository(
    bundle: Bundle,
    repository: Path,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    max_delay_ms: float = MAX_DELAY_MS,
    force: bool = False,
) -> Path:
    """Write the bundle as a model of a Triton repository.

    Args:
        bundle: What is served.
        repository: The repository's folder; other models in it are left alone.
        provider: Execution provider of the engine, `cpu` or `cuda`.
        threads: Threads inside one operator; None lets the runtime choose.
        max_delay_ms: Longest that a request waits for company.
        force: Replace the model when it is already there.

    Returns:
        The model's folder.

    Raises:
        UsageError: The model is already there, or its name cannot be a folder's.
        IncompatibleArtefact: The bundle cannot be served.
    """
    if not _NAME.fullmatch(bundle.name):
        raise UsageError(
            "the bundle's name cannot be a model's folder",
            where=bundle.path,
            wanted="letters, digits, `_`, `.` and `-`",
            found=bundle.name,
            do="export it under another --name",
        )
    model = repository / bundle.name
    refuse_existing(model, force=force)
    config = config_text(bundle, provider=provider, threads=threads, max_delay_ms=max_delay_ms)
    with atomic_folder(model) as folder:
        (folder / CONFIG).write_text(config)
        if len(bundle.tasks) == 1:
            (folder / LABELS).write_text("\n".join(bundle.tasks[0].labels) + "\n")
        version = folder / protocol.VERSION
        shutil.copytree(bundle.path, version / "bundle", copy_function=_link)
        _carry_package(version / PACKAGE)
        (version / "model.py").write_text(MODEL)
    return model


def config_text(
    bundle: Bundle,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    max_delay_ms: float = MAX_DELAY_MS,
) -> str:
    """The `config.pbtxt`: one instance, because each holds a backbone of its own.

    The delay is never below `MIN_DELAY_US`: with zero, Triton 2.51 now and then leaves a lone request
    in its queue for half a second.
    """
    from google.protobuf import text_format
    from google.protobuf.json_format import ParseDict
    from tritonclient.grpc import model_config_pb2

    registry = Registry(bundle)
    fields = protocol.model_config(registry, max_delay_ms=max_delay_ms)
    if len(bundle.tasks) == 1:
        for output in fields["output"]:
            if output["name"] == LOGITS:
                output["label_filename"] = LABELS
    batching = fields["dynamic_batching"]
    batching["max_queue_delay_microseconds"] = max(
        MIN_DELAY_US, batching["max_queue_delay_microseconds"]
    )
    del fields["platform"]
    fields["backend"] = "python"
    # Without the number of a GPU there would be one instance on each, all on the first.
    place = {"kind": "KIND_CPU"} if provider == "cpu" else {"kind": "KIND_GPU", "gpus": [0]}
    fields["instance_group"] = [{**place, "count": 1}]
    fields["parameters"] = {
        "provider": {"string_value": provider},
        "threads": {"string_value": str(threads or 0)},  # 0 lets the runtime choose
        "identity": {"string_value": bundle.identity},
    }
    return text_format.MessageToString(ParseDict(fields, model_config_pb2.ModelConfig()))


def _carry_package(folder: Path) -> None:
    package = Path(__file__).parents[1]
    for pattern in CARRIED:
        for source in package.glob(pattern):
            copy = folder / source.relative_to(package)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


def _link(source: str, copy: str) -> None:
    """A hard link, or a copy where the two folders lie on different file systems."""
    try:
        os.link(source, copy)
    except OSError:
        shutil.copy2(source, copy)
