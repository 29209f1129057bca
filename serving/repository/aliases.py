"""A thin model per task, NAME.TASK, for clients that know a task only as a model.

Each is an ensemble, which Triton runs itself: a first step says the task's name once for each row, and
the bundle's model answers. So all aliases share that model's one queue of batches, and none has a process
or an engine of its own. The first step is one small model for all of them, NAME.task_names. In `native` it has an
output per task; in `hot`, where tasks come and go, `triton/alias_folder.py` says what its outputs are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...export.engine import TASK
from ...merge.errors import UsageError
from ..triton.alias_folder import FIRST_STEP
from .config import COMPANION, as_parameters, label_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ...export.engine import Tensor
    from ..registry import Registry

NAMES = FIRST_STEP


def names_fields(
    registry: Registry, main: Mapping[str, Any], outputs: Iterable[str]
) -> dict[str, Any]:
    """The configuration of NAME.task_names, without its backend.

    Args:
        registry: The bundle's tasks.
        main: The configuration of the bundle's model.
        outputs: What an alias may choose from.
    """
    rows = smallest_input(registry)
    return {
        "name": registry.name + NAMES,
        "max_batch_size": main["max_batch_size"],
        "input": [tensor for tensor in main["input"] if tensor["name"] == rows.name],
        "output": [{"name": name, "data_type": "TYPE_STRING", "dims": [1]} for name in outputs],
        "version_policy": main["version_policy"],
        "instance_group": [{"kind": "KIND_CPU", "count": 1}],
        "parameters": as_parameters({COMPANION: registry.name}),
    }


def alias_fields(
    registry: Registry,
    main: Mapping[str, Any],
    task: str,
    said_by: str,
    labels: tuple[str, ...] = (),
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The configuration of NAME.TASK, and its file of labels.

    Args:
        registry: The bundle's tasks.
        main: The configuration of the bundle's model.
        task: The task.
        said_by: The output of the first step that says it.
        labels: Its class names.
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
                    "output_map": {said_by: TASK},
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
    return fields, label_file(fields, labels) if registry.labelled else {}


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
