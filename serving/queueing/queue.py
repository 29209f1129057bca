"""Which waiting requests run next: strict priority levels, and inside a level a fair share per flow.

A *flow* is what shares are counted by: the set of tasks that a request names. A request of one task, by
far the most of them, is charged to that task. One that mixes tasks is a flow of its own, because it can
neither be split nor wait in two lines at once; its weight is the smallest of its tasks' weights, so that
naming another task beside one's own never buys a larger share.

Inside a level the flows take turns by deficit round robin (Shreedhar and Varghese, 1995). At its turn a
flow is given credit, its *quantum*, and sends requests from its front while the credit covers their rows.
The lightest task's quantum is one row: with few flows every batch holds rows of each, so the first
request of an idle task is in the next batch however long the others' lines are.

A batch ends where the next request in turn does not fit. That request keeps its place, is the first of
the next batch, and so waits for one batch at most; requests of other flows that do fit go ahead of it and
are charged for it. What they may owe is bounded: room that nobody else could have used is free.

Times are integers of the caller's clock. Not safe to call from several threads.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Generic, TypeVar

from ...merge.errors import UsageError
from ..rejections import Overloaded

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

Item = TypeVar("Item")

PRIORITY_LEVELS = 3
DEFAULT_PRIORITY = 2
"""One level above the default for what is urgent, one below it for what has time."""

LOOKAHEAD = 64
"""Flows that are looked at to fill the room in front of a request that does not fit."""

_SLACK = 64  # deadlines of requests that are gone, kept before they are swept out


@dataclass(frozen=True, eq=False)
class Ticket(Generic[Item]):
    """A waiting request.

    Attributes:
        item: What waits.
        rows: What it costs.
        tasks: The task of each of its answers.
        arrived: When it came.
        number: Its place in the order of arrival.
        level: Where its flow stands.
        flow: The line that it stands in.
    """

    item: Item
    rows: int
    tasks: Sequence[str]
    arrived: int
    number: int
    level: _Level[Item]
    flow: _Flow[Item]


class FairQueue(Generic[Item]):
    """Waiting requests. Putting, taking out and removing cost O(1) per row, a deadline O(log n)."""

    def __init__(
        self,
        *,
        max_rows: int | None = None,
        max_task_rows: int | None = None,
        weights: Mapping[str, float] | None = None,
        priority_levels: int = PRIORITY_LEVELS,
        default_priority: int = DEFAULT_PRIORITY,
    ) -> None:
        """Set limits and shares.

        Args:
            max_rows: Rows that may wait in all; None for no limit.
            max_task_rows: Rows of one task that may wait; None for no limit.
            weights: Share of a task relative to others; 1 where it is not named.
            priority_levels: Levels 1, the first to be served, to this one.
            default_priority: The level of a request that names none or one that is not there, as in Triton.

        Raises:
            UsageError: A weight is not a positive number, or the default is no level.
        """
        self._weights = dict(weights or {})
        for task, weight in self._weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise UsageError(
                    "a weight is not a positive number",
                    where=f"task {task}",
                    wanted="a share relative to the other tasks' 1",
                    found=weight,
                )
        if not 1 <= default_priority <= priority_levels:
            raise UsageError(
                "the default priority is none of the levels",
                wanted=f"1 to {priority_levels}",
                found=default_priority,
            )
        self._lightest = min([1.0, *self._weights.values()])
        self._max_rows = max_rows
        self._max_task_rows = max_task_rows
        self._levels: list[_Level[Item]] = [_Level() for _ in range(priority_levels)]
        self._default = default_priority
        self._rows = 0
        self._rows_by_task: Counter[str] = Counter()
        self._numbers = count()
        self._waiting: OrderedDict[int, Ticket[Item]] = OrderedDict()
        # Numbers instead of tickets: a deadline outlives its request, and must not keep its arrays alive.
        self._deadlines: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def rows(self) -> int:
        """Rows that wait."""
        return self._rows

    @property
    def oldest(self) -> int | None:
        """When the oldest waiting request came; None when nothing waits."""
        return next(iter(self._waiting.values())).arrived if self._waiting else None

    @property
    def next_deadline(self) -> int | None:
        """When the next request expires; None when none can."""
        while self._deadlines and self._deadlines[0][1] not in self._waiting:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def put(
        self,
        item: Item,
        *,
        rows: int,
        tasks: Sequence[str],
        now: int,
        priority: int = 0,
        deadline: int | None = None,
    ) -> Ticket[Item]:
        """Let a request wait.

        Args:
            item: What waits.
            rows: What it costs, at least 1.
            tasks: The task of each of its answers; none of a request of the server's own, which is always
                admitted and stands in a line of its own.
            now: The time.
            priority: Its level, 1 first; 0 for the default.
            deadline: When it gives up; None for never.

        Raises:
            Overloaded: Too many rows wait, of all tasks or of one of its own.
        """
        if tasks:
            self._admit(rows, tasks)
        level = self._levels[
            (priority if 1 <= priority <= len(self._levels) else self._default) - 1
        ]
        number = next(self._numbers)
        ticket = Ticket(item, rows, tasks, now, number, level, self._flow(level, tasks))
        ticket.flow.line[number] = ticket
        self._waiting[number] = ticket
        self._rows += rows
        if self._max_task_rows is not None:
            self._rows_by_task.update(tasks)
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, number))
            if len(self._deadlines) > 2 * len(self._waiting) + _SLACK:
                self._deadlines = [entry for entry in self._deadlines if entry[1] in self._waiting]
                heapq.heapify(self._deadlines)
        return ticket

    def remove(self, ticket: Ticket[Item]) -> bool:
        """Take a request out of the middle; False when it waits no longer."""
        if self._waiting.pop(ticket.number, None) is None:
            return False
        flow = ticket.flow
        del flow.line[ticket.number]
        self._rows -= ticket.rows
        if self._max_task_rows is not None:
            self._rows_by_task.subtract(ticket.tasks)
            for task in set(ticket.tasks):
                if not self._rows_by_task[task]:
                    del self._rows_by_task[task]
        if not flow.line:  # an idle flow has neither credit nor debt, and costs nothing
            del ticket.level.ring[flow.key]
        return True

    def expire(self, now: int) -> list[Ticket[Item]]:
        """Take out the requests whose deadline has come, the earliest first."""
        expired = []
        while (deadline := self.next_deadline) is not None and deadline <= now:
            ticket = self._waiting[heapq.heappop(self._deadlines)[1]]
            self.remove(ticket)
            expired.append(ticket)
        return expired

    def take(self, max_rows: int) -> list[Ticket[Item]]:
        """The requests of the next engine batch, at most `max_rows` rows together.

        Empty only when nothing waits. No request may be larger than a batch.
        """
        batch: list[Ticket[Item]] = []
        room = max_rows
        for level in self._levels:
            room = self._take_turns(level, room, batch)
            room = self._fill(level, room, max_rows, batch)
        return batch

    def _take_turns(self, level: _Level[Item], room: int, batch: list[Ticket[Item]]) -> int:
        """Move requests in turn into the batch until one does not fit; the room that is left."""
        ring = level.ring
        in_vain = 0  # turns since a request was sent
        while room and ring:
            if in_vain == len(ring):
                level.skip_rounds()
                in_vain = 0
            flow = next(iter(ring.values()))
            if not flow.has_turn:
                flow.has_turn = True
                flow.credit += flow.quantum
            in_vain += 1
            while (head := flow.head) is not None and flow.credit >= head.rows:
                if head.rows > room:
                    return room  # the flow keeps its turn and its credit
                flow.credit -= head.rows
                room -= head.rows
                batch.append(head)
                self.remove(head)
                in_vain = 0
            if flow.line:
                flow.has_turn = False
                ring.move_to_end(flow.key)
        return room

    def _fill(
        self, level: _Level[Item], room: int, max_rows: int, batch: list[Ticket[Item]]
    ) -> int:
        """Fill the room before a request that does not fit with later flows' requests that do."""
        later = list(islice(level.ring.values(), 1, LOOKAHEAD)) if room else []
        # First those that can pay for it later; what they leave would be empty, and is given away.
        for floor in (-max_rows, -math.inf):
            for flow in later:
                while (head := flow.head) is not None and head.rows <= room:
                    if flow.credit - head.rows < floor:
                        break
                    flow.credit -= head.rows
                    room -= head.rows
                    batch.append(head)
                    self.remove(head)
        for flow in later:
            flow.credit = max(flow.credit, -max_rows)
        return room

    def _admit(self, rows: int, tasks: Sequence[str]) -> None:
        if self._max_rows is not None and self._rows + rows > self._max_rows:
            raise Overloaded(
                "the queue is full",
                wanted=f"at most {self._max_rows} rows waiting",
                found=f"{self._rows}, and {rows} more",
                do="try again later",
            )
        if self._max_task_rows is None:
            return
        for task, more in Counter(tasks).items():
            if self._rows_by_task[task] + more > self._max_task_rows:
                raise Overloaded(
                    "the task's part of the queue is full",
                    where=f"task {task}",
                    wanted=f"at most {self._max_task_rows} of its rows waiting",
                    found=f"{self._rows_by_task[task]}, and {more} more",
                    do="try again later",
                )

    def _flow(self, level: _Level[Item], tasks: Sequence[str]) -> _Flow[Item]:
        names = frozenset(tasks)
        flow = level.ring.get(names)
        if flow is None:
            weight = min((self._weights.get(name, 1.0) for name in names), default=1.0)
            flow = level.ring[names] = _Flow(names, weight / self._lightest)
        return flow


class _Flow(Generic[Item]):
    """The line of one set of tasks; `credit` in rows."""

    __slots__ = ("credit", "has_turn", "key", "line", "quantum")

    def __init__(self, key: Hashable, quantum: float) -> None:
        self.key = key
        self.quantum = quantum
        self.credit = 0.0
        self.has_turn = False
        self.line: OrderedDict[int, Ticket[Item]] = OrderedDict()

    @property
    def head(self) -> Ticket[Item] | None:
        return next(iter(self.line.values())) if self.line else None


class _Level(Generic[Item]):
    """The flows of one priority that wait, in the order of their turns."""

    __slots__ = ("ring",)

    def __init__(self) -> None:
        self.ring: OrderedDict[Hashable, _Flow[Item]] = OrderedDict()

    def skip_rounds(self) -> None:
        """Give every flow at once what it gets in the rounds to come in which none can send."""
        short = [
            (next(iter(flow.line.values())).rows - flow.credit) / flow.quantum
            for flow in self.ring.values()
        ]
        rounds = math.ceil(min(short)) - 1
        if rounds > 0:
            for flow in self.ring.values():
                flow.credit += rounds * flow.quantum
