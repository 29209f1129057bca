"""A light caller beside a hot task: its latency alone, in a first-come queue, and in the fair queue.

    python bench/fairness.py

The engine is a stand-in that sleeps 3 ms per call of at most 8 rows, so what differs is who waits for whom.
48 callers of one task and one caller of another each send their next request when the last is answered. The
first-come queue is the same one with every request in one flow. Times in milliseconds, of the light caller.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from rich.console import Console
from rich.table import Table

from utune_deploy.serving.answers import Answers
from utune_deploy.serving.queueing.batcher import Batcher
from utune_deploy.serving.watching.counters import Counters

ENGINE_SECONDS = 0.003
MAX_BATCH = 8


@dataclass(frozen=True)
class Row:
    """A request of one row; `tasks` is what its flow is told by."""

    tasks: tuple[str, ...]

    def __len__(self) -> int:
        return 1


class Stub:
    """What a batcher needs of a service, with an engine that sleeps."""

    registry = SimpleNamespace(max_batch=MAX_BATCH)

    def __init__(self) -> None:
        self.counters = Counters(())

    def run(self, requests: list[Row]) -> list[Answers]:
        """Sleep, and answer nothing."""
        time.sleep(ENGINE_SECONDS)
        nothing = np.empty((1, 0), np.float32)
        return [Answers(nothing, (), nothing[0], request.tasks, 0) for request in requests]


async def light_latencies(seconds: float, heavy: int, *, fair: bool) -> tuple[np.ndarray, float]:
    """The light caller's latencies in milliseconds, and rows per second in all."""
    service = Stub()
    names = ("hot", "light") if fair else ("all", "all")
    stop = time.perf_counter() + seconds
    latencies = []

    async def call(name: str, times: list[float]) -> None:
        while (start := time.perf_counter()) < stop:
            await batcher.submit(Row((name,)))
            times.append((time.perf_counter() - start) * 1e3)

    async with Batcher(service) as batcher:
        await asyncio.gather(*(call(names[0], []) for _ in range(heavy)), call(names[1], latencies))
    return np.array(latencies), service.counters.read().rows / seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10, help="per line of the table")
    parser.add_argument("--heavy", type=int, default=48, help="callers of the hot task")
    asked = parser.parse_args()
    table = Table("light caller", "requests", "p50", "p99", "max", "rows/s in all")
    for title, heavy, fair in (
        ("alone", 0, True),
        ("first come", asked.heavy, False),
        ("fair queue", asked.heavy, True),
    ):
        times, rate = asyncio.run(light_latencies(asked.seconds, heavy, fair=fair))
        p50, p99 = np.percentile(times, [50, 99])
        numbers = f"{p50:.1f}", f"{p99:.1f}", f"{times.max():.1f}", f"{rate:.0f}"
        table.add_row(title, str(len(times)), *numbers)
    Console().print(table)


if __name__ == "__main__":
    main()
