"""The model NAME.pictures: pixels instead of prepared tensors.

It is an ensemble, which Triton runs itself: NAME.prepare, a graph on the CPU, resizes, crops and
normalises as the row's task says (see `export/served/pictures.py`), and the bundle's model answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...export.engine import IMAGES, TASK
from .config import COMPANION, as_parameters

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..registry import Registry

PICTURES = ".pictures"  # behind a bundle's name
PREPARE = ".prepare"
PICTURE = {"name": "picture", "data_type": "TYPE_UINT8", "dims": [-1, -1, 3]}  # [-1, H, W, 3] RGB


def prepare_fields(registry: Registry, main: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of NAME.prepare, without its backend.

    Args:
        registry: The bundle's tasks.
        main: The configuration of the bundle's model.
    """
    given = {tensor["name"]: tensor for tensor in main["input"]}
    images = {key: given[IMAGES][key] for key in ("name", "data_type", "dims")}
    return {
        "name": registry.name + PREPARE,
        "max_batch_size": main["max_batch_size"],
        "input": [PICTURE, given[TASK]],
        "output": [images],
        "version_policy": main["version_policy"],
        "instance_group": [{"kind": "KIND_CPU", "count": 1}],
        "parameters": as_parameters({COMPANION: registry.name}),
    }


def pictures_fields(registry: Registry, main: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of NAME.pictures: inputs `picture` UINT8 [-1, H, W, 3] and `task`.

    Args:
        registry: The bundle's tasks.
        main: The configuration of the bundle's model.
    """
    prepared = prepare_fields(registry, main)
    steps = [
        (prepared["name"], [PICTURE["name"], TASK], [IMAGES]),
        (registry.name, [IMAGES, TASK], [tensor["name"] for tensor in main["output"]]),
    ]
    return {
        "name": registry.name + PICTURES,
        "platform": "ensemble",
        "max_batch_size": main["max_batch_size"],
        "input": prepared["input"],
        "output": [
            {k: v for k, v in tensor.items() if k != "label_filename"} for tensor in main["output"]
        ],
        "version_policy": main["version_policy"],
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": name,
                    "model_version": -1,
                    "input_map": {tensor: tensor for tensor in reads},
                    "output_map": {tensor: tensor for tensor in gives},
                }
                for name, reads, gives in steps
            ]
        },
        "parameters": as_parameters({COMPANION: registry.name}),
    }
