"""Deep prompts become constant prefixes: exact, and the sequence keeps its length.

A prompt that enters a block as a constant and is cut from its output acts only through its keys and values, and these do not depend on the image (VPT-deep, arXiv 2203.12119). They are measured
at the attention itself, with every other branch of the task in place, so whatever shapes them (norms,
biases, LoRA, key norms) is accounted for. Two different images must give the same constants.
"""

from __future__ import annotations

import copy
import functools
from collections import ChainMap, Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .attention import Attention, Seam
from .errors import IncompatibleArtefact
from .parallel import joined
from .sites import Sites, attention_inside
from .tuner import Branch, Point
from .tuners.prefix import Prefix

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .backbone import Backbone
    from .delta import Delta

CONSTANT = 1e-9  # relative, float64: rounding of one GEMM at two batch positions


def lower(
    backbone: Backbone, delta: Delta, sites: Sites, double: Callable[[], nn.Module] | None = None
) -> Delta:
    """A delta whose deep prompts are prefixes; the delta itself when it has none.

    What stays tokens: prompts that live for several blocks, which depend on the image from the second
    block on, and several prompts at one attention.

    Args:
        backbone: The frozen backbone.
        delta: The task.
        sites: Of the backbone.
        double: Gives the backbone's model in float64; see `in_double`.

    Raises:
        IncompatibleArtefact: A prompt's keys depend on the image, its block has no single attention, or
            the backbone does not run with the prompts.
    """
    deep = {n: b for n, b in delta.branches.items() if b.tuner.join == "tokens" and b.serial}
    points = {name: attention_inside(sites, branch.add.module) for name, branch in deep.items()}
    taken = Counter(points.values())
    keys = {name: point for name, point in points.items() if taken[point] == 1}
    prompts = {name: deep[name] for name in keys}
    if not prompts:
        return delta
    model = (double or in_double(backbone))()
    weighted = [
        (branch, {k: v.double() for k, v in delta.tensors[name].items()})
        for name, branch in delta.branches.items()
    ]
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles: list[Any] = []
    inputs = [t.double() if t.is_floating_point() else t for t in backbone.draw(batch=2)]
    try:
        with torch.no_grad(), joined(model, weighted):
            # The watches stand inside what `joined` opens: they see the keys that end in the prompt,
            # before a prefix of the same block lengthens them.
            for name, point in keys.items():
                watch = _Watch(name, delta.tensors[name]["token"].shape[0], seen)
                module = model.get_submodule(point.module)
                handles.append(module.register_forward_pre_hook(watch.begin))
                handles.append(
                    module.register_forward_hook(watch.end, prepend=True, always_call=True)
                )
            model(*inputs)
    except RuntimeError as cause:
        raise IncompatibleArtefact(
            "the backbone does not run with the prompts",
            where=f"task {delta.task}",
            found=str(cause).splitlines()[0],
            do="some attentions fix the number of their tokens: choose another method",
        ) from cause
    finally:
        for handle in handles:
            handle.remove()

    branches = dict(delta.branches)
    tensors: dict[str, Mapping[str, Tensor]] = {}
    for name, branch in prompts.items():
        dtype = torch.promote_types(delta.tensors[name]["token"].dtype, torch.float32)
        key, value = (_constant(t, name).to(dtype) for t in seen[name])
        point: Point = keys[name]
        joint: bool = branch.tuner.joint_softmax  # type: ignore[attr-defined]
        branches[name] = Branch(Prefix(joint_softmax=joint), point, point)
        tensors[name] = {"key": key, "value": value}
    return replace(delta, branches=branches, tensors=ChainMap(tensors, delta.tensors))  # type: ignore[arg-type]


def in_double(backbone: Backbone) -> Callable[[], nn.Module]:
    """The backbone's model in float64, copied when it is first asked for and then shared."""
    return functools.cache(lambda: twin_of(backbone.model, torch.float64))


def twin_of(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a frozen model, its real numbers in a dtype; tensor by tensor, never twice."""
    made: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            cast = tensor.detach().to(dtype, copy=True)
            own = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(cast, tensor.requires_grad) if own else cast
    return copy.deepcopy(model, made).to(dtype)


def _constant(t: Tensor, name: str) -> Tensor:
    """`[2, H, P, d]` of two images as one `[P, C]`."""
    if (t[0] - t[1]).abs().max() > CONSTANT * t.abs().max():
        raise IncompatibleArtefact(
            "the keys of a prompt depend on the image, so it is no constant prefix",
            where=name,
            found=f"two images differ by {float((t[0] - t[1]).abs().max()):.2g}",
        )
    return t[0].transpose(0, 1).flatten(1)


class _Watch(Seam):
    """Takes the last `length` keys and values that one attention is called with."""

    def __init__(self, name: str, length: int, seen: dict[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.name, self.length, self.seen = name, length, seen

    def attend(self, call: Attention) -> Tensor:
        last = slice(-self.length, None)
        self.seen[self.name] = (call.key[..., last, :], call.value[..., last, :])
        return call.run()
