"""A batch of one size that stays on the device; with CUDA graphs, launched as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ....merge.errors import UsageError
from .cuda import Graph

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from .cuda import Array
    from .lane import Lane


class TensorRTBound:
    """See `engine.Bound`.

    Args:
        lane: A context of its own.
        feeds: The rows.
        bank: The tasks' tensors, where they are inputs.
        cuda_graph: Record the kernels at the first run and replay them.
    """

    def __init__(
        self,
        lane: Lane,
        feeds: Mapping[str, NDArray[Any]],
        bank: Mapping[str, Array],
        *,
        cuda_graph: bool,
    ) -> None:
        self._lane, self._bank, self._cuda_graph = lane, bank, cuda_graph
        self._types = {name: (array.dtype, array.shape) for name, array in feeds.items()}
        self._graph: Graph | None = None
        self._recorded = -1  # refits of the engine when the graph was recorded
        with lane.lock:
            lane.take(feeds, bank)

    def feed(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        """See `engine.Bound`."""
        for name, array in inputs.items():
            if (array.dtype, array.shape) != self._types.get(name):
                raise UsageError(
                    "an input is not of the type and shape that were bound",
                    where=name,
                    wanted=self._types.get(name, f"one of {', '.join(self._types)}"),
                    found=(array.dtype, array.shape),
                )
        with self._lane.lock:
            for name, array in inputs.items():
                self._lane.stream.to_device(self._lane.memory[name], array)

    def run(self) -> None:
        """See `engine.Bound`."""
        lane = self._lane
        with lane.lock:
            lane.require_sound()
            if not self._cuda_graph:
                lane.enqueue()
            else:
                if self._graph is None or self._recorded != lane.opened.refits:
                    lane.enqueue()  # TensorRT does its last preparations in the first run of a shape
                    lane.stream.wait()
                    self._graph = Graph(lane.stream, lane.enqueue)
                    self._recorded = lane.opened.refits
                self._graph.launch()
            lane.stream.wait()

    def fetch(self) -> NDArray[np.float32]:
        """See `engine.Bound`."""
        with self._lane.lock:
            return self._lane.fetch()
