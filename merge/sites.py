"""The places of a backbone where a branch can read or join, measured on one image.

Measured, not tabled: in some timm families `attn.qkv` is never called (its weight is read by the module
around it), in others it runs on windows. A place that is never entered, or entered twice for one
image, cannot carry a branch, and the error says so.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .attention import Attention, Seam
from .errors import IncompatibleArtefact, UsageError
from .parallel import channels_first, read_inside
from .tuner import Branch, Point, bind
from .tuners.bottleneck import reads_patches

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .backbone import Backbone


@dataclass(frozen=True)
class Sites:
    """What one image showed.

    Attributes:
        model: The backbone's class, for messages.
        channels: Channels at every point that was entered.
        dims: Number of axes of the value at every point.
        calls: How often every point was entered.
        modules: All module paths.
        read: Linear layers whose weight the module around them reads instead of calling them.
        tensors: Shapes of all parameters and buffers, by name.
        unclear: Points whose value could have its channels first or last.
    """

    model: str
    channels: Mapping[Point, int]
    dims: Mapping[Point, int]
    calls: Mapping[Point, int]
    modules: frozenset[str]
    read: frozenset[str] = frozenset()
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    unclear: frozenset[Point] = frozenset()

    def require(self, point: Point) -> int:
        """The channels at a point that can carry a branch.

        Raises:
            IncompatibleArtefact: No such module, never entered, or entered more than once.
        """
        if point.module not in self.modules:
            raise IncompatibleArtefact(
                "the backbone has no such module", where=point, wanted=f"a module of {self.model}"
            )
        measured = _passed(point)
        calls = self.calls.get(measured, 0)
        if calls == 0:
            reason = {
                "keys": "no scaled dot product attention runs inside this module",
                "patches": "the backbone runs no convolution of one group here",
            }.get(point.side, "the backbone never calls this module, or not on a tensor")
            raise IncompatibleArtefact(
                f"a branch here would never act: {reason}",
                where=point,
                wanted="a point that one image passes once",
                found="passed 0 times",
            )
        if calls > 1:
            raise IncompatibleArtefact(
                "a branch here would act more than once per image",
                where=point,
                wanted="a point that one image passes once",
                found=f"passed {calls} times",
            )
        if measured in self.unclear:
            raise IncompatibleArtefact(
                "it is not clear which axis of this module's value holds the channels",
                where=point,
                found=f"a tensor of {self.dims[measured]} axes",
                do="join at a linear, norm or convolution layer inside it",
            )
        if point.side == "keys" and self.dims[measured] != 4:
            raise IncompatibleArtefact(
                "the attention inside this module does not work on [B, H, N, d]",
                where=point,
                found=f"keys of {self.dims[measured]} axes",
            )
        if point.side == "tokens" and self.dims[measured] != 3:
            raise IncompatibleArtefact(
                "tokens can join a sequence [B, N, C] only",
                where=point,
                found=f"a tensor of {self.dims[measured]} axes",
            )
        return self.channels[measured]

    def check(self, branch: Branch, tensors: Mapping[str, Tensor], *, where: object) -> None:
        """Hold a branch and its tensors to the backbone.

        Raises:
            IncompatibleArtefact: The place cannot carry it, or a tensor has the wrong shape.
        """
        sizes = bind(branch.tuner.shapes, tensors, where=where)
        if branch.tuner.join == "weights":
            self._check_parameter(branch, where=where)
            return
        given, taken = branch.tuner.channels(sizes)
        for axis, wanted, points in (("in", given, branch.taps), ("out", taken, (branch.add,))):
            for point in points:
                channels = self.require(point)
                if wanted not in (None, channels):
                    raise IncompatibleArtefact(
                        "a branch does not have the channels of its place",
                        where=where,
                        wanted=f"{axis}={channels} at {point}",
                        found=f"{axis}={wanted}",
                        do="check that the delta was trained on this backbone",
                    )
        if branch.serial:
            return
        order = list(self.channels)  # as the image passed them
        late = max(order.index(_passed(point)) for point in branch.taps)
        if late > order.index(_passed(branch.add)):
            raise IncompatibleArtefact(
                "a branch joins before the value that it reads is there",
                where=where,
                wanted="a tap that the image passes before the add point",
                found=f"from {order[late]} to {branch.add}",
            )

    def _check_parameter(self, branch: Branch, *, where: object) -> None:
        """Hold a difference to the parameter that it is added to."""
        parameter: str = branch.tuner.parameter  # type: ignore[attr-defined]
        name = f"{branch.add.module}.{parameter}".lstrip(".")
        (wanted,) = branch.tuner.shapes.values()
        if self.tensors.get(name) != wanted:
            raise IncompatibleArtefact(
                "the backbone has no such parameter",
                where=where,
                wanted=f"{name} of shape {list(wanted)}",
                found=list(self.tensors[name]) if name in self.tensors else "none",
                do="check that the delta was trained on this backbone",
            )


def measure(backbone: Backbone) -> Sites:
    """Run one image of noise and note what every module is given and gives.

    Raises:
        UsageError: The backbone cannot run on its own image size.
    """
    seen = _Seen()
    handles = []
    model = backbone.model
    names = {path: module for path, module in model.named_modules() if path}
    for path, module in names.items():
        handles.append(module.register_forward_pre_hook(seen.enter(path)))
        handles.append(module.register_forward_hook(seen.leave(path, module)))
    for parent, paths in read_inside(model, set(names)).items():
        seen.read |= {path: names[path] for path in paths if parent in names}
    try:
        with torch.no_grad(), seen:
            model(backbone.example())
    except (RuntimeError, AssertionError, ValueError) as cause:
        raise UsageError(
            "the backbone does not run on an image of its own size",
            where=backbone.identity.architecture,
            found=str(cause).splitlines()[0],
        ) from cause
    finally:
        for handle in handles:
            handle.remove()
    return Sites(
        type(model).__name__,
        seen.channels,
        seen.dims,
        seen.calls,
        frozenset(names),
        frozenset(seen.met),
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        frozenset(seen.unclear),
    )


def _passed(point: Point) -> Point:
    """The point at which the image is seen to pass this one."""
    return Point(point.module, "input") if point.side == "tokens" else point


def blocks(model: nn.Module) -> list[str]:
    """Paths of the transformer blocks, in order: modules numbered under a list named `blocks`.

    Raises:
        UsageError: The backbone has none.
    """
    found = [
        path
        for path, _ in model.named_modules()
        if len(parts := path.split(".")) >= 2 and parts[-2] == "blocks" and parts[-1].isdigit()
    ]
    if not found:
        raise UsageError(
            "the backbone has no blocks to tune",
            where=type(model).__name__,
            wanted="modules named blocks.0, blocks.1, ...",
        )
    return found


def behind(model: nn.Module, block: str, op: str) -> str:
    """The op of a block whose output the residual sum takes: `attn` or `mlp`, or the LayerScale behind."""
    name = {"attn": "ls1", "mlp": "ls2"}.get(op)
    scale = getattr(model.get_submodule(block), name, None) if name else None
    return op if scale is None or isinstance(scale, nn.Identity) else str(name)


def attention_inside(sites: Sites, block: str) -> Point:
    """The `keys` point of the one attention inside a block, or of the attention itself.

    Raises:
        IncompatibleArtefact: There is none, or several.
    """
    inside = [
        point
        for point, calls in sites.calls.items()
        if point.side == "keys" and calls == 1 and f"{point.module}.".startswith(f"{block}.")
    ]
    if sites.calls.get(Point(block, "keys"), 0) != 1 or not inside:
        raise IncompatibleArtefact(
            "the block has no single attention whose keys could be lengthened", where=block
        )
    return max(inside, key=lambda point: len(point.module))


def _has_clear_layout(module: nn.Module) -> bool:
    """Where the channels of the module's `[B, ?, ?, ?]` value are: first, or last as in Swin."""
    if channels_first(module) or isinstance(module, nn.Linear | nn.LayerNorm):
        return True
    inside = list(module.modules())[1:]
    last = any(isinstance(m, nn.Linear | nn.LayerNorm) for m in inside)
    return last and not any(channels_first(m) for m in inside)


