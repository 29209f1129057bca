"""Where a task's requests go: to few replicas, always the same, more of them while the task is hot.

Every task ranks the replicas by a hash of both names, its own way, and the first of them are its homes (rendezvous
hashing, Thaler and Ravishankar 1998: https://doi.org/10.1109/90.663936). A replica that comes takes only the tasks
that now rank it first, one that goes leaves only its own to others, and whoever knows the same names ranks alike:
several fronts agree without a word. A ring would do the same less evenly; it saves looking at every
replica, of which there are tens here, not millions.

How many homes a task has follows its load: rows under way, averaged over a window. That is its rate times its
time (Little), so slow requests count for more than quick ones.

Names alone share out unevenly, eight tasks over two replicas as six and two now and then. So no replica is given
more than `BALANCE` times its share of the rows that are under way; what is too much for a home goes to
the next replica in the task's order, always the same one (consistent hashing with bounded loads, Mirrokni, Thorup
and Zadimoghaddam 2018: https://arxiv.org/abs/1608.01350).
"""

from __future__ import annotations

import hashlib
import math
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WINDOW_SECONDS = 10.0
BALANCE = 1.25
FORGOTTEN = 1e-3  # rows under way on average, below which a task is not remembered
MOST_RANKINGS = 1 << 14  # of tasks, kept until the replicas change


@dataclass
class _Load:
    rows: int = 0  # under way now
    mean: float = 0.0  # exponentially weighted over the window
    at: float = 0.0


class Load:
    """Rows under way by task, now and on average. Safe to call from several threads."""

    def __init__(
        self, window: float = WINDOW_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Over a window in seconds."""
        self._window = window
        self._clock = clock
        self._loads: dict[str, _Load] = {}
        self._lock = threading.Lock()

    def add(self, tasks: Sequence[str], sign: int) -> None:
        """Rows begin (1) or end (-1), one for each name."""
        now = self._clock()
        with self._lock:
            for name, rows in Counter(tasks).items():
                load = self._loads.setdefault(name, _Load(at=now))
                self._settle(load, now)
                load.rows = max(0, load.rows + sign * rows)

    def mean(self, task: str) -> float:
        """Rows of the task under way, on average over the window."""
        with self._lock:
            load = self._loads.get(task)
            if load is None:
                return 0.0
            self._settle(load, self._clock())
            if not load.rows and load.mean < FORGOTTEN:
                del self._loads[task]
            return load.mean

    def _settle(self, load: _Load, now: float) -> None:
        kept = math.exp((load.at - now) / self._window)
        load.mean = load.rows + (load.mean - load.rows) * kept
        load.at = now


class Placement:
    """Which replicas a request should go to, best first."""

    def __init__(
        self,
        *,
        by_task: bool = True,
        rows_per_home: float,
        load: Load | None = None,
        seed: int | None = None,
    ) -> None:
        """With no replicas yet.

        Args:
            by_task: Whether tasks have homes; otherwise every replica is as good.
            rows_per_home: Rows of a task under way, on average, that one home is enough for.
            load: Measures the tasks.
            seed: Of the choice between equals.
        """
        self.load = load or Load()
        self._by_task = by_task
        self._rows_per_home = rows_per_home
        self._random = random.Random(seed)
        self._replicas: tuple[str, ...] = ()
        self._rankings: dict[str, tuple[str, ...]] = {}
        self._under_way: Counter[str] = Counter()  # rows by replica

    def began(self, replica: str, tasks: Sequence[str]) -> None:
        """Rows of these tasks went to a replica."""
        self.load.add(tasks, 1)
        self._under_way[replica] += len(tasks) or 1

    def ended(self, replica: str, tasks: Sequence[str]) -> None:
        """They are answered, or lost."""
        self.load.add(tasks, -1)
        self._under_way[replica] -= len(tasks) or 1
        if self._under_way[replica] <= 0:
            del self._under_way[replica]

    def homes(self, task: str) -> tuple[str, ...]:
        """The replicas that should hold the task now; the first is its home when it is idle."""
        return self._ranking(task)[: self._count(task)]

    def ranks(self, tasks: Sequence[str], replicas: Sequence[str]) -> list[list[str]]:
        """The replicas in groups, best first; the least loaded of a group is to be taken.

        The first group holds at most two, drawn from those that are home to the most rows: choosing the less loaded of
        two random ones is nearly as good as of all, and does not send everybody to the same one (Mitzenmacher
        2001: https://doi.org/10.1109/71.963420).

        Args:
            tasks: Of each row; none for a request of all tasks.
            replicas: Those that there are.
        """
        known = tuple(sorted(replicas))
        if known != self._replicas:
            self._replicas, self._rankings = known, {}
        rows = len(tasks) or 1
        held: Counter[str] = Counter()
        far: Counter[str] = Counter()
        for name, count in Counter(tasks if self._by_task else ()).items():
            homes = self._count(name)
            for place, replica in enumerate(self._ranking(name)):
                if place < homes:
                    held[replica] += count
                else:
                    far[replica] += count * place
        under_way = sum(self._under_way[name] for name in known)
        most = math.ceil(BALANCE * (under_way + rows) / len(known))

        def cost(name: str) -> tuple[bool, int, int]:
            return self._under_way[name] + rows > most, -held[name], far[name]

        order = sorted(known, key=cost)
        best = [name for name in order if cost(name) == cost(order[0])]
        first = self._random.sample(best, 2) if len(best) > 2 else best
        return [first, *([name] for name in order if name not in first)]

    def _ranking(self, task: str) -> tuple[str, ...]:
        ranking = self._rankings.get(task)
        if ranking is None:
            if len(self._rankings) >= MOST_RANKINGS:
                self._rankings.clear()
            ranking = self._rankings[task] = rank(task, self._replicas)
        return ranking

    def _count(self, task: str) -> int:
        return 1 + int(self.load.mean(task) / self._rows_per_home)


def rank(task: str, replicas: Sequence[str]) -> tuple[str, ...]:
    """All replicas in the order in which the task prefers them."""
    return tuple(sorted(replicas, key=lambda name: _score(task, name), reverse=True))


def _score(task: str, replica: str) -> bytes:
    key = task.encode(errors="surrogatepass")
    # The replica's name as the key of the hash: no task and replica are ever another pair's text.
    name = hashlib.blake2b(replica.encode(), digest_size=32).digest()
    return hashlib.blake2b(key, key=name, digest_size=8).digest()
