"""What Ray Serve asks which replica a request goes to, in every process that has a handle."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import (  # pyright: ignore[reportMissingImports]  an extra
    RequestRouter,
)

from .messages import Ask
from .placement import Placement

PATH = f"{__name__}.TaskRouter"


class TaskRouter(RequestRouter):
    """Ray's own way of sending a request, along our order of the replicas."""

    def initialize_state(self, *, by_task: bool, rows_per_home: float) -> None:
        """See `RequestRouter`.

        Args:
            by_task: Whether a task has homes; where the engine holds all tasks as constants it needs none.
            rows_per_home: See `Placement`.
        """
        self._placement = Placement(rows_per_home=rows_per_home)
        self._by_task = by_task
        self._under_way: dict[str, tuple[str, ...]] = {}

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """See `RequestRouter`: groups of replicas, the least loaded of the first one is taken."""
        if pending_request is not None:
            # Else a cluster whose replicas are all full would be asked again without a pause.
            pending_request.routing_context.should_backoff = True
        by_name = {each.replica_id.unique_id: each for each in candidate_replicas}
        groups = self._placement.ranks(self._tasks(pending_request), list(by_name))
        return [[by_name[name] for name in group] for group in groups if group]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """See `RequestRouter`."""
        tasks = self._tasks(pending_request)
        if tasks:
            self._placement.load.add(tasks, 1)
            self._under_way[pending_request.metadata.internal_request_id] = tasks

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        """See `RequestRouter`."""
        tasks = self._under_way.pop(internal_request_id, None)
        if tasks:
            self._placement.load.add(tasks, -1)

    def _tasks(self, pending_request: Any) -> tuple[str, ...]:
        arguments = pending_request.args if pending_request is not None and self._by_task else ()
        asks = [each for each in arguments if isinstance(each, Ask)]
        return asks[0].tasks if asks else ()