class _Seen(Seam):
    """Counts entries and attention calls of one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.channels: dict[Point, int] = {}
        self.dims: dict[Point, int] = {}
        self.calls: Counter[Point] = Counter()
        self.inside: list[str] = []
        self.unclear: set[Point] = set()
        self.read: dict[str, nn.Module] = {}
        self.met: set[str] = set()

    def note(self, point: Point, value: Any, module: nn.Module | None = None) -> None:
        if not isinstance(value, Tensor):
            return
        first = module is not None and channels_first(module)
        self.calls[point] += 1
        self.channels[point] = value.shape[1 if first else -1]
        self.dims[point] = value.dim()
        if value.dim() > 3 and module is not None and not _has_clear_layout(module):
            self.unclear.add(point)

    def enter(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.inside.append(path)
            value = args[0] if args else None
            self.note(Point(path, "input"), value, module)
            if reads_patches(module):
                point = Point(path, "patches")
                self.calls[point] += 1
                self.channels[point] = module.weight[0].numel()  # type: ignore[index]
                self.dims[point] = 3

        return hook

    def leave(self, path: str, module: nn.Module) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], value: Any) -> None:
            self.inside.pop()
            self.note(Point(path, "output"), value, module)

        return hook

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = super().linear(x, weight, bias)
        for path, layer in self.read.items():
            if weight is layer.weight and path not in self.inside:
                self.note(Point(path, "input"), x)
                self.note(Point(path, "output"), y)
                self.met.add(path)
        return y

    def attend(self, call: Attention) -> Tensor:
        for path in set(self.inside):
            point = Point(path, "keys")
            self.calls[point] += 1
            self.channels[point] = call.key.shape[-3] * call.key.shape[-1]
            self.dims[point] = call.key.dim()
        return call.run()
