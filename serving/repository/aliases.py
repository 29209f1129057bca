"""A thin model per task, NAME.TASK, for clients that know a task only as a model.

Each is an ensemble, which Triton runs itself: a first step says the task's name once for each row, and
the bundle's model answers. So all aliases share that model's one queue of batches, and none has a process
or an engine of its own. The first step is one small model for all of them, NAME.task_names, with an
output per task.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...export.engine import TASK
from ...merge.errors import UsageError
from .config import COMPANION, as_parameters, label_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...export.engine import Tensor
    from ..registry import Registry

NAMES = ".task_names"  # behind a bundle's name: the first step of its aliases


def names_fields(registry: Registry, main: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of NAME.task_names, without its backend.

    Args:
        registry: The bundle's tasks.
        main: The configuration of the bundle's model.
    """
    rows = smallest_input(registry)
    return {
        "name": registry.name + NAMES,
        "max_batch_size": main["max_batch_size"],
        "input": [tensor for tensor in main["input"] if tensor["name"] == rows.name],
        "output": [
            {"name": task, "data_type": "TYPE_STRING", "dims": [1]} for task in registry.names
        ],
        "version_policy": main["version_policy"],
        "instance_group": [{"kind": "KIND_CPU", "count": 1}],
        "parameters": as_parameters({COMPANION: registry.name}),
    }


def alias_fields(
    registry: Registry, main: Mapping[str, Any], task: str
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The configuration of NAME.TASK, and its file of labels.

    Args:
        registry: The bundle's tasks.
        main: The configuration of the bundle's model.
        task: The task.
    """
    rows = [tensor["name"] for tensor in main["input"] if tensor["name"] != TASK]
    outputs = [tensor["name"] for tensor in main["output"]]
    fields: dict[str, Any] = {
        "name": f"{registry.name}.{task}",
        "platform": "ensemble",
        "max_batch_size": main["max_batch_size"],
        "input": [tensor for tensor in main["input"] if tensor["name"] != TASK],
        "output": [
            {k: v for k, v in tensor.items() if k != "label_filename"} for tensor in main["output"]
        ],
        "version_policy": main["version_policy"],
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": registry.name + NAMES,
                    "model_version": -1,
                    "input_map": {name: name for name in [smallest_input(registry).name]},
                    "output_map": {task: TASK},
                },
                {
                    "model_name": registry.name,
                    "model_version": -1,
                    "input_map": {name: name for name in (*rows, TASK)},
                    "output_map": {name: name for name in outputs},
                },
            ]
        },
        "parameters": as_parameters({COMPANION: registry.name}),
    }
    files = label_file(fields, registry.versions[task].labels) if registry.labelled else {}
    return fields, files


def smallest_input(registry: Registry) -> Tensor:
    """The row input that has the fewest numbers."""
    return min(registry.inputs.values(), key=lambda t: math.prod(int(size) for size in t.shape[1:]))


def require_names(registry: Registry, taken: set[str]) -> None:
    """Refuse tasks that cannot be models.

    Args:
        registry: The bundle's tasks.
        taken: Names of the bundle's other models.

    Raises:
        UsageError: An alias would have the name of another model.
    """
    for task in registry.names:
        if f"{registry.name}.{task}" in taken:
            raise UsageError(
                "the alias of a task would have the name of another model",
                where=registry.bundle.path,
                found=f"{registry.name}.{task}",
                do="export it under another task name, or leave the aliases out",
            )
