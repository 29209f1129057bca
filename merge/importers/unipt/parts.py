"""What the readers of UniPT's checkpoints share: tensors that are read once, hidden states, frozen tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from ...errors import IncompatibleArtefact
from ...tuner import Point
from ..foreign import Foreign, differing, other_backbone, some

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ...backbone import Backbone
    from ...tuner import Weights

T = TypeVar("T")

NORM = {"weight": "weight", "bias": "bias", "running_mean": "mean", "running_var": "var"}
SKIPPED = ("num_batches_tracked", "position_ids")


@dataclass
class Checkpoint:
    """The tensors of a file, and which of them have been read.

    Attributes:
        path: The file.
        tensors: By name, without the prefixes of distributed training.
        seen: Names of those that were read.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    seen: set[str] = field(default_factory=set)

    def take(self, key: str, *shape: int | None) -> Tensor:
        """A tensor of the file.

        Args:
            key: Its name.
            shape: What it has to have, None for an axis of any length; no shape for any.

        Raises:
            IncompatibleArtefact: It is not there, or has another shape.
        """
        self.seen.add(key)
        if key not in self.tensors:
            raise IncompatibleArtefact(
                "the checkpoint lacks a tensor",
                where=self.path,
                wanted=key,
                found=self._beside(key),
            )
        tensor = self.tensors[key]
        sizes = tuple(tensor.shape)
        if shape and (
            len(sizes) != len(shape)
            or any(wanted not in (None, size) for wanted, size in zip(shape, sizes, strict=True))
        ):
            raise IncompatibleArtefact(
                "a tensor of the checkpoint has another shape than its layer",
                where=f"{self.path}: {key}",
                wanted=f"[{', '.join('any' if size is None else str(size) for size in shape)}]",
                found=list(sizes),
            )
        return tensor

    def gate(self, source: str) -> Tensor:
        """The weight `[d]` of a layer that scores what a softmax then weighs.

        Its bias, if there is one, is in every score, and the softmax does not see it.
        """
        self.seen.add(f"{source}.bias")
        return self.take(f"{source}.weight", 1, None)[0]

    def linear(
        self, source: str, name: str, norm: str | None = None, *, batch: bool = False
    ) -> Weights:
        """A linear layer or 1 x 1 convolution as `NAME_weight`, `NAME_bias`, and its norm `NAME_norm_*`.

        Args:
            source: Of the layer.
            name: See above.
            norm: Of the norm, if there is one.
            batch: It is a batch norm, with running statistics.

        Raises:
            IncompatibleArtefact: A tensor is not there, or has another shape.
        """
        key = f"{source}.weight"
        pixel = key in self.tensors and self.tensors[key].dim() == 4
        weight = self.take(key, None, None, *((1, 1) if pixel else ())).flatten(1)
        out = weight.shape[0]
        found = {f"{name}_weight": weight, f"{name}_bias": self.take(f"{source}.bias", out)}
        for theirs, ours in NORM.items() if norm is not None else ():
            if batch or not theirs.startswith("running"):
                found[f"{name}_norm_{ours}"] = self.take(f"{norm}.{theirs}", out)
        return found

    def count(self, prefix: str) -> int:
        """How many layers are numbered behind a prefix.

        Raises:
            IncompatibleArtefact: None.
        """
        inside = (key.removeprefix(prefix) for key in self.tensors if key.startswith(prefix))
        numbers = {key.partition(".")[0] for key in inside}
        if not numbers:
            self.take(f"{prefix}0")
        return len(numbers)

    def require_seen(self, *other: str, own: str | None = None) -> None:
        """All tensors have been read, but for those of other parts.

        Args:
            other: How the names of the other parts begin.
            own: How names among them begin that are to be read all the same.

        Raises:
            IncompatibleArtefact: One has not been.
        """
        left = sorted(
            key
            for key in self.tensors
            if key not in self.seen
            and not key.endswith(SKIPPED)
            and (not key.startswith(other) or (own is not None and key.startswith(own)))
        )
        if left:
            raise IncompatibleArtefact(
                "the checkpoint holds tensors of no known tuner",
                where=self.path,
                wanted="tensors of UniPT's release, and no others",
                found=some(left),
            )

    def _beside(self, key: str) -> str:
        """The tensors nearest to one that is missing: of its module, or of the one around it."""
        while key:
            key = key.rpartition(".")[0]
            if near := sorted(k for k in self.tensors if k.startswith(f"{key}." if key else "")):
                return some(near)
        return "no tensors"


