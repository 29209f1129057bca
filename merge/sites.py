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
from .ops import channels_first, reads_patches
from .parallel import read_inside
from .tuner import Branch, Point, bind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .backbone import Backbone


DROPS = {"attn": "drop_path1", "mlp": "drop_path2"}  # of timm's blocks, by the op in front


@dataclass(frozen=True)
class Sites:
    """What one image showed.

    Attributes:
        model: The backbone's class, for messages.
        channels: Channels at every point that was entered.
        dims: Number of axes of the value at every point.
        shapes: Of the value at every point, for one example.
        calls: How often every point was entered.
        modules: All module paths.
        leads: First axis of the value at every point, for one image: more than 1 where windows are.
        fleeting: Points whose value the backbone overwrites in place later on.
        residual: By op, such as `blocks.0.attn`, where the residual sum takes its output: behind a
            LayerScale, a gamma or a norm that stands there.
        shared: Names of the tensors that several modules hold.
        read: Linear layers whose weight the module around them reads instead of calling them.
        tensors: Shapes of all parameters and buffers, by name.
        unclear: Points whose value could have its channels first or last, with both numbers.
    """

    model: str
    channels: Mapping[Point, int]
    dims: Mapping[Point, int]
    calls: Mapping[Point, int]
    modules: frozenset[str]
    leads: Mapping[Point, int] = field(default_factory=dict)
    shapes: Mapping[Point, tuple[int, ...]] = field(default_factory=dict)
    fleeting: frozenset[Point] = frozenset()
    residual: Mapping[str, Point] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()
    read: frozenset[str] = frozenset()
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    unclear: Mapping[Point, tuple[int, ...]] = field(default_factory=dict)

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

    def check(
        self,
        branch: Branch,
        tensors: Mapping[str, Tensor],
        *,
        where: object,
        replaced: dict[Point, int] | None = None,
    ) -> None:
        """Hold a branch and its tensors to the backbone.

        Args:
            branch: Tuner and place.
            tensors: Its stored tensors.
            where: For messages.
            replaced: Channels at points whose value branches before this one replaced; this one's are added.

        Raises:
            IncompatibleArtefact: The place cannot carry it, or a tensor has the wrong shape.
        """
        sizes = bind(branch.tuner.shapes, tensors, where=where)
        if branch.tuner.join == "weights":
            self._check_parameter(branch, where=where)
            return
        replaced = {} if replaced is None else replaced
        given, taken = branch.tuner.channels(sizes)
        each = given if isinstance(given, tuple) else (given,) * len(branch.taps)
        places = [("in", wanted, point) for wanted, point in zip(each, branch.taps, strict=True)]
        if branch.tuner.join == "replace":
            self.require(branch.add)
            if taken is not None:
                replaced[branch.add] = taken
        else:
            places.append(("out", taken, branch.add))
        for axis, wanted, point in places:
            either = self.unclear.get(point, ()) if branch.tuner.reads_map else ()
            if wanted in either and self.calls[point] == 1:
                continue  # the tuner says which axis it means
            channels = replaced.get(point, self.require(point))
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
        self._check_values(branch, where=where)
        order = list(self.channels)  # as the image passed them
        late = max(order.index(_passed(point)) for point in branch.taps)
        if late > order.index(_passed(branch.add)):
            raise IncompatibleArtefact(
                "a branch joins before the value that it reads is there",
                where=where,
                wanted="a tap that the image passes before the add point",
                found=f"from {order[late]} to {branch.add}",
            )

    def _check_values(self, branch: Branch, *, where: object) -> None:
        """What is tapped must still be there, and in the order of tokens in which it is added."""
        if branch.tuner.join not in ("add", "replace"):
            return
        for point in branch.taps:
            if point in self.fleeting and point != branch.add:
                raise IncompatibleArtefact(
                    "the backbone overwrites a tapped value before the branch reads it",
                    where=where,
                    found=point,
                    do="tap at another module",
                )
            windows = self.leads.get(point, 1), self.leads.get(branch.add, 1)
            if branch.tuner.join == "replace":
                continue
            if windows[0] != windows[1] and not branch.tuner.reads_map:
                raise IncompatibleArtefact(
                    "a branch is added in another order of tokens than it reads",
                    where=where,
                    wanted="both ends inside the windows, or both outside",
                    found=f"{point} in {windows[0]} windows, {branch.add} in {windows[1]}",
                )

    def _check_parameter(self, branch: Branch, *, where: object) -> None:
        """Hold a difference to the parameter that it is added to."""
        parameter: str = branch.tuner.parameter  # type: ignore[attr-defined]
        name = f"{branch.add.module}.{parameter}".lstrip(".")
        (wanted,) = branch.tuner.shapes.values()
        if name in self.shared:
            raise IncompatibleArtefact(
                "several modules share the parameter, and the difference would change one of them",
                where=where,
                found=name,
            )
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
            model(*backbone.draw())
    except (RuntimeError, AssertionError, ValueError) as cause:
        raise UsageError(
            "the backbone does not run on an example of its own size",
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
        leads=seen.leads,
        shapes={point: tuple(value.shape) for point, value in seen.values.items()},
        fleeting=seen.overwritten(),
        residual=_residual(seen),
        shared=_shared(model),
        read=frozenset(seen.met),
        tensors={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        unclear=seen.unclear,
    )


def _residual(seen: _Seen) -> dict[str, Point]:
    """By op of a block where the residual sum takes its output.

    In timm's blocks that is what a DropPath is given: the op's own output, or that of a LayerScale or norm
    behind it, or something that no module gives.
    """
    found: dict[str, Point] = {}
    for own, value in seen.values.items():
        block, _, op = own.module.rpartition(".")
        if own.side != "output" or op not in DROPS:
            continue
        last = Point(f"{block}.{DROPS[op]}", "input")
        summed = seen.values.get(last, value)
        given = [
            point
            for point, other in seen.values.items()
            if other is summed and point.side == "output" and point.module.startswith(f"{block}.")
        ]
        clear = [
            point
            for point in [own] * (summed is value) + given + [last]
            if point not in seen.unclear
        ]
        found[own.module] = clear[0] if clear else own
    return found


def _shared(model: nn.Module) -> frozenset[str]:
    """Names of the tensors that several modules hold."""
    holders: dict[int, set[int]] = {}
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (module._parameters | module._buffers).items():
            if tensor is not None:
                holders.setdefault(id(tensor), set()).add(id(module))
                names.setdefault(id(tensor), []).append(f"{path}.{name}".lstrip("."))
    return frozenset(n for key, found in names.items() if len(holders[key]) > 1 for n in found)


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
        self.unclear: dict[Point, tuple[int, ...]] = {}
        self.leads: dict[Point, int] = {}
        self.values: dict[Point, Tensor] = {}
        self.versions: dict[Point, int] = {}
        self.read: dict[str, nn.Module] = {}
        self.met: set[str] = set()

    def note(self, point: Point, value: Any, module: nn.Module | None = None) -> None:
        if not isinstance(value, Tensor):
            return
        first = module is not None and channels_first(module)
        self.calls[point] += 1
        self.channels[point] = value.shape[1 if first else -1]
        self.dims[point] = value.dim()
        self.leads[point] = value.shape[0]
        self.values[point], self.versions[point] = value, value._version
        if value.dim() > 3 and module is not None and not _has_clear_layout(module):
            self.unclear[point] = (value.shape[1], value.shape[-1])

    def overwritten(self) -> frozenset[Point]:
        """The points whose value was changed in place after it was noted."""
        return frozenset(p for p, v in self.values.items() if v._version != self.versions[p])

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
            first = value[0] if isinstance(value, tuple) and value else value
            self.note(Point(path, "output"), first, module)

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
