"""SHELF: exact graph rewrites, one algebraic identity per file, run in the order of this table.

A pass takes a model, rewrites it in place and returns how often it did. Each identity holds in real
arithmetic; `build` checks the rewritten engine against torch afterwards.

The order: `flat_heads` looks for what the exporter wrote, so it comes first. `narrow_tokens` before
`collapse_linears`: a pick behind two layers then stands in front of both. `widen_hidden` and the joins come last: they
hide a layer in wider weights, where neither would see it, and judge by the tokens that are left.

`CPU_PASSES` or `CUDA_PASSES` come after all of these and after the typing pass, for engines of ONNX Runtime
on that device. The latter write the nodes that its fused kernels, and ours, stand for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx_ir.passes import common

from .collapse_linears import collapse_linears
from .flat_heads import flat_heads
from .flat_patches import flat_patches
from .join_added import join_added
from .join_biases import join_biases
from .join_siblings import join_siblings
from .narrow_tokens import narrow_tokens
from .outline_branches import outline_branches
from .outline_norms import outline_norms
from .packed_attention import packed_attention
from .row_biases import row_biases
from .skip_norms import skip_norms
from .widen_hidden import widen_hidden

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import onnx_ir as ir

PASSES: dict[str, Callable[[ir.Model], int]] = {
    "flat_heads": flat_heads,
    "narrow_tokens": narrow_tokens,
    "collapse_linears": collapse_linears,
    "widen_hidden": widen_hidden,
    "join_siblings": join_siblings,
    "join_added": join_added,
    "join_biases": join_biases,
}

HALF_PASSES = {name: step for name, step in PASSES.items() if name != "widen_hidden"}
"""Of engines in half precision, in place of `PASSES`."""

APART = {name: step for name, step in HALF_PASSES.items() if not name.startswith("join_")} | {
    "flat_patches": flat_patches
}
"""Of engines in eight bits, in place of `PASSES`: the weights of backbone and tuners stay apart, and patches are a
product, so that `quantise` takes the one without the other."""

CPU_PASSES: dict[str, Callable[[ir.Model], int]] = {"row_biases": row_biases}

CUDA_PASSES: dict[str, Callable[[ir.Model], int]] = {
    "flat_patches": flat_patches,
    "outline_norms": outline_norms,
    "outline_branches": outline_branches,
    "skip_norms": skip_norms,
    "packed_attention": packed_attention,
}


def rewrite(
    model: ir.Model, passes: Mapping[str, Callable[[ir.Model], int]] = PASSES
) -> dict[str, int]:
    """Run passes in place, dropping what each leaves unused.

    Returns:
        How often each pass rewrote something.
    """
    done = {}
    for name, step in passes.items():
        done[name] = step(model)
        common.RemoveUnusedNodesPass()(model)
    return done
