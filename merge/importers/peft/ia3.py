"""IA3 (arXiv 2205.05638, section 3.3): a number per channel that a layer reads or gives."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import nn

from ...errors import IncompatibleArtefact
from ...tuners.gain import Gain
from .adapter import CONFIG

if TYPE_CHECKING:
    from .adapter import Adapter


def read_ia3(adapter: Adapter) -> None:
    """A gain before each feed-forward layer and behind every other, where it scales the layer's bias too.

    Raises:
        IncompatibleArtefact: A layer that cannot be carried.
    """
    adapter.allow("feedforward_modules")
    for layer in adapter.layers("ia3_l"):
        before = _feeds_forward(adapter, layer.name)
        out, width, *kernel = layer.weight.shape
        size = width * getattr(layer.op, "groups", 1) if before else out
        linear = (1, size) if before else (size, 1)
        shape = linear if isinstance(layer.op, nn.Linear) else (1, size, *[1] * len(kernel))
        factor = layer.take("ia3_l", *shape).double().flatten()
        if before:
            layer.serial("ia3", Gain(shift=False), "input", {"gain": factor - 1})
            continue
        layer.gain("ia3", factor, keep=layer.outer_bias)


def _feeds_forward(adapter: Adapter, module: str) -> bool:
    """PEFT's rule: a text is a pattern of the whole name, of a list any end of the name counts.

    Raises:
        IncompatibleArtefact: It cannot be read.
    """
    named = adapter.config.get("feedforward_modules") or []
    module = adapter.wrapper + module
    try:
        if isinstance(named, str):
            return re.fullmatch(named, module) is not None
        return any(module.endswith(end) for end in named)
    except (TypeError, re.error) as cause:
        raise IncompatibleArtefact(
            "the adapter's configuration is malformed",
            where=adapter.path / CONFIG,
            wanted="feedforward_modules, a pattern or a list of names",
            found=repr(named),
        ) from cause
