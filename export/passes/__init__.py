"""SHELF: exact graph rewrites, one algebraic identity per file, run in the order of this table.

A pass takes a model, rewrites it in place and returns how often it did. Each identity holds in real
arithmetic; `build` checks the rewritten engine against torch afterwards.

The order: `flat_heads` looks for what the exporter wrote, so it comes first. `narrow_tokens` before
`collapse_linears`: a pick behind two layers then stands in front of both. The joins come last: they
hide a layer in wider weights, where neither would see it, and judge by the tokens that are left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx_ir.passes import common

from .collapse_linears import collapse_linears
from .flat_heads import flat_heads
from .join_added import join_added
from .join_biases import join_biases
from .join_siblings import join_siblings
from .narrow_tokens import narrow_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

PASSES: dict[str, Callable[[ir.Model], int]] = {
    "flat_heads": flat_heads,
    "narrow_tokens": narrow_tokens,
    "collapse_linears": collapse_linears,
    "join_siblings": join_siblings,
    "join_added": join_added,
    "join_biases": join_biases,
}


def rewrite(model: ir.Model) -> dict[str, int]:
    """Run every pass in place, dropping what each leaves unused.

    Returns:
        How often each pass rewrote something.
    """
    done = {}
    for name, step in PASSES.items():
        done[name] = step(model)
        common.RemoveUnusedNodesPass()(model)
    return done
