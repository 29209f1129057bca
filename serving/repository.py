"""A Triton model repository from a bundle, complete in itself.

    <repository>/<bundle's name>/
      config.pbtxt       written through Triton's own protobuf
      labels.txt         class names of the logits, when the bundle has one task
      1/model.py         loads `serving/triton_model.py` of the package beside it
      1/bundle/          the bundle, hard-linked where the file system allows it
      1/utune_deploy/    the floors that serving needs; neither torch nor timm

Where the bundle has an engine of all tasks, the model NAME.all stands beside it in a folder of its own,
with the same things in it.

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
from typing import TYPE_CHECKING, Any

from ..export.engine import CPU, LOGITS
from ..merge.errors import UsageError
from ..merge.files import atomic_folder, refuse_existing
from . import protocol
from .registry import ALL, MAX_DELAY_MS, Registry

if TYPE_CHECKING:
    from ..export.bundle import Bundle
    from ..export.engine import Device

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
    "export/mapped.py",
    "export/parity.py",
    "export/targets/*.py",
    "serving/__init__.py",
    "serving/counters.py",
    "serving/packed.py",
    "serving/protocol.py",
    "serving/registry.py",
    "serving/rejections.py",
    "serving/resident.py",
    "serving/service.py",
    "serving/store.py",
    "serving/tasks.py",
    "serving/tensors.py",
    "serving/triton_model.py",
    "serving/versions.py",
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
    device: Device = CPU,
    max_delay_ms: float = MAX_DELAY_MS,
    force: bool = False,
) -> Path:
    """Write the bundle as a model of a Triton repository, or as two, the second with all tasks.

    Args:
        bundle: What is served.
        repository: The repository's folder; other models in it are left alone.
        device: Where the engine runs.
        max_delay_ms: Longest that a request waits for company.
        force: Replace the models when they are already there; where the bundle has no engine of all tasks,
            that takes such a model of an earlier bundle of this name away.

    Returns:
        The folder of the model of one task per row.

    Raises:
        UsageError: A model is already there, or its name cannot be a folder's.
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
    model, of_all = repository / bundle.name, repository / (bundle.name + ALL)
    models = {model: False} if bundle.engine_of_all is None else {model: False, of_all: True}
    settings: dict[str, Any] = {
        "device": device,
        "max_delay_ms": max_delay_ms,
    }
    configs = {
        folder: config_text(bundle, all_tasks=all_tasks, **settings)
        for folder, all_tasks in models.items()
    }
    for folder in models:
        refuse_existing(folder, force=force)
    for path, all_tasks in models.items():
        with atomic_folder(path) as folder:
            (folder / CONFIG).write_text(configs[path])
            if _has_label_file(bundle, all_tasks):
                (folder / LABELS).write_text("\n".join(bundle.tasks[0].labels) + "\n")
            version = folder / protocol.VERSION
            shutil.copytree(bundle.path, version / "bundle", copy_function=_link)
            _carry_package(version / PACKAGE)
            (version / "model.py").write_text(MODEL)
    if force and of_all not in models and _answers_all(of_all):
        shutil.rmtree(of_all)
    return model


def _has_label_file(bundle: Bundle, all_tasks: bool) -> bool:
    """Whether the logits have one row of class names: Triton knows no other kind."""
    return len(bundle.tasks) == 1 and bool(bundle.tasks[0].labels) and not all_tasks


def _answers_all(model: Path) -> bool:
    """Whether it is a model of all tasks that was written here."""
    config = model / CONFIG
    return config.is_file() and f'key: "{protocol.ALL_TASKS}"' in config.read_text(errors="replace")


def config_text(
    bundle: Bundle,
    *,
    device: Device = CPU,
    max_delay_ms: float = MAX_DELAY_MS,
    all_tasks: bool = False,
) -> str:
    """The `config.pbtxt`: one instance, because each holds a backbone of its own.

    The delay is never below `MIN_DELAY_US`: with zero, Triton 2.51 now and then leaves a lone request
    in its queue for half a second.
    """
    from google.protobuf import text_format
    from google.protobuf.json_format import ParseDict
    from tritonclient.grpc import model_config_pb2

    registry = Registry(bundle, all_tasks=all_tasks)
    fields = protocol.model_config(registry, max_delay_ms=max_delay_ms)
    if _has_label_file(bundle, all_tasks):
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
    place = {"kind": "KIND_CPU"} if device.provider == "cpu" else {"kind": "KIND_GPU", "gpus": [0]}
    fields["instance_group"] = [{**place, "count": 1}]
    fields["parameters"] = {
        "provider": {"string_value": device.provider},
        "threads": {"string_value": str(device.threads or 0)},  # 0 lets the runtime choose
        **({"kernels": {"string_value": str(device.kernels)}} if device.kernels else {}),
        "identity": {"string_value": bundle.identity},
        **({protocol.ALL_TASKS: {"string_value": "true"}} if all_tasks else {}),
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
