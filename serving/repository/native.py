"""The layout `native`: Triton's ONNX Runtime backend runs the engine, and no code of ours is there.

    NAME/
      config.pbtxt
      labels.txt         class names of the logits, when the bundle has one task
      1/model.onnx       the engine between task names and answers, see `export/served`

A request cannot be refused there once it is in a batch. So the model has one output more than that of
the layout `hot`: `valid` BOOL [-1, 1], false for a row with an unknown task, a number that is not finite
or an id out of range; its logits and score are NaN and its label is empty. And `task` must always be given.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...export.engine import TASK, VALID
from ...merge.errors import UsageError
from .config import as_parameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...export.bundle import Bundle
    from ...export.engine import Device, Tensor
    from ..registry import Registry
    from .options import ModelOptions

MODEL = "model.onnx"


class Graphs(Protocol):
    """What makes the graphs: the package `export.served`. Handed in, because serving never imports onnx."""

    def serve_graph(self, bundle: Bundle, all_tasks: bool = ..., /) -> bytes:
        """The graph of a bundle's model."""
        ...

    def task_names(self, tasks: Sequence[str], rows: Tensor, /) -> bytes:
        """The graph of the aliases' first step."""
        ...

    def picture_graph(self, bundle: Bundle, /) -> bytes:
        """The graph from pixels to the engine's tensor."""
        ...


class Native:
    """See the module."""

    backend = "onnxruntime"

    def __init__(self, graphs: Graphs) -> None:
        self.graphs = graphs

    def finish(
        self, fields: dict[str, Any], registry: Registry, options: ModelOptions, device: Device
    ) -> None:
        """Add what the ONNX Runtime backend needs to a model's configuration."""
        options.require_no_service()
        self.run_graph(fields)
        for tensor in fields["input"]:
            if tensor["name"] == TASK:
                tensor.pop("optional", None)
        fields["output"].append({"name": VALID, "data_type": "TYPE_BOOL", "dims": [1]})
        if device.prepared is not None:
            raise UsageError(
                "Triton's own ONNX Runtime keeps no prepared engines",
                found="layout native",
                do="leave --prepared out, or use the layout `hot`",
            )
        if device.threads:
            fields["parameters"] |= as_parameters({"intra_op_thread_count": str(device.threads)})
        if not device.arena:
            fields["parameters"] |= as_parameters(
                {"enable_mem_arena": "0", "enable_mem_pattern": "0"}
            )
        if device.provider != "cpu":
            bundle = registry.bundle
            engine = bundle.require_fan_out() if registry.all_tasks else bundle.engine
            # the provider's own default is to round
            parameters = {"use_tf32": str(int(engine.precision == "tf32"))}
            if device.memory_mb:
                parameters["gpu_mem_limit"] = str(device.memory_mb << 20)
                parameters["arena_extend_strategy"] = "kSameAsRequested"
            fields["optimization"] = {
                "execution_accelerators": {
                    "gpu_execution_accelerator": [{"name": "cuda", "parameters": parameters}]
                }
            }
        if device.kernels is not None:
            fields["model_operations"] = {
                "op_library_filename": [str(Path(device.kernels).absolute())]
            }

    def fill(
        self, version: Path, bundle: Bundle, all_tasks: bool, *, in_place: bool = False
    ) -> None:
        """Write the folder of a version; the graph is written whatever `in_place` says.

        Raises:
            UsageError: The bundle's engine is no ONNX graph.
            BuildFailed: The graph is too large for one file.
        """
        del in_place
        self.write_graph(version, self.graphs.serve_graph(bundle, all_tasks))

    def finish_names(self, fields: dict[str, Any]) -> None:
        """Add to the configuration of the aliases' first step."""
        self.run_graph(fields)

    def fill_names(self, version: Path, tasks: tuple[str, ...], rows: Tensor) -> None:
        """Write the folder of a version of the aliases' first step."""
        self.write_graph(version, self.graphs.task_names(tasks, rows))

    def write_graph(self, version: Path, graph: bytes) -> None:
        """Put a graph into the folder of a version."""
        (version / MODEL).write_bytes(graph)

    def run_graph(self, fields: dict[str, Any]) -> None:
        """Let the ONNX Runtime backend run the model's graph."""
        fields["platform"] = "onnxruntime_onnx"
        fields["backend"] = self.backend
        fields["default_model_filename"] = MODEL
