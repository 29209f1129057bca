"""A plan's graph: traced from torch, rewritten, typed. Everything between a plan and a file."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from onnx_ir.passes import common

from ..export.bundle import FAN_OUT
from ..export.graph import Inputs, clean, merge_equal, serialise, specs, trace
from ..export.macs import macs
from ..export.passes import APART, CPU_PASSES, CUDA_PASSES, HALF_PASSES, PASSES, rewrite
from ..export.passes.gathered import RANKS
from ..export.precision import HALF, ON_CUDA, QUANTISED
from ..export.products import products
from ..merge.backbone import create
from ..merge.bank import NO_ROOM, Bank, Room, Slot, slots_of, stack
from ..merge.errors import BuildFailed, UsageError
from ..merge.fan_out import FanOut
from ..merge.fold import fold
from ..merge.lower import in_double, lower
from ..merge.mixed import Alone, Mixed, Single
from ..merge.rows import Rows
from .numerics import Numerics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from ..export.engine import Tensor
    from ..export.precision import Typing
    from ..merge.backbone import Backbone
    from ..merge.calls import Calls
    from ..merge.delta import Delta
    from ..merge.fan_out import Group
    from ..merge.sites import Sites
    from ..merge.tuner import Branch
    from .plan import Plan


class Made(NamedTuple):
    """A traced model.

    Attributes:
        model: The graph.
        slots: Of its bank.
        bank: The bank; None where there is none, and where nobody holds it.
        rows: The bank of a mixed engine, row by row. With `bank` None the graph's own tensors of that name hold
            one row of zeros instead.
        lowered: Tasks whose prompts became prefixes.
    """

    model: ir.Model
    slots: tuple[Slot, ...] = ()
    bank: Bank | None = None
    rows: Rows | None = None
    lowered: Sequence[str] = ()

    @property
    def streamed(self) -> Rows | None:
        """The rows, where nobody holds the bank."""
        return self.rows if self.bank is None else None


def graph_of(
    plan: Plan,
    backbone: Backbone,
    deltas: Sequence[Delta],
    sites: Sites,
    groups: Sequence[Group],
    precision: str,
    room: Room = NO_ROOM,
    *,
    streamed: bool = False,
) -> Made:
    """The traced model of a plan's engine.

    Args:
        plan: Of the tasks.
        backbone: The frozen backbone.
        deltas: The tasks in row order.
        sites: Of the backbone.
        groups: What tasks share, in mode `fan-out`.
        precision: In half, the bank is laid out for fused kernels; `fp32` for standard operators.
        room: Sizes that the bank's slots have at least.
        streamed: Leave the values of a mixed engine's bank out, to be written behind the graph, row by row.
    """
    if plan.mode == FAN_OUT:
        return fan_out_graph(backbone, groups)
    rows = _rows(backbone)
    if plan.mode == "merged":
        merged = fold(deltas[0], backbone, sites=sites)
        arguments = {**backbone.identity.arguments, "num_classes": len(deltas[0].labels)}
        plain = create(backbone.identity.architecture, arguments).model
        plain.load_state_dict(dict(merged.tensors))
        return Made(trace(plain, Inputs(rows)))
    double = in_double(backbone)
    constant = [lower(backbone, delta, sites, double) for delta in deltas]
    lowered = [d.task for d, c in zip(deltas, constant, strict=True) if c is not d]
    ranks = RANKS if precision in HALF else ()
    mixed = plan.mode == "multi"
    if mixed and streamed:
        slots = slots_of(constant, ranks=ranks, room=room)
        return _mixed(plan, backbone, Rows(slots, constant), lowered)
    stacked = stack(constant, torch.float32, ranks=ranks, room=room)
    slots = stacked.slots
    mixes = not any(b.tuner.no_bank for b in deltas[0].branches.values())
    if plan.mode == "parallel" and precision in HALF and mixes:
        rename = {f"bank_{i}": f"bank/{key}" for i, key in enumerate(stacked.tensors)}
        module = Alone(backbone, stacked).eval()
        return Made(trace(module, Inputs(rows), rename=rename), slots, stacked, None, lowered)
    if plan.mode == "parallel":
        return Made(_traced(Single(backbone, stacked), backbone), slots, stacked, None, lowered)
    whole = _mixed_model(plan, backbone, stacked)
    return Made(whole, slots, stacked, Rows(slots, constant), lowered)


def _mixed(plan: Plan, backbone: Backbone, rows: Rows, lowered: Sequence[str]) -> Made:
    """A mixed engine's graph, traced with a bank of zeros; as an input it has as many rows as a trace needs."""
    few = min(len(rows), 2) if plan.bank == "inputs" else None
    model = _mixed_model(plan, backbone, rows.shaped(few))
    return Made(model, rows.slots, None, rows, lowered)