def weights_of(path: Path, saved: Any) -> list[dict[str, Tensor]]:
    """The states in a file, without the prefix of distributed training: one, or one per side.

    Where there are averaged weights (`model_ema`) they are what the release evaluates.

    Raises:
        IncompatibleArtefact: There are none.
    """
    inner = saved
    if isinstance(saved, dict):
        for key in ("model_ema", "model", "state_dict", "model_state_dict"):
            if isinstance(saved.get(key), (dict, list, tuple)):
                inner = saved[key]
                break
    states = inner if isinstance(inner, (list, tuple)) else [inner]
    found = [
        {_plain(key): value for key, value in state.items() if isinstance(value, Tensor)}
        for state in states
        if isinstance(state, dict)
    ]
    if not any(found):
        raise IncompatibleArtefact(
            "the file holds no tensors",
            where=path,
            wanted="a state dict, alone or under model_ema, model or state_dict",
            found=some(map(str, saved)) if isinstance(saved, dict) else type(saved).__name__,
        )
    return found


def made(path: Path, kind: Callable[..., T], *sizes: Any, **fields: Any) -> T:
    """A tuner of the sizes that a file's tensors have.

    Raises:
        IncompatibleArtefact: There is none of these sizes.
    """
    try:
        return kind(*sizes, **fields)
    except ValueError as cause:
        raise IncompatibleArtefact(
            "the layers of the side network do not fit each other",
            where=path,
            wanted="those of UniPT's release",
            found=str(cause),
        ) from cause


def _plain(key: str) -> str:
    """A key without `module.`, wherever a wrapper put it."""
    return ".".join(part for part in key.split(".") if part != "module")


def outputs(paths: Sequence[str]) -> tuple[Point, ...]:
    """What modules give."""
    return tuple(Point(path, "output") for path in paths)


def require_states(path: Path, states: Sequence[Point], wanted: int) -> None:
    """The side network reads as many hidden states as the backbone has.

    Raises:
        IncompatibleArtefact: It does not.
    """
    if len(states) != wanted:
        raise IncompatibleArtefact(
            "the side network reads another number of hidden states than the backbone has",
            where=path,
            wanted=f"{wanted}, as in the file",
            found=f"{len(states)} in the backbone",
            do="load the backbone that it was trained on",
        )


def require_trunk(
    path: Path,
    backbone: Backbone,
    tensors: Mapping[str, Tensor],
    found: Foreign,
    outside: tuple[str, ...] = (),
) -> None:
    """The file's frozen tensors, under the backbone's names, are the backbone's.

    Args:
        path: The file.
        backbone: The backbone.
        tensors: The file's.
        found: Gets a note where there is nothing to compare.
        outside: How the names of frozen tensors begin that are no part of the backbone.

    Raises:
        IncompatibleArtefact: They are not, or one of them is not in the backbone.
    """
    own = backbone.model.state_dict()
    if not set(tensors) & set(own):
        found.notes["trunk"] = "the file holds no frozen tensors that could be compared"
        return
    changed = list(differing(path, backbone, tensors))
    more = (k for k in tensors if k not in own and not backbone.is_classifier(k))
    changed += [k for k in more if not k.startswith(outside) and not k.endswith(SKIPPED)]
    if changed:
        raise other_backbone(path, backbone, changed)
