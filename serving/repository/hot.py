"""The layout `hot`: Triton's Python backend runs our service, which the model carries with it.

    NAME/
      config.pbtxt
      labels.txt         class names of the logits, when the bundle has one task
      1/model.py         loads `serving/triton/model.py` of the package beside it
      1/bundle/          the bundle, hard-linked where the file system allows it
      1/utune_deploy/    the floors that serving needs; neither torch nor timm
    NAME.tasks/          the model that changes the tasks: a light process that passes commands on to NAME's

The queue is our batcher's, so Triton has none: without `dynamic_batching` it hands every request over at once.

The environment that runs it needs onnxruntime, numpy (below 2 for the tritonserver of the
nvidia-pytriton wheel) and, for a bundle whose bank is an input, safetensors.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...merge.errors import UsageError
from ..service import require_fitting_rows
from ..tasks.commands import commands_config
from ..triton.alias_folder import MARK
from ..triton.settings import SOCKETS, Settings
from .config import COMPANION, as_parameters

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...export.bundle import Bundle
    from ...export.engine import Device, Tensor
    from ..registry import Registry
    from .options import ModelOptions

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
    "serving/answers.py",
    "serving/models.py",
    "serving/protocol.py",
    "serving/queueing/*.py",
    "serving/registry.py",
    "serving/rejections.py",
    "serving/service.py",
    "serving/tasks/*.py",
    "serving/tensors.py",
    "serving/triton/*.py",
    "serving/watching/__init__.py",
    "serving/watching/counters.py",
    "serving/watching/logs.py",
    "serving/watching/series.py",
)
"""Everything that `serving/triton` imports, as patterns below the package."""

MODEL = '''"""{text}"""

import sys
from pathlib import Path

sys.dont_write_bytecode = True  # Triton would take it for a change, and load the model anew

# First, so that no installed utune_deploy answers in place of the one that was carried here.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from utune_deploy.serving.triton.{module} import TritonPythonModel  # noqa: E402, F401
'''

NAMES_MODEL = '''"""Say which alias was asked, once for each row: the first step of every alias."""

import numpy as np
import triton_python_backend_utils as triton


class TritonPythonModel:
    """Each output says its own name, behind a mark."""

    def execute(self, requests):
        """One response per request, of the outputs that were asked for."""
        responses = []
        for request in requests:
            (rows,) = request.inputs()
            count = rows.shape()[0]
            responses.append(
                triton.InferenceResponse(
                    output_tensors=[
                        triton.Tensor(name, np.full((count, 1), ({mark!r} + name).encode(), dtype=object))
                        for name in request.requested_output_names()
                    ]
                )
            )
        return responses
'''


class Hot:
    """See the module."""

    backend = "python"

    def finish(
        self, fields: dict[str, Any], registry: Registry, options: ModelOptions, device: Device
    ) -> None:
        """Add what the Python backend needs to a model's configuration.

        Raises:
            UsageError: Several GPUs are asked for; or an option has no meaning here, or is no possible one.
        """
        options.require_no_scheduler()
        if device.provider != "cpu" and options.gpus != (0,):
            raise UsageError(
                "the layout `hot` puts every engine on the first GPU it sees",
                wanted="GPU 0",
                found=f"GPUs {', '.join(map(str, options.gpus))}",
                do="leave the GPUs out and set CUDA_VISIBLE_DEVICES, or use the layout `native`",
            )
        require_fitting_rows(registry.bundle, options.rows)
        fields["backend"] = self.backend
        del fields["dynamic_batching"]
        settings = Settings(
            device=replace(device, prepared=device.prepared and device.prepared.absolute()),
            rows=options.rows,
            keep=options.keep and options.keep.absolute(),
            task_control=options.task_control,
            sockets=options.sockets,
            bundle=registry.bundle.path.absolute() if options.in_place else None,
            queueing=options.queueing(),
        )
        fields["parameters"] |= as_parameters(settings.write())

    def fill(
        self, version: Path, bundle: Bundle, all_tasks: bool, *, in_place: bool = False
    ) -> None:
        """Write the folder of a version; `model.py` reads from the configuration who answers."""
        del all_tasks
        if not in_place:
            shutil.copytree(bundle.path, version / "bundle", copy_function=_link)
        _carry_package(version / PACKAGE)
        text = "Serve the bundle beside this file with the package beside this file."
        _write_program(version, MODEL.format(text=text, module="model"))

    def tasks_fields(
        self, registry: Registry, main: Mapping[str, Any], options: ModelOptions
    ) -> dict[str, Any]:
        """The configuration of NAME.tasks.

        Args:
            registry: The bundle's tasks.
            main: The configuration of the bundle's model.
            options: As of that one.
        """
        fields = commands_config(registry.name)
        del fields["platform"]
        sockets = {SOCKETS: str(options.sockets)} if options.sockets else {}
        return {
            **fields,
            "backend": self.backend,
            "version_policy": main["version_policy"],
            "instance_group": [{"kind": "KIND_CPU", "count": 1}],
            "parameters": as_parameters({COMPANION: registry.name, **sockets}),
        }

    def fill_tasks(self, version: Path) -> None:
        """Write the folder of a version of NAME.tasks."""
        _carry_package(version / PACKAGE)
        text = "Pass commands on to the model of the tasks."
        _write_program(version, MODEL.format(text=text, module="tasks"))

    def finish_names(self, fields: dict[str, Any]) -> None:
        """Add to the configuration of the aliases' first step."""
        fields["backend"] = self.backend

    def fill_names(self, version: Path, tasks: tuple[str, ...], rows: Tensor) -> None:
        """Write the folder of a version of the aliases' first step."""
        del tasks, rows
        _write_program(version, NAMES_MODEL.format(mark=MARK))


def _write_program(version: Path, text: str) -> None:
    (version / "model.py").write_text(text)
    # Python would leave byte code here when it first reads the program, and Triton take that for a change and load the
    # model anew, without the tasks that came meanwhile. Where this is no folder, Python goes without.
    (version / "__pycache__").touch()


def _carry_package(folder: Path) -> None:
    package = Path(__file__).parents[2]
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
