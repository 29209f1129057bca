"""The classifier of an ms-swift task: in the files, in a file of its own, or the backbone's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import IncompatibleArtefact
from ..tuner import CannotFold, Point
from .foreign import refuse
from .swift_files import EXTRA, Reading, few, state_dict, unwrapped

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .settings import Settings


def plant_heads(reading: Reading, settings: Settings) -> None:
    """The classifiers: the files', a person's, or else the backbone's own.

    Raises:
        IncompatibleArtefact: There is none, it is not one linear layer, or a tuner stands at it that
            does not fold.
    """
    paths = reading.backbone.classifiers
    for number, path in enumerate(paths):
        own = {
            part: reading.tensors.pop(f"{path}.{part}")
            for part in ("weight", "bias")
            if f"{path}.{part}" in reading.tensors
        }
        if reading.outer and len(paths) > 1:
            raise refuse(
                reading.path, "one head stands behind a backbone of several classifiers",
                found=", ".join(paths),
            )  # fmt: skip
        outer = reading.outer
        if not own and not outer and (file := settings.get("head", str)) is not None:
            outer = _head_file(Path(file), path)
            settings.found["head"] = Path(file).name
        head = _head(reading, path, own, outer)
        reading.found.plant_head(
            reading.backbone, *_with_tuners(reading, path, head, outer), number
        )
    if left := few(sorted(reading.tensors)):
        raise refuse(reading.path, "the classifier is not one linear layer", found=left)


def _head(
    reading: Reading, path: str, own: Mapping[str, Tensor], outer: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """The classifier's weight and bias; where backbone and model each have one, their product."""
    inner = _inner_head(reading, path, own, outer)
    for head in filter(None, (inner, outer)):
        _require_linear(reading, path, head)
    if not inner or not outer:
        one = inner or outer
        return one["weight"], one.get("bias")
    weight, bias = (outer[part].double() if part in outer else None for part in ("weight", "bias"))
    if weight is None or weight.shape[1] != inner["weight"].shape[0]:
        raise refuse(
            reading.path, "the head does not read what the backbone's classifier gives",
            found=f"{list(outer['weight'].shape)} behind {list(inner['weight'].shape)}",
        )  # fmt: skip
    if "bias" in inner:
        through = weight @ inner["bias"].double()
        bias = through if bias is None else through + bias
    return weight @ inner["weight"].double(), bias


def _inner_head(
    reading: Reading, path: str, own: Mapping[str, Tensor], outer: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The backbone's own classifier, as far as it was tuned from the files; empty if it plays no part.

    Raises:
        IncompatibleArtefact: There is no classifier at all.
    """
    layer = reading.module(path)
    frozen: dict[str, Tensor] = {}
    if isinstance(layer, nn.Linear):
        frozen = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    if outer and not own:
        return (
            frozen if isinstance(layer, nn.Linear) and reads_logits(reading, layer, outer) else {}
        )
    if "weight" not in own and not frozen:
        raise refuse(
            reading.path,
            "the task has no head",
            found=f"{path} is neither in the files nor in the backbone",
            do="name a file with its weight and bias: --set head=FILE; the folder above, with "
            f"{EXTRA}, may have it",
        )
    if not own:
        reading.found.notes["head"] = "the backbone's own"
    return dict(own) if "weight" in own else {**frozen, **own}


def reads_logits(reading: Reading, layer: nn.Linear, outer: Mapping[str, Tensor]) -> bool:
    """The head behind the backbone reads the logits of its classifier rather than its features.

    Raises:
        IncompatibleArtefact: Both have as many channels.
    """
    _require_linear(reading, "head", outer)
    width = outer["weight"].shape[1]
    if layer.in_features == layer.out_features == width:
        raise refuse(
            reading.path,
            "it is not clear whether the head reads the backbone's features or its logits",
            found=f"{width} of both",
            do="load the backbone without its classifier",
        )
    return width == layer.out_features


def _require_linear(reading: Reading, path: str, head: Mapping[str, Tensor]) -> None:
    weight, bias = head.get("weight"), head.get("bias")
    fits = weight is not None and weight.dim() == 2
    if not fits or set(head) - {"weight", "bias"} or (
        bias is not None and bias.shape != weight.shape[:1]  # type: ignore[union-attr]
    ):  # fmt: skip
        raise IncompatibleArtefact(
            "the head is not one linear layer",
            where=f"{reading.path}: {path}",
            wanted="weight [classes, features] and bias [classes]",
            found={name: list(tensor.shape) for name, tensor in head.items()},
        )


def _with_tuners(
    reading: Reading, path: str, head: tuple[Tensor, Tensor | None], outer: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """The classifier with the branches at it folded in, which a head of another size leaves no room for.

    Raises:
        IncompatibleArtefact: One does not fold.
    """
    at = [n for n, b in reading.found.branches.items() if b.add == Point(path, "output")]
    if not at:
        return head
    weight, bias = head
    op = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=torch.float64)
    op.requires_grad_(requires_grad=False)
    op.weight.copy_(weight)
    if bias is not None:
        op.bias.copy_(bias)
    for name in at:
        branch, weights = reading.found.branches.pop(name), reading.found.tensors.pop(name)
        try:
            if outer or branch.place is None:
                raise CannotFold("another classifier stands behind it")
            exact = {key: tensor.double() for key, tensor in weights.items()}
            for parameter, value in branch.tuner.fold(exact, op, branch.place).items():
                getattr(op, parameter).copy_(value)
        except CannotFold as cause:
            raise refuse(
                reading.path, "a tuner on the classifier cannot be carried", found=f"{name}: {cause.reason}"
            ) from cause  # fmt: skip
    return op.weight, op.bias


def _head_file(file: Path, classifier: str) -> dict[str, Tensor]:
    """A classifier from a file of its own.

    Raises:
        UsageError: There is no such file.
        IncompatibleArtefact: It is unsafe, or holds no classifier.
    """
    tensors = {unwrapped(key)[0]: tensor for key, tensor in state_dict(file).items()}
    names = ("head.fc.weight", "head.weight", "fc.weight", "weight", f"{classifier}.weight")
    for name in names:
        if name in tensors:
            bias = tensors.get(name.removesuffix("weight") + "bias")
            return {"weight": tensors[name], **({} if bias is None else {"bias": bias})}
    raise refuse(
        file, "the file holds no classifier", found=few(list(tensors)),
        do=f"wanted: one of {', '.join(names[:-1])}, and its bias",
    )  # fmt: skip
