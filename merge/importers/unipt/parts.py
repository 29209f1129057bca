"""What the readers of UniPT's checkpoints share: states, linear layers, hidden states, frozen tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...tuner import Point
from ..foreign import Foreign, differing, other_backbone, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ...backbone import Backbone
    from ...tuner import Weights

NORM = {"weight": "weight", "bias": "bias", "running_mean": "mean", "running_var": "var"}
SKIPPED = ("num_batches_tracked", "position_ids")


def weights_of(path: Path, saved: Any) -> list[dict[str, Tensor]]:
    """The states in a file, without the prefix of distributed training: one, or one per side.

    Where there are averaged weights (`model_ema`) they are what the release evaluates.

    Raises:
        IncompatibleArtefact: There are none.
    """
    if isinstance(saved, dict):
        for key in ("model_ema", "model", "state_dict"):
            if isinstance(saved.get(key), (dict, list, tuple)):
                saved = saved[key]
                break
    states = saved if isinstance(saved, (list, tuple)) else [saved]
    found = [
        {_plain(key): value for key, value in state.items() if isinstance(value, Tensor)}
        for state in states
        if isinstance(state, dict)
    ]
    if not any(found):
        raise refuse(path, "the file holds no tensors", found=type(saved).__name__)
    return found


def _plain(key: str) -> str:
    """A key without `module.`, wherever a wrapper put it."""
    return ".".join(part for part in key.split(".") if part != "module")


def linear(
    path: Path, state: Mapping[str, Tensor], source: str, name: str, norm: str | None = None
) -> Weights:
    """A linear layer or 1 x 1 convolution as `NAME_weight`, `NAME_bias`, and its norm `NAME_norm_*`.

    Raises:
        IncompatibleArtefact: A tensor is not there.
    """
    weight = take(path, state, f"{source}.weight")
    if weight.dim() == 4:
        weight = weight.flatten(1)
    found = {f"{name}_weight": weight, f"{name}_bias": take(path, state, f"{source}.bias")}
    if norm is not None:
        take(path, state, f"{norm}.weight")
        for theirs, ours in NORM.items():
            if (tensor := state.get(f"{norm}.{theirs}")) is not None:
                found[f"{name}_norm_{ours}"] = tensor
    return found


def take(path: Path, state: Mapping[str, Tensor], key: str) -> Tensor:
    """A tensor of the file.

    Raises:
        IncompatibleArtefact: It is not there.
    """
    if key not in state:
        raise refuse(path, "the checkpoint lacks a tensor", found="none", do=f"wanted: {key}")
    return state[key]


def outputs(paths: Sequence[str]) -> tuple[Point, ...]:
    """What modules give."""
    return tuple(Point(path, "output") for path in paths)


def require_states(path: Path, states: Sequence[Point], wanted: int) -> None:
    """The side network reads as many hidden states as the backbone has.

    Raises:
        IncompatibleArtefact: It does not.
    """
    if len(states) != wanted:
        raise refuse(
            path,
            "the side network reads another number of hidden states than the backbone has",
            found=f"{wanted} in the file, {len(states)} in the backbone",
            do="load the backbone that it was trained on",
        )


def require_trunk(
    path: Path, backbone: Backbone, tensors: Mapping[str, Tensor], found: Foreign
) -> None:
    """The file's frozen tensors, under the backbone's names, are the backbone's.

    Raises:
        IncompatibleArtefact: They are not.
    """
    if not set(tensors) & set(backbone.model.state_dict()):
        found.notes["trunk"] = "the file holds no frozen tensors that could be compared"
        return
    if changed := differing(path, backbone, tensors):
        raise other_backbone(path, backbone, list(changed))


def require_known(path: Path, state: Mapping[str, Tensor], known: Sequence[str]) -> None:
    """Every tensor begins with one of these.

    Raises:
        IncompatibleArtefact: One does not.
    """
    left = sorted(
        key for key in state if not key.startswith(tuple(known)) and not key.endswith(SKIPPED)
    )
    if left:
        raise refuse(
            path, "the checkpoint holds tensors of no known tuner", found=", ".join(left[:5])
        )
