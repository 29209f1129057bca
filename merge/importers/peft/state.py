"""A PEFT model's whole state dict: its adapter as `save_pretrained` would have written it, and the frozen rest."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ...errors import IncompatibleArtefact

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

KINDS = r"lora_\w+|ia3_l|hada_\w+|lokr_\w+|vera_\w+|oft_R|boft_[RsP]|ln_tuning_layers|ranknum"
TUNED = re.compile(rf"(?:^|\.)(?:{KINDS})(?=\.|$)")
NAMED = re.compile(
    rf"(?P<tuner>(?:^|\.)(?:{KINDS}))\.(?!(?:weight|bias)$)(?P<adapter>[^.]+)(?=\.|$)"
)
SURPLUS = re.compile(r".*\.(?:boft_P|ranknum|vera_[AB])")  # what PEFT makes again when it loads
SHARED = ("base_model.vera_A", "base_model.vera_B")
MAGNITUDE = "lora_magnitude_vector"


def is_whole(names: Mapping[str, Tensor]) -> bool:
    """The frozen layers are there too."""
    return any(name.endswith(".base_layer.weight") for name in names)


def split(
    path: Path, tensors: Mapping[str, Tensor], bias: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What was trained, by the names that `save_pretrained` gives it, and what was frozen, by the backbone's own.

    Args:
        path: The folder, for messages.
        tensors: The whole state dict.
        bias: The adapter's setting: of which layers the biases are trained.

    Raises:
        IncompatibleArtefact: There are several adapters.
    """
    adapters = {m["adapter"] for name in tensors if (m := NAMED.search(name))}
    if len(adapters) > 1:
        raise IncompatibleArtefact(
            "the file holds several adapters",
            where=path,
            wanted="one",
            found=", ".join(sorted(adapters)),
            do="save the one that is meant: model.save_pretrained(..., selected_adapters=[NAME])",
        )
    trained: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    for full, tensor in tensors.items():
        name = NAMED.sub(lambda m: m["tuner"], full)
        inside = name.replace(".base_layer.", ".")
        module, saved, rest = inside.partition(".modules_to_save.")
        if TUNED.search(name):
            if name in SHARED or not SURPLUS.fullmatch(name):
                trained[name] = tensor
        elif saved:
            trained[f"{module}.{rest.partition('.')[2]}"] = tensor  # behind the adapter's name
        elif ".original_module." in inside:
            frozen[inside.replace(".original_module.", ".")] = tensor
        elif inside.endswith(".bias") and (bias == "all" or (bias != "none" and inside != name)):
            trained[inside] = tensor
        else:
            frozen[inside] = tensor
    return trained, frozen