def _mixed_model(plan: Plan, backbone: Backbone, bank: Bank) -> ir.Model:
    """A mixed engine's graph with this bank."""
    module = Mixed(backbone, bank).eval()
    task = torch.tensor([0, min(1, len(bank.tasks) - 1)])
    if plan.bank == "inputs":
        tensors = {f"bank/{key}": tensor for key, tensor in bank.tensors.items()}
        return trace(module, Inputs(_rows(backbone), task, tensors))
    rename = {f"bank_{i}": f"bank/{key}" for i, key in enumerate(bank.tensors)}
    return trace(module, Inputs(_rows(backbone), task), rename=rename)


def fan_out_graph(backbone: Backbone, groups: Sequence[Group]) -> Made:
    """The engine for every task; each group runs the trunk, and what they share of it becomes one."""
    return Made(merge_equal(_traced(FanOut(backbone, groups), backbone)))


def counted(
    model: ir.Model, backbone: Backbone, deltas: Sequence[Delta], sites: Sites
) -> dict[str, dict[str, int]]:
    """Multiply-accumulates for one example: of the engine for all tasks, and of the tasks one by one."""
    double = in_double(backbone)
    known: dict[tuple[frozenset[Branch], int], int] = {}
    alone = 0
    for delta in deltas:
        kind = frozenset(delta.branches.values()), delta.parameters
        if kind not in known:
            bank = stack([lower(backbone, delta, sites, double)], torch.float32)
            single = _traced(Single(backbone, bank), backbone)
            rewrite(single)
            known[kind] = macs(single).total
        alone += known[kind]
    return {"macs": {"every task": macs(model).total, "tasks one by one": alone}}


def require_whole_attentions(model: ir.Model, calls: Calls) -> dict[str, dict[str, dict[str, int]]]:
    """How many products and attentions a finished graph has, beside what its trunk calls in torch.

    Raises:
        BuildFailed: An attention of the trunk is in pieces, which no runtime puts together again.
    """
    found = products(model)
    if found.attentions < calls.attentions:
        raise BuildFailed(
            "attentions of the backbone fell apart into products, so that they would run many times slower",
            wanted=f"{calls.attentions} whole attentions, as torch runs",
            found=f"{found.attentions} in the graph",
            do="report this with the backbone's name and the versions of torch and onnxscript",
        )
    return {"products": {"engine": found._asdict(), "backbone": calls._asdict()}}


def _traced(module: torch.nn.Module, backbone: Backbone) -> ir.Model:
    """A module that takes the backbone's inputs alone."""
    return trace(module.eval(), Inputs(_rows(backbone)))


def _rows(backbone: Backbone) -> dict[str, torch.Tensor]:
    names = [entry.name for entry in backbone.inputs]
    return dict(zip(names, backbone.draw(batch=2), strict=True))


def inputs_of(backbone: Backbone, model: ir.Model) -> tuple[Tensor, ...]:
    """The graph's inputs, with what their integers are below."""
    below = {
        entry.name: 2 if entry.values == "mask" else entry.high
        for entry in backbone.inputs
        if entry.values != "normal"
    }
    return tuple(replace(t, high=below.get(t.name)) for t in specs(model.graph.inputs))


class Finished(NamedTuple):
    """What was done to a traced graph: how often each pass rewrote something, and its types."""

    rewritten: dict[str, int]
    typing: Typing


def finish(
    model: ir.Model,
    precision: str,
    *,
    standard: bool = False,
    numerics: Numerics | None = None,
    bank: Mapping[str, NDArray[np.generic]] | Rows | None = None,
) -> Finished:
    """Run every pass on a traced graph, in place, and give it the types of a precision.

    Folds are float32 or wider; weights are cast once, behind them.

    Args:
        model: The graph.
        precision: A key of `export.precision.PRECISIONS`.
        standard: Keep to ONNX's own operators, for runtimes that are not ONNX Runtime.
        numerics: What stays float32, and the examples of an audit.
        bank: Float32 tensors by input name for that, where the bank is an input; or the rows of a bank that nobody
            holds.

    Raises:
        UsageError: A pattern of nodes to keep names none.
        CheckFailed: Values leave the range of the precision.
    """
    passes = APART if precision in QUANTISED else HALF_PASSES if precision in HALF else PASSES
    rewritten = rewrite(model, passes)
    clean(model)
    typing = (numerics or Numerics()).typed(model, precision, bank)
    if not standard:
        rewritten |= rewrite(model, CUDA_PASSES if precision in ON_CUDA else CPU_PASSES)
        common.TopologicalSortPass()(model)
    return Finished(rewritten, typing)


def backbone_engine(backbone: Backbone, precision: str = "fp32") -> bytes:
    """The backbone alone, through the same passes: the baseline of every benchmark.

    Raises:
        UsageError: The precision takes its ranges from examples of a task.
    """
    if precision in QUANTISED:
        raise UsageError(
            f"there is no bare backbone in {precision} to time beside: its ranges come from examples",
            do="name a bundle in fp32 first, and this one with --against",
        )
    model = _traced(backbone.model, backbone)
    finish(model, precision)
    return serialise(model, {})
