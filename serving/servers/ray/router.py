"""What Ray Serve asks which replica a request goes to, in every process that has a handle."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import (  # pyright: ignore[reportMissingImports]  an extra
    RequestRouter,
)

from .messages import Ask
from .placement import Placement


class TaskRouter(RequestRouter):
    """Ray's own way of sending a request, along our order of the replicas."""

    def initialize_state(  # pyright: ignore[reportIncompatibleMethodOverride]  its settings are named
        self, *, by_task: bool, rows_per_home: float
    ) -> None:
        """See `RequestRouter`.

        Args:
            by_task: Whether a task has homes; where the engine holds all tasks as constants it needs none.
            rows_per_home: See `Placement`.
        """
        self._placement = Placement(by_task=by_task, rows_per_home=rows_per_home)
        self._under_way: dict[str, tuple[str, tuple[str, ...]]] = {}

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """See `RequestRouter`: the replicas in order, one in each rank."""
        by_name = {each.replica_id.unique_id: each for each in candidate_replicas}
        if not by_name or pending_request is None:
            return [list(by_name.values())]
        # Else a cluster whose replicas are all full would be asked again without a pause.
        pending_request.routing_context.should_backoff = True
        tasks = _tasks(pending_request)
        first, *others = self._placement.ranks(tasks, list(by_name))
        first = sorted(first, key=lambda name: self._queue(by_name[name]))
        # Counted here and not when it is sent: requests that come together would all see the same replica idle.
        self._begin(pending_request, first[0], tasks)
        return [*([by_name[name]] for name in first), *([by_name[n] for n in g] for g in others)]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """See `RequestRouter`: it may have gone to a later rank."""
        began = self._under_way.get(pending_request.metadata.internal_request_id)
        if began is not None and began[0] != replica_id.unique_id:
            self._begin(pending_request, replica_id.unique_id, began[1])

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        """See `RequestRouter`."""
        self._end(internal_request_id)

    def _begin(self, pending_request: Any, replica: str, tasks: tuple[str, ...]) -> None:
        identity = pending_request.metadata.internal_request_id
        self._end(identity)
        self._under_way[identity] = replica, tasks
        self._placement.began(replica, tasks)

        def unless_sent(future: Any) -> None:
            if future.cancelled():  # Ray completes only what it sent
                self._end(identity)

        pending_request.future.add_done_callback(unless_sent)

    def _end(self, identity: str) -> None:
        began = self._under_way.pop(identity, None)
        if began is not None:
            self._placement.ended(*began)

    def _queue(self, replica: Any) -> int:
        """Requests under way there as Ray saw them last, those of other fronts too."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def _tasks(pending_request: Any) -> tuple[str, ...]:
    """The task of each row of a request, if it is one."""
    given = pending_request.args
    return given[0].tasks if given and isinstance(given[0], Ask) else ()
