"""SHELF: named methods, each one or more tuners at their published places, for `attach`.

A method is a function that gives a `Method`; its settings are its arguments. Places are timm's module
names inside a block.
"""

from __future__ import annotations

from .adapters import (
    adaptformer,
    bapat,
    dual_adapter,
    lora,
    parallel_adapter,
    patt,
    serial_adapter,
    together,
)
from .networks import bypass, side_tuning
from .planting import Method, Planted, head_branch, in_blocks
from .prompts import deep_prompt, prefix, shallow_prompt
from .side_networks import ladder, unipt
from .u_tuning import u_tuner
from .weights import bitfit, full, ia3, lokr, norm_tuning, oft, ssf

__all__ = [
    "Method",
    "Planted",
    "adaptformer",
    "bapat",
    "bitfit",
    "bypass",
    "deep_prompt",
    "dual_adapter",
    "full",
    "head_branch",
    "ia3",
    "in_blocks",
    "ladder",
    "lokr",
    "lora",
    "norm_tuning",
    "oft",
    "parallel_adapter",
    "patt",
    "prefix",
    "serial_adapter",
    "shallow_prompt",
    "side_tuning",
    "ssf",
    "together",
    "u_tuner",
    "unipt",
]
