"""From a torch module to an ONNX graph with a free batch axis and names that can be traced back.

torch.export through `torch.onnx.export` (dynamo). The exporter's own optimiser is not used: it merges
equal tensors and renames most of them, so a tensor of one task could no longer be told from another's.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer

from ..merge.errors import BuildFailed
from .engine import IMAGES, LOGITS, TASK
from .engine import Tensor as Spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

OPSET = 23  # the first with one Attention operator
BATCH = "batch"
TASKS = "tasks"
UNLIMITED = 1 << 62
LARGEST = (1 << 31) - 1  # bytes of one protobuf message


@dataclass(frozen=True)
class Inputs:
    """Example inputs of a trace.

    Attributes:
        rows: By name, in the order in which the module takes them, `[B, ...]` each, B at least 2; images
            `[B, C, H, W]` or clips `[B, C, T, H, W]` need no name.
        task: `[B]` int64, or None for one task.
        bank: `[T, ...]` by input name, when the bank is an input.
    """

    rows: Tensor | Mapping[str, Tensor]
    task: Tensor | None = None
    bank: Mapping[str, Tensor] | None = None

    @property
    def named(self) -> dict[str, Tensor]:
        """All inputs but the bank's, by name."""
        rows = dict(self.rows) if isinstance(self.rows, Mapping) else {IMAGES: self.rows}
        return rows if self.task is None else {**rows, TASK: self.task}


def trace(
    module: nn.Module, inputs: Inputs, *, rename: Mapping[str, str] | None = None
) -> ir.Model:
    """The graph of `module(*rows, task, *bank)`, constants folded, nothing else rewritten.

    Args:
        module: In eval mode.
        inputs: Examples; the batch axis, and the task axis of bank inputs, stay free.
        rename: New names for parameters and buffers, by their path in the module.

    Raises:
        BuildFailed: torch cannot export the module.
    """
    batch = torch.export.Dim(BATCH, min=1, max=1 << 20)
    args: list[Tensor] = list(inputs.named.values())
    names = list(inputs.named)
    shapes: list[object] = [{0: batch} for _ in args]
    if inputs.bank:
        rows = torch.export.Dim(TASKS, min=1, max=1 << 20)
        # Copies: of a tensor that is also a buffer of the module, the exporter takes the buffer's size.
        args.extend(tensor.clone() for tensor in inputs.bank.values())
        names.extend(inputs.bank)
        shapes.extend({0: rows} for _ in inputs.bank)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                tuple(args),
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=[LOGITS],
                dynamic_shapes=_per_parameter(module, shapes),
                optimize=False,
                verbose=False,
            )
    except Exception as cause:  # torch.export raises many kinds
        raise BuildFailed(
            "torch cannot export the model to ONNX",
            where=type(module).__name__,
            found=str(cause).strip().splitlines()[0] if str(cause).strip() else repr(cause),
        ) from cause
    if program is None:
        raise BuildFailed("torch exported nothing", where=type(module).__name__)
    model = program.model
    for old, new in (rename or {}).items():
        if (value := model.graph.initializers.get(old)) is not None:
            value.name = new
    clean(model)
    return model


def _per_parameter(module: nn.Module, shapes: Sequence[object]) -> tuple[object, ...]:
    """Shapes in the form of the parameters of `forward`: what `*args` takes is a tuple of its own."""
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(shapes)
    first = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*shapes[:first], tuple(shapes[first:]))


def clean(model: ir.Model) -> ir.Model:
    """Fold what is constant, drop what is unused, lift constants, name every node."""
    with _quiet():
        optimizer.fold_constants(model, input_size_limit=UNLIMITED, output_size_limit=UNLIMITED)
    for step in (
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
    ):
        step(model)
    return model


def merge_equal(model: ir.Model) -> ir.Model:
    """What is computed several times, once: equal constants become one, and then equal nodes.

    Not for an engine whose bank is told by the names of its tensors: two tasks may hold equal ones.
    """
    for step in (
        common.DeduplicateInitializersPass(size_limit=UNLIMITED),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    ):
        step(model)
    return model


def serialise(model: ir.Model, metadata: Mapping[str, str]) -> bytes:
    """The model as one ONNX file without external data.

    Raises:
        BuildFailed: The model is over protobuf's limit of 2 GiB.
    """
    proto = ir.to_proto(signed(model, metadata))
    require_fits(proto.ByteSize())
    return proto.SerializeToString()


def signed(model: ir.Model, metadata: Mapping[str, str]) -> ir.Model:
    """The model without what the exporter noted in it, and with this metadata."""
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    model.producer_name = "utune-deploy"
    model.producer_version = None  # torch's own; the manifest has all versions
    return model


def require_fits(size: int) -> None:
    """Hold a file's bytes to what protobuf reads.

    Raises:
        BuildFailed: They are over 2 GiB.
    """
    if size > LARGEST:
        raise BuildFailed(
            "the engine is too large for one ONNX file",
            wanted=f"at most {LARGEST} bytes",
            found=f"{size} bytes",
            do="with --bank inputs the tasks' tensors are a file of their own, of any size",
        )


def specs(values: Sequence[ir.Value]) -> tuple[Spec, ...]:
    """Name, dtype and shape of graph inputs or outputs."""
    return tuple(
        Spec(
            value.name or "",
            value.dtype.numpy().name if value.dtype is not None else "float32",
            tuple(d if isinstance(d, int) else str(d.value) for d in value.shape or ()),
        )
        for value in values
    )


@contextlib.contextmanager
def _quiet():
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
